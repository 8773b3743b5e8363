"""Judging policies: replay against hand-computed shares, live answers against plain generation, reports."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from kv_gym.cli import app
from kv_gym.errors import UserError
from kv_gym.evaluation import evaluate, report
from kv_gym.evaluation.configurations import configurations_of, full_cache
from kv_gym.evaluation.evaluate import named_policies
from kv_gym.evaluation.measure import measure, replay
from kv_gym.evaluation.report import markdown, merged
from kv_gym.evaluation.rows import read_result, result, write_json
from kv_gym.evaluation.tasks import TaskContext, TaskQuestion, unseen_questions
from kv_gym.files import bundled
from kv_gym.policies import make_policy
from kv_gym.traces.sequence import Continuation, Sequence


def four_tokens():
    """One layer, one head, four tokens; the two continuations have 2 queries and 1."""
    future = np.zeros((1, 1, 4, 1, 2), np.float32)
    future[0, 0, :, 0, 0] = [0.2, 0.8, 0.4, 0.2]
    other = np.zeros((1, 1, 4, 1, 2), np.float32)
    other[0, 0, :, 0, 0] = [0.1, 0.0, 0.5, 0.3]
    keys = np.zeros((1, 1, 4, 2), np.float32)
    keys[0, 0, :, 0] = [3.0, 1.0, 2.0, 4.0]  # knorm keeps 1, then 2, 0, 3
    continuations = (Continuation(np.zeros(2, int), future, 2), Continuation(np.zeros(1, int), other, 1))
    queries = np.zeros((1, 1, 4, 2), np.float32)
    return Sequence("a", np.arange(4), keys, keys, queries, continuations, (0,), (1.0,), task="hand")


def test_replay_equals_shares_computed_by_hand():
    # expected utility: the mean of [.1, .4, .2, .1] and [.1, 0, .5, .3]
    utility = np.array([0.1, 0.2, 0.35, 0.2])
    rows = replay({"knorm": make_policy("knorm"), "oracle": make_policy("oracle")}, [four_tokens()], [1, 0.5, 3])
    kept = {(row["policy"], row["budget"]): row["utility_kept"] for row in rows}
    assert kept["knorm", 1] == pytest.approx(utility[1] / utility.sum())
    assert kept["knorm", 0.5] == pytest.approx(utility[[1, 2]].sum() / utility.sum())
    assert kept["knorm", 3] == pytest.approx(utility[[0, 1, 2]].sum() / utility.sum())
    assert kept["oracle", 0.5] == pytest.approx(utility[[2, 3]].sum() / utility.sum())  # the tie goes to the newer
    assert {row["task"] for row in rows} == {"hand"} and {row["n"] for row in rows} == {1}


def test_one_slot_and_everything_are_different_budgets():
    rows = replay({"knorm": make_policy("knorm")}, [four_tokens()], [1, 1.0])
    assert [row["utility_kept"] for row in rows] == pytest.approx([0.2 / 0.85, 1.0])


def test_protected_slots_count_and_displace():
    rows = replay({"knorm": make_policy("knorm")}, [four_tokens()], [2], sinks=1, recent=0)
    assert rows[0]["utility_kept"] == pytest.approx((0.1 + 0.2) / 0.85)


def test_statistics_and_queries_that_were_not_recorded_are_refused():
    with pytest.raises(UserError, match="record with --stats h2o"):
        replay({"h2o": make_policy("h2o")}, [four_tokens()], [2])
    with pytest.raises(UserError, match="record with --window 32"):
        replay({"snapkv": make_policy("snapkv")}, [four_tokens()], [2])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def contexts(model):
    """Questions whose first answer is what the full cache would say, and a second kind that is surely wrong."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(3):
        context = torch.randint(1, 40, (24,), generator=generator)
        questions = []
        for size in (2, 3):
            question = torch.randint(1, 40, (size,), generator=generator)
            said = model.generate(
                torch.cat([context, question])[None], max_new_tokens=3, do_sample=False, min_new_tokens=3
            )[0, -3:]
            questions.append(TaskQuestion(tuple(question.tolist()), tuple(said.tolist())))
            questions.append(TaskQuestion(tuple(question.tolist()), ((said[0].item() + 1) % 40, *said[1:].tolist())))
        made.append(TaskContext(tuple(context.tolist()), tuple(questions), "t"))
    return made


def test_the_full_cache_answers_as_plain_generation_does(model, contexts):
    rows = evaluate(["keydiff"], [8], model=model, tasks=contexts, progress=False)["rows"]
    full = next(row for row in rows if row["policy"] == "full_cache")
    assert (full["accuracy"], full["n"], full["questions"]) == (0.5, 3, 12)  # the changed ones are wrong
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["keydiff", "h2o", "snapkv", "recency", "random"])
def test_batched_one_pass_answers_equal_a_greedy_loop_on_each_question(model, contexts, name):
    from kv_gym.live import EvictingCache

    right, nll = [], []
    for context in contexts:
        for question in context.questions:
            with EvictingCache(model, policy=name, budget=8) as cache, torch.no_grad():
                model(input_ids=torch.tensor([context.context_ids]), past_key_values=cache)
                ids, said, losses = list(question.question_ids), [], []
                for expected in question.answer_ids:
                    logits = model(input_ids=torch.tensor([ids]), past_key_values=cache).logits[0, -1]
                    losses.append(-logits.log_softmax(-1)[expected].item())
                    said.append(logits.argmax().item())
                    ids = [expected]
                right.append(said == list(question.answer_ids))
                nll.append(np.mean(losses))
    configurations = [full_cache(), *configurations_of({name: make_policy(name)}, [8])]
    rows = measure(model, [unseen_questions(contexts, rows=2)], configurations)
    row = next(row for row in rows if row["policy"] == name)
    assert row["accuracy"] == pytest.approx(np.mean(right))
    assert row["nll"] == pytest.approx(np.mean(nll), abs=1e-4)
    # keys and values of 2 layers x 2 heads x 8 slots x 8 numbers, and the positions, at the least
    assert row["cache_bytes"] >= 2 * 2 * 8 * (2 * 8 * 4 + 8)


def test_oracles_are_refused_live(model, contexts):
    with pytest.raises(UserError, match="oracle"):
        evaluate(["oracle"], [0.5], model=model, tasks=contexts, progress=False)


def test_reports_join_replay_and_live_rows(tmp_path):
    replayed = result([{"policy": "a", "budget": 0.125, "task": "t", "utility_kept": 0.5, "n": 3}])
    live = result([
        {"policy": "full_cache", "budget": 1.0, "task": "t", "accuracy": 1.0, "nll": 0.1, "cache_bytes": 80, "n": 9},
        {"policy": "a", "budget": 0.125, "task": "t", "accuracy": 0.25, "nll": 1.5, "cache_bytes": 10, "n": 9,
         "policy_bytes": 4000},
    ])  # fmt: skip
    assert "| a | 1/8 | 0.500 | 25.0% | 1.500 | 10 + 4,000 |" in markdown(merged(replayed, live))
    write_json(tmp_path / "live.json", live)
    written = report([replayed, read_result(tmp_path / "live.json")], tmp_path)
    assert "| a | 1/8 | 0.500 | 25.0% |" in written.read_text()
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match="no result"):
        read_result(tmp_path / "other.json")


def test_allocations_that_a_policy_cannot_use_are_left_out_and_named_policies(tmp_path):
    traces = str(bundled("traces"))
    command = ["evaluate", "--traces", traces, "--split", "all", "--policies", "knorm,recency", "--budgets", "1/4"]
    done = CliRunner().invoke(app, [*command, "--allocation", "uniform,global", "--json", str(tmp_path / "rows.json")])
    assert done.exit_code == 0 and "left out: knorm: scores of policy 'knorm' are not comparable" in done.output
    data = json.loads((tmp_path / "rows.json").read_text())
    configurations = {(row["policy"], row["allocation"]) for row in data["rows"]}
    assert configurations == {("knorm", "uniform"), ("recency", "uniform"), ("recency", "global")}
    assert [sentence.partition(":")[0] for sentence in data["left_out"]] == ["knorm"]
    with pytest.raises(UserError, match="not comparable"):
        evaluate(["knorm"], ["1/4"], traces=traces, split=None, allocations=["global"], progress=False)


def test_policies_of_one_name_are_told_apart_by_a_mapping_alone():
    windows = [make_policy("snapkv", window=8), make_policy("snapkv", window=16)]
    with pytest.raises(UserError, match="two policies are called 'snapkv'; give a mapping"):
        named_policies(windows)
    assert list(named_policies({"short": windows[0], "long": windows[1]}).values()) == windows
    assert list(named_policies(["h2o", "h2o", make_policy("snapkv"), make_policy("snapkv")])) == ["h2o", "snapkv"]


def rows_of(tasks, model, **more):
    return evaluate(["recency"], [8], model=model, tasks=tasks, progress=False, **more)["rows"]


def test_tasks_are_read_from_a_file_and_from_lists_of_questions(model, contexts, tmp_path):
    records = [
        {"context_ids": list(c.context_ids), "question_ids": list(q.question_ids), "answer_ids": list(q.answer_ids)}
        for c in contexts
        for q in c.questions
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    known = [(row["accuracy"], row["questions"], row["contexts"]) for row in rows_of(contexts, model)]
    assert known[0][:2] == (0.5, 12)
    for tasks in (file, str(file), [file], records, iter(records)):  # a data set iterates over records
        assert [(row["accuracy"], row["questions"], row["contexts"]) for row in rows_of(tasks, model)] == known


class Words:
    """A tokenizer whose words are numbers."""

    bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


def test_questions_in_text_need_a_tokenizer(model):
    records = [{"context": "1 2 3 4 5 6 7 8 9 10", "question": "11", "answer": "12"}]
    assert rows_of(records, model, tokenizer=Words())[0]["questions"] == 1
    with pytest.raises(UserError, match="row 0 holds text and the model has no tokenizer; give the tokenizer"):
        rows_of(records, model)


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        (None, "a model needs tasks"),
        ([], "a model needs tasks"),
        ("none.jsonl", "none.jsonl cannot be read"),
        ([3], "tasks hold int; expected names, questions"),
        ([{"question": "what?"}], "row 0 has no context"),
    ],
)
def test_tasks_that_cannot_be_read_are_refused_and_not_left_out(model, tasks, sentence):
    with pytest.raises(UserError, match=sentence):
        rows_of(tasks, model)


def test_python_has_messages_of_its_own(model, contexts):
    traces = bundled("traces")
    for empty in ({"budgets": []}, {"budgets": [0.5], "allocations": []}):
        with pytest.raises(UserError, match="there is nothing to compare; expected at least one budget"):
            evaluate(["recency"], traces=traces, **empty)
    kept = [
        [
            row["utility_kept"]
            for row in evaluate(["recency"], ["1/4"], traces=traces, split=split, progress=False)["rows"]
        ]
        for split in ("all", None)
    ]
    assert len(kept[0]) == 2 and kept[0] == kept[1]
    for arguments in (
        {"traces": traces, "evicted": ["merge"]},
        {"traces": traces, "select": ["quest:0.2"]},
        {},
        {"model": model},
        {"traces": traces, "model": model},
    ):
        with pytest.raises(UserError) as refusal:
            evaluate(["recency"], ["1/4"], progress=False, **arguments)
        assert "--" not in str(refusal.value)
