"""Fit a cache to questions of one kind in 20 minutes: the policy that `real_model.py --fitted` measures.

    make real-model
    python benchmarks/real_model_fit.py --out runs/real_model/fit
    python benchmarks/real_model.py --out runs/real_model --fitted ... --publish benchmarks/results/real_model

Writes questions with the wordings and the novel of a test task to `OUT/questions.jsonl`, as a user's own data would be:
of the same kind as those that `real_model.py` asks, but of other contexts (another seed). Then it runs what
``kv-gym fit --data OUT/questions.jsonl --minutes 20 --out OUT/fit`` does. Interrupted, the same call goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kv_gym.evaluation.rows import write_rows
from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.fit import fit
from kv_gym.models import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/models/smollm2-135m-instruct", help="folder or hub id")
    parser.add_argument("--task", default="needle:1024:keys=4:seed=11", help="whose questions the cache is fitted to")
    parser.add_argument("--contexts", type=int, default=100, help="of that task, half of them to train on")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="share of the questions that may be lost by the budget it chooses"
    )
    parser.add_argument("--workers", type=int, help="processes that record and measure")
    parser.add_argument("--out", type=Path, default=Path("runs/real_model/fit"))
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model)
    (task,) = parse_tasks(f"{arguments.task}:count={arguments.contexts}", tokenizer)
    questions = arguments.out / "questions.jsonl"
    write_rows(
        questions,
        (
            {"context_ids": script.segments[0].ids, "question_ids": each.question_ids, "answer_ids": each.answer_ids}
            for script in task.scripts  # type: ignore[attr-defined]
            for each in script.questions
        ),
    )
    fit(
        model, questions, arguments.out / "fit", tokenizer=tokenizer, minutes=arguments.minutes,
        tolerance=arguments.tolerance, workers=arguments.workers,
    )  # fmt: skip


if __name__ == "__main__":
    main()
