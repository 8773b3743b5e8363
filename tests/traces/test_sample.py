"""The recipe of the bundled sample makes what the README says, from any model of the reference's shape."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from kv_gym import list_policies, make_policy
from kv_gym.reference.tokenizer import build_tokenizer
from kv_gym.reference.train import reference_config
from kv_gym.traces import open_traces

RECIPE = Path(__file__).parents[2] / "traces" / "recipes" / "sample.py"


def test_the_bundled_sample_is_what_the_recipe_says():
    full = open_traces()[0]
    remembering = {make_policy(name).statistics for name in list_policies() if name != "scorer"} - {""}
    assert set(full.stats) == remembering, "a policy with memory came: run the recipe again"


@pytest.mark.slow
def test_sample_is_small_and_has_one_full_sequence(tmp_path):
    LlamaForCausalLM(reference_config()).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    command = [sys.executable, str(RECIPE), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "sample")]
    subprocess.run(command, check=True, capture_output=True)
    traces = open_traces(tmp_path / "sample")
    assert sum(path.stat().st_size for path in (tmp_path / "sample").iterdir()) < 2_200_000
    full, *light = traces.load()
    assert len(full.tokens) == 257, "256 words and the beginning token"
    assert full.queries.shape[2] == 32
    assert set(full.stats) == set(open_traces()[0].stats)
    assert full.stats["h2o"]["mass"].shape == full.keys.shape[:3]
    assert len(full.continuations) == 8
    assert len(light) == 3
    assert all(not s.stats and not s.queries.size and s.continuations for s in light)
    assert {s.split for s in traces} == {"train", "test"}
    assert str(tmp_path) not in (tmp_path / "sample" / "manifest.json").read_text()
