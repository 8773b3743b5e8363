"""Several trace sets of one model are one set: for reading, replay and training."""

import gymnasium
import pytest
from traced_models import PROMPTS, same, some_prompt, tiny_model
from typer.testing import CliRunner

from kv_gym import cli
from kv_gym.errors import UserError
from kv_gym.evaluation import evaluate
from kv_gym.traces import Prompt, open_traces, record, validate


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Three prompts, then one of them again, another of the same id, and a new one."""
    folder = tmp_path_factory.mktemp("sets")
    others = [PROMPTS[2], some_prompt((5, 18), "p1", seed=9, context=24), PROMPTS[3]]
    for name, prompts, recipe in (("a", PROMPTS[:3], {"from": "a"}), ("b", others, {"from": "b"})):
        record(tiny_model(), prompts, folder / name, window=4, progress=False, recipe=recipe)
    return folder


def test_sets_in_a_list_and_in_a_folder_are_one(sets):
    first, second = open_traces(sets / "a"), open_traces(sets / "b")
    joined = open_traces([sets / "a", second])
    assert joined.ids == ["p0", "p1", "p2", "p1.2", "p3"]
    assert joined["p1.2"].id == "p1.2" and (joined["p1.2"].tokens == second["p1"].tokens).all()
    assert same(joined["p1"], first["p1"]) and same(joined.cached(10**9)[4], second["p3"])
    assert joined.manifest["recipe"] == {"sets": [{"from": "a"}, {"from": "b"}]}
    assert open_traces(sets).hash == joined.hash != open_traces([sets / "b", sets / "a"]).hash
    assert open_traces([sets / "a"]).hash == first.hash
    assert validate(sets)["sequences"] == 5
    assert len(joined.select(split="train")) == 5


def test_joined_sets_are_replayed(sets, tmp_path):
    rows = evaluate(["knorm"], [0.5], traces=[sets / "a", sets / "b"], split="all", progress=False)["rows"]
    assert rows[0]["n"] == 5 and set(rows[0]["contexts"]) == {"p0", "p1", "p2", "p1.2", "p3"}
    for traces in (sets, [str(sets / "a"), str(sets / "b")]):
        assert gymnasium.make("KVEvict-v0", traces=traces).reset(seed=0)[0]["mask"].any()
    given = ["evaluate", "--traces", f"{sets}/a,{sets}/b", "--split", "all", "--policies", "knorm", "--no-progress"]
    done = CliRunner().invoke(cli.app, given)
    assert done.exit_code == 0 and "knorm" in done.output


def test_sets_that_do_not_belong_together_are_refused(sets, tmp_path):
    record(tiny_model(seed=1), PROMPTS[:1], tmp_path / "other", window=4, progress=False)
    with pytest.raises(UserError, match="weights hash"):
        open_traces([sets / "a", tmp_path / "other"])
    book = [Prompt("x", [1, 2, 3], [[4]], split=split, text_hash="book") for split in ("train", "test")]
    for prompt in book:
        record(tiny_model(), [prompt], tmp_path / prompt.split, progress=False)
    with pytest.raises(UserError, match="in train of one set and in test of another"):
        open_traces([tmp_path / "train", tmp_path / "test"])
    with pytest.raises(UserError, match="no trace set in the list"):
        open_traces([])
