"""The plan of a fit, from timings made by hand, and a fit that keeps to it."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from traced_models import VOCABULARY, tiny_model

from kv_gym.errors import UserError
from kv_gym.fit import fit, loss, run
from kv_gym.fit.plan import MARGIN, Limits, Plan, Stage, Timings, plan_whole, plan_within
from kv_gym.policies import make_policy
from kv_gym.training.pace import Pace

BOTH = ("joint", "end_to_end")
TIMINGS = Timings(  # about those of a model of 135 M parameters on one core: 5 s to record 640 tokens
    record=5 / 640, read=4.0, ask=0.6, paces={"joint": Pace(4.0, 0.1, 1.0, 1.0), "end_to_end": Pace(0.5, 1.0, 5.0, 5.0)}
)
LIMITS = Limits(
    lengths=[640] * 160, validation=80, test=80, fewest=10, budgets=[2.0**-i for i in range(1, 13)],
    fixed_budgets=False, heuristics=(8, 5), steps={"joint": (600, 50), "end_to_end": (1200, 100)},
)  # fmt: skip


@pytest.mark.parametrize("minutes", [12, 20, 40, 90, 300, 2000])
def test_a_plan_fits_into_its_time_and_uses_it(minutes):
    plan = plan_within(minutes, BOTH, LIMITS, TIMINGS, spent=60.0)
    assert plan.total <= 60 * minutes * MARGIN
    assert set(plan.seconds) >= {"measure", "full_cache", "record", "chosen", "tested", "train"}
    assert 8 <= plan.contexts <= 160 and 10 <= plan.validation <= 80 and 5 <= plan.test <= 80
    full = plan.stages[-1] == Stage("end_to_end", 1200, 100, plan.stages[-1].seconds)
    assert full or plan.total > 0.8 * 60 * minutes * MARGIN
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_more_time_is_used_for_more():
    plans = [plan_within(minutes, BOTH, LIMITS, TIMINGS, spent=60.0) for minutes in (12, 30, 120, 2000)]
    for less, more in pairwise(plans):
        assert (less.contexts, less.validation) <= (more.contexts, more.validation)
    assert [stage.agent for stage in plans[0].stages] == ["joint"]  # too short for both
    assert [stage.agent for stage in plans[-1].stages] == list(BOTH)
    assert (plans[-1].contexts, plans[-1].validation, plans[-1].test) == (160, 80, 80)
    assert len(plans[0].budgets) == 6 and plans[0].budgets[0] == 1 / 2 and len(plans[-1].budgets) == 12


def test_shorter_contexts_are_taken_where_few_long_ones_would_fit():
    lengths = [4096, 512] * 40
    plan = plan_within(20, BOTH, replace(LIMITS, lengths=lengths), TIMINGS, spent=60.0)
    assert plan.longest == 512 and plan.contexts >= 20
    assert plan.selected(lengths) == [2 * i + 1 for i in range(plan.contexts)]
    assert plan_within(2000, BOTH, replace(LIMITS, lengths=lengths), TIMINGS, 60.0).longest == 4096


def test_budgets_of_the_callers_own_are_all_kept():
    plan = plan_within(20, BOTH, replace(LIMITS, fixed_budgets=True), TIMINGS, spent=60.0)
    assert len(plan.budgets) == 12


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fewest": 80}, "80 validation and 40 test contexts alone take"),
        ({"lengths": [16_000] * 20}, "recording 8 contexts takes"),
    ],
)
def test_a_time_that_is_too_short_is_refused_with_one_that_is_not(change, why):
    limits = replace(LIMITS, **change)
    with pytest.raises(UserError, match=rf"^10 minutes are too short for this fit on this machine, where {why}") as no:
        plan_within(10, BOTH, limits, TIMINGS, spent=60.0)
    enough = int(str(no.value).partition("give at least ")[2].split()[0])
    assert plan_within(enough, BOTH, limits, TIMINGS, spent=60.0).total <= 60 * enough


def test_training_too_slow_for_the_time_is_refused():
    slow = replace(TIMINGS, record=1e-4, paces={"joint": Pace(0.0, 0.0, 60.0, 1.0)})
    with pytest.raises(UserError, match=r"30 steps of joint take \d+ min: give at least \d+ minutes"):
        plan_within(3, ["joint"], replace(LIMITS, validation=4, test=4, fewest=4), slow, spent=10.0)


def test_a_fit_without_a_limit_says_how_long_it_takes():
    plan = plan_whole("end_to_end", LIMITS, TIMINGS, spent=60.0)
    assert plan.contexts == 160 and plan.seconds["record"] == pytest.approx(800)
    # 8 contexts prepared, 144 used for the first time, 1,200 steps, 13 validations on 16 contexts
    assert plan.seconds["train"] == pytest.approx(4 + 144 + 6000 + 13 * 16 * 5)
    assert plan.describe()[-1].startswith("about 2 h 56 min on this machine; --minutes N plans for a time")


def test_training_gives_way_to_phases_that_took_longer_than_planned():
    plan = plan_within(60, BOTH, LIMITS, TIMINGS, spent=60.0)
    planned = {name: plan.seconds[name] for name in ("measure", "full_cache", "record")}
    assert plan.training_time(planned, 0) >= plan.seconds["warm_start"]
    slow = {name: 1.3 * seconds for name, seconds in planned.items()}
    assert plan.training_time(slow, 0) < plan.seconds["warm_start"]
    trained = planned | {"warm_start": plan.seconds["warm_start"]}
    resumed = plan.training_time(trained | {"train": 100.0}, 1)  # counted from the stage's start, before the stop
    assert resumed == pytest.approx(plan.training_time(trained, 1))
    assert plan_whole("joint", LIMITS, TIMINGS, 60.0).training_time(planned, 0) is None


def test_choosing_and_testing_share_what_is_left():
    plan = plan_within(60, BOTH, LIMITS, TIMINGS, spent=60.0)
    before = {name: plan.seconds[name] for name in plan.seconds if name not in ("chosen", "tested")}
    late = before | {"train": before["train"] + 300}
    left = 60 * 60 * MARGIN - sum(late.values())
    chosen = plan.judging_time(late, "chosen")
    assert chosen == pytest.approx(left * plan.seconds["chosen"] / (plan.seconds["chosen"] + plan.seconds["tested"]))
    assert plan.judging_time(late | {"chosen": chosen}, "tested") == pytest.approx(left - chosen)
    assert plan.judging_time(late | {"chosen": 9999.0}, "tested") == 0
    assert plan_whole("joint", LIMITS, TIMINGS, 60.0).judging_time(before, "chosen") is None


@pytest.fixture(scope="module")
def continuations(tmp_path_factory):
    generator = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()

    file = tmp_path_factory.mktemp("data") / "continuations.jsonl"
    lines = [{"context_ids": ids(24), "continuation_ids": [ids(4), ids(6)]} for _ in range(20)]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


@pytest.mark.slow
def test_a_fit_within_minutes_trains_joint_and_then_through_the_model(continuations, tmp_path, monkeypatch, capsys):
    model = tiny_model("llama", initializer_range=0.1, max_position_embeddings=128)
    monkeypatch.setattr(run, "HEURISTICS", {"recency": ("uniform",)})
    pace = Pace(0.0, 0.0, 5.0, 1.0)
    timings = Timings(0.01, 0.1, 0.01, dict.fromkeys(BOTH, pace))
    monkeypatch.setattr(run._Pipeline, "_timings", lambda *_: timings)
    done = fit(model, continuations, tmp_path / "out", tolerance=50.0, minutes=10)
    first, second = done["plan"]["stages"]
    assert (first["agent"], second["agent"]) == BOTH and 30 <= second["steps"] < 120
    start, end = (make_policy(tmp_path / "out" / folder) for folder in ("warm-start", "training"))
    assert start.training["settings"]["steps"] == first["steps"]
    assert end.training["agent"] == "end_to_end" and end.training["start"] != "scratch"
    assert done["agent"] == "joint -> end_to_end" and done["stopped_after"] is None
    said = capsys.readouterr().err
    assert f"train joint for {first['steps']} steps" in said and "of 10 min on this machine" in said
    monkeypatch.setattr(run._Pipeline, "_timings", lambda *_: pytest.fail("timed again"))
    assert fit(model, continuations, tmp_path / "out", tolerance=50.0, minutes=10)["plan"] == done["plan"]
    with pytest.raises(UserError, match=r"begun with minutes 10(\.0)? and this call has 20"):
        fit(model, continuations, tmp_path / "out", tolerance=50.0, minutes=20)

    # out of time: no more contexts than a choice and a test need, the same ones for heuristics and policy
    state = json.loads((tmp_path / "out" / "fit.json").read_text())
    monkeypatch.setattr(Plan, "judging_time", lambda *_: 0.0)
    monkeypatch.setattr(loss, "unseen_questions", partial(loss.unseen_questions, rows=1))
    (tmp_path / "out" / "fit.json").write_text(json.dumps(state | {"finished": False}))
    late = fit(model, continuations, tmp_path / "out", tolerance=50.0, minutes=10)
    counts = {task: {row["n"] for row in late["rows"] if row["task"] == task} for task in ("validation", "test")}
    assert counts == {"validation": {4}, "test": {4}}
    assert late["plan"]["validation"] == 5 and "the time is short: 4 of 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"minutes": 0}, "minutes is 0; expected a number above 0"),
        ({"minutes": 5, "steps": 10}, "the settings steps belong to an agent, and the time chooses it"),
    ],
)
def test_unusable_times_are_refused_before_anything_is_written(continuations, tmp_path, given, sentence):
    with pytest.raises(UserError, match=sentence):
        fit(tiny_model("llama"), continuations, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
