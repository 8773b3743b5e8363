"""The environment KVPage-v0: which page leaves a cache that all requests share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from kv_gym.errors import UserError
from kv_gym.pages import RequestTrace, read_requests
from kv_gym.pages.cache import Candidates, PageCache, check_drawn
from kv_gym.pages.features import BASIC_FEATURES, check_features, feature_matrix

Observation = dict[str, np.ndarray]

REWARDS = ("hits", "belady")
ACTIONS = ("ranking", "index")
SEMANTICS = ("prefix", "objects")
_TRIES = 100  # of drawing a slice in which something must leave


class PageEpisodes:
    """What the scalar and the vector environment share: the trace, the spaces, and the rules of an episode.

    Arguments are those of :class:`KVPageEnv`.
    """

    def __init__(
        self,
        requests: str | Path | RequestTrace | None = None,
        capacity: int | None = None,
        candidates: int = 16,
        semantics: str = "prefix",
        features: Sequence[str] = BASIC_FEATURES,
        horizon: int = 256,
        action: str = "ranking",
        reward: str = "hits",
        part: Sequence[float] = (0.0, 1.0),
        drawn: int = 0,
        limit: float = 0.0,
    ):
        for name, value, known in (
            ("semantics", semantics, SEMANTICS),
            ("action", action, ACTIONS),
            ("reward", reward, REWARDS),
        ):
            if value not in known:
                raise UserError(f"{name} {value!r} is not known; expected one of {', '.join(known)}")
        if candidates < 2:
            raise UserError(f"with candidates={candidates} there is nothing to decide; expected 2 or more")
        check_drawn(drawn, candidates)
        if not 0 <= limit < float("inf"):
            raise UserError(f"a limit of {limit} seconds is no time; expected 0 (none) or more")
        if horizon < 1:
            raise UserError(f"horizon {horizon} serves no request; expected 1 or more")
        if not (len(part) == 2 and 0 <= part[0] < part[1] <= 1):
            raise UserError(f"part {part} is no stretch of the trace; expected two shares, such as (0.0, 0.7)")
        check_features(features)
        self.trace = requests if isinstance(requests, RequestTrace) else read_requests(requests or sample_requests())
        if semantics == "prefix" and self.trace.sizes is not None:
            raise UserError("blocks of prefixes are of one size, and this trace has sizes: choose semantics='objects'")
        default = max(1, self._total() // 20)
        self.capacity = default if capacity is None else int(capacity)
        if self.capacity < 1:
            raise UserError(f"a cache of capacity {self.capacity} holds nothing; expected 1 or more")
        if self.capacity >= self._total():
            raise UserError(
                f"a cache of {self.capacity} holds all that the trace asks for ({self._total()}): "
                "nothing ever leaves; give a smaller capacity"
            )
        self.candidates, self.drawn = candidates, drawn
        self.semantics, self.features = semantics, tuple(features)
        self.action, self.reward, self.limit = action, reward, limit
        first, last = (round(share * self.trace.requests) for share in part)
        self.first, self.last = first, max(last, first + 1)
        self.horizon = min(horizon, self.last - self.first)
        self.observation_space = spaces.Dict(
            {
                **{name: spaces.Box(0.0, 4.0, (candidates,), np.float32) for name in self.features},
                "mask": spaces.Box(0.0, 1.0, (candidates,), np.float32),
            }
        )
        self.action_space: spaces.Space = (
            spaces.Box(-1.0, 1.0, (candidates,), np.float32) if action == "ranking" else spaces.Discrete(candidates)
        )

    def _total(self) -> int:
        if self.trace.sizes is None:
            return self.trace.footprint
        _, first = np.unique(self.trace.pages, return_index=True)
        return int(self.trace.sizes[first].sum())

    def nothing(self) -> Observation:
        """An observation without candidates."""
        return {name: np.zeros(self.candidates, np.float32) for name in (*self.features, "mask")}


def sample_requests() -> Path:
    """The request trace that ships with the library."""
    from kv_gym.files import bundled

    return bundled("requests") / "sample.jsonl.gz"


class DecisionTimer:
    """Says whether a decision came later than a limit after the candidates were shown.

    Args:
        limit: seconds; 0: no decision is late.

    Attributes:
        clock: gives the seconds.
    """

    def __init__(self, limit: float):
        self.limit, self.clock = limit, cast(Callable[[], float], time.perf_counter)
        self._begun = 0.0

    def start(self) -> None:
        """Candidates are shown now."""
        if self.limit:
            self._begun = self.clock()

    @property
    def late(self) -> bool:
        """Whether a decision that comes now is late."""
        return self.limit > 0 and self.clock() - self._begun > self.limit


class PageEpisode:
    """One slice of the trace, served from a warm cache up to the next decision.

    Args:
        rules: the shared settings.
        start: number of the first request.
        seed: of the candidates that are drawn at random.

    Attributes:
        shown: candidates of the decision that is due; empty where the trace is over.
        over: whether the slice is over; what is shown then is the next decision after it.
        evicted: the page that left last, or -1.
    """

    def __init__(self, rules: PageEpisodes, start: int, seed: int = 0):
        self.rules, self.start = rules, start
        self.stop = min(start + rules.horizon, rules.last)
        self.cache = PageCache(
            rules.trace, rules.capacity, rules.semantics, rules.candidates, future=True, drawn=rules.drawn, seed=seed
        )
        self._warm()
        self._before = (self.cache.hits, self.cache.served, self.cache.evictions)
        self._counted = 0  # hits that rewards have paid
        self._decisions = self._late = 0
        self._at_end: dict[str, Any] = {}
        self.shown: list[int] = []
        self.over, self.evicted = False, -1
        self._serving = self._serve()
        self._go_on()

    def _warm(self) -> None:
        """Serve what came before by LRU: at least three times as many accesses as the cache has room for."""
        trace, cache = self.rules.trace, self.cache
        begin = self.start
        wanted = trace.starts[self.start] - 3 * self.rules.capacity
        if trace.sizes is None:
            begin = int(np.searchsorted(trace.starts, max(wanted, 0), side="right")) - 1
        else:
            seen = np.cumsum(trace.sizes[: trace.starts[self.start]][::-1])
            enough = int(np.searchsorted(seen, 3 * self.rules.capacity))
            begin = int(np.searchsorted(trace.starts, max(trace.starts[self.start] - enough, 0), side="right")) - 1
        for _ in cache.serve(min(begin, self.start), self.start):
            cache.evict(cache.shown()[0])

    def _serve(self) -> Iterator[None]:
        yield from self.cache.serve(self.start, self.stop)
        self._at_end = self.describe()
        self.over = True
        yield from self.cache.serve(self.stop, self.rules.trace.requests)

    def _go_on(self) -> None:
        while next(self._serving, self) is None:
            self.shown = self.cache.shown()
            if len(self.shown) > 1:
                return
            self.cache.evict(self.shown[0])  # nothing to choose
        self.shown = []

    @property
    def hits(self) -> int:
        """Pages found in the slice so far."""
        return self.cache.hits - self._before[0]

    @property
    def accesses(self) -> int:
        """Pages asked for in the slice so far."""
        return self.cache.served - self._before[1]

    def observe(self) -> Observation:
        """Features and mask of the candidates."""
        observation = self.rules.nothing()
        count = len(self.shown)
        if count:
            seen = feature_matrix(Candidates(self.cache, self.shown), self.rules.features)
            for name, column in zip(self.rules.features, seen.T, strict=True):
                observation[name][:count] = column
            observation["mask"][:count] = 1
        return observation

    def describe(self) -> dict[str, Any]:
        """The info of a step; hits after the slice do not count."""
        return self._at_end or {
            "hit_rate": self.hits / max(self.accesses, 1),
            "total_hits": self.hits,
            "accesses": self.accesses,
            "evictions": self.cache.evictions - self._before[2],
            "start": self.start,
            "late_share": self._late / max(self._decisions, 1),
        }

    def act(self, action: Any, late: bool = False) -> float:
        """Evict by the action (or by LRU where it is late), go on to the next decision, and give the reward."""
        place = 0 if late else self._chosen(action)
        self._decisions += 1
        self._late += late
        regret = self._regret(place) if self.rules.reward == "belady" else 0.0
        self.evicted = self.shown[place]
        self.cache.evict(self.evicted)
        self._go_on()
        hits = self.describe()["total_hits"]
        gained, self._counted = hits - self._counted, hits
        return -regret if self.rules.reward == "belady" else float(gained)

    def _chosen(self, action: Any) -> int:
        count = len(self.shown)
        if self.rules.action == "ranking":
            scores = np.asarray(action, float).reshape(-1)
            if scores.shape != (self.rules.candidates,) or np.isnan(scores[:count]).any():
                raise UserError(
                    f"the action has shape {np.shape(action)} or is not a number; expected {self.rules.candidates} "
                    "scores, higher = keep"
                )
            return int(np.argmin(scores[:count]))
        place = int(action)
        if not 0 <= place < self.rules.candidates:
            raise UserError(f"the action names candidate {place}; expected a number below {self.rules.candidates}")
        return place if place < count else 0  # an agent without a mask goes on, with the choice of LRU

    def _regret(self, place: int) -> float:
        """0 for the candidate whose next use is farthest, up to 1 for one that is needed at once."""
        now, longest = self.cache.access, len(self.rules.trace)
        until = [min(self.cache.due[page] - now, longest) for page in self.shown]
        return float(1.0 - np.log1p(until[place]) / np.log1p(max(until)))


class KVPageEnv(gym.Env[Observation, Any]):
    """Evict pages from a cache that many requests share: blocks of prompts, or web objects.

    ## Description

    A serving engine keeps the KV cache of earlier prompts in blocks of 16 to 512 tokens, and a request that begins with
    the same text uses them again; a proxy keeps objects. When the cache is full and something new comes, a page must
    leave. The environment serves a recorded trace of requests and stops at every such decision, shows the least
    recently used pages that may leave, and evicts the one that the action chooses. Nothing is approximated: later
    states are those of a cache from which this page is gone.

    ## Action Space

    `action="ranking"`: `Box(-1, 1, (K,))`, a score for each candidate, higher = keep; the lowest leaves, among equals
    the least recently used. `action="index"`: `Discrete(K)`, the candidate that leaves, for DQN and masked PPO;
    `action_masks()` says which numbers have a candidate, and the others evict the least recently used one.

    ## Observation Space

    A `Dict` of `[K]` float32 arrays; candidates are sorted from the least recently used on, and where there are fewer
    than K the rest is 0. All but `mask`, `ttl` and `order` are logarithms, scaled to about 0 to 1.

    | key | meaning |
    |---|---|
    | `age` | accesses since the page was last used |
    | `gap` | mean number of accesses between its uses |
    | `hits` | uses while it was cached, the first not counted |
    | `seen` | requests for it so far, also while it was not cached |
    | `period` | accesses between its last two uses, also where it left between them; a million after one use |
    | `size` | share of the capacity |
    | `ttl` | logarithm of the seconds until it expires; 1 where it does not |
    | `depth` | its place in the request that first asked for it |
    | `length` | pages of the request that last used it |
    | `order` | its place among the least recently used |
    | `previous` | accesses between the two uses before the last; shown, like all that follow, if `features` names it |
    | `often`, `steady` | uses that count half after 1,000, and after 30,000 accesses |
    | `behind` | pages that followed it in the request that last used it |
    | `known` | pages of this request, from its first on, that earlier requests had asked for |
    | `turn` | turns of its conversation: one more than that of the request that brought the last known page |
    | `pace` | accesses between this request and the use of the last known page before |
    | `parent_age` | accesses since the page before it in the chain was used |
    | `predecessor_age` | accesses since that page was used which had been asked for just before its last use |
    | `mask` | 1 where there is a candidate |

    ## Rewards

    `reward="hits"`: pages found in the cache until the next decision; their sum over an episode is its hits.
    `reward="belady"`: 0 for the candidate whose next use is farthest, down to -1 for one
    that is asked for at once: `log(1 + its distance) / log(1 + the farthest distance) - 1`.

    ## Info

    `hit_rate`, `total_hits`, `accesses` and `evictions` of the episode so far, its first request `start`, and
    `late_share`: the share of its decisions that came later than `limit` after the candidates were shown. In their
    place the least recently used page left, as in a server that cannot wait.

    ## Starting State

    A stretch of `horizon` requests is drawn; the cache holds what LRU had left there after the requests before it (at
    least three times its capacity, where there are so many). `reset(options={"start": 100})` names the first request.

    ## Episode End

    After `horizon` requests the episode is truncated; it never terminates. The last observation is the next decision
    after them, with which a value can be estimated; it has no candidates where nothing leaves any more.

    ## Arguments

    - `requests`: a file that :func:`kv_gym.pages.read_requests` reads, or a :class:`~kv_gym.pages.RequestTrace`; None:
      the sample that ships with the library.
    - `capacity`: pages, or bytes where the trace has sizes; None: a twentieth of all that is asked for.
    - `candidates`: K, how many of the least recently used pages are shown.
    - `semantics`: `prefix`: requests are chains, only leaves that no request uses may leave; `objects`: every page
      stands alone.
    - `features`: which features, in which order; by default the first ten.
    - `horizon`: requests of an episode.
    - `action`, `reward`: see above.
    - `drawn`: how many of the K candidates are drawn at random from all pages that may leave, behind the least recently
      used ones; `order` says nothing of them.
    - `limit`: seconds from the return of `reset` or `step` to the next call of `step`, after which LRU decides; in a
      batch, for all its environments together. 0: no limit, so that results can be repeated on a slower machine.
    - `part`: the share of the trace that episodes are drawn from, such as `(0.0, 0.7)` for training.

    The trace and, for each environment, one cache are held in memory: about 100 bytes for each page of the trace and
    200 for each cached one.

    ## Version History

    - v0: the first version.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}

    def __init__(
        self,
        requests: str | Path | RequestTrace | None = None,
        render_mode: str | None = None,
        **settings: Any,
    ):
        """Read the trace; `settings` are the arguments above.

        Raises:
            UserError: a trace or a setting that cannot be used.
        """
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"render_mode {render_mode!r} is not known; expected None or 'ansi'")
        self.rules = PageEpisodes(requests, **settings)
        self.observation_space: spaces.Space = self.rules.observation_space
        self.action_space = self.rules.action_space
        self.render_mode = render_mode
        self.timer = DecisionTimer(self.rules.limit)
        self._episode: PageEpisode | None = None
        self._last = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a stretch of requests.

        Raises:
            UserError: an unknown option, or no stretch in which anything must leave.
        """
        super().reset(seed=seed)
        self._episode = begin_episode(self.rules, self.np_random, options)
        self._last = ""
        observation, info = self._episode.observe(), self._episode.describe()
        self.timer.start()
        return observation, info

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Evict a page and serve requests up to the next decision."""
        episode = self._episode
        if episode is None or episode.over:
            raise UserError("step was called before reset, or after the end of the episode: call reset first")
        reward = episode.act(action, self.timer.late)
        self._last = f"page {episode.evicted} left, reward {reward:g}"
        observation, info = episode.observe(), episode.describe()
        self.timer.start()
        return observation, reward, False, episode.over, info

    def action_masks(self) -> np.ndarray:
        """`[K]` bool, which candidates there are; what `sb3_contrib.MaskablePPO` asks for."""
        if self._episode is None:
            raise UserError("action_masks was called before reset: call reset first")
        return np.arange(self.rules.candidates) < len(self._episode.shown)

    def render(self) -> str | None:  # type: ignore[override]
        """The candidates as a line of text, in the mode `ansi`."""
        if self.render_mode is None or self._episode is None:
            return None
        pages = " ".join(map(str, self._episode.shown)) or "-"
        rate = self._episode.describe()["hit_rate"]
        return f"hit rate {rate:.3f} | {self._last or 'begin'} | candidates, oldest first: {pages}\n"


def begin_episode(
    rules: PageEpisodes, random: np.random.Generator, options: dict[str, Any] | None = None
) -> PageEpisode:
    """An episode with a decision to take.

    Args:
        rules: the shared settings.
        random: draws where it begins.
        options: ``{"start": number of the first request}``, or None.

    Raises:
        UserError: an unknown option, or no stretch in which anything must leave.
    """
    options = dict(options or {})
    start = options.pop("start", None)
    if options:
        raise UserError(f"unknown reset option {', '.join(options)}; expected start")
    latest = rules.last - rules.horizon
    seed = int(random.integers(2**31)) if rules.drawn else 0
    if start is not None:
        if not rules.first <= int(start) <= latest:
            raise UserError(f"start {start} is outside the trace; expected {rules.first} to {latest}")
        episode = PageEpisode(rules, int(start), seed)
        if episode.over:
            raise UserError(f"nothing leaves the cache in the {rules.horizon} requests from {start} on: choose others")
        return episode
    for _ in range(_TRIES):
        episode = PageEpisode(rules, int(random.integers(rules.first, latest + 1)), seed)
        if not episode.over:
            return episode
    raise UserError(
        f"in {_TRIES} stretches of {rules.horizon} requests nothing left the cache: give a smaller capacity or a "
        "longer horizon"
    )
