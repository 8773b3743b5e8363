"""The examples that use the environment run from end to end and stay short."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from traced_models import some_prompt, tiny_model

from kv_gym.traces import record

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    for name, seed, contexts in (("train", 0, 3), ("test", 7, 2)):
        prompts = [some_prompt(name=f"{name}{i}", seed=seed + i, context=24 + i) for i in range(contexts)]
        record(tiny_model(), prompts, folder / name, progress=False)
    return folder


def run(example, *arguments):
    argv = sys.argv
    sys.argv = [example, *map(str, arguments)]
    try:
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    finally:
        sys.argv = argv


def test_train_ppo(traces, tmp_path, capsys):
    run(
        "train_ppo.py", "--traces", traces / "train", "--eval-traces", traces / "test", "--out", tmp_path,
        "--steps", 512, "--num-envs", 4,
    )  # fmt: skip
    trained, untrained = re.findall(r": (0\.\d{3})$", capsys.readouterr().out, re.MULTILINE)
    assert 0 < float(untrained) <= 1 and 0 < float(trained) <= 1
    assert (tmp_path / "agent.zip").is_file() and list(tmp_path.glob("PPO_1/events.out.tfevents.*"))


def test_custom_agent(traces, capsys):
    run("custom_agent.py", "--traces", traces / "train", "--steps", 201)
    output = capsys.readouterr().out
    first, *_, last = (float(number) for number in re.findall(r"training reward (0\.\d{3})", output))
    assert 0 < first < last < 1  # it learns
    assert re.search(r"held out, learned: 0\.\d{3}", output) and "held out, smallest keys" in output


def test_single_file_ppo(traces, capsys):
    run("single_file_ppo.py", "--traces", traces / "train", "--updates", 15)
    first, last = map(float, re.search(r"reward (0\.\d{3}) to (0\.\d{3})", capsys.readouterr().out).groups())
    assert first < last  # it learns


@pytest.mark.parametrize("example", ["train_ppo.py", "custom_agent.py", "single_file_ppo.py"])
def test_examples_are_short(example):
    assert len((EXAMPLES / example).read_text().splitlines()) <= 60
