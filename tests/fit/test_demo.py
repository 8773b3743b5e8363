"""The demo from end to end, made small: it learns, depends on its seed, and can be run again."""

import json

import pytest

from kv_gym.files import MODEL
from kv_gym.fit import demo

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODEL.is_dir(), reason="the reference model is not here")]


@pytest.fixture
def small(monkeypatch):
    for name, value in {"TRAINING_CONTEXTS": 24, "HELD_OUT_CONTEXTS": 3, "TOKENS": 256, "STEPS": 60}.items():
        monkeypatch.setattr(demo, name, value)


def test_it_writes_report_policy_and_log_and_may_run_again(small, tmp_path, capsys):
    learned = []
    for seed in (0, 0, 1):
        report = demo.demo(tmp_path, seed=seed, progress=False)
        rows = json.loads((tmp_path / "replay.json").read_text())["rows"]
        kept = {(row["policy"], row["budget"]): row["utility_kept"] for row in rows}
        assert kept["learned", 0.25] > max(kept[name, 0.25] for name in demo.POLICIES)
        learned.append([value for (name, _), value in kept.items() if name == "learned"])
        text = report.read_text()
        assert "| learned | 1/8 |" in text and "| full_cache | 1.0 |" in text
        assert (tmp_path / "report.png").is_file() and (tmp_path / "policy" / "policy.json").is_file()
        assert len(list((tmp_path / "training" / "tensorboard").glob("events*"))) == 1
    assert learned[0] == learned[1] != learned[2]
    assert capsys.readouterr().out.count("question ") >= 12
