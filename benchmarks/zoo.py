"""Train the zoo: every agent on the reference model, five seeds, each on contexts of its own.

    python benchmarks/zoo.py --out runs/held_out
    python benchmarks/zoo.py --out runs/held_out --agents end_to_end,rloo --leave-out multi_key

Policies are written to ``<out>/<agent>-<seed>``; what has been recorded or trained is not done again. With
``--leave-out`` the training contexts come from all other families of tasks, and the folders are named
``<agent>-without-<task>-<seed>``. `joint_utility` is `joint` with the attention that is kept as its aim,
`joint_hidden` sees hidden states alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from kv_gym.reference import MODEL
from kv_gym.reference.generator import TASKS
from kv_gym.reference.prompts import reference_prompts
from kv_gym.traces import TraceSet, load_model, record
from kv_gym.traces.prompts import Prompt
from kv_gym.training import train
from kv_gym.training.registry import agent_settings

AGENTS = ("end_to_end", "joint", "expected", "rloo", "grpo", "ppo", "distill", "foresight", "kvzap", "attention_gate")
OTHERS: dict[str, tuple[str, dict]] = {
    "joint_utility": ("joint", {"target": "utility", "loss": "softmax"}),
    "joint_hidden": ("joint", {"inputs": ["hidden"]}),
}
CONTEXTS = ((512, 192), (1024, 64))  # words, and contexts of that length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/held_out"))
    parser.add_argument("--agents", default=",".join(AGENTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--leave-out", choices=TASKS)
    arguments = parser.parse_args()
    model, tokenizer = load_model(MODEL)
    seconds = trained(
        model, tokenizer, arguments.out, "multi_key", arguments.seeds, arguments.agents.split(","), arguments.leave_out
    )[1]
    for agent, took in seconds.items():
        print(f"{agent:12} {' '.join(f'{each:.0f}' for each in took)} s")


def trained(
    model, tokenizer, out: Path, task: str, seeds: int, agents: Iterable[str], leave_out: str | None = None
) -> tuple[dict[str, Path], dict[str, list[float]]]:
    """Folders of agents trained on contexts of their seed, by agent and seed, and what each training took.

    With `leave_out`, `task` does not matter: contexts come from every family but that one.
    """
    mark = f"-without-{leave_out}" if leave_out else ""
    tasks = [family for family in TASKS if family != leave_out] if leave_out else [task]
    learned: dict[str, Path] = {}
    seconds: dict[str, list[float]] = {agent: [] for agent in agents}
    for seed in range(seeds):
        for agent in seconds:
            kind, settings = OTHERS.get(agent, (agent, {}))
            hidden = "hidden" in agent_settings(kind, **settings).inputs
            contexts = out / f"train{'-hidden' * hidden}{mark}-{seed}"
            training = training_contexts(model, tokenizer, contexts, tasks, seed, hidden=hidden)
            learned[f"{agent} {seed}"] = folder = out / f"{agent}{mark}-{seed}"
            if not (folder / "policy.json").exists():
                began = time.monotonic()
                train(kind, training, folder, seed=seed, model=model, **settings)
                (folder / "seconds").write_text(f"{time.monotonic() - began:.1f}")
            seconds[agent].append(float((folder / "seconds").read_text()))
    return learned, seconds


def training_contexts(
    model,
    tokenizer,
    folder: Path,
    tasks: list[str],
    seed: int,
    contexts: Iterable[tuple[int, int]] = CONTEXTS,
    hidden: bool = False,
) -> TraceSet:
    """The contexts of one seed, spread evenly over `tasks`; `contexts` are words, and how many of that length."""

    def drawn() -> Iterator[Prompt]:
        for i, (words, count) in enumerate(contexts):
            for task in tasks:
                yield from reference_prompts(task, words, -(-count // len(tasks)), 8, "train", seed + 500 * i)

    return record(model, list(drawn()), folder, tokenizer=tokenizer, hidden=hidden)


if __name__ == "__main__":
    main()
