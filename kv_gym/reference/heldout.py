"""The held-out texts that results are reported on, fixed by seed and hash.

``heldout.json`` was written before the first policy was measured; a test recomputes every hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kv_gym.files import read_json
from kv_gym.reference.generator import FIRST_HELD_OUT_SEED, TASKS, Context, make_context, refuse_unknown

FILE = Path(__file__).with_name("heldout.json")
LENGTHS = (512, 1024)
CONTEXTS = 64  # of each task and length
LONGER_SETS = (("multi_key", 512, 256),)  # begin with the same contexts; for results that need many questions
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
            questions = [(question.question, question.answer) for question in context.questions]
            digest.update(json.dumps([context.words, questions]).encode())
        return digest.hexdigest()


def held_out(task: str, tokens: int, contexts: int | None = None) -> HeldOut:
    """The pinned set of a task at a length of 512 or 1,024 tokens; another length is made from the same seeds.

    Args:
        task: one of the generator's.
        tokens: words per context.
        contexts: how many there should be, 64 by default; more only where a longer set is pinned (else the longest).

    Raises:
        UserError: unknown task, or a length that the density does not divide.
    """
    refuse_unknown(task, tokens)
    pinned = [row for row in read_json(FILE) if (row["task"], row["tokens"]) == (task, tokens)]
    if not pinned:
        return _unpinned(task, tokens)
    enough = [row for row in pinned if row["contexts"] >= (contexts or CONTEXTS)]
    return HeldOut(**(enough or pinned[-1:])[0])


def _unpinned(task: str, tokens: int, contexts: int = CONTEXTS) -> HeldOut:
    return HeldOut(task, tokens, contexts, QUESTIONS, FIRST_HELD_OUT_SEED + 10_000 * TASKS.index(task) + tokens)


def pin() -> None:
    """Write ``heldout.json``: done before the first policy was measured; `LONGER_SETS` were added later."""
    sizes = [(task, tokens, CONTEXTS) for task in TASKS for tokens in LENGTHS] + list(LONGER_SETS)
    rows = [asdict(texts) | {"sha256": texts.hash()} for texts in (_unpinned(*size) for size in sizes)]
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    pin()
