"""A short run of `benchmarks/hardening.py`: damaged files and disturbed commands end as they should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "hardening.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads memory and CPU time from /proc")
def test_no_damage_ends_in_anything_but_one_sentence(tmp_path):
    command = [sys.executable, SCRIPT, "--minutes", "0.6", "--seed", "1", "--json", tmp_path / "counts.json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["mutations"]["all"]["mutations"] > 0 and counts["runs"]["all"]["other disturbances"] > 0
