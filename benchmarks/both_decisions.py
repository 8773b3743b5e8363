"""One policy for prefill and decode: `end_to_end` trained on one kind of decision points, on the other, and on both.

    python benchmarks/both_decisions.py --out runs/held_out
    kv-gym leaderboard benchmarks/both_decisions.yml --out runs/both_decisions --workers 2 \
        --publish benchmarks/results/both_decisions

Prefill decisions stand at the end of a context whose questions follow (the training contexts of ``zoo.py``). Decode
decisions stand in the midst of a text: dialogues, lists that are copied out and streams of facts are stopped at their
cuts, and what follows is the next words of the same text and the questions about what was read. A scorer sees one slot
at a time, so that slots which earlier cuts have taken do not change what it says of those that are left: training needs
no simulated evictions, only the right futures. Policies are written to ``<out>/end_to_end-<kind>-<seed>``, with kind
``decode`` or ``both``; what is there is not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.evaluation.tasks.scripted import TaskScript
from kv_gym.reference import MODEL
from kv_gym.reference.prompts import reference_prompts
from kv_gym.traces import TraceSet, load_model, record
from kv_gym.traces.prompts import Prompt
from kv_gym.training import train

AGENT = "end_to_end"
TEXTS = "dialogue:512:count=32:seed={0},copy:128:count=16:seed={0},fact:512:count=16:seed={0}"
FIRST_SEED = 900  # of the texts; contexts of zoo.py have seeds below 600, validation ones 899
AHEAD = 32  # tokens of the same text that follow a decision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/held_out"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    model, tokenizer = load_model(MODEL)
    for seed in range(arguments.seeds):
        for kind in ("decode", "both"):
            traces = contexts(model, tokenizer, arguments.out / f"train-{kind}-{seed}", kind, seed)
            train(AGENT, traces, arguments.out / f"{AGENT}-{kind}-{seed}", seed=seed, model=model)


def contexts(model, tokenizer, folder: Path, kind: str, seed: int) -> TraceSet:
    """The training contexts of a seed; of ``both``, half of each kind."""
    prompts = [prompt for script in _texts(seed) for prompt in decisions(script)]
    if kind == "both":
        prompts = prompts[::2] + list(reference_prompts("multi_key", 512, 128, 8, "train", seed))
    return record(model, prompts, folder, tokenizer=tokenizer)


def _texts(seed: int) -> list[TaskScript]:
    return [
        TaskScript(f"{task.name} {script.id}".replace(" ", "-"), script.segments, script.questions)
        for task in parse_tasks(TEXTS.format(FIRST_SEED + seed))
        for script in task.scripts
    ]


def decisions(script: TaskScript) -> Iterator[Prompt]:
    """A prompt for every cut of a text but the last, at most four: what was read, and what may come after it."""
    cuts = [index for index, segment in enumerate(script.segments) if segment.compress][:-1]
    for index in cuts[:: -(-len(cuts) // 4)]:
        read = [token for segment in script.segments[: index + 1] for token in segment.ids]
        later = script.segments[index + 1 :]
        ahead = [token for segment in later for token in segment.ids]
        questions = [(question.question_ids, question.answer_ids) for question in script.questions]
        turns = [(segment.ids, segment.answers[0]) for segment in later if segment.answers and not segment.compress]
        questions += [(ids[: answer.start], ids[answer.start : answer.stop]) for ids, answer in turns]
        # about facts that have been stated by then
        asked = [[*question, *answer] for question, answer in questions if _stands_in(answer, read)]
        yield Prompt(
            id=f"{script.id}-{index}",
            context_ids=read,
            continuation_ids=[ahead[:AHEAD], *asked],
            task=script.id.split("-")[0],
            split="train",
            text_hash=script.id,
        )


def _stands_in(part: tuple[int, ...], whole: list[int]) -> bool:
    return any(tuple(whole[i : i + len(part)]) == tuple(part) for i in range(len(whole) - len(part) + 1))


if __name__ == "__main__":
    main()
