"""The held-out texts that results are reported on: fixed by seed, and pinned by hash.

``heldout.json`` was written before the first policy was measured; a test recomputes every hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kv_gym.reference.generator import FIRST_HELD_OUT_SEED, TASKS, Context, make_context, refuse_unmade

FILE = Path(__file__).with_name("heldout.json")
LENGTHS = (512, 1024)
CONTEXTS = 64  # of each task and length
QUESTIONS = 8  # of each context, as far as it has so many


@dataclass(frozen=True)
class HeldOut:
    """One set of held-out contexts: a task at a length, and the hash of its text."""

    task: str
    tokens: int
    contexts: int
    questions: int
    first_seed: int
    sha256: str = ""

    def make(self, count: int | None = None) -> Iterator[Context]:
        """The first `count` contexts (all by default)."""
        for i in range(self.contexts if count is None else min(count, self.contexts)):
            yield make_context(self.task, self.tokens, self.first_seed + i, self.questions)

    def hash(self) -> str:
        """SHA-256 of all words, questions and answers."""
        digest = hashlib.sha256()
        for context in self.make():
            asked = [(question.question, question.answer) for question in context.questions]
            digest.update(json.dumps([context.words, asked]).encode())
        return digest.hexdigest()


def held_out(task: str, tokens: int) -> HeldOut:
    """The pinned set of a task at a length of 512 or 1,024 tokens; another length is made from the same seeds.

    Raises:
        UserError: unknown task, or a length that the density does not divide.
    """
    refuse_unmade(task, tokens)
    for row in json.loads(FILE.read_text()):
        if (row["task"], row["tokens"]) == (task, tokens):
            return HeldOut(**row)
    return _unpinned(task, tokens)


def _unpinned(task: str, tokens: int) -> HeldOut:
    return HeldOut(task, tokens, CONTEXTS, QUESTIONS, FIRST_HELD_OUT_SEED + 10_000 * TASKS.index(task) + tokens)


def pin() -> None:
    """Write ``heldout.json``: done once, before the first policy number."""
    sets = [_unpinned(task, tokens) for task in TASKS for tokens in LENGTHS]
    rows = [asdict(one) | {"sha256": one.hash()} for one in sets]
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    pin()
