"""`kv-gym pages train`: agents that learn which page shall leave.

`clone` imitates the tail oracle. Its data are decisions of the cache itself: those that the oracle meets, then, round
by round, those that the learner meets (DAgger, Ross et al. 2011, arXiv 1011.0686), each with the next use of every
candidate. The loss is list-wise (ListNet, Cao et al. 2007): a softmax over the candidates of the logarithm of the time
to the next use, so that two pages that are never asked for again are equally good to evict.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kv_gym import __version__
from kv_gym.errors import UserError
from kv_gym.pages.cache import Candidates, PageCache, check_drawn
from kv_gym.pages.features import check_features, feature_matrix, features_of
from kv_gym.pages.policies.base import PageRankingPolicy
from kv_gym.pages.policies.learned import Learned, LearnedCard
from kv_gym.pages.policies.tail_oracle import TailOracle
from kv_gym.pages.readers import read_requests
from kv_gym.pages.requests import RequestTrace
from kv_gym.pages.simulator import simulate

AGENTS = ("clone",)
TRAINING, VALIDATION = 0.5, 0.7
"""Shares of the requests up to which agents train, and up to which the best round is chosen; the rest is for tests."""

_TEMPERATURE = 0.3  # of the targets: a page that is used twice as late gets ten times the weight
_BATCH = 256


def train_pages(
    agent: str,
    requests: str | Path | RequestTrace,
    out: str | Path,
    capacity: int,
    semantics: str = "objects",
    oversize: str = "refuse",
    candidates: int = 16,
    drawn: int = 0,
    features: Sequence[str] | None = None,
    hidden: int = 32,
    rounds: int = 3,
    decisions: int = 20_000,
    steps: int = 1000,
    rate: float = 3e-3,
    seed: int = 0,
    format: str = "auto",
) -> Learned:
    """Train a page policy on the first half of a trace.

    The round with the most hits between half and 0.7 of the requests is kept; where LRU has more hits there, the policy
    leaves every decision to LRU and says so. The last 0.3 of the requests are not looked at: measure on them with
    `kv-gym pages simulate --policies FOLDER,lru --warm-up 0.7`.

    Args:
        agent: clone: imitate the oracle that chooses among the candidates.
        requests: a trace, or the file of one.
        out: folder to write the policy into.
        capacity: pages, or bytes where the trace has sizes.
        semantics: objects: every page stands alone; prefix: requests are chains of which only the ends may leave.
        oversize: what becomes of an object that is larger than the cache: refuse the trace, or pass it by.
        candidates: how many pages it chooses among.
        drawn: how many of these are drawn at random from all that may leave; the others are the least recently used.
        features: what it sees of each; None: all that can differ between pages of the trace.
        hidden: width of the network.
        rounds: of recording decisions and training on all that are recorded.
        decisions: recorded in a round, at most.
        steps: optimiser steps in a round.
        rate: learning rate at its peak.
        seed: of the weights and of what is drawn.
        format: of the file: auto, mooncake, keys, times, csv, nginx or cache2k.

    Returns:
        The policy; its `card` holds the hit rates on the validation part.

    Raises:
        UserError: an unknown agent or feature, a file that cannot be read, or a trace where nothing must leave.
    """
    if agent not in AGENTS:
        raise UserError(f"unknown page agent {agent!r}; known: {', '.join(AGENTS)}")
    if Path(out).is_file():
        raise UserError(f"{out} is a file; name a folder to write the policy into")
    if candidates < 2 or min(hidden, rounds, decisions, steps) < 1:
        raise UserError("nothing to train; expected 2 candidates or more, and 1 or more of all other numbers")
    check_drawn(drawn, candidates)
    trace = requests if isinstance(requests, RequestTrace) else read_requests(requests, format)
    if features is None:  # the place in the list says nothing of pages that were drawn
        features = tuple(name for name in features_of(trace, semantics) if not drawn or name != "order")
    check_features(features)
    seen = trace.part(0, max(1, int(VALIDATION * trace.requests)))

    def hit_rate(policy: PageRankingPolicy | str) -> float:
        return simulate(seen, policy, capacity, semantics, oversize, warm_up=TRAINING / VALIDATION).hit_rate

    oracle = TailOracle(candidates=candidates, drawn=drawn)
    bounds = {"lru": hit_rate("lru"), "tail_oracle": hit_rate(oracle)}
    card = LearnedCard(
        features=tuple(features),
        candidates=candidates,
        drawn=drawn,
        hidden=hidden,
        trace=trace.name,
        semantics=semantics,  # type: ignore[arg-type]  # simulate has refused others
        capacity=capacity,
        seed=seed,
        kv_gym=__version__,
    )
    train = trace.part(0, max(1, int(TRAINING * trace.requests)))
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    network = CandidateScorer(len(features), hidden)
    behaviour: PageRankingPolicy = oracle
    recorded: list[Decisions] = []
    learned: list[tuple[float, Learned]] = []
    for _ in range(rounds):
        recorded.append(
            record_decisions(train, behaviour, capacity, semantics, candidates, features, decisions, random)
        )
        everything = Decisions(*(np.concatenate(arrays) for arrays in zip(*recorded, strict=True)))
        fit_scorer(network, everything, steps, rate, random)
        behaviour = Learned(card, network.weights(), shadow=0)
        learned.append((hit_rate(behaviour), behaviour))
    rate_of_best, best = max(learned, key=lambda each: each[0])
    validation = {"learned": rate_of_best, **bounds}
    card = card.model_copy(update={"validation": validation, "fallback": rate_of_best < bounds["lru"]})
    policy = Learned(card, best.weights)
    policy.save(out)
    return policy


class Decisions(NamedTuple):
    """Recorded decisions.

    Attributes:
        features: `[decisions, K, F]` float32, 0 where there are fewer than K candidates.
        distance: `[decisions, K]` float32 accesses until each is used next; twice the trace where it is not.
        mask: `[decisions, K]` bool, which candidates there are.
    """

    features: np.ndarray
    distance: np.ndarray
    mask: np.ndarray


def record_decisions(
    trace: RequestTrace,
    policy: PageRankingPolicy,
    capacity: int,
    semantics: str,
    candidates: int,
    features: Sequence[str],
    count: int,
    random: np.random.Generator,
) -> Decisions:
    """Run a policy over a trace and keep `count` of the decisions that it meets, drawn evenly.

    Decisions of the last tenth are left out: too much of what follows them is unknown.

    Raises:
        UserError: there was nothing to decide.
    """
    cache = PageCache(trace, capacity, semantics, candidates, future=True, drawn=policy.drawn)
    policy.reset(0)
    last, longest = int(0.9 * len(trace)), 2 * len(trace)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    met = 0
    for _ in cache.serve(0, trace.requests):
        pages = cache.shown()
        if len(pages) == 1:
            cache.evict(pages[0])
            continue
        shown = Candidates(cache, pages)
        if cache.access < last:
            place = met if met < count else int(random.integers(met + 1))
            met += 1
            if place < count:  # reservoir sampling
                distance = np.minimum(shown.next_use - cache.access, longest).astype(np.float32)
                kept[place : place + 1] = [(feature_matrix(shown, features), distance)]
        cache.evict(pages[int(np.argmin(policy.rank(shown)))])
    if not kept:
        raise UserError(
            f"nothing leaves a cache of {capacity} in the first half of {trace.name}: give a smaller capacity"
        )
    made = Decisions(
        np.zeros((len(kept), candidates, len(features)), np.float32),
        np.ones((len(kept), candidates), np.float32),
        np.zeros((len(kept), candidates), bool),
    )
    for row, (seen, distance) in enumerate(kept):
        made.features[row, : len(seen)] = seen
        made.distance[row, : len(seen)] = distance
        made.mask[row, : len(seen)] = True
    return made


class CandidateScorer(nn.Module):
    """The network of :class:`~kv_gym.pages.policies.learned.Learned`, for training: `[B, K, F]` to scores `[B, K]`.

    Args:
        features: F.
        hidden: width.
    """

    center: Tensor
    scale: Tensor

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.candidate = nn.Linear(features, hidden)
        self.own = nn.Linear(hidden, hidden)
        self.mean = nn.Linear(hidden, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.register_buffer("center", torch.zeros(features))
        self.register_buffer("scale", torch.zeros(features))

    def normalise(self, features: Tensor, mask: Tensor) -> None:
        """Take mean and deviation of the inputs from data, the first time that it is called."""
        if not self.scale.any():
            present = features[mask]
            self.center, self.scale = present.mean(0), present.std(0, unbiased=False) + 0.01

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Scores; those that `mask` leaves out mean nothing."""
        hidden = torch.relu(self.candidate((features - self.center) / self.scale))
        present = mask[..., None].float()
        pooled = (hidden * present).sum(-2, keepdim=True) / present.sum(-2, keepdim=True)
        return self.score(torch.relu(self.own(hidden) + self.mean(pooled)))[..., 0]

    def weights(self) -> dict[str, np.ndarray]:
        """The weights as a trained policy holds them, with the scaling of the inputs in the first layer."""
        with torch.no_grad():
            first = self.candidate.weight / self.scale
            tensors = {
                "candidate.weight": first.T,
                "candidate.bias": self.candidate.bias - first @ self.center,
                "own.weight": self.own.weight.T,
                "mean.weight": self.mean.weight.T,
                "joined.bias": self.own.bias,
                "score.weight": self.score.weight[0],
            }
        return {name: np.array(tensor.detach().numpy(), order="C") for name, tensor in tensors.items()}


def fit_scorer(network: CandidateScorer, data: Decisions, steps: int, rate: float, random: np.random.Generator) -> None:
    """Train the network so that a softmax of its scores, the lowest first, is one of the log distances."""
    features, distance, mask = (torch.from_numpy(array) for array in data)
    network.normalise(features, mask)
    absent = torch.finfo(torch.float32).min
    target = (distance.log1p() / _TEMPERATURE).masked_fill(~mask, absent).softmax(-1)
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 3))
    for _ in range(steps):
        rows = torch.from_numpy(random.integers(len(features), size=_BATCH))
        leaving = (-network(features[rows], mask[rows])).masked_fill(~mask[rows], absent).log_softmax(-1)
        loss = -(target[rows] * leaving.clamp(min=-1e4)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
