"""The example runs, and a policy answers inside kvpress what it answers in kv_gym's own cache."""

import runpy
from pathlib import Path

from kv_gym.evaluation import evaluate
from kv_gym.evaluation.tasks import reference_tasks
from kv_gym.models import load_model
from kv_gym.reference import MODEL

EXAMPLE = Path(__file__).parents[2] / "examples" / "kvpress_press.py"


def test_the_example_answers_as_the_live_cache_does(capsys):
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    names = ["h2o", "keydiff", "snapkv"]
    found = runpy.run_path(str(EXAMPLE))["main"](names, contexts=2)
    assert "of 16 answers from 25% of the cache" in capsys.readouterr().out
    rows = evaluate(names, [0.25], model=load_model(MODEL)[0], tasks=reference_tasks(count=2), progress=False)["rows"]
    live = {row["policy"]: row["accuracy"] for row in rows}
    assert {name: found[name] for name in names} == {name: live[name] for name in names}
    assert 0 < found["h2o"] < 1  # not all alike
