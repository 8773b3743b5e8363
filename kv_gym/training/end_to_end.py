"""The agent `end_to_end`: trains the scores through the frozen model.

The model reads recorded continuations over a context that was cut once to a random total, by one threshold over all
slots. The loss is how far its next-token distributions move from those over the full context (Kullback-Leibler
divergence, in nats per token). Gradients reach the scores through the gates of the cut, straight through it. It needs
no answers, and it copies no attention: attention is a proxy, and several heads may attend to what one of them needs.

Not a published method. Nearest: learned sparsity with a straight-through or relaxed gate, such as DMS (arXiv
2506.05345), which retrains the model; here it is frozen, contexts come from traces, and only scores are learned.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn.functional import pad

from kv_gym.policies.scorer import Scorer
from kv_gym.traces.sequence import Contexts, Sequence
from kv_gym.training.learner import Count, Metrics, Protection
from kv_gym.training.losses import hard_top
from kv_gym.training.masked_context import frozen_model
from kv_gym.training.through_model import ModelLearner, ModelLearnerSettings


class EndToEndSettings(ModelLearnerSettings):
    """Settings of `end_to_end`, with those of every agent that trains through the model.

    Attributes:
        smallest, largest: the totals that are trained for, as shares of all slots; drawn log-uniformly.
        temperature: distance from the threshold, in units of the scores, over which gradients reach slots.
        near: slots further than so many temperatures below the threshold are not read at all: they are evicted, and
            their gradient is next to nothing. None: all are read. On an accelerator all are, since it would have to be
            waited for.
    """

    steps: Count = 1200
    protect: Protection = (0, 0)
    smallest: PositiveFloat = 1 / 128
    largest: PositiveFloat = 1 / 16
    temperature: PositiveFloat = 0.5
    near: PositiveFloat | None = 8.0


class EndToEnd(ModelLearner):
    """Trains the scores through the frozen model, by the divergence of the cut cache's predictions from the full's."""

    settings_class = EndToEndSettings
    data_parallel = True
    settings: EndToEndSettings

    def step(self, step: int) -> Metrics:
        """Cut some contexts, each to a total of its own, and descend the divergence from the full cache."""
        self.start_step(step)
        settings = self.settings
        batch = self._sample_contexts(settings.contexts)
        low, high = math.log(settings.smallest), math.log(settings.largest)
        shares = torch.empty(len(batch)).uniform_(low, high).exp().tolist()
        indices = self._sample_continuations(batch)
        own = self.processes.own(len(batch))
        with frozen_model(self.model):
            divergence = self.divergence(batch[own], shares[own], indices[own])
            norm = self.optimizer_step(divergence.mean() * (len(divergence) / len(batch)))
        return {"loss": self.total_loss, "divergence": self.total_loss, "gradient_norm": norm}

    def divergence(self, sequences: list[Sequence], shares: list[float], indices: list[list[int]]) -> Tensor:
        """Divergence of the predictions over cut caches from those over the full ones, nats per token: `[contexts]`.

        Args:
            sequences: contexts of similar length.
            shares: the total that each is cut to.
            indices: which of its continuations each context reads, as many for all.
        """
        longest = max(len(sequence.tokens) for sequence in sequences)
        cuts = [self._cut(sequence, share, longest) for sequence, share in zip(sequences, shares, strict=True)]
        gates, near = map(list, zip(*cuts, strict=True))
        read = near if self.settings.near is not None and self.model.device.type == "cpu" else None
        logits, _, mask = self.gated_logits(sequences, gates, indices, read)
        return self.divergence_from_full(logits, mask, sequences, indices)

    def reward(self, policy: Scorer, validation: Contexts) -> float:
        """Minus the mean divergence at four totals, on contexts that the optimiser never saw; 0 is perfect."""
        low, high = math.log(self.settings.smallest), math.log(self.settings.largest)
        divergences = []
        with frozen_model(self.model), torch.no_grad():
            for sequence in validation:
                indices = [list(range(len(sequence.continuations)))]
                for share in np.exp(np.linspace(low, high, 4)).tolist():
                    divergences.append(float(self.divergence([sequence], [share], indices)))
        return -sum(divergences) / len(divergences)

    def _cut(self, sequence: Sequence, share: float, n: int) -> tuple[Tensor, Tensor]:
        """Gates `[heads, n]` of a context cut to a share of its slots, and which of them are near enough to be read.

        Behind the context's end they are 0 and false.
        """
        scores = self.scores(sequence)  # [heads, length]
        count = max(1, int(share * scores.numel()))
        gates = hard_top(scores.flatten(), count, self.settings.temperature).view_as(scores)
        kept = gates.detach() > 0.5
        lowest = scores.detach().masked_fill(~kept, float("inf")).amin()  # of a slot that stays
        near = kept | (scores.detach() > lowest - self.settings.temperature * (self.settings.near or math.inf))
        behind = (0, n - scores.shape[1])
        return pad(gates, behind), pad(near, behind)
