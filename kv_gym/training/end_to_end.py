"""The agent `end_to_end`: slots are worth what the model would say without them.

The model reads recorded continuations over a context that was cut to a random total, once, by one threshold over all
slots; the loss is how far its next-token distributions move from those over the full context (Kullback-Leibler
divergence, in nats per token). Gradients reach the scores through the gates of the cut, straight through it. No answer
is known and no attention is copied: attention is a proxy, and several heads may attend to what one of them needs.

Not a published method. Nearest: learned sparsity with a straight-through or relaxed gate, such as DMS (arXiv
2506.05345), which retrains the model; here it is frozen, contexts come from traces, and only scores are learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kv_gym.errors import UserError
from kv_gym.policies.scorer import Scorer
from kv_gym.traces.sequence import Sequence
from kv_gym.training.contexts import inputs_of
from kv_gym.training.cuts import hard_top
from kv_gym.training.learner import Learner, Told
from kv_gym.training.masked_context import Recorded, continuation_logits, frozen
from kv_gym.training.settings import Settings

MOST_KEPT = 1 << 30  # bytes: what the full cache says, of all contexts, is kept up to here


@dataclass(frozen=True)
class EndToEndSettings(Settings):
    """Settings of `end_to_end`; `slots` is not used, since a cut is made over all of them.

    Attributes:
        continuations: continuations per context and step, at most.
        smallest, largest: the totals that are trained for, as shares of all slots; drawn log-uniformly.
        temperature: distance from the threshold, in units of the scores, over which gradients reach slots.
    """

    steps: int = 1200
    contexts: int = 4
    protect: tuple[int, int] = (0, 0)
    continuations: int = 8
    smallest: float = 1 / 128
    largest: float = 1 / 16
    temperature: float = 0.5


class EndToEnd(Learner):
    """Descends the divergence of the cut cache's answers from the full cache's."""

    settings = EndToEndSettings
    calibrated = True
    needs_model = True
    chosen: EndToEndSettings

    def prepare(self, sequences: list[Sequence]) -> None:
        """Take the contexts as they are, and standardise inputs over the first of them.

        Raises:
            UserError: a context has no continuation.
        """
        for sequence in sequences:
            if not sequence.continuations:
                raise UserError(f"context {sequence.id} has no continuations, so nothing tells what its cut would cost")
        self.sequences = sequences
        self._answers: dict[str, Tensor] = {}
        self.standardise_fresh(inputs_of(sequence, self.chosen.inputs) for sequence in sequences)

    @property
    def samples(self) -> int:
        """One per context and head."""
        return self.chosen.contexts * self.network.heads

    def step(self, step: int) -> Told:
        """Cut some contexts, each to a total of its own, and make the cut model say what the full one says."""
        self.begin(step)
        chosen = self.chosen
        picked = self._alike(chosen.contexts)
        low, high = math.log(chosen.smallest), math.log(chosen.largest)
        shares = torch.empty(len(picked)).uniform_(low, high).exp().tolist()
        several = min(chosen.continuations, *(len(sequence.continuations) for sequence in picked))
        drawn = [torch.randperm(len(sequence.continuations))[:several].tolist() for sequence in picked]
        with frozen(self.model):
            loss = self.divergence(picked, shares, drawn).mean()
            norm = self.descend(loss)
        return {"loss": loss.detach(), "divergence": loss.detach(), "gradient_norm": norm}

    def _alike(self, count: int) -> list[Sequence]:
        """Random contexts of nearly one length: all of a batch are padded to the longest."""
        first = len(self.sequences[int(torch.randint(len(self.sequences), ()))].tokens)
        near = [sequence for sequence in self.sequences if 0.8 * first <= len(sequence.tokens) <= 1.25 * first]
        return [near[i] for i in torch.randint(len(near), (count,)).tolist()]

    def divergence(self, picked: list[Sequence], shares: list[float], drawn: list[list[int]]) -> Tensor:
        """Kullback-Leibler divergence of the cut caches from the full ones, nats per token: `[contexts]`.

        Args:
            picked: contexts of nearly one length.
            shares: the total that each is cut to.
            drawn: which of its continuations each context reads, as many for all.
        """
        contexts = _recorded(picked)
        layers, heads, n = contexts.keys.shape[1:4]
        gates = torch.stack(
            [self._cut(sequence, share, n) for sequence, share in zip(picked, shares, strict=True)]
        ).view(len(picked), layers, heads, n)
        tokens, real = _continuations(picked, drawn)
        cut = continuation_logits(self.model, contexts, gates, tokens).float().log_softmax(-1)
        known = [self._full(sequence, which) for sequence, which in zip(picked, drawn, strict=True)]
        full = torch.stack([pad(each, (0, 0, 0, tokens.shape[2] - each.shape[1])) for each in known])
        moved = (full.exp() * (full - cut)).sum(-1) * real
        return moved.sum((1, 2)) / real.sum((1, 2))

    def reward(self, policy: Scorer, validation: list[Sequence]) -> float:
        """Minus the mean divergence at four totals, on contexts that the optimiser never saw; 0 is perfect."""
        low, high = math.log(self.chosen.smallest), math.log(self.chosen.largest)
        moved = []
        with frozen(self.model), torch.no_grad():
            for sequence in validation:
                everyone = [list(range(len(sequence.continuations)))]
                for share in np.exp(np.linspace(low, high, 4)).tolist():
                    moved.append(float(self.divergence([sequence], [share], everyone)))
        return -sum(moved) / len(moved)

    @torch.no_grad()
    def _full(self, sequence: Sequence, drawn: list[int]) -> Tensor:
        """Log-probabilities of some continuations over the full cache, `[Q, m, vocabulary]`; kept if all of them fit.

        Always of one context alone, so that a resumed run meets the same numbers as an uninterrupted one.
        """
        if sequence.id in self._answers:
            return self._answers[sequence.id][drawn]
        there = sum(len(continuation.tokens) for continuation in sequence.continuations)
        kept = 4 * there * self.model.config.get_text_config().vocab_size * len(self.sequences) <= MOST_KEPT
        contexts = _recorded([sequence])
        everything = torch.ones(contexts.keys.shape[:4])
        asked = list(range(len(sequence.continuations))) if kept else drawn
        tokens, _ = _continuations([sequence], [asked])
        full = continuation_logits(self.model, contexts, everything, tokens)[0].float().log_softmax(-1)
        if kept:
            self._answers[sequence.id] = full
        return full[drawn] if kept else full

    def _cut(self, sequence: Sequence, share: float, n: int) -> Tensor:
        scores = self.network(inputs_of(sequence, self.chosen.inputs))  # [heads, length]
        count = max(1, int(share * scores.numel()))
        gates = hard_top(scores.flatten(), count, self.chosen.temperature).view_as(scores)
        return pad(gates, (0, n - scores.shape[1]))


def _recorded(sequences: list[Sequence]) -> Recorded:
    lengths = torch.tensor([len(sequence.tokens) for sequence in sequences])
    n = int(lengths.max())

    def padded(array: np.ndarray) -> Tensor:
        return pad(torch.from_numpy(array), (0, 0, 0, n - array.shape[2]))

    keys = torch.stack([padded(sequence.keys) for sequence in sequences])
    return Recorded(keys, torch.stack([padded(sequence.values) for sequence in sequences]), lengths)


def _continuations(sequences: list[Sequence], drawn: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens `[C, Q, m]` of the drawn continuations of each context, padded at the end, and which are real."""
    picked = [
        [torch.from_numpy(sequence.continuations[i].tokens) for i in which]
        for sequence, which in zip(sequences, drawn, strict=True)
    ]
    m = max(len(tokens) for row in picked for tokens in row)
    padded = torch.stack([torch.stack([pad(tokens, (0, m - len(tokens))) for tokens in row]) for row in picked])
    lengths = torch.tensor([[len(tokens) for tokens in row] for row in picked])
    return padded, (torch.arange(m) < lengths[..., None]).float()
