"""The pages that a classic policy would evict next, in place of the least recently used ones, as candidates.

The classic policy runs in the cache less the places of the candidates. What it evicts stays cached there, as in a
victim cache (Jouppi, "Improving direct-mapped cache performance by the addition of a small fully-associative cache and
prefetch buffers", ISCA 1990), until one of these pages leaves; a page that is used there returns to the policy as one
that missed.
"""

from __future__ import annotations

from kv_gym.errors import UserError
from kv_gym.pages.policies.base import PageRankingPolicy, QueuePolicy
from kv_gym.pages.policies.registry import make_page_policy
from kv_gym.pages.requests import RequestTrace


class PolicyOrder:
    """Keeps a queue policy at work whose evictions are only proposals.

    Args:
        policy: what proposes.
    """

    def __init__(self, policy: QueuePolicy):
        self._policy = policy

    def start(self, count: int, capacity: int, trace: RequestTrace) -> None:
        """Begin with an empty cache.

        Args:
            count: candidates.
            capacity: of the cache.
            trace: the requests.
        """
        size = 1.0 if trace.sizes is None else max(float(trace.sizes.mean()), 1.0)
        self._count = count
        self._capacity = max(capacity - round((count - 1) * size), capacity // 2, 1)
        self._sizes: dict[int, int] = {}  # of the pages that the policy holds
        self._held = 0  # their sum
        self._next: dict[int, int] = {}  # pages that it evicted and their sizes, the first first
        self._admitted = False
        self._incoming = -1, 0
        self._policy.now = 0
        self._policy.start(self._capacity, trace)

    def hit(self, page: int) -> None:
        """A cached page is asked for."""
        if page in self._next:
            self.miss(page, self._next.pop(page))
            while self._sizes and self._held + self._incoming[1] > self._capacity:
                self._propose()
            self.store()
        else:
            self._policy.hit(page)

    def miss(self, page: int, size: int) -> None:
        """A page that is not cached is asked for."""
        self._incoming = page, size
        self._admitted = self._policy.admits(page, size)

    def next(self) -> list[int]:
        """The pages that the policy would evict next, the first first."""
        while len(self._next) < self._count and self._sizes:
            self._propose()
        return list(self._next)[: self._count]

    def _propose(self) -> None:
        page = self._policy.evict(*self._incoming)
        size = self._sizes.pop(page)
        self._held -= size
        self._next[page] = size

    def store(self) -> None:
        """The page that missed is stored."""
        page, size = self._incoming
        if self._admitted:
            self._policy.admit(page, size)
            self._sizes[page] = size
            self._held += size
        else:
            self._next[page] = size

    def remove(self, page: int) -> None:
        """A page has left."""
        if page in self._next:
            del self._next[page]
        else:
            self._policy.remove(page)
            self._held -= self._sizes.pop(page)


def order_of(policy: PageRankingPolicy) -> PolicyOrder | None:
    """The order that a ranking policy asks for; None: that of the cache, the least recently used first.

    Raises:
        UserError: the order is no policy with queues, or one that reads later requests.
    """
    if policy.order == "lru":
        return None
    queues = make_page_policy(policy.order)
    if not isinstance(queues, QueuePolicy) or queues.needs_future:
        raise UserError(
            f"order={policy.order} shows no candidates; expected lru or a policy with queues, such as s3_fifo"
        )
    return PolicyOrder(queues)
