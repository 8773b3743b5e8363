"""The leaderboard: what it measures, that it goes on where it stopped, and that nothing is measured twice."""

import json
import random
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from kv_gym import EvictingCache, cli
from kv_gym.errors import UserError
from kv_gym.evaluation.leaderboard import compact, leaderboard, page, plan, publish, read_rows, read_spec
from kv_gym.evaluation.leaderboard.identity import _code, exported_hash, model_hash, policy_hash
from kv_gym.evaluation.leaderboard.results import ResultFolder, write_batch
from kv_gym.evaluation.measure import replay
from kv_gym.evaluation.tasks.scripted import ScriptedTask
from kv_gym.files import bundled
from kv_gym.live.tiers import LowRankState
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies import make_policy
from kv_gym.policies.scorer import GroupedScorer, Scorer
from kv_gym.traces import open_traces

CONTEXTS, TOKENS = 10, 24  # two batches


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, questions, and a policy trained in two seeds (not really)."""
    folder = tmp_path_factory.mktemp("leaderboard")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    for name, seed in (("tasks", 1), ("others", 2)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked(model, seed)))
    for seed in range(2):
        torch.manual_seed(seed)
        network = GroupedScorer(4, 8, 8)
        Scorer(network, Fingerprint.of(model), (1, 99), calibrated=True).save_pretrained(folder / f"mine-{seed}")
    return folder


def asked(model, seed):
    """Two questions for each context, answered as the full cache would, and one that no cache answers."""
    stream = random.Random(seed)
    for _ in range(CONTEXTS):
        context, question = ([stream.randrange(1, 40) for _ in range(size)] for size in (TOKENS, 2))
        ids = torch.tensor([context + question])
        said = model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)[0, -2:].tolist()
        for answer in (said, [said[0], (said[1] + 1) % 40]):
            yield {"context_ids": context, "question_ids": question, "answer_ids": answer, "task": "toy"}


def spec_of(place, **more):
    return {
        "model": str(place / "model"), "tasks": [str(place / "tasks.jsonl")], "budgets": [6, "1/2"],
        "policies": ["keydiff", "h2o", "critical_kv"],
    } | more  # fmt: skip


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "milliseconds"} for row in rows]


@pytest.fixture(scope="module")
def rows(place, tmp_path_factory):
    spec = spec_of(place, learned={"mine": [str(place / "nowhere-{seed}"), str(place / "mine-{seed}")]}, seeds=[0, 1])
    return leaderboard(spec, tmp_path_factory.mktemp("out"), progress=False)


@pytest.fixture
def counted(monkeypatch):
    """What was measured: (number of the batch's contexts, names of the configurations)."""
    seen = []
    measure = ScriptedTask.measure

    def watched(self, model, batch, configurations):
        seen.append((len(batch), [configuration.name for configuration in configurations]))
        yield from measure(self, model, batch, configurations)

    monkeypatch.setattr(ScriptedTask, "measure", watched)
    return seen


def test_rows_are_all_configurations_with_the_null_hypotheses(rows):
    configurations = [(row["policy"], row["seed"], row["budget"], row["sinks"], row["recent"]) for row in rows]
    expected = {("full_cache", None, 1.0, None, None)}
    for budget in (6, 0.5):
        for ends in ((None, None), (4, 32)):
            expected |= {(name, None, budget, *ends) for name in ("random", "recency")}
        expected |= {(name, None, budget, None, None) for name in ("keydiff", "h2o", "critical_kv")}
        expected |= {("mine", seed, budget, None, None) for seed in (0, 1)}
    assert len(configurations) == len(expected) and set(configurations) == expected
    assert len({row["cell"] for row in rows}) == len(rows)
    full = rows[0]
    assert (full["accuracy"], full["n"], full["questions"]) == (0.5, CONTEXTS, 2 * CONTEXTS)
    assert full["slots"] == [[TOKENS, TOKENS]] * 2
    by_name = {row["policy"]: row for row in rows if row["budget"] == 6}
    assert by_name["keydiff"]["slots"] == [[6, 6]] * 2
    assert by_name["keydiff"]["policy_bytes"] == 0 < by_name["mine"]["policy_bytes"]
    assert by_name["keydiff"]["cache_bytes"] == 2 * 2 * 6 * (2 * 8 * 4 + 8)  # keys, values and positions


@pytest.mark.parametrize("name", ["keydiff", "h2o", "critical_kv", "recency"])
def test_a_row_equals_a_greedy_loop_over_every_question(place, rows, name):
    model = LlamaForCausalLM.from_pretrained(place / "model").eval()
    right, loss = {}, {}
    for number, line in enumerate(map(json.loads, (place / "tasks.jsonl").read_text().splitlines())):
        context = str(number // 2)
        with EvictingCache(model, policy=name, budget=6) as cache, torch.no_grad():
            model(input_ids=torch.tensor([line["context_ids"]]), past_key_values=cache)
            ids, said, losses = line["question_ids"], [], []
            for expected in line["answer_ids"]:
                logits = model(input_ids=torch.tensor([ids]), past_key_values=cache).logits[0, -1]
                said.append(logits.argmax().item())
                losses.append(-logits.log_softmax(-1)[expected].item())
                ids = [expected]
        right[context] = right.get(context, 0) + (said == line["answer_ids"])
        loss[context] = loss.get(context, 0) + sum(losses) / 2
    row = next(row for row in rows if (row["policy"], row["budget"], row["sinks"]) == (name, 6, None))
    assert {context: entry[0] for context, entry in row["contexts"].items()} == right
    assert {context: entry[2] for context, entry in row["contexts"].items()} == pytest.approx(loss, abs=1e-4)
    assert row["accuracy"] == pytest.approx(sum(right.values()) / (2 * CONTEXTS))
    assert row["nll"] == pytest.approx(sum(loss.values()) / (2 * CONTEXTS), abs=1e-4)


def test_what_is_finished_is_not_measured_again(place, tmp_path, counted, monkeypatch):
    first = leaderboard(spec_of(place), tmp_path, progress=False)
    assert [size for size, _ in counted] == [8, 2]
    counted.clear()
    monkeypatch.setattr(
        "kv_gym.evaluation.leaderboard.run.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    assert leaderboard(spec_of(place), tmp_path, progress=False) == first
    assert counted == []


def test_only_what_is_new_is_measured(place, tmp_path, counted):
    before = leaderboard(spec_of(place), tmp_path, progress=False)
    counted.clear()
    after = leaderboard(spec_of(place, policies=["keydiff", "h2o", "critical_kv", "tova"]), tmp_path, progress=False)
    assert counted == [(8, ["tova", "tova"]), (2, ["tova", "tova"])]
    assert [row for row in after if row["policy"] != "tova"] == before
    counted.clear()
    fewer = leaderboard(spec_of(place, policies=["tova"]), tmp_path, progress=False)
    assert read_rows(tmp_path / "rows.jsonl") == fewer  # rows nobody asks for now are no results, and are kept
    assert leaderboard(spec_of(place), tmp_path, progress=False) == before and counted == []


def test_an_interruption_loses_the_batch_under_way_alone(place, tmp_path, rows, monkeypatch):
    measure, sizes = ScriptedTask.measure, []

    def interrupted(self, model, batch, configurations):
        sizes.append(len(batch))
        for number, found in enumerate(measure(self, model, batch, configurations)):
            if len(batch) == 2 and number == 3:
                raise KeyboardInterrupt
            yield found

    spec = spec_of(place, learned={"mine": [str(place / "mine-{seed}")]}, seeds=[0, 1])
    monkeypatch.setattr(ScriptedTask, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        leaderboard(spec, tmp_path, progress=False)
    (tmp_path / "state" / "batches" / "torn.jsonl.tmp").write_text(
        '{"cell": "half a li'
    )  # a kill in the midst of writing
    assert read_rows(tmp_path / "rows.jsonl") == []
    sizes.clear()
    monkeypatch.setattr(ScriptedTask, "measure", measure)
    counted = []
    monkeypatch.setattr(
        ScriptedTask, "measure", lambda *given: counted.append(len(given[2])) or measure(*given)
    )  # fmt: skip
    again = leaderboard(spec, tmp_path, progress=False)
    assert counted == [2]
    assert without_times(again) == without_times(rows)
    assert not list((tmp_path / "state" / "batches").glob("*.jsonl"))


def test_a_damaged_batch_is_refused(tmp_path):
    file = write_batch(tmp_path, 0, [{"cell": "a", "batch": 0, "outcomes": [{"context": "0", "correct": 1.0}]}])
    assert ResultFolder(tmp_path).batches["a"][0]["outcomes"] == [{"context": "0", "correct": 1.0}]
    file.write_text(file.read_text().replace("1.0", "0.0"))
    with pytest.raises(UserError, match="is damaged, or an earlier version wrote it: remove it"):
        ResultFolder(tmp_path)


@pytest.mark.slow
def test_two_processes_write_the_rows_of_one(place, tmp_path, rows):
    spec = spec_of(place, learned={"mine": [str(place / "mine-{seed}")]}, seeds=[0, 1])
    assert without_times(leaderboard(spec, tmp_path, workers=2, progress=False)) == without_times(rows)


def test_settings_are_those_that_answer_most_on_validation_contexts(place, tmp_path):
    task = {"task": str(place / "tasks.jsonl"), "validation": str(place / "others.jsonl")}
    grid = {"contexts": 8, "budgets": [6], "allocations": ["uniform", "global", "global:softmax"],
            "protections": ["own", [0, 0], [2, 2]], "windows": [3]}  # fmt: skip
    spec = spec_of(place, tasks=[task], validation=grid, policies=["keydiff", "snapkv"])
    found = leaderboard(spec, tmp_path, progress=False)
    tried = [json.loads(line)["row"] for line in (tmp_path / "state" / "other.jsonl").read_text().splitlines()]
    of_snapkv = [row for row in tried if row["policy"] == "snapkv"]
    assert {row["window"] for row in of_snapkv} == {None, 3} and {row["n"] for row in tried} == {8}
    assert len(of_snapkv) == 2 * 3 * 3 and {row["allocation"] for row in of_snapkv} == set(grid["allocations"])
    # keydiff's own ends are 0 and 0, and its scores do not compare as they are
    assert sum(row["policy"] == "keydiff" for row in tried) == 2 * 2
    for name in ("keydiff", "snapkv"):
        best = max((row for row in tried if row["policy"] == name), key=lambda row: (row["accuracy"], -row["nll"]))
        marked = [row for row in found if row["policy"] == name and row["chosen_on_validation"]]
        assert {row["budget"] for row in marked} == {6, 0.5}
        settings = ("allocation", "sinks", "recent", "window")
        assert all([row[key] for key in settings] == [best[key] for key in settings] for row in marked)
    assert not any(row["chosen_on_validation"] for row in found if row["policy"] == "full_cache")


def test_a_policy_may_have_allocations_of_its_own(place):
    spec = read_spec(spec_of(place, allocations=["uniform"], allocations_of={"h2o": ["global"], "keydiff": []}))
    cells = plan.cells_of(plan.TaskIdentity("t", "", "prefill", ""), spec, plan.heuristics(spec), nulls=False).values()
    rules = {(cell.policy.name, cell.setting.allocation) for cell, _ in cells}
    assert ("h2o", "global") in rules and not {("h2o", "uniform"), ("keydiff", "uniform")} & rules


def test_a_configuration_that_refuses_is_a_row_with_its_sentence(place, tmp_path):
    model = LlamaForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    Scorer(GroupedScorer(4, 8, 8), Fingerprint.of(model), (1, 99)).save_pretrained(tmp_path / "foreign")
    rough = Scorer.from_pretrained(place / "mine-0")
    Scorer(rough.network, rough.fingerprint, rough.lengths).save_pretrained(tmp_path / "rough")  # heads do not compare
    learned = {name: [str(tmp_path / name)] for name in ("foreign", "rough")}
    spec = spec_of(place, allocations=["uniform", "global"], learned=learned)
    found = leaderboard(spec, tmp_path / "out", progress=False)
    said = {(row["policy"], row["allocation"]): row["refused"] for row in found if row.get("refused")}
    assert set(said) == {("foreign", "uniform"), ("foreign", "global"), ("rough", "global")}
    assert "weights hash" in said["foreign", "uniform"] and "not comparable" in said["rough", "global"]
    # a heuristic goes without an allocation that its scores are not made for
    assert {row["allocation"] for row in found if row["policy"] == "keydiff"} == {"uniform"}
    assert all(row["accuracy"] is None for row in found if row.get("refused"))
    assert next(row for row in found if row["policy"] == "h2o" and row["allocation"] == "global")["questions"] == 20
    assert "not comparable across heads" in page(found)


def test_what_queries_read_is_a_setting(place, tmp_path, rows):
    spec = spec_of(place, budgets=["1.0"], policies=["knorm", "h2o"], selections=["all", "quest:0.1"])
    found = [row for row in leaderboard(spec, tmp_path, progress=False) if row["policy"] in ("knorm", "h2o")]
    by_name = {(row["policy"], row["select"]): row for row in found}
    assert len(by_name) == len(found) == 4
    everything, some = (by_name["knorm", select] for select in ("all", "quest:0.1"))
    # groups of 16: with 24 tokens of context and 3 of the question all are read
    assert everything["slots_read"] == some["slots_read"] == TOKENS + 3
    assert some["nll"] == pytest.approx(everything["nll"], rel=1e-4) and some["cell"] != everything["cell"]
    assert "needs the attention of every query" in by_name["h2o", "quest:0.1"]["refused"]
    assert "quest:0.1" in page(found)


def test_episodes_are_a_setting_with_a_price(place, tmp_path):
    pytest.importorskip("sklearn")
    spec = {"tasks": [{"task": "dialogue:128:topics=2", "contexts": 1}], "budgets": ["1/4"], "policies": ["epicache"],
            "episodes": ["none", "2:window=2"]}  # fmt: skip
    found = leaderboard(spec, tmp_path / "dialogue", progress=False)
    whole, divided = (row for row in found if row["policy"] == "epicache")
    assert (whole["episodes"], divided["episodes"]) == ("none", "2:window=2") and whole["cell"] != divided["cell"]
    assert whole["tokens_read"] is None and divided["tokens_read"] > 2 * 128
    assert {row["episodes"] for row in found if row["policy"] in ("random", "recency", "full_cache")} == {"none"}
    written = page(found)
    assert "uniform, episodes 2:window=2" in written and f"{divided['tokens_read']:,.0f}" in written
    # contexts that have one window: a row with the sentence, and the others as ever
    found = leaderboard(spec_of(place, budgets=[6], policies=["keydiff"], episodes=[2]), tmp_path / "short",
                        progress=False)  # fmt: skip
    (said,) = [row["refused"] for row in found if row["episodes"] == "2"]
    assert said.startswith("the conversation has 1 window, and episodes are groups of windows")
    assert "- keydiff, uniform, episodes 2 (toy): the conversation has 1 window" in page(found)
    assert all(row["questions"] == 20 for row in found if row["episodes"] == "none")
    with pytest.raises(UserError, match="episodes '2:size=3' are not known"):
        read_spec(spec | {"episodes": ["2:size=3"]})


def test_a_trained_state_is_known_by_what_it_is(place, tmp_path):
    model = LlamaForCausalLM.from_pretrained(place / "model")
    state = LowRankState.untrained(Fingerprint.of(model), rank=2, width=4)
    folders = [state.save_pretrained(tmp_path / name) for name in ("one", "two")]
    cells = []
    for folder in folders:
        spec = spec_of(place, budgets=[6], policies=["keydiff"], tiers=[f"less:{folder}"])
        row = leaderboard(spec, tmp_path / "out", progress=False)[-1]
        assert row["evicted"] == f"less (untrained, {state.digest[:12]})" and row["questions"] == 20
        cells.append(row["cell"])
    assert cells[0] == cells[1]
    with pytest.raises(UserError, match=r"holds no state\.json"):
        read_spec(spec | {"tiers": [f"less:{tmp_path}"]})


MOODY = '''
"""A policy that likes some contexts."""
from dataclasses import dataclass
from kv_gym import Policy
from kv_gym.errors import UserError

@dataclass(frozen=True)
class Moody(Policy):
    def score(self, view):
        if len(view.keys) == 2:
            raise {error}
        return view.keys[..., 0]
'''


@pytest.fixture
def moody(tmp_path, monkeypatch):
    """Writes the policy above into a module of its own, with another name each time: modules are imported once."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, error):
        (tmp_path / f"{name}.py").write_text(MOODY.format(error=error))
        return f"{name}:Moody"

    return write


def test_a_configuration_that_refuses_midway_costs_the_others_nothing(place, tmp_path, rows, moody):
    name = moody("moody_refusing", "UserError('not these two')")
    found = leaderboard(spec_of(place, policies=["keydiff", name, "h2o"]), tmp_path / "out", progress=False)
    assert {row.get("refused") for row in found if row["policy"] == name} == {"not these two"}
    others = {row["cell"]: row["contexts"] for row in found if row["policy"] != name}
    assert others == {row["cell"]: row["contexts"] for row in rows if row["cell"] in others} and len(others) == 13


def test_a_configuration_that_fails_is_named_and_measured_again_when_mended(place, tmp_path, moody, counted):
    name = moody("moody_failing", "ValueError('no idea')")
    spec = spec_of(place, policies=["keydiff", name])
    with pytest.raises(
        UserError, match=r"2 configurations failed, the first moody_failing:Moody on toy .* ValueError: no idea"
    ):
        leaderboard(spec, tmp_path / "out", progress=False)
    kept = read_rows(tmp_path / "out" / "rows.jsonl")
    assert {row["policy"] for row in kept} == {"full_cache", "random", "recency", "keydiff"}
    del sys.modules["moody_failing"]
    (tmp_path / "moody_failing.py").write_text(MOODY.format(error="x").replace("raise x", "pass"))
    counted.clear()
    mended = leaderboard(spec, tmp_path / "out", progress=False)
    assert [names for _, names in counted] == [[name] * 2] * 2  # its code is another, so both batches
    assert [row for row in mended if row["policy"] != name] == kept


def test_a_configuration_that_fails_on_validation_contexts_costs_the_others_nothing(place, tmp_path, moody):
    task = {"task": str(place / "tasks.jsonl"), "validation": str(place / "others.jsonl")}
    grid = {"budgets": [6], "allocations": ["uniform"], "protections": ["own"]}
    name = moody("moody_choosing", "ValueError('no idea')")
    spec = spec_of(place, tasks=[task], validation=grid, policies=["keydiff", name])
    with pytest.raises(
        UserError, match=r"3 configurations failed, the first on validation contexts with ValueError: no idea"
    ):
        leaderboard(spec, tmp_path / "out", progress=False)
    kept = read_rows(tmp_path / "out" / "rows.jsonl")
    assert {row["policy"] for row in kept if row["chosen_on_validation"]} == {"keydiff"}


def test_replay_rows_equal_plain_replay_and_the_heads_add_up(tmp_path):
    traces = bundled("traces")
    utility = {"traces": str(traces), "split": "all", "contexts": 2, "oracles": ["oracle"]}
    spec = {"tasks": [], "budgets": ["1/4", "1/8"], "policies": ["keydiff", "knorm", "h2o"], "utility": utility,
            "allocations": ["uniform", "global:zscore"]}  # fmt: skip
    found = leaderboard(spec, tmp_path, progress=False)
    part = [open_traces(traces)[number] for number in range(2)]
    policies = {name: make_policy(name) for name in ("keydiff", "knorm", "oracle")}
    # contexts of several tasks: replay gives a row for each, so kept utility is compared context by context
    for number, sequence in enumerate(part):
        total = float(sequence.utility().sum())
        for row in replay(policies, [sequence], [1 / 4, 1 / 8], allocations=spec["allocations"]):
            configuration = (row["policy"], row["budget"], row["allocation"])
            ours = next(r for r in found if (r["policy"], r["budget"], r["allocation"]) == configuration)
            kept, whole, _ = list(ours["contexts"].values())[number]
            assert (kept, whole) == pytest.approx((row["utility_kept"] * total, total), rel=1e-5)
    refused = {row["refused"] for row in found if row["policy"] == "h2o"}  # only the first context holds statistics
    assert len(refused) == 1 and "holds no statistics of policy 'h2o'" in refused.pop()
    assert len(found) == 4 * 2 * 2 and all(row["accuracy"] is None for row in found)
    row = found[0]
    sums = [sum(entry[place] for entry in row["contexts"].values()) for place in (0, 1)]
    assert row["utility_kept"] == pytest.approx(sums[0] / sums[1])
    weights = sum(sequence.utility().sum(-1) for sequence in part)
    assert (np.array(row["head_utility"]) * weights).sum() / weights.sum() == pytest.approx(sums[0] / sums[1], abs=1e-4)


BAD = {
    "unknown key 'budget'": {"budget": [1]},
    "has no budgets": {"budgets": None},
    "tasks is 'multi_key'; expected a list": {"tasks": "multi_key"},
    "budget 2.0 is a share above 1": {"budgets": ["2.0"]},
    "unknown allocation": {"allocations": ["unifrm"]},
    "allocations_of is": {"allocations_of": ["uniform"]},
    "unknown policy 'keydif'": {"policies": ["keydif"]},
    "is an oracle": {"policies": ["oracle"]},
    "learned policy 'mine' is not in": {"learned": {"mine": "nowhere/mine-{seed}"}},
    "contexts is 0": {"tasks": [{"task": "multi_key:512", "contexts": 0}]},
    "has unknown key 'grid'": {"validation": {"grid": 3}},
    r"protections is \[\[1\]\]; expected `own`, or sinks and recent": {"validation": {"protections": [[1]]}},
    "seeds is \\['a'\\]": {"seeds": ["a"]},
    "has no traces": {"utility": {"split": "test"}},
    "no tasks, utility or pages": {"tasks": []},
    "capacities is \\[0\\]": {"pages": [{"requests": "keys.txt", "capacities": [0]}]},
    "hold no context in split 'none'": {"tasks": [], "utility": {"traces": str(bundled("traces")), "split": "none"}},
    "names 2 tasks": {"tasks": ["multi_key:512:count=1,single:512:count=1"]},
    "there is no model": {"model": "nobody/nothing"},
    "model is 3; expected a text": {"model": 3},
}


@pytest.mark.parametrize("sentence", BAD)
def test_a_specification_that_cannot_be_used_is_one_sentence(tmp_path, sentence):
    spec = {"tasks": ["multi_key:512:count=1"], "budgets": ["1/4"], "policies": ["keydiff"]} | BAD[sentence]
    with pytest.raises(UserError, match=sentence):
        leaderboard(spec, tmp_path, progress=False)


def test_budgets_are_known_by_what_they_mean():
    spec = read_spec({"tasks": ["multi_key:512"], "budgets": ["0.25", "1/4", 1, "1.0", "1", 0.25]})
    assert spec.budgets == ("0.25", "1", "1.0")


def test_files_that_are_no_specification(tmp_path):
    for text, sentence in (
        (": [", "line 1: no YAML"),
        ("- 1", "holds list"),
        ("!!python/object:os.x {}", "tags are not read"),
        ("tasks: &a [x]\nbudgets: *a", "aliases and anchors are not read"),
    ):
        (tmp_path / "spec.yml").write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_spec(tmp_path / "spec.yml")
    with pytest.raises(UserError, match=r"none.yml cannot be read .*; expected a specification"):
        read_spec(tmp_path / "none.yml")
    (tmp_path / "rows.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match="line 1 has no policy and budget"):
        read_rows(tmp_path)


def test_the_benchmark_specification_can_be_read():
    spec = read_spec(bundled("agents").parent / "benchmarks" / "leaderboard.yml")
    assert len(spec.budgets) == 6 and spec.seeds == (0, 1, 2, 3, 4) and len(spec.tasks) == 2


def test_identity_is_what_a_result_depends_on(place, tmp_path):
    assert policy_hash(make_policy("snapkv")) == policy_hash(make_policy("snapkv"))
    others = [make_policy("snapkv", window=8), make_policy("same_tokens"), make_policy("same_tokens", over="knorm")]
    assert len({policy_hash(policy) for policy in (make_policy("snapkv"), *others)}) == 4
    source = "class A:\n    x = 1\n"
    assert _code(source) == _code('"""Told."""\n\n\nclass A:\n    """Told."""\n    x = 1  # why\n')
    assert _code(source) != _code(source.replace("1", "2"))
    quotes = "def f(x):\n    'Ärger.'\n    return f'{x!r}', \"# none\"  # a comment\n"
    assert _code(quotes) == sha256(b"""deff(x):returnf'{x!r}',"#none\"""").hexdigest()  # under any Python
    policy = Scorer.from_pretrained(place / "mine-0")
    policy.training["seconds"] = 3
    policy.save_pretrained(tmp_path / "same")
    assert exported_hash(tmp_path / "same") == exported_hash(place / "mine-0") != exported_hash(place / "mine-1")
    with torch.no_grad():
        policy.network.biases[0].add_(1)
    policy.save_pretrained(tmp_path / "same")
    assert exported_hash(tmp_path / "same") != exported_hash(place / "mine-0")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = model_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert model_hash(tmp_path) != before


def test_compact_rows_make_the_page_that_the_command_writes(place, tmp_path, rows):
    spec = tmp_path / "spec.yml"
    more = {"learned": {"mine": [str(place / "mine-{seed}")]}, "seeds": [0, 1]}
    spec.write_text(json.dumps(spec_of(place, **more)))  # JSON is YAML
    said = CliRunner().invoke(
        cli.app, ["leaderboard", str(spec), "--out", str(tmp_path / "out"), "--workers", "1", "--no-progress",
                  "--publish", str(tmp_path / "kept"), "--page", str(tmp_path / "page.md")],
    )  # fmt: skip
    assert said.exit_code == 0 and f"{len(rows)} rows" in said.output, said.output
    written = (tmp_path / "page.md").read_text()
    assert page(read_rows(tmp_path / "kept")) == written
    mine = [row["accuracy"] for row in rows if (row["policy"], row["budget"]) == ("mine", 6)]
    line = next(line for line in written.splitlines() if line.startswith("| **mine** | uniform |"))
    assert line.split(" | ")[3] == f"{50 * sum(mine):.1f}"
    assert sum("versions" in row for row in compact(rows)) == 1


def test_published_rows_replace_others_and_keep_zeros(tmp_path, rows):
    (tmp_path / "gone.jsonl").write_text('{"policy": "a", "budget": 1}\n')
    assert [file.name for file in publish(rows, tmp_path)] == ["toy.jsonl"]
    assert [file.name for file in tmp_path.iterdir()] == ["toy.jsonl"]
    kept = read_rows(tmp_path)
    assert [row["accuracy"] for row in kept] == pytest.approx([row["accuracy"] for row in rows], abs=1e-6)
    assert all(row["contexts"] and row["recent"] is None for row in kept if row["policy"] == "keydiff")
    assert compact([rows[0] | {"budget": 1 / 3}])[0]["budget"] == 1 / 3


def test_results_are_not_taken_for_published_rows(place, tmp_path, rows):
    leaderboard(spec_of(place), tmp_path, progress=False)
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds the results themselves"):
        publish(rows, tmp_path)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_contexts_are_published_of_the_setting_that_competes(rows):
    ours = [row for row in rows if row["policy"] == "h2o"]
    others = [row | {"allocation": "global", "accuracy": 0.99, "cell": f"{row['cell']}g"} for row in ours]
    listed = lambda kept: {row["allocation"] for row in kept if "contexts" in row}  # noqa: E731
    assert listed(compact(ours + others)) == {"global"}
    chosen = [row | {"chosen_on_validation": True} for row in ours]
    assert listed(compact(chosen + others)) == {"uniform"}
    learned = [row | {"policy": "mine", "seed": 0} for row in ours + others]
    assert listed(compact(learned)) == {"uniform", "global"}
    nulls = [row for row in rows if row["policy"] == "recency"]
    assert len(nulls) == 4 and all("contexts" in row for row in compact(nulls))


def test_a_task_that_all_configurations_refuse_has_a_page(rows):
    alone = [rows[0], *(row | {"refused": "not this one", "accuracy": None} for row in rows[1:])]
    assert "With the full cache 50.0 %" in page(alone) and "not this one" in page(alone)


def test_names_are_no_markup_and_stay_on_one_line(rows):
    named = [row | {"policy": "<script>|x\n\x1b[1m"} if row["policy"] == "keydiff" else row for row in rows]
    assert "<script>" not in page(named) and "\\<script\\>\\|x \\[1m |" in page(named)
