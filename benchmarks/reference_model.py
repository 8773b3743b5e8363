"""How well the reference model answers with its full cache: ``python benchmarks/reference_model.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kv_gym.evaluation.configurations import full_cache
from kv_gym.evaluation.measure import measure
from kv_gym.evaluation.rows import result, write_json
from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.files import MODEL
from kv_gym.models import load_model
from kv_gym.reference.generator import TASKS
from kv_gym.reference.heldout import LENGTHS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("runs/reference_model.json"))
    arguments = parser.parse_args()
    model, _ = load_model(MODEL)
    rows, shown = [], Table("task", "tokens", "exact match", "NLL", "questions", title="Full cache, held-out seeds")
    for task in TASKS:
        for tokens in LENGTHS:
            row = measure(model, parse_tasks(f"{task}:{tokens}:unseen"), [full_cache()])[0] | {"tokens": tokens}
            rows.append(row)
            shown.add_row(task, str(tokens), f"{row['accuracy']:.1%}", f"{row['nll']:.4f}", str(row["questions"]))
    Console().print(shown)
    write_json(arguments.json, result(rows))


if __name__ == "__main__":
    main()
