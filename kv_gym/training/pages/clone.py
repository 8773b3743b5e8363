"""The page agent `clone`: it imitates the oracle that chooses among the candidates.

Its data are decisions of the cache itself: those that the oracle meets, then, round by round, those that the learner
meets (DAgger, Ross et al. 2011, arXiv 1011.0686), each with the next use of every candidate. The loss is list-wise
(ListNet, Cao et al. 2007): a softmax over the candidates of the logarithm of the time to the next use, so that two
pages that are never asked for again are equally good to evict.
"""

from __future__ import annotations

import numpy as np
import torch

from kv_gym.training.pages.agent import PageAgent, PageSettings, PageTask
from kv_gym.training.pages.network import CandidateScorer
from kv_gym.training.pages.recording import Decisions

_TEMPERATURE = 0.3  # of the targets: a page that is used twice as late gets ten times the weight
_BATCH = 256


class Clone(PageAgent):
    """Behaviour cloning of the tail oracle, with DAgger's rounds."""

    imitates = True

    def __init__(self, task: PageTask, settings: PageSettings):
        super().__init__(task, settings)
        self._network = CandidateScorer(len(task.features), settings.hidden)
        self._recorded: list[Decisions] = []

    @property
    def network(self) -> CandidateScorer:  # noqa: D102
        return self._network

    def train_round(self, recorded: Decisions | None) -> None:  # noqa: D102
        assert recorded is not None
        self._recorded.append(recorded)
        everything = Decisions(*(np.concatenate(arrays) for arrays in zip(*self._recorded, strict=True)))
        fit_scorer(self._network, everything, self.settings.steps, self.settings.rate, self.random)


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
