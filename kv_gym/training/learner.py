"""What every agent's algorithm is made of: draw decisions, measure a loss, take a step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.policies.scorer import GroupedScorer, Scorer
from kv_gym.traces.sequence import Sequence
from kv_gym.training.contexts import Context, expected_utility, read_context, standardise
from kv_gym.training.settings import Settings

FIRST_CONTEXTS = 32  # that inputs are standardised by
Told = dict[str, Tensor | float]
"""What a step has to say, by the name that TensorBoard shows."""


class Learner(ABC):
    """An algorithm at work on one network.

    A step draws anew with a seed of its own, so that what a step does depends on the state before it and on its
    number alone: a resumed run repeats an uninterrupted one exactly.

    Class attributes:
        settings: the class of its settings.
        calibrated: scores of different heads are trained against one another, one threshold may cut them all.
        absolute: a score means the same in every context, so that this threshold may be fixed ahead.
        any_inputs: it learns from whatever inputs its settings name, not from the usual ones alone.
        needs_model: the model itself takes part, as :attr:`model`, whatever the settings.

    Attributes:
        model: a transformers decoder, or None.
    """

    settings: ClassVar[type[Settings]] = Settings
    calibrated: bool = False
    absolute: bool = False
    any_inputs: ClassVar[bool] = True
    needs_model: ClassVar[bool] = False
    model: Any = None

    def __init__(self, settings: Settings, seed: int, network: GroupedScorer, fresh: bool = True):
        """Prepare to train `network` in place; a `fresh` one has not seen yet how its inputs are distributed."""
        self.chosen, self.seed, self.network, self.fresh = settings, seed, network, fresh
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.rate, weight_decay=settings.weight_decay
        )

    @classmethod
    def settled(cls, settings: Settings, with_model: bool) -> Settings:
        """The settings with what hangs on whether the model is given decided."""
        return settings

    @classmethod
    def model_use(cls, settings: Settings) -> str:
        """What the agent needs the model itself for, after "agent 'x' ...", or "" where it needs none."""
        return "trains through the model" if cls.needs_model else ""

    def worth(self, sequence: Sequence) -> np.ndarray:
        """`[L, H, n]` float32, what the agent learns to rank a context's slots by."""
        return expected_utility(sequence)

    @abstractmethod
    def prepare(self, sequences: list[Sequence]) -> None:
        """Take the training contexts, and let a fresh network standardise its inputs."""

    def standardise_fresh(self, inputs: Iterable[Tensor]) -> None:
        """Let a fresh network take mean and scale of its inputs from the first contexts, each `[heads, n, f]`."""
        if self.fresh:
            self.network.standardise(torch.cat(list(islice(inputs, FIRST_CONTEXTS)), 1))

    @abstractmethod
    def step(self, step: int) -> Told:
        """Train once; `step` counts from 0. What it tells holds at least ``loss``."""

    @property
    @abstractmethod
    def samples(self) -> int:
        """Rankings that one step learns from: decisions (one head of one context), each with all of its samples."""

    def reward(self, policy: Scorer, validation: list[Sequence]) -> float | None:
        """What checkpoints are chosen by, higher is better; None: the utility that `policy` keeps."""
        return None

    def state(self) -> dict[str, Any]:
        """Tensors and plain data from which :meth:`load` goes on."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from an earlier :meth:`state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    def begin(self, step: int) -> None:
        """Seed the draws of a step and set its learning rate: a short warm-up, then a cosine to zero."""
        torch.manual_seed(self.seed * 1_000_003 + step)
        done = step / self.chosen.steps
        factor = min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * done)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.chosen.rate * factor

    def descend(self, loss: Tensor) -> Tensor:
        """One optimiser step; returns the norm of the gradient before it was clipped to 1.

        Raises:
            UserError: the loss is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss is {loss.item()}: train with a lower rate than {self.chosen.rate}")
        return norm


class ContextLearner(Learner):
    """An algorithm that learns from decisions at the end of contexts, all heads in one batched product."""

    contexts: list[Context]

    def prepare(self, sequences: list[Sequence]) -> None:
        """Read inputs and worth of every context into memory."""
        self.contexts = [read_context(sequence, self.worth, self.chosen.inputs) for sequence in sequences]
        self.standardise_fresh(context.at() for context in self.contexts)
        standardise(self.contexts, self.network)

    @property
    def samples(self) -> int:
        """One per context and head."""
        return self.chosen.contexts * self.network.heads

    def draw(self) -> tuple[Tensor, Tensor]:
        """Inputs `[heads, contexts * n, f]` and worth `[contexts, heads, n]` of random slots of random contexts."""
        picked = [self.contexts[i] for i in torch.randint(len(self.contexts), (self.chosen.contexts,))]
        n = min(self.chosen.slots, min(c.worth.shape[1] for c in picked))
        slots = [torch.randperm(c.worth.shape[1])[:n] for c in picked]
        inputs = torch.cat([c.at(s) for c, s in zip(picked, slots, strict=True)], 1)
        return inputs, torch.stack([c.worth.index_select(1, s) for c, s in zip(picked, slots, strict=True)])

    def score(self, inputs: Tensor, worth: Tensor, network: GroupedScorer | None = None) -> Tensor:
        """Scores `[contexts, heads, n]` of drawn inputs, by the network in training or another."""
        scores = (network or self.network).scores(inputs)
        return scores.view(inputs.shape[0], len(worth), -1).transpose(0, 1)


class LossLearner(ContextLearner):
    """An algorithm that is one loss of the scores of one draw."""

    def step(self, step: int) -> Told:
        """Draw contexts and slots, and descend the loss of their scores."""
        self.begin(step)
        inputs, worth = self.draw()
        loss, told = self.loss(self.score(inputs, worth), worth)
        return {"loss": loss.detach(), **told, "gradient_norm": self.descend(loss)}

    @abstractmethod
    def loss(self, scores: Tensor, worth: Tensor) -> tuple[Tensor, Told]:
        """The loss of scores `[contexts, heads, n]` whose slots are worth `worth`, and what there is to tell."""
