"""The one command: parts that share no text, the budget that validation chooses, resuming, refusals, honest failure."""

import json
import math
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import torch
from traced_models import VOCABULARY, tiny_model
from typer.testing import CliRunner

from kv_gym.cli import app
from kv_gym.errors import UserError
from kv_gym.evaluation.configurations import full_cache
from kv_gym.evaluation.tasks import TaskContext, TaskQuestion
from kv_gym.fit import fit, load_fit, run
from kv_gym.fit.data import PARTS, _split, read_data
from kv_gym.fit.loss import least_provable, lost_answers, lost_nats
from kv_gym.policies import make_policy
from kv_gym.traces import open_traces
from kv_gym.training.registry import agent_settings

CONTEXT, QUESTIONS = 24, 3
FAST = {"agent": "joint", "steps": 4, "budgets": ("1/2", "1/4"), "progress": False}
EXAMPLE = Path(__file__).parents[2] / "examples" / "fit_my_model.py"


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", initializer_range=0.1, max_position_embeddings=128)


def random_ids(generator, n):
    return torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()


def lines_of(path, lines):
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture(scope="module")
def questions(model, tmp_path_factory):
    """24 contexts of three questions whose answers are what the model says with all of its cache."""
    generator, asked = torch.Generator().manual_seed(0), []
    for _ in range(24):
        context = random_ids(generator, CONTEXT)
        asked += [(context, random_ids(generator, 2)) for _ in range(QUESTIONS)]
    with torch.no_grad():
        said = model(torch.tensor([context + question for context, question in asked])).logits[:, -1].argmax(-1)
    lines = [
        {"context_ids": context, "question_ids": question, "answer_ids": [answer]}
        for (context, question), answer in zip(asked, said.tolist(), strict=True)
    ]
    return lines_of(tmp_path_factory.mktemp("questions") / "questions.jsonl", lines)


@pytest.fixture(scope="module")
def continuations(tmp_path_factory):
    generator, lines = torch.Generator().manual_seed(1), []
    for _ in range(20):
        after = [random_ids(generator, n) for n in (4, 6)]
        lines.append({"context_ids": random_ids(generator, CONTEXT), "continuation_ids": after})
    return lines_of(tmp_path_factory.mktemp("continuations") / "continuations.jsonl", lines)


@pytest.fixture(scope="module")
def finished(model, questions, tmp_path_factory):
    """A fit to questions, with a tolerance that half of the cache holds."""
    out = tmp_path_factory.mktemp("fits") / "finished"
    return fit(model, questions, out, tolerance=0.9, **FAST), out


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_no_context_stands_in_two_parts_and_the_order_of_lines_does_not_matter(questions, tmp_path):
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    data = read_data(questions)
    parts = [{context.context_ids for context in getattr(data, part)} for part in PARTS]
    assert [len(part) for part in parts] == [12, 6, 6]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    asked = [
        (c.context_ids, q.question_ids, q.answer_ids) for p in PARTS for c in getattr(data, p) for q in c.questions
    ]
    assert sorted(asked) == sorted(tuple(tuple(line[name]) for name in line) for line in lines)

    # a context that comes back later in the file joins its first questions: the second ones may not lie elsewhere
    mixed = lines[::3] + lines[2::3][::-1] + lines[1::3]
    again = read_data(lines_of(tmp_path / "mixed.jsonl", mixed))
    for part in PARTS:
        one, other = getattr(data, part), getattr(again, part)
        assert [c.context_ids for c in one] == [c.context_ids for c in other]
        assert [set(c.questions) for c in one] == [set(c.questions) for c in other]


def test_a_file_with_more_than_enough_gives_the_rest_to_choosing_and_testing(questions):
    data = read_data(questions, count=8)
    assert [len(getattr(data, part)) for part in PARTS] == [8, 8, 8]


def test_a_text_is_divided_by_place_and_repeated_windows_count_once(tmp_path):
    from kv_gym.reference.generator import make_context
    from kv_gym.reference.tokenizer import build_tokenizer

    words = [word for i in range(4) for word in make_context("multi_key", 128, 77 + i).words]
    file = tmp_path / "novel.txt"
    file.write_text(" ".join(words + words[:64]))  # it ends as it began
    data = read_data(file, build_tokenizer(), tokens=17, continuation_tokens=16)
    assert data.measure == "nll" and data.source["tokens"] == 17
    windows = [[*c.context_ids[1:], *q.question_ids, *q.answer_ids] for p in PARTS for c in getattr(data, p)
               for q in c.questions]  # fmt: skip
    assert [len(getattr(data, part)) for part in PARTS] == [8, 4, 4]
    ids = build_tokenizer()(" ".join(words), add_special_tokens=False)["input_ids"]
    assert [i for window in windows for i in window] == ids


def test_reference_data_are_the_pinned_test_texts_and_other_ones():
    from kv_gym.evaluation.tasks import reference_tasks

    data = read_data("reference", tokens=64, count=8, seed=3)
    assert list(data.test) == reference_tasks("multi_key", 64, 4)
    contexts = [context.context_ids for part in PARTS for context in getattr(data, part)]
    assert len(set(contexts)) == 16
    assert read_data("reference", tokens=64, count=8, seed=4).train != data.train


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_of_single_questions_is_agresti_and_mins():
    """10 lost and 4 gained of 100; theirs: 14 + 1 differ and 6 is the difference, of 102."""
    lost = [1.0] * 10 + [-1.0] * 4 + [0.0] * 86
    loss, most = lost_answers(lost, [1] * 100)
    published = 6 / 102 + 1.96 * math.sqrt((15 - 6**2 / 102) / 102**2)
    assert loss == 0.06
    assert most == pytest.approx(published, abs=2e-3)  # Student's t with 99 degrees is 1.984, and residuals


def test_questions_that_fall_together_prove_less():
    together, apart = [4.0] * 2 + [0.0] * 18, [1.0] * 8 + [0.0] * 12
    assert lost_answers(together, [4] * 20)[0] == lost_answers(apart, [4] * 20)[0] == 0.1
    assert lost_answers(together, [4] * 20)[1] > lost_answers(apart, [4] * 20)[1] + 0.03


def test_losing_nothing_among_few_proves_little():
    assert lost_answers([0.0] * 10, [1] * 10) == (0.0, pytest.approx(2.262 / 12, abs=1e-3))
    assert lost_answers([0.0] * 10, [1] * 10)[1] == pytest.approx(least_provable(10, 10))


def test_lost_nats_have_students_interval():
    lost = [0.1, 0.3, -0.1, 0.2, 0.5]
    half = 2.776 * statistics.stdev(lost) / math.sqrt(5)
    assert lost_nats(lost) == (pytest.approx(0.2), pytest.approx(0.2 + half, abs=1e-3))


# -- from end to end ---------------------------------------------------------------------------------------------------


def test_what_a_fit_to_questions_leaves(finished, model, questions):
    done, out = finished
    on_disk = json.loads((out / "fit.json").read_text())
    assert on_disk == done and done["finished"]
    assert {"policy", "traces", "training", "README.md", "fit.json"} == {file.name for file in out.iterdir()}
    assert (done["measure"], done["allocation"]) == ("accuracy", "global")
    assert done["protection"] == list(agent_settings("joint").protect)
    assert set(done["seconds"]) == {"measure", "full_cache", "record", "train", "chosen", "tested"}
    assert {"torch", "transformers"} < set(done["versions"]) and done["command"]
    for part in ("validation", "test"):
        full = next(row for row in done["rows"] if (row["policy"], row["task"]) == ("full_cache", part))
        assert (full["accuracy"], full["loss"], full["n"], full["questions"]) == (1.0, 0.0, 6, 18)
        for row in done["rows"]:
            if row["task"] == part:  # everything is asked of the same questions, so the loss is what is missing
                assert row["loss"] == pytest.approx(1 - row["accuracy"]) and row["loss_upper"] >= row["loss"]
    learned = [r for r in done["rows"] if (r["policy"], r["task"]) == ("learned", "validation")]
    assert [row["budget"] for row in learned] == [1 / 2, 1 / 4]
    within = [row["budget"] for row in learned if row["loss_upper"] <= 0.9]
    assert done["budget"] == min(within) == done["compared_at"]
    tested = {row["policy"]: row for row in done["rows"] if row["task"] == "test"}
    assert set(tested) == {"full_cache", "learned", *run.HEURISTICS}
    assert {row["budget"] for name, row in tested.items() if name != "full_cache"} == {done["budget"]}
    card = (out / "README.md").read_text()
    assert all(sentence in card for sentence in done["verdict"])
    assert "Without training, " in card  # at this tolerance everybody does as well
    assert f"| learned | global | 1/2 | {tested['learned']['accuracy']:.1%} |" in card


def test_a_chosen_cache_holds_what_was_chosen(finished, model, questions):
    done, out = finished
    context = torch.tensor([read_data(questions).test[0].context_ids])
    with load_fit(model, out) as cache, torch.no_grad():
        model(context, past_key_values=cache)
        assert int(cache.kept().sum()) == int(done["budget"] * CONTEXT) * cache.kept().numel()
    with load_fit(model, out, budget=1.0, trigger="every:4") as cache, torch.no_grad():
        model(context, past_key_values=cache)
        assert int(cache.kept().min()) == CONTEXT
    with pytest.raises(UserError, match="weights hash"):
        load_fit(tiny_model("llama", seed=5, max_position_embeddings=128), out)


def test_the_cards_example_runs(finished, model, questions):
    _, out = finished
    (snippet,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    asked = read_data(questions).test[0]
    context, question = torch.tensor([asked.context_ids]), torch.tensor([asked.questions[0].question_ids])
    assert len(snippet.strip().splitlines()) <= 5
    names = {"model": model, "context": context, "question": question, "torch": torch}
    exec(compile(snippet.replace('"this-folder"', f"{str(out)!r}"), "card", "exec"), names)
    assert names["cache"].seen > CONTEXT + 2
    assert names["cache"].kept().sum() < names["cache"].seen * names["cache"].kept().numel()
    names["cache"].detach()


def test_a_finished_fit_is_not_repeated(finished, model, questions, monkeypatch, tmp_path):
    done, out = finished

    def work(*_, **__):
        raise AssertionError("repeated")

    for name in ("record", "train", "measure_losses"):
        monkeypatch.setattr(run, name, work)
    assert fit(model, questions, out, tolerance=0.9, **FAST) == done

    model.save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--data", questions, "--out", out, "--tolerance", 0.9, "--agent", "joint"]
    options += ["--steps", 4, "--budgets", "1/2,1/4", "--no-progress"]
    said = CliRunner().invoke(app, ["fit", *map(str, options)])
    assert said.exit_code == 0, said.output
    assert said.stdout.splitlines()[:-1] == done["verdict"]
    assert f"{out}: card in README.md" in said.stdout


@pytest.fixture
def few_heuristics(monkeypatch):
    monkeypatch.setattr(run, "HEURISTICS", {"keydiff": ("global:softmax",), "recency": ("uniform",)})


def test_continuations_are_judged_by_their_likelihood(model, continuations, tmp_path, few_heuristics):
    done = fit(model, continuations, tmp_path / "out", tolerance=50.0, **FAST, target="kvzip")
    assert "kvzip" in open_traces(tmp_path / "out/traces")[0].stats  # what a target needs is recorded for it
    assert done["measure"] == "nll" and done["budget"] == 1 / 4
    losses = []
    for context in read_data(continuations).test:
        of_context = []
        for asked in context.questions:
            ids = torch.tensor([[*context.context_ids, *asked.question_ids, *asked.answer_ids]])
            with torch.no_grad():
                said = model(ids).logits[0, CONTEXT:-1].log_softmax(-1)
            of_context.append(-said.gather(1, ids[0, CONTEXT + 1 :, None]).mean().item())
        losses.append(statistics.mean(of_context))
    full, learned = (
        row for row in done["rows"] if row["task"] == "test" and row["policy"] in ("full_cache", "learned")
    )
    assert full["nll"] == pytest.approx(statistics.mean(losses), rel=1e-4)
    assert learned["loss"] == pytest.approx(learned["nll"] - full["nll"], abs=1e-6) and learned["loss"] != 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "nats per token" in done["verdict"][0] and "| accuracy |" not in card


def test_a_policy_of_hidden_states_is_fitted_too(model, questions, tmp_path, few_heuristics):
    done = fit(model, questions, tmp_path, tolerance=0.9, **FAST | {"inputs": ["hidden"]})
    assert done["finished"] and open_traces(tmp_path / "traces").load()[0].hidden is not None
    assert make_policy(tmp_path / "policy").inputs == ("hidden",)


def test_an_unreachable_tolerance_is_said_and_nothing_is_evicted(model, continuations, tmp_path, few_heuristics):
    done = fit(model, continuations, tmp_path, tolerance=1e-9, **FAST)
    assert done["budget"] == 1.0 and done["enough"] == []
    assert done["verdict"][0].startswith("No budget below 1.0 stays within a loss of 0.0000 nats per token")
    assert "so the budget is 1.0 and nothing is evicted" in (tmp_path / "README.md").read_text()
    with load_fit(model, tmp_path) as cache, torch.no_grad():
        model(torch.tensor([read_data(continuations).test[0].context_ids]), past_key_values=cache)
        assert int(cache.kept().min()) == CONTEXT


# -- who chooses -------------------------------------------------------------------------------------------------------


def invented(most):
    """A stand-in for measuring: the interval's upper end by part, policy and budget; the loss is half of it."""

    def measured(model, contexts, part, measure, configurations, progress=True, go_on=None, **workers):
        rows = []
        for configuration in (full_cache(), *configurations):
            policy, budget, allocation = configuration.name, configuration.budget, configuration.allocation.name
            high = 0.0 if policy == "full_cache" else most(part, policy, budget, allocation)
            figures = {"accuracy": 1 - high / 2, "nll": high, "loss": high / 2, "loss_upper": high}
            counts = {"n": len(contexts), "questions": sum(len(context.questions) for context in contexts)}
            names = {"policy": policy, "budget": budget, "allocation": allocation, "task": part}
            counts |= {"contexts": {str(number): [0, 1, 0.0] for number in range(len(contexts))}}
            rows.append(names | figures | counts | {"cache_bytes": 8.0, "policy_bytes": 0})
        return rows

    return measured


@pytest.mark.parametrize(
    ("validation", "test", "chosen"),
    [({1 / 2: 0.1, 1 / 4: 0.2}, {1 / 4: 1.0}, 1 / 4), ({1 / 2: 0.9, 1 / 4: 0.9}, {1 / 2: 0.0}, 1.0)],
)
def test_the_test_part_chooses_nothing(model, questions, tmp_path, monkeypatch, validation, test, chosen):
    """Validation and test disagree: the budget is validation's, and what is reported is the test's."""
    losses = {"validation": validation, "test": test}
    monkeypatch.setattr(
        run,
        "measure_losses",
        invented(lambda part, name, budget, _: losses[part][budget] if name == "learned" else 0.9),
    )
    done = fit(model, questions, tmp_path, tolerance=0.5, **FAST)
    assert done["budget"] == chosen
    at = next(iter(test))
    row = next(row for row in done["rows"] if (row["policy"], row["task"]) == ("learned", "test"))
    assert (row["budget"], row["loss_upper"]) == (at, test[at])
    assert f"loses {100 * test[at] / 2:.2f} points on 18 questions of 6 test contexts" in done["verdict"][1]


@pytest.mark.parametrize(("at_half", "chosen"), [(0.1, 1 / 2), (0.9, 1.0)])
def test_budgets_that_pass_below_the_first_failure_are_named(model, questions, tmp_path, monkeypatch, at_half, chosen):
    most = {1 / 2: at_half, 1 / 3: 0.9, 1 / 4: 0.2}
    monkeypatch.setattr(
        run, "measure_losses", invented(lambda _, name, budget, __: most[budget] if name == "learned" else 1)
    )
    done = fit(model, questions, tmp_path, tolerance=0.5, **FAST | {"budgets": ["1/2", "1/3", "1/4"]})
    assert done["budget"] == chosen
    failed = "1/3" if chosen == 1 / 2 else "1/2"
    assert done["verdict"][-1] == (
        f"The walk down the budgets ended at {failed}, the first not surely within the tolerance: that 1/4 would be "
        "does not count, since one of many tries may be lucky."
    )


def test_a_loss_on_the_test_part_beyond_the_tolerance_is_said(model, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure_losses", invented(lambda part, *_: 0.4 if part == "validation" else 1.4))
    done = fit(model, questions, tmp_path, tolerance=0.5, **FAST)
    assert done["budget"] == 1 / 4
    assert "The test contexts do not confirm the tolerance: expect the loss that they show." in done["verdict"]


def test_a_heuristic_that_does_as_well_is_named_with_the_allocation_that_suits_it(
    model, questions, tmp_path, monkeypatch
):
    def most(part, policy, budget, allocation):
        return {("learned", "global"): 0.1, ("keydiff", "global:softmax"): 0.2}.get((policy, allocation), 0.9)

    monkeypatch.setattr(run, "measure_losses", invented(most))
    done = fit(model, questions, tmp_path, tolerance=0.5, **FAST)
    assert done["enough"] == ["keydiff"]
    assert done["verdict"][0].endswith(" on 18 validation questions is 1/4, and no smaller one was tried.")
    assert done["verdict"][-1] == (
        "Without training, keydiff (global:softmax; on the test contexts it loses 10.00 points) stays within the "
        "tolerance at 1/4 too: this may be enough."
    )
    assert (tmp_path / "policy" / "policy.json").is_file()  # the learned one is exported all the same


# -- interruptions -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(model, questions, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure_losses", invented(lambda part, policy, budget, _: 0.1 / budget))
        return fit(model, questions, tmp_path_factory.mktemp("uninterrupted"), tolerance=0.3, **FAST)


@pytest.mark.parametrize("phase", ["record", "train", "save_pretrained", "chosen", "tested", "card"])
def test_an_interrupted_fit_goes_on_and_ends_alike(uninterrupted, model, questions, tmp_path, monkeypatch, phase):
    done, out = uninterrupted, tmp_path / "out"
    monkeypatch.setattr(run, "measure_losses", invented(lambda part, policy, budget, _: 0.1 / budget))

    def stops(*_, **__):
        raise KeyboardInterrupt

    def measured_until(part):
        real = run.measure_losses
        return lambda *given, **more: stops() if given[2] == part and given[4] else real(*given, **more)

    def half_saved(policy, folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "policy.safetensors").write_bytes(b"half")
        stops() if Path(folder).name == "policy" else None

    with monkeypatch.context() as patch:
        if phase in ("chosen", "tested"):
            patch.setattr(run, "measure_losses", measured_until("validation" if phase == "chosen" else "test"))
        elif phase == "save_pretrained":
            real = run.train

            def trained(*given, **more):
                policy = real(*given, **more)
                patch.setattr(type(policy), "save_pretrained", half_saved)
                return policy

            patch.setattr(run, "train", trained)
        else:
            patch.setattr(run, phase, stops)
        with pytest.raises(KeyboardInterrupt):
            fit(model, questions, out, tolerance=0.3, **FAST)
    with pytest.raises(UserError, match="is not finished: run the same"):
        load_fit(model, out)
    before = {file: file.stat().st_mtime_ns for file in out.glob("traces/*.h5")}
    assert bool(before) == (phase != "record")
    calls = []
    real_choice = run._Pipeline._choose
    monkeypatch.setattr(run._Pipeline, "_choose", lambda fit, policy: calls.append(policy) or real_choice(fit, policy))
    again = fit(model, questions, out, tolerance=0.3, **FAST)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert len(calls) == (phase not in ("tested", "card"))
    for name in ("rows", "budget", "enough", "verdict", "settings"):
        assert again[name] == done[name]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_other_settings_in_the_same_folder_are_refused(finished, model, questions, continuations):
    _, out = finished
    for change, sentence in (
        ({"tolerance": 0.8}, "was begun with tolerance 0.9 and this call has 0.8"),
        ({"tolerance": 0.9, "seed": 1}, "begun with seed 0 and this call has 1"),
        ({"tolerance": 0.9, "allocation": "uniform"}, "begun with allocation global and this call has uniform"),
    ):
        with pytest.raises(UserError, match=sentence):
            fit(model, questions, out, **FAST | change)
    with pytest.raises(UserError, match=r"begun with model [0-9a-f]{12} and this call has [0-9a-f]{12}"):
        fit(tiny_model("llama", seed=1, max_position_embeddings=128), questions, out, tolerance=0.9, **FAST)
    with pytest.raises(UserError, match="begun with file"):
        fit(model, continuations, out, tolerance=0.9, **FAST)


def test_a_fit_that_recorded_nothing_yet_may_be_begun_otherwise(model, questions, continuations, tmp_path, monkeypatch):
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    wrong = [line | {"answer_ids": [(i + 1) % VOCABULARY for i in line["answer_ids"]]} for line in lines]
    file = lines_of(tmp_path / "wrong.jsonl", wrong)
    with pytest.raises(UserError, match=r"with its full cache the model answers 0.0% of 18 validation questions"):
        fit(model, file, tmp_path / "out", tolerance=0.3, **FAST)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["fit.json"]
    monkeypatch.setattr(run, "measure_losses", invented(lambda *_: 0.1))
    assert fit(model, continuations, tmp_path / "out", tolerance=50.0, **FAST)["finished"]


UNUSABLE = {
    "too few contexts": ([{"context_ids": [i, 2], "continuation_ids": [[3, 4]]} for i in range(15)],
                         "holds 15 different contexts and at least 16 are needed"),
    "too few questions": ([{"context_ids": [i, 2], "question_ids": [3], "answer_ids": [4]} for i in range(40)],
                          r"gives 40 contexts, and about 552 are needed to tell a loss of 0.01 \(of 10 questions"),
    "short continuations": ([{"context_ids": [1, 2], "continuation_ids": [[3]]}], "a continuation of 1 tokens"),
    "no continuation": ([{"context_ids": [1, 2], "continuation_ids": []}], "at least one continuation"),
    "neither": ([{"context": "a"}], "neither a question and an answer nor continuations"),
    "a bad line": ([{"context_ids": [1, 2], "question_ids": [3], "answer_ids": [4]}, {"context_ids": [1]}], "line 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_data_are_refused_before_anything_is_written(model, tmp_path, name):
    lines, sentence = UNUSABLE[name]
    with pytest.raises(UserError, match=sentence):
        fit(model, lines_of(tmp_path / "data.jsonl", lines), tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("asked", [1, 3])
def test_as_many_contexts_as_a_refusal_names_are_enough(asked):
    def judge(contexts):
        of_each = tuple(TaskQuestion((1,), (i,)) for i in range(asked))
        made = [TaskContext((i, 2), of_each) for i in range(contexts)]
        run._refuse_too_few(_split("accuracy", made, 160, {"file": "data"}), 0.01, 160)

    with pytest.raises(UserError, match=r"data gives 40 contexts, and about \d+ are needed") as refused:
        judge(40)
    needed = int(re.search(r"about (\d+)", str(refused.value))[1])
    judge(needed)
    with pytest.raises(UserError):
        judge(needed - 8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tolerance": 0.0}, "tolerance is 0.0; expected a number above 0"),
        ({"budgets": ("1/2", "64")}, "budget 64 cannot be chosen; expected shares"),
        ({"budgets": ("1.0",)}, "budget 1.0 cannot be chosen"),
        ({"budgets": ("1/90",)}, "1/90 of the shortest context, 24 tokens, is no whole token"),
        ({"agent": "expected", "allocation": "global"}, "global"),
        ({"agent": "nobody"}, "unknown agent"),
        ({"tokens": 64}, "lengths of their own: leave tokens"),
        ({"count": 4}, "count is 4; expected at least 8"),
    ],
)
def test_unusable_settings_are_refused_before_anything_is_written(model, questions, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        fit(model, questions, tmp_path / "out", **{"tolerance": 0.9} | FAST | change)
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(model, questions, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other things than an earlier fit"):
        fit(model, questions, tmp_path, tolerance=0.9, **FAST)
    with pytest.raises(UserError, match=r"holds no fit\.json; expected a folder that `kv-gym fit` wrote"):
        load_fit(model, tmp_path)
    (tmp_path / "fit.json").write_text('{"format": 1, "finished": true, "settings": {}, "seconds": {}}')
    with pytest.raises(UserError, match="remove the folder and fit again"):
        load_fit(model, tmp_path)
    (tmp_path / "fit.json").write_text('{"format": 2, "finished": false, "settings": {}, "seconds": {}}')
    with pytest.raises(UserError, match="newer than 1: upgrade kv-gym"):
        load_fit(model, tmp_path)
    with pytest.raises(UserError, match=r"nothing\.jsonl cannot be read"):
        fit(model, tmp_path / "nothing.jsonl", tmp_path / "out", **FAST)


def test_end_to_end_refuses_a_model_that_it_cannot_train_through_before_recording(questions, tmp_path):
    with pytest.raises(UserError, match="layers without full attention"):
        fit(tiny_model("gemma3"), questions, tmp_path / "out", tolerance=0.9, progress=False)
    assert not (tmp_path / "out").exists()


# -- the example -------------------------------------------------------------------------------------------------------


def test_the_example_answers_from_the_fitted_cache(model, questions, tmp_path, monkeypatch, capsys, few_heuristics):
    model.save_pretrained(tmp_path / "model")
    given = {"--model": tmp_path / "model", "--data": questions, "--out": tmp_path / "out", "--tolerance": 0.9}
    given |= {"--steps": 4}
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *(str(word) for pair in given.items() for word in pair)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"^\d+ slots hold 24 tokens of 6 heads$", said, re.MULTILINE)
    assert len(re.findall(r"^(?:right|wrong) \[\d+\]$", said, re.MULTILINE)) == QUESTIONS
    assert json.loads((tmp_path / "out" / "fit.json").read_text())["agent"] == "end_to_end"


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 60
