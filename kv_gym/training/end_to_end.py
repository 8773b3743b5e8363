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
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import pad

from kv_gym.devices import to_device
from kv_gym.errors import UserError
from kv_gym.policies.scorer import Scorer
from kv_gym.traces import TraceSet
from kv_gym.traces.sequence import Contexts, Sequence
from kv_gym.training.learner import Learner, Metrics, Protection, Settings, sequence_inputs
from kv_gym.training.losses import hard_top
from kv_gym.training.masked_context import (
    RecordedContexts,
    continuation_logits,
    frozen_model,
    padded_continuations,
)

CACHED_BYTES = 1 << 30  # log-probabilities of the full cache are kept in memory up to here
SMALLEST_REST = 1e-6  # probability of all tokens but the kept ones, whose logarithm float32 would not give below that


class EndToEndSettings(Settings):
    """Settings of `end_to_end`, with those of every agent; `slots` has no effect, since a cut is over all slots.

    Attributes:
        continuations: continuations per context and step, at most.
        smallest, largest: the totals that are trained for, as shares of all slots; drawn log-uniformly.
        temperature: distance from the threshold, in units of the scores, over which gradients reach slots.
        top: how many of the full cache's log-probabilities are kept of every token, the highest; the others count
            together, as one more token. None: all of them.
        near: slots further than so many temperatures below the threshold are not read at all: they are evicted, and
            their gradient is next to nothing. None: all are read. On an accelerator all are, since it would have to be
            waited for.
    """

    steps: PositiveInt = 1200
    contexts: PositiveInt = 4
    protect: Protection = (0, 0)
    continuations: PositiveInt = 8
    smallest: PositiveFloat = 1 / 128
    largest: PositiveFloat = 1 / 16
    temperature: PositiveFloat = 0.5
    top: PositiveInt | None = 64
    near: PositiveFloat | None = 8.0


class EndToEnd(Learner):
    """Trains the scores through the frozen model, by the divergence of the cut cache's predictions from the full's.

    Contexts are kept on the host; a step moves its own, and their continuations, to the model's device. The scoring
    networks may be on another.
    """

    settings_class = EndToEndSettings
    calibrated = True
    needs_model = True
    settings: EndToEndSettings

    def prepare(self, sequences: Contexts) -> None:
        """Take the contexts as they are, and standardise inputs over the first of them.

        Raises:
            UserError: a context has no continuation.
        """
        sequences = sequences.cached(self.memory) if isinstance(sequences, TraceSet) else sequences
        self._lengths: list[tuple[int, int]] = []  # of each context and of its longest continuation
        for sequence in sequences:
            if not sequence.continuations:
                raise UserError(
                    f"context {sequence.id} has no continuations, so the cost of a cut is unknown: record some"
                )
            longest = max(len(continuation.tokens) for continuation in sequence.continuations)
            self._lengths.append((len(sequence.tokens), longest))
        self.sequences = sequences
        self._full_log_probs: dict[str, tuple[Tensor, Tensor]] = {}
        self.fit_standardisation(sequence_inputs(sequence, self.settings.inputs) for sequence in sequences)

    def step(self, step: int) -> Metrics:
        """Cut some contexts, each to a total of its own, and descend the divergence from the full cache."""
        self.start_step(step)
        settings = self.settings
        batch = self._sample_contexts(settings.contexts)
        low, high = math.log(settings.smallest), math.log(settings.largest)
        shares = torch.empty(len(batch)).uniform_(low, high).exp().tolist()
        count = min(settings.continuations, *(len(sequence.continuations) for sequence in batch))
        indices = [torch.randperm(len(sequence.continuations))[:count].tolist() for sequence in batch]
        with frozen_model(self.model):
            loss = self.divergence(batch, shares, indices).mean()
            norm = self.optimizer_step(loss)
        return {"loss": loss.detach(), "divergence": loss.detach(), "gradient_norm": norm}

    def _sample_contexts(self, count: int) -> list[Sequence]:
        """Random contexts of similar length with continuations of similar length, since both are padded in a batch."""
        first = self._lengths[int(torch.randint(len(self._lengths), ()))]
        similar = [
            number
            for number, own in enumerate(self._lengths)
            if all(0.8 * a <= b <= 1.25 * a for a, b in zip(first, own, strict=True))
        ]
        return [self.sequences[similar[i]] for i in torch.randint(len(similar), (count,)).tolist()]

    def divergence(self, sequences: list[Sequence], shares: list[float], indices: list[list[int]]) -> Tensor:
        """Kullback-Leibler divergence of the cut caches from the full ones, nats per token: `[contexts]`.

        With `top` log-probabilities it is the divergence of distributions in which all other tokens are one: never more
        than the whole one, and less by P times the divergence within those tokens, where P is their probability with
        the full cache. Its gradient with respect to the logits of a token differs by at most 2 P, summed over the
        vocabulary.

        Args:
            sequences: contexts of similar length.
            shares: the total that each is cut to.
            indices: which of its continuations each context reads, as many for all.
        """
        contexts = RecordedContexts.of(sequences, self.model.device)
        shape = contexts.keys.shape[:4]
        cuts = [self._cut(sequence, share, shape[3]) for sequence, share in zip(sequences, shares, strict=True)]
        gates, near = (to_device(torch.stack(each).view(shape), self.model.device) for each in zip(*cuts, strict=True))
        tokens, mask = padded_continuations(sequences, indices, self.model.device)
        read = near if self.settings.near is not None and near.device.type == "cpu" else None
        with self.precision():
            logits = continuation_logits(self.model, contexts, gates, tokens, read).float()
        known = [self._full(sequence, chosen) for sequence, chosen in zip(sequences, indices, strict=True)]
        full, chosen = (
            torch.stack([pad(part, (0, 0, 0, tokens.shape[2] - part.shape[1])) for part in parts])
            for parts in zip(*known, strict=True)
        )
        cut = logits.gather(-1, chosen) - logits.logsumexp(-1, keepdim=True)
        divergence = (full.exp() * (full - cut)).sum(-1)
        if full.shape[-1] < logits.shape[-1]:
            rest, cut_rest = ((1 - part.exp().sum(-1)).clamp(min=SMALLEST_REST) for part in (full, cut))
            divergence = divergence + rest * (rest.log() - cut_rest.log())
        return (divergence * mask).sum((1, 2)) / mask.sum((1, 2))

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

    @torch.no_grad()
    def _full(self, sequence: Sequence, indices: list[int]) -> tuple[Tensor, Tensor]:
        """The highest log-probabilities of some continuations over the full cache, and their tokens.

        Both are `[Q, m, top]`; they are kept if those of all contexts fit. Always of one context alone, so that a
        resumed run meets the same numbers as an uninterrupted one.
        """
        if sequence.id in self._full_log_probs:
            log_probs, chosen = self._full_log_probs[sequence.id]
            return log_probs[indices], chosen[indices].long()
        tokens_total = sum(len(continuation.tokens) for continuation in sequence.continuations)
        vocabulary = self.model.config.get_text_config().vocab_size
        top = min(self.settings.top or vocabulary, vocabulary)
        cached = 8 * tokens_total * top * len(self.sequences) <= CACHED_BYTES
        contexts = RecordedContexts.of([sequence], self.model.device)
        gates = torch.ones(contexts.keys.shape[:4], device=self.model.device)
        read = list(range(len(sequence.continuations))) if cached else indices
        tokens, _ = padded_continuations([sequence], [read], self.model.device)
        with self.precision():
            logits = continuation_logits(self.model, contexts, gates, tokens)[0].float()
        highest, chosen = logits.topk(top)
        log_probs = highest - logits.logsumexp(-1, keepdim=True)
        if not cached:
            return log_probs, chosen
        self._full_log_probs[sequence.id] = log_probs, chosen.int()
        return log_probs[indices], chosen[indices]

    def _cut(self, sequence: Sequence, share: float, n: int) -> tuple[Tensor, Tensor]:
        """Gates `[heads, n]` of a context cut to a share of its slots, and which of them are near enough to be read.

        Behind the context's end they are 0 and false.
        """
        inputs = to_device(sequence_inputs(sequence, self.settings.inputs), self.device)
        with self.precision():
            scores = self.network(inputs).float()  # [heads, length]
        count = max(1, int(share * scores.numel()))
        gates = hard_top(scores.flatten(), count, self.settings.temperature).view_as(scores)
        kept = gates.detach() > 0.5
        lowest = scores.detach().masked_fill(~kept, float("inf")).amin()  # of a slot that stays
        near = kept | (scores.detach() > lowest - self.settings.temperature * (self.settings.near or math.inf))
        behind = (0, n - scores.shape[1])
        return pad(gates, behind), pad(near, behind)
