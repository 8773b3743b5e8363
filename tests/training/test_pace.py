"""Training that keeps to a time: the plan from known timings, the deadline in the loop, and resuming."""

import json
import re
from types import SimpleNamespace

import pytest
from known_traces import write_known_traces

from kv_gym.errors import UserError
from kv_gym.policies import make_policy
from kv_gym.training import train, trainer
from kv_gym.training.pace import Pace, steps_within

FAST = {"hidden": 8, "rate": 0.02, "steps": 40, "every": 10}
PACE = Pace(prepare=1.0, first_use=0.5, step=2.0, validation=3.0)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return write_known_traces(tmp_path_factory.mktemp("known") / "traces")


def test_a_run_that_fits_keeps_its_settings():
    whole = PACE.seconds(100, 50, training=20, validation=2)
    assert whole == 8 * 1.0 + 20 * 0.5 + 100 * 2.0 + 3 * 2 * 3.0
    assert steps_within(whole, PACE, 20, 2, 100, 50) == (100, 50)


@pytest.mark.parametrize("seconds", [40, 60, 100, 150, 200, 235])
def test_the_most_steps_that_fit_are_planned_and_no_more(seconds):
    steps, every = steps_within(seconds, PACE, 20, 2, 100, 50)
    assert 1 <= steps <= 100 and 1 <= every <= steps
    assert PACE.seconds(steps, every, 20, 2) <= seconds < PACE.seconds(steps + 2, every, 20, 2)


def test_validations_take_a_small_part_of_a_limited_time():
    slow = Pace(0.0, 0.0, 1.0, 10.0)
    steps, every = steps_within(400, slow, 8, 1, 10_000, 5)
    assert -(-steps // every) == 6  # 60 of 400 seconds, and one more before the first step
    assert steps == 400 - 70


def test_a_time_in_which_no_step_fits_is_refused():
    with pytest.raises(
        UserError, match=r"^10 s are too short to train: .* takes about 32 s on this machine; give more"
    ):
        steps_within(10, PACE, 20, 2, 100, 50)


def test_a_run_within_minutes_says_what_it_will_do_and_resumes_its_plan(traces, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer.Trainer, "measure_pace", lambda run: Pace(0.0, 0.0, 1.0, 0.5))
    step, taken = trainer.Trainer.train_step, []

    def interrupted(run):
        taken.append(run.step)
        if len(taken) == 18:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(trainer.Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("joint", traces, tmp_path / "out", minutes=0.5, progress=True, **FAST)
    assert re.search(r"train joint: 2\d of 40 steps, about (29|30) s on this machine", capsys.readouterr().err)
    monkeypatch.setattr(trainer.Trainer, "measure_pace", lambda run: pytest.fail("the plan was made anew"))
    policy = train("joint", traces, tmp_path / "out", minutes=0.5, resume=True, progress=False, **FAST)
    assert taken[-1] + 1 == policy.training["settings"]["steps"] < 40
    assert policy.training["minutes"] == 0.5 and "stopped_after" not in policy.training
    again = train("joint", traces, tmp_path / "out", minutes=0.5, progress=False, **FAST)
    assert again.training == policy.training
    with pytest.raises(UserError, match="trained otherwise"):
        train("joint", traces, tmp_path / "out", progress=False, **FAST)


def test_a_run_that_is_slower_than_planned_ends_in_time_with_its_best_checkpoint(traces, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer.Trainer, "measure_pace", lambda run: Pace(0.0, 0.0, 1e-3, 1e-3))
    step, now = trainer.Trainer.train_step, [0.0]
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(run):
        now[0] += 4.0
        return step(run)

    monkeypatch.setattr(trainer.Trainer, "train_step", slow)
    train("joint", traces, tmp_path, minutes=1, progress=True, **FAST)
    assert now[0] == 60.0  # the limit
    about = json.loads((tmp_path / "policy.json").read_text())["training"]
    assert about["stopped_after"] == 15 and about["held_out_reward"] > 0
    assert f"the time is up after {about['stopped_after']} of 40 steps" in capsys.readouterr().err
    assert make_policy(tmp_path).comparable


def test_steps_are_timed_on_a_few_contexts_and_leave_no_trace(traces, tmp_path):
    timed = train("rloo", traces, tmp_path / "timed", minutes=5, progress=False, **FAST)
    assert timed.training["settings"]["steps"] == 40
    plain = train("rloo", traces, tmp_path / "plain", progress=False, **FAST)
    assert timed.training["held_out_reward"] >= plain.training["held_out_reward"]


@pytest.mark.parametrize("minutes", [0, -1.0])
def test_minutes_are_above_zero(traces, tmp_path, minutes):
    with pytest.raises(UserError, match="minutes are given to train for; expected a number above 0"):
        train("joint", traces, tmp_path, minutes=minutes, progress=False, **FAST)
    assert not list(tmp_path.iterdir())
