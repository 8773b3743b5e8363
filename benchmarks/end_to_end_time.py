"""What `end_to_end` pays per training step, with and without what makes it cheaper, in turns in one run.

``whole`` keeps all log-probabilities of the full cache and reads every slot; ``top`` keeps the highest 64 of each
token; ``near`` leaves slots far below the threshold out as well. Each starts from the same `joint` policy, which is
trained here, since a network without training scores all slots alike. ``forgetful`` is ``whole`` where the
log-probabilities do not fit into memory, as on a trace set of some hundred contexts.

Run: ``python benchmarks/end_to_end_time.py --json benchmarks/results/end_to_end_time.json``
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.evaluation.tasks.prompts import prompts_of_tasks
from kv_gym.models import load_model
from kv_gym.traces import record
from kv_gym.training import end_to_end, train
from kv_gym.training.registry import agent_settings
from kv_gym.training.trainer import Trainer

WAYS = {
    "forgetful": {"top": None, "near": None},
    "whole": {"top": None, "near": None},
    "top": {"near": None},
    "near": {},
}


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="runs/models/smollm2-135m-instruct")
    parser.add_argument("--tasks", default="needle:640:keys=4:split=train:count=4", help="whose contexts are recorded")
    parser.add_argument("--joint-steps", type=int, default=40, help="of the policy to start from")
    parser.add_argument("--contexts", type=int, default=2, help="contexts per step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prompts = list(prompts_of_tasks(parse_tasks(args.tasks, tokenizer)))
        traces = record(model, prompts, Path(folder) / "traces", stats=())
        start = train("joint", traces, Path(folder) / "joint", model=model, steps=args.joint_steps, target="mean")
        trainers = {}
        for name, changes in WAYS.items():
            settings = agent_settings("end_to_end", contexts=args.contexts, **changes)
            trainers[name] = Trainer("end_to_end", settings, 0, traces, start, model)
            trainers[name].setup()
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        loss: dict[str, list[float]] = {name: [] for name in WAYS}
        limit = end_to_end.CACHED_BYTES
        for number in range(-1, args.rounds):  # in the first round log-probabilities are read
            for name, trainer in trainers.items():
                end_to_end.CACHED_BYTES = 0 if name == "forgetful" else limit
                began = time.perf_counter()
                metrics = trainer.train_step()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - began)
                    loss[name].append(float(metrics["loss"]))
    print("| way | seconds per step | steps per second | times `forgetful` | loss |\n|---|---|---|---|---|")
    for name, spent in seconds.items():
        step = statistics.median(spent)
        ratio = statistics.median(a / b for a, b in zip(seconds["forgetful"], spent, strict=True))
        rows.append({"way": name, "step_seconds": step, "speed": ratio, "loss": statistics.mean(loss[name])})
        print(f"| {name} | {step:.2f} | {1 / step:.3f} | {ratio:.2f} | {rows[-1]['loss']:.4f} |")
    if args.json:
        about = {"model": Path(args.model).name, "tasks": args.tasks, "contexts": args.contexts}
        about |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
