"""What a page policy is: it says which page leaves a full cache.

There are two kinds. A :class:`PageRankingPolicy` scores the candidates that it is shown, as a policy of slots scores
those of a KV cache: it has no memory of its own, and the same object acts in ``KVPage-v0``, in the simulator and
in an exported form. A :class:`QueuePolicy` keeps queues of its own, as most classic algorithms do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kv_gym.pages.cache import Candidates, PageCache
from kv_gym.pages.predictions import predicted_bits
from kv_gym.pages.requests import RequestTrace


class PagePolicy:
    """Anything that decides which page leaves.

    Class attributes:
        needs_future: it reads later requests: a bound, not a policy that could run.
        stochastic: it draws random numbers; results carry their seed.
        objects, prefix: whether it can serve ``semantics="objects"``, and ``"prefix"``, where only leaves that no
            request uses may go.
    """

    needs_future: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    objects: ClassVar[bool] = True
    prefix: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The registry's name: the name of the file that the policy lives in."""
        return type(self).__module__.rpartition(".")[2]


class QueuePolicy(PagePolicy, ABC):
    """A policy with queues of its own.

    The cache calls `start` once, then for every access `hit`, or on a miss `admits`, `evict` until there is room, and
    `admit`; after either, `discard`. `remove` tells that a page left because it expired.

    Attributes:
        now: number of the current access, set by the cache.
    """

    now: int = 0

    @abstractmethod
    def start(self, capacity: int, trace: RequestTrace) -> None:
        """Begin with an empty cache of `capacity` units or bytes; only oracles look into the trace."""

    @abstractmethod
    def hit(self, page: int) -> None:
        """A cached page is asked for."""

    def admits(self, page: int, size: int) -> bool:
        """Whether a page that missed shall be stored at all."""
        return True

    @abstractmethod
    def evict(self, incoming: int, size: int) -> int:
        """Choose the page that leaves to make room for `incoming`, and forget it."""

    @abstractmethod
    def admit(self, page: int, size: int) -> None:
        """A page that missed is stored."""

    @abstractmethod
    def remove(self, page: int) -> None:
        """A cached page has expired."""

    def discard(self, page: int) -> Iterable[int]:
        """Pages to throw out right after an access to `page`, forgotten by the policy already."""
        return ()


@dataclass(eq=False)
class PredictionPolicy(QueuePolicy, ABC):
    """A queue policy that is told one bit about every access; for pages of equal size.

    Attributes:
        predictor: see :func:`~kv_gym.pages.predictions.predicted_bits`.
        flip: share of bits turned over.
        seed: of the policy's draws and of what is turned over.
    """

    needs_future = True
    predictor: str = "oracle"
    flip: float = 0.0
    seed: int = 0

    def predictions(self, bits: np.ndarray, capacity: int, trace: RequestTrace) -> list[bool]:
        """What the predictor says of every access, where `bits` `[accesses]` are the true ones."""
        return predicted_bits(bits, trace, capacity, self.predictor, self.flip, self.seed).tolist()


class PageRankingPolicy(PagePolicy, ABC):
    """A policy that scores candidates; the one with the lowest score leaves, ties to the least recently used.

    Attributes:
        candidates: how many pages it is shown.
        drawn: how many of these are drawn at random from all that may leave; the others are the first of the order.
        order: lru, or the name of a policy with queues whose next victims are shown.
    """

    prefix = True
    candidates: int = 16
    drawn: int = 0
    order: str = "lru"

    @abstractmethod
    def rank(self, candidates: Candidates) -> np.ndarray:
        """Scores `[K]`, higher = keep."""

    def declines(self, incoming: int, victim: int, cache: PageCache) -> bool:
        """Whether the incoming page shall not be stored rather than `victim` leave (bypass)."""
        return False

    def observe(self, cache: PageCache, begin: int, end: int) -> None:
        """The accesses from `begin` up to `end`, a request, were served; ``cache.found`` says which of them hit."""

    def reset(self, seed: int) -> None:
        """Begin a run: a stochastic policy seeds its generator."""


class PageQueue(OrderedDict[int, int]):
    """Pages with their sizes, oldest first, and the sum of the sizes.

    Attributes:
        total: sum of the sizes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def push(self, page: int, size: int) -> None:
        """Add a page at the newest end."""
        self[page] = size
        self.total += size

    def pop_oldest(self) -> tuple[int, int]:
        """Take out the oldest page; its number and size."""
        page, size = self.popitem(last=False)
        self.total -= size
        return page, size

    def take(self, page: int) -> int:
        """Take out a page; its size."""
        size = self.pop(page)
        self.total -= size
        return size

    def trim(self, limit: int) -> None:
        """Drop the oldest pages until the rest fits into `limit`."""
        while self.total > limit:
            self.pop_oldest()
