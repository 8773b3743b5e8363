"""Plain lines where stderr is no terminal, and how durations are said."""

import pytest

from kv_gym import progress
from kv_gym.progress import ProgressBar, duration


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_half_minute_and_one_at_the_end(clock, capsys):
    with ProgressBar("record", 40, 10) as bar:
        for seconds in (10, 20, 31, 40, 62):
            clock[0] = seconds
            bar.advance(2)
        bar.update(40, "held-out reward 0.500")
    assert capsys.readouterr().err.splitlines() == [
        "record: 16 of 40, about 2 min left",
        "record: 20 of 40, about 2 min left",
        "record: 40 of 40, held-out reward 0.500",
    ]


def test_short_or_hidden_work_leaves_no_line(clock, capsys):
    for shown, seconds in ((True, 29), (False, 300)):
        with ProgressBar("record", 4, shown=shown) as bar:
            clock[0] += seconds
            bar.advance(4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.4, "3 s"), (89, "89 s"), (90, "2 min"), (7140, "119 min"), (11_990, "3 h 20 min")]
)
def test_durations_are_said_as_people_do(seconds, said):
    assert duration(seconds) == said
