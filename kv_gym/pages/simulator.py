"""Run a page policy over a request trace and count the hits."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass

import numpy as np

from kv_gym.errors import UserError
from kv_gym.pages.cache import Candidates, PageCache
from kv_gym.pages.order import order_of
from kv_gym.pages.policies.base import PagePolicy, PageRankingPolicy, QueuePolicy
from kv_gym.pages.policies.lru import PageLRU
from kv_gym.pages.policies.registry import make_page_policy
from kv_gym.pages.requests import RequestTrace

SEMANTICS = ("objects", "prefix")


@dataclass(frozen=True)
class SimulationResult:
    """What one policy did at one capacity.

    Attributes:
        policy, capacity, semantics, trace: what was run.
        accesses, hits: pages asked for, and found, after the warm-up.
        hit_rate: their ratio.
        byte_hit_rate: share of the bytes found, or None where the trace has no sizes.
        evictions: pages that were evicted, those of the warm-up too.
        late_share: of a policy with a time limit: share of decisions that came late, so that LRU stood in.
        shadow_share: of a policy with a shadow LRU: share of decisions left to LRU because the shadow had more hits.
        hit: `[accesses]` bool, where asked for.
    """

    policy: str
    capacity: int
    semantics: str
    trace: str
    accesses: int
    hits: int
    hit_rate: float
    byte_hit_rate: float | None
    evictions: int
    late_share: float | None = None
    shadow_share: float | None = None
    hit: np.ndarray | None = None

    def row(self) -> dict:
        """The result as a row for JSON."""
        row = asdict(self)
        del row["hit"]
        return row


def simulate(
    trace: RequestTrace,
    policy: str | PagePolicy,
    capacity: int,
    semantics: str = "objects",
    oversize: str = "refuse",
    record_hits: bool = False,
    warm_up: float = 0.0,
) -> SimulationResult:
    """Count a policy's hits over a trace, beginning with an empty cache.

    Args:
        trace: the requests.
        policy: a name of :func:`~kv_gym.pages.list_page_policies`, with settings after colons (``belady:bypass=true``),
            a class path, the folder of a trained one, or a policy object.
        capacity: pages, or bytes where the trace has sizes.
        semantics: ``objects``: every access stands alone; ``prefix``: chains, see :class:`~.cache.PageCache`.
        oversize: what becomes of an object that is larger than the cache: ``refuse`` the trace, or ``pass`` it by.
        record_hits: keep which accesses hit.
        warm_up: share of the requests that only fill the cache; hits are counted after them.

    Raises:
        UserError: an unknown policy or semantics, a warm-up of the whole trace, a capacity that holds nothing, an
            object above the capacity, or a policy that cannot serve prefixes.
    """
    if semantics not in SEMANTICS:
        raise UserError(f"semantics {semantics!r} is not known; expected one of {', '.join(SEMANTICS)}")
    if not 0 <= warm_up < 1:
        raise UserError(f"a warm-up of {warm_up} leaves nothing to count; expected a share from 0 to below 1")
    first = int(trace.starts[int(warm_up * trace.requests)])
    chosen = make_page_policy(policy)
    if semantics == "prefix" and not chosen.prefix:
        raise UserError(
            f"policy {chosen.name!r} keeps queues of single pages and cannot serve prefixes, where only leaves may "
            "leave: choose a ranking policy or an engine's, or semantics='objects'"
        )
    if semantics == "objects" and not chosen.objects:
        raise UserError(f"policy {chosen.name!r} serves prefixes only: choose semantics='prefix'")
    if semantics == "prefix" and trace.sizes is not None:
        raise UserError("blocks of prefixes are of one size, and this trace has sizes: choose semantics='objects'")
    if oversize == "refuse" or capacity < 1:
        trace.check_capacity(capacity)
    elif oversize != "pass":
        raise UserError(f"oversize {oversize!r} is not known; expected refuse or pass")
    plain = isinstance(chosen, PageLRU) and semantics == "objects" and trace.ttl is None
    record = record_hits or first > 0
    counted: tuple[int, int, int, list[bool] | bytearray | None]
    if plain:
        counted = _run_lru(trace, capacity, record)
    elif isinstance(chosen, QueuePolicy):
        counted = _run_queues(trace, chosen, capacity, record)
    else:
        assert isinstance(chosen, PageRankingPolicy)
        counted = _run_ranking(trace, chosen, capacity, semantics)
    hits, hit_bytes, evictions, hit = counted
    found = None if hit is None else np.array(hit, bool)
    if first and found is not None:
        hits = int(found[first:].sum())
        hit_bytes = 0 if trace.sizes is None else int(trace.sizes[first:][found[first:]].sum())
    total = None if trace.sizes is None else int(trace.sizes[first:].sum())
    return SimulationResult(
        chosen.name,
        capacity,
        semantics,
        trace.name,
        len(trace) - first,
        hits,
        hits / (len(trace) - first),
        None if not total else hit_bytes / total,
        evictions,
        getattr(chosen, "late_share", None),
        getattr(chosen, "shadow_share", None),
        found if record_hits else None,
    )


def _run_lru(trace: RequestTrace, capacity: int, record: bool) -> tuple[int, int, int, list[bool] | None]:
    """LRU without the machinery for candidates, which it needs none of: ten times as fast."""
    cached: OrderedDict[int, int] = OrderedDict()
    used = hits = hit_bytes = evictions = 0
    hit: list[bool] | None = [] if record else None
    sizes = [1] * len(trace) if trace.sizes is None else trace.sizes.tolist()
    for page, size in zip(trace.pages.tolist(), sizes, strict=True):
        found = page in cached
        if found:
            hits += 1
            hit_bytes += cached[page]
            cached.move_to_end(page)
        elif size <= capacity:
            while used + size > capacity:
                used -= cached.popitem(last=False)[1]
                evictions += 1
            cached[page] = size
            used += size
        if hit is not None:
            hit.append(found)
    return hits, hit_bytes, evictions, hit


def _run_queues(
    trace: RequestTrace, policy: QueuePolicy, capacity: int, record: bool
) -> tuple[int, int, int, list[bool] | None]:
    policy.now = 0
    policy.start(capacity, trace)
    kind = type(policy)
    asks = kind.admits is not QueuePolicy.admits
    discards = kind.discard is not QueuePolicy.discard
    on_hit, on_admit, evict = policy.hit, policy.admit, policy.evict
    cached: dict[int, int] = {}
    expires: dict[int, float] = {}
    used = hits = hit_bytes = evictions = 0
    hit: list[bool] | None = [] if record else None
    pages = trace.pages.tolist()
    sizes = [1] * len(pages) if trace.sizes is None else trace.sizes.tolist()
    expiring = trace.ttl is not None and trace.times is not None
    times = trace.times.tolist() if expiring and trace.times is not None else ()
    ttl = trace.ttl.tolist() if expiring and trace.ttl is not None else ()
    for at, page in enumerate(pages):
        policy.now = at
        if expiring and page in cached and times[at] >= expires[page]:
            used -= cached.pop(page)
            policy.remove(page)
        found = page in cached
        if found:
            hits += 1
            hit_bytes += cached[page]
            on_hit(page)
        else:
            size = sizes[at]
            if size <= capacity and (not asks or policy.admits(page, size)):
                while used + size > capacity:
                    used -= cached.pop(evict(page, size))
                    evictions += 1
                cached[page] = size
                used += size
                on_admit(page, size)
                if expiring:
                    expires[page] = times[at] + ttl[at]
        if discards:
            for gone in policy.discard(page):
                used -= cached.pop(gone)
        if hit is not None:
            hit.append(found)
    return hits, hit_bytes, evictions, hit


def _run_ranking(
    trace: RequestTrace, policy: PageRankingPolicy, capacity: int, semantics: str
) -> tuple[int, int, int, bytearray]:
    policy.reset(0)
    cache = PageCache(
        trace, capacity, semantics, policy.candidates, policy.needs_future, getattr(policy, "priority", None),
        policy.drawn, getattr(policy, "seed", 0), order_of(policy),
    )  # fmt: skip
    bypasses = type(policy).declines is not PageRankingPolicy.declines
    observes = type(policy).observe is not PageRankingPolicy.observe
    starts = trace.lists["starts"]
    for request in range(trace.requests):
        for _ in cache.serve(request, request + 1):
            pages = cache.shown()
            victim = pages[0] if len(pages) == 1 else pages[int(np.argmin(policy.rank(Candidates(cache, pages))))]
            if bypasses and policy.declines(cache.incoming, victim, cache):
                cache.decline()
            else:
                cache.evict(victim)
        if observes:
            policy.observe(cache, starts[request], starts[request + 1])
    return cache.hits, cache.hit_bytes, cache.evictions, cache.found
