"""kvpress's own presses on the questions of `real_model.py`: the rows of a peer.

    make kvpress
    .venv-kvpress/bin/python benchmarks/real_model_kvpress.py --contexts 12 --publish benchmarks/results/real_model

Contexts are read as kvpress's pipeline reads them (`with press(model): model.model(...)` into a DynamicCache). Every
question is asked of the compressed cache, its answer fed whole and judged token by token, as `real_model.py` does.
kvpress protects what each press protects, and evicts in every layer alike; `AdaKV` deals slots out among the heads of a
layer, KVzip among all heads of the model. Caches of these two keep all slots and mask the evicted ones.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kvpress
import torch
from transformers import DynamicCache

from kv_gym.budgets import parse_budget
from kv_gym.evaluation.leaderboard import publish, read_rows
from kv_gym.evaluation.outcomes import Outcome, measured_fields
from kv_gym.evaluation.rows import complete
from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.evaluation.tasks.scripted import TaskScript, judge_answers
from kv_gym.models import load_model
from kv_gym.progress import ProgressBar

WEIGHTS = "4-bit copy of SmolLM2-135M-Instruct"
PEER = "kvpress "  # what the names of its rows begin with
# by name: how a press is made for a share of slots that goes, and who gets the slots
PRESSES: dict[str, tuple[Callable[[float], Any], str]] = {
    "KVzip, reads twice": (lambda ratio: kvpress.KVzipPress(ratio), "global"),
    "AdaKV of ExpectedAttention": (
        lambda ratio: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio, epsilon=1e-2)),
        "ada",
    ),
    "ExpectedAttention": (lambda ratio: kvpress.ExpectedAttentionPress(ratio, epsilon=1e-2), "uniform"),
    "SnapKV": (lambda ratio: kvpress.SnapKVPress(ratio), "uniform"),
    "KeyDiff": (lambda ratio: kvpress.KeyDiffPress(ratio), "uniform"),
    "TOVA": (lambda ratio: kvpress.TOVAPress(ratio), "uniform"),
    "StreamingLLM": (lambda ratio: kvpress.StreamingLLMPress(ratio), "uniform"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/models/smollm2-135m-instruct", help="folder or hub id")
    parser.add_argument("--task", default="needle:1024:keys=4")
    parser.add_argument("--contexts", type=int, default=12, help="the first of the task's")
    parser.add_argument("--budgets", default="1/2,1/4,1/8,1/16", help="shares of the slots that stay")
    parser.add_argument("--publish", type=Path, required=True, help="folder of compact rows, to which these are added")
    arguments = parser.parse_args()

    logging.getLogger("kvpress").setLevel(logging.ERROR)
    model, tokenizer = load_model(arguments.model, "cpu", "float32")
    (task,) = parse_tasks(f"{arguments.task}:count={arguments.contexts}", tokenizer)
    budgets = [float(parse_budget(each)) for each in arguments.budgets.split(",")]
    rows, scripts = [], list(task.scripts)  # type: ignore[attr-defined]
    with ProgressBar("kvpress", len(PRESSES) * len(budgets) * len(scripts)) as bar:
        for name, (make, allocation) in PRESSES.items():
            for budget in budgets:
                outcomes = []
                for script in scripts:
                    outcomes += measured(model, make(1 - budget), script)
                    bar.advance(1)
                row = {
                    "policy": PEER + name, "budget": budget, "allocation": allocation, "evicted": "drop",
                    "select": "all", "episodes": "none", "policy_bytes": 0, "task": task.name, "trigger": task.trigger,
                    "chosen_on_validation": True,
                }  # fmt: skip
                rows.append(complete(row | measured_fields(outcomes), name))
    known = [row for row in read_rows(arguments.publish) if not _is_replaced(row, task.name)]
    publish([*known, *(row | {"weights": WEIGHTS} for row in rows)], arguments.publish)


def _is_replaced(row: dict, task: str) -> bool:
    return row["task"] == task and row["policy"].startswith(PEER)


@torch.no_grad()
def measured(model: Any, press: Any, script: TaskScript) -> Iterator[Outcome]:
    """Outcomes of one press on one context, by its parts."""
    started, cache = time.thread_time(), DynamicCache()
    ids = torch.tensor([script.segments[0].ids])
    with press(model):
        model.model(input_ids=ids, past_key_values=cache)
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    lengths = [cache.get_seq_length(layer) for layer in range(len(cache.layers))]
    for question in script.questions:
        asked = torch.tensor([[*question.question_ids, *question.answer_ids]])
        positions = torch.arange(ids.shape[1], ids.shape[1] + asked.shape[1] - 1)[None]
        size = len(question.answer_ids)
        logits = model(
            input_ids=asked[:, :-1], past_key_values=cache, position_ids=positions, logits_to_keep=size
        ).logits
        for layer, length in zip(cache.layers, lengths, strict=True):  # the question leaves again
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        likelihood, expected = logits.float().log_softmax(-1), asked[:, -size:]
        ((right,), (nll,)) = judge_answers(likelihood, expected)
        begun = int(likelihood[0, 0].argmax() == expected[0, 0])
        seconds = (time.thread_time() - started) / len(script.questions)
        answers = ((begun + int(right), round(nll * size, 3)),)
        yield Outcome(script.id, question.part, 1, float(right), nll, nbytes, None, seconds, answers)


if __name__ == "__main__":
    main()
