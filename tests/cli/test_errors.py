"""A user's mistake on the command line: one sentence on stderr, exit code 2, no traceback, nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kv_gym import cli
from kv_gym.errors import UserError


def run(*arguments: str) -> tuple[int, str]:
    """Run the command line in this process: its exit code and what it printed on stderr."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if isinstance(result.exception, UserError):  # main() prints it, as the test below shows
        return 2, f"kv-gym: {result.exception}\n"
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


def test_the_process_itself_exits_with_2_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "kv_gym", "trace", "info", tmp_path / "none"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("kv-gym: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(13, "Permission denied", "a.json"), "cannot use a.json: Permission denied"),
        (OSError("unable to lock file"), "unable to lock file"),
    ],
)
def test_errors_of_the_operating_system_are_one_line(monkeypatch, capsys, error, sentence):
    def refused():
        raise error

    monkeypatch.setattr(cli, "app", refused)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("warnings.formatwarning", None)  # main() sets its own
        cli.main()
    assert stop.value.code == 2 and capsys.readouterr().err == f"kv-gym: {sentence}\n"


@pytest.fixture
def sample():
    from kv_gym.files import bundled

    return bundled("traces")


@pytest.fixture
def tiny_model(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


BUDGETS = {"0": "not above zero", "-0.5": "not above zero", "1.5": "share above 1", "many": "no number"}


@pytest.mark.parametrize("budget", BUDGETS)
def test_unusable_budgets(sample, budget):
    code, message = run("evaluate", "--traces", sample, "--policies", "keydiff", f"--budgets={budget}")
    assert code == 2 and BUDGETS[budget] in message


def test_an_unknown_policy_gets_a_suggestion(sample):
    code, message = run("evaluate", "--traces", sample, "--policies", "keydif")
    assert code == 2 and "did you mean 'keydiff'?" in message


def test_an_oracle_without_a_future(tiny_model, tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"context_ids": [1, 2], "question_ids": [3], "answer_ids": [4]}')
    code, message = run("evaluate", "--model", tiny_model, "--tasks", tmp_path / "tasks.jsonl", "--policies", "oracle")
    assert code == 2 and "oracle" in message and "traces" in message


def test_a_policy_of_another_model(tiny_model, tmp_path):
    from kv_gym.models.fingerprint import Fingerprint
    from kv_gym.policies.scorer import GroupedScorer, Scorer

    other = Fingerprint("llama", "a" * 64, "{}", layers=(0,), query_heads=2, kv_heads=2, head_dim=4)
    Scorer(GroupedScorer(2, 4, 8), other, (8, 8)).save_pretrained(tmp_path / "policy")
    (tmp_path / "tasks.jsonl").write_text('{"context_ids": [1, 2], "question_ids": [3], "answer_ids": [4]}')
    code, message = run(
        "evaluate", "--model", tiny_model, "--tasks", tmp_path / "tasks.jsonl", "--policies", tmp_path / "policy"
    )
    assert code == 2 and "kv_heads 2" in message and "has 1" in message


@pytest.mark.parametrize(
    "line", ["", '{"context": "", "continuations": ["a"]}', '{"context_ids": [], "continuation_ids": [[1]]}', "{"]
)
def test_unusable_prompts_leave_nothing_behind(tiny_model, tmp_path, line):
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    code, message = run(
        "record", "--model", tiny_model, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out"
    )
    assert code == 2 and message.startswith("kv-gym: ") and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_record_wants_one_source(tiny_model, tmp_path):
    code, message = run("record", "--model", tiny_model, "--out", tmp_path / "out")
    assert code == 2 and "exactly one of" in message and not (tmp_path / "out").exists()


def test_a_model_that_is_not_there(tmp_path):
    code, message = run("record", "--model", tmp_path / "none", "--tasks", "reference", "--out", tmp_path / "out")
    assert code == 2 and message.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_unknown_agent_and_a_foreign_folder(sample, tmp_path):
    code, message = run("train", "jiont", "--traces", sample, "--out", tmp_path / "out")
    assert code == 2 and "joint" in message and not (tmp_path / "out").exists()
    (tmp_path / "mine.txt").write_text("mine")
    code, message = run("train", "joint", "--traces", sample, "--out", tmp_path)
    assert code == 2 and "name a new folder" in message
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("kv_gym.traces.info", interrupted, raising=False)
    monkeypatch.setattr(sys, "argv", ["kv-gym", "trace", "info", "x"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130 and capsys.readouterr().err == "kv-gym: interrupted; the same command begins anew\n"
    monkeypatch.setattr("kv_gym.training.train", interrupted)
    monkeypatch.setattr(sys, "argv", ["kv-gym", "train", "joint", "--traces", "x", "--out", "none"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130 and "run the same command again to go on" in capsys.readouterr().err


def test_a_split_that_the_traces_lack(sample):
    code, message = run("evaluate", "--traces", sample, "--policies", "keydiff", "--split", "val")
    assert code == 2 and "no context in split 'val' (splits there: 'test', 'train')" in message


def test_traces_and_a_model_at_once(sample):
    both = ("evaluate", "--traces", sample, "--model", "reference", "--policies", "keydiff")
    for arguments in (both, (*both, "--tasks", "multi_key:64"), ("evaluate", "--policies", "keydiff")):
        code, message = run(*arguments)
        assert code == 2 and "either on --traces or on a --model with --tasks" in message


def test_a_recording_of_no_context(tmp_path):
    code, message = run(
        "record", "--model", "reference", "--tasks", "reference", "--count", 0, "--out", tmp_path / "out"
    )
    assert code == 2 and "'--count'" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.pdf", "a.md", "a.htm"])
def test_a_report_of_another_kind(sample, tmp_path, name):
    rows = tmp_path / "rows.json"
    run("evaluate", "--traces", sample, "--policies", "keydiff", "--json", rows, "--no-progress")
    code, message = run("report", rows, "--out", tmp_path / name)
    assert code == 2 and "name one that ends in .html, or a folder" in message and not (tmp_path / name).exists()


def test_text_in_words_that_the_model_does_not_know(tmp_path):
    (tmp_path / "text.txt").write_text("Ceci n'est pas une pipe " * 200)
    code, message = run("record", "--model", "reference", "--text", tmp_path / "text.txt", "--out", tmp_path / "out")
    assert code == 2 and "unknown to the model's tokenizer" in message and not (tmp_path / "out").exists()


def test_a_result_that_cannot_be_written_is_refused_before_the_work(sample, tmp_path):
    code, message = run("evaluate", "--traces", sample, "--policies", "keydiff", "--json", tmp_path)
    assert code == 2 and "is a folder" in message


def test_a_failed_evaluation_leaves_the_earlier_result(sample, tmp_path):
    file = tmp_path / "result.json"
    assert run("evaluate", "--traces", sample, "--policies", "keydiff", "--json", file, "--no-progress")[0] == 0
    before = file.read_text()
    assert json.loads(before)["rows"]
    assert run("evaluate", "--traces", sample, "--policies", "keydiff,nothing", "--json", file)[0] == 2
    assert file.read_text() == before and [f.name for f in tmp_path.iterdir()] == ["result.json"]


DAMAGE = {
    "missing": lambda file: file.unlink(),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "foreign": lambda file: file.write_bytes(b"no HDF5 at all"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_traces(sample, tmp_path, name):
    import shutil

    shutil.copytree(sample, tmp_path / "traces")
    for file in Path(tmp_path / "traces").glob("*.h5"):
        DAMAGE[name](file)
    for verb in (
        ["trace", "validate", tmp_path / "traces"],
        ["evaluate", "--traces", tmp_path / "traces", "--policies", "keydiff"],
    ):
        code, message = run(*verb)
        assert code == 2 and message.startswith("kv-gym: ") and message.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("steps", "expected NAME=VALUE"),
        ("contexts=[", "expected a value as in agents/*.yml"),
        ("seed=3", "unknown key 'seed'"),
        ("loss=square", "loss is 'square'; expected 'softmax', 'poisson' or 'listwise'"),
        ("contexts=two", "contexts is 'two'"),
    ],
)
def test_unusable_settings(sample, tmp_path, given, expected):
    code, message = run("train", "joint", "--traces", sample, "--out", tmp_path / "out", "--set", given)
    assert code == 2 and expected in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_threads_of_the_cpu(tmp_path):
    code = "import os, sys; sys.argv = ['kv-gym', '--threads', '1', 'policies']; from kv_gym.cli import app\n"
    code += "app(standalone_mode=False)\nimport torch; assert torch.get_num_threads() == 1\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert run("--threads", "0", "policies")[0] == 2
