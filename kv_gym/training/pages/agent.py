"""The base of every page agent: its settings, and a round of training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from kv_gym.pages.requests import RequestTrace
from kv_gym.training.pages.network import CandidateScorer
from kv_gym.training.pages.recording import Decisions


class PageSettings(BaseModel):
    """Settings that all page agents have; an agent with more of them has a subclass.

    Attributes:
        hidden: width of the network.
        rounds: of gathering experience and training on all of it; the best one is kept.
        decisions: gathered in a round, at most.
        steps: optimiser steps in a round.
        rate: learning rate, at its peak where it has one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    hidden: PositiveInt = 32
    rounds: PositiveInt = 3
    decisions: PositiveInt = 20_000
    steps: PositiveInt = 1000
    rate: PositiveFloat = 3e-3


class EnvironmentSettings(PageSettings):
    """Settings of the agents that act in ``KVPage-v0``, with those of every page agent.

    Attributes:
        envs: environments in the batch.
        horizon: requests of an episode.
        reward: ``hits`` until the next decision, or ``belady``, how much sooner than the best candidate's the page's
            next use is: a denser signal, for which every decision looks ahead in the training part of the trace.
        gamma: discount from one decision to the next.
        batch: decisions in an optimiser step.
    """

    envs: PositiveInt = 8
    horizon: PositiveInt = 1000
    reward: Literal["hits", "belady"] = "belady"
    gamma: float = Field(default=0.5, ge=0, le=1)
    batch: PositiveInt = 256


@dataclass(frozen=True)
class PageTask:
    """What is to be learned.

    Attributes:
        trace: the requests to train on.
        capacity, semantics: of the cache.
        candidates, drawn: pages that a decision shows, and how many of these are drawn at random.
        features: what the network sees of each.
        seed: of weights and draws.
    """

    trace: RequestTrace
    capacity: int
    semantics: str
    candidates: int
    drawn: int
    features: Sequence[str]
    seed: int


class PageAgent(ABC):
    """Trains a :class:`~.network.CandidateScorer`.

    Class attributes:
        settings_class: its settings; ``agents/pages/<agent>.yml`` holds them.
        imitates: it learns from decisions with the next use of every candidate, recorded while the policy of the round
            before runs (in the first round: the oracle); else it runs an environment of its own.

    Args:
        task: what is to be learned.
        settings: of the agent.
    """

    settings_class: ClassVar[type[PageSettings]] = PageSettings
    imitates: ClassVar[bool] = False

    def __init__(self, task: PageTask, settings: PageSettings):
        self.task, self.settings = task, settings
        self.random = np.random.default_rng(task.seed)

    @property
    @abstractmethod
    def network(self) -> CandidateScorer:
        """What is trained."""

    @abstractmethod
    def train_round(self, recorded: Decisions | None) -> None:
        """Gather experience and train on it; `recorded` is given where the agent imitates."""
