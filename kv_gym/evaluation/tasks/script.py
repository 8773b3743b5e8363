"""Scripts: what a cache is fed in one context, where it is cut, and which of the tokens are judged as answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Answer:
    """Tokens `start` to `stop` of a segment, judged as one answer; those before them are its prompt.

    `part` is what :attr:`kv_gym.evaluation.outcomes.Outcome.part` will say.
    """

    start: int
    stop: int
    part: str = ""


@dataclass(frozen=True)
class Segment:
    """Tokens that are fed in one forward and stay in the cache.

    Attributes:
        ids: the tokens.
        answers: which of them are judged. An answer may begin with the segment's first token, which the last token
            of the segment before predicts.
        cut: evict when they have been read.
    """

    ids: tuple[int, ...]
    answers: tuple[Answer, ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class Aside:
    """A question asked on a copy of the cache when all segments have been read: others do not see it."""

    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    part: str = ""


@dataclass(frozen=True)
class Script:
    """One context.

    Attributes:
        id: the same for all configurations.
        segments: fed one after another; at least one.
        asides: asked at the end, each on a copy of the cache.
        length: tokens of which a budget that is a share takes its share at every cut, so that the cache is bounded in
            slots; None means the tokens seen when the cut is made.
    """

    id: str
    segments: tuple[Segment, ...]
    asides: tuple[Aside, ...] = ()
    length: int | None = None

    @property
    def shape(self) -> tuple:
        """Scripts of equal shape can be fed together as rows of one cache; asides do not matter."""
        return self.length, tuple((len(each.ids), each.answers, each.cut) for each in self.segments)


def alike(scripts: Iterable[Script], rows: int) -> list[Sequence[Script]]:
    """Groups of at most `rows` scripts of one shape, ordered by the first of each."""
    shapes: dict[tuple, list[Script]] = {}
    for script in scripts:
        shapes.setdefault(script.shape, []).append(script)
    return [same[start : start + rows] for same in shapes.values() for start in range(0, len(same), rows)]


def scripts_hash(scripts: Iterable[Script]) -> str:
    """SHA-256 over everything that is fed, cut and asked."""
    digest = hashlib.sha256()
    for script in scripts:
        digest.update(json.dumps(astuple(script)).encode())
    return digest.hexdigest()
