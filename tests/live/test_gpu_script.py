"""The script for a borrowed GPU, rehearsed on the CPU with tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.py"


@pytest.mark.slow
def test_every_part_of_the_gpu_script_runs(tmp_path):
    pytest.importorskip("triton", reason="the kernel needs Triton: pip install 'kv-gym[gpu]'")
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--minutes", "10", "--out", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    parts = {name: part for name, part in results.items() if isinstance(part, dict) and name != "versions"}
    assert len(parts) == 17
    failed = {name: part for name, part in parts.items() if "error" in part or part.get("passed") is False}
    assert failed == {}
