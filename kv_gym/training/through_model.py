"""What agents share that train through the frozen model: contexts whose slots have gates, and the model's loss.

The model reads recorded continuations over a context whose slots have gates (:mod:`kv_gym.training.masked_context`).
The loss is how far its next-token distributions move from those over the full context, or how unlikely it finds the
continuation. Gradients reach the gates, and the scores behind them.
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import pad

from kv_gym.devices import resident_limit, to_device
from kv_gym.errors import UserError
from kv_gym.traces import TraceSet
from kv_gym.traces.sequence import Contexts, Sequence
from kv_gym.training.learner import Learner, Settings, sequence_inputs
from kv_gym.training.masked_context import (
    RecordedContexts,
    continuation_logits,
    padded_continuations,
    recorded_tensors,
)

CACHED_BYTES = 1 << 30  # log-probabilities of the full cache are kept in memory up to here
SMALLEST_REST = 1e-6  # probability of all tokens but the kept ones, whose logarithm float32 would not give below that


class ModelLearnerSettings(Settings):
    """Settings of agents that train through the model; `slots` has no effect, since cuts are over all slots.

    Attributes:
        continuations: continuations per context and step, at most.
        top: how many of the full cache's log-probabilities are kept of every token, the highest; the others count
            together, as one more token. None: all of them.
    """

    contexts: PositiveInt = 4
    continuations: PositiveInt = 8
    top: PositiveInt | None = 64


class ModelLearner(Learner):
    """Trains scores by what the model predicts over contexts whose slots have gates.

    Contexts are kept on the host; a step moves its own, and their continuations, to the model's device. The scoring
    networks may be on another.
    """

    calibrated = True
    needs_model = True
    settings: ModelLearnerSettings

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
        self._resident: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._resident_limit = resident_limit(self.device)
        self.fit_standardisation(map(self._inputs, sequences))

    def _sample_contexts(self, count: int) -> list[Sequence]:
        """Random contexts of similar length with continuations of similar length, since both are padded in a batch."""
        first = self._lengths[int(torch.randint(len(self._lengths), ()))]
        similar = [
            number
            for number, own in enumerate(self._lengths)
            if all(0.8 * a <= b <= 1.25 * a for a, b in zip(first, own, strict=True))
        ]
        return [self.sequences[similar[i]] for i in torch.randint(len(similar), (count,)).tolist()]

    def _sample_continuations(self, batch: list[Sequence]) -> list[list[int]]:
        """Which of its continuations each context reads, as many for all."""
        count = min(self.settings.continuations, *(len(sequence.continuations) for sequence in batch))
        return [torch.randperm(len(sequence.continuations))[:count].tolist() for sequence in batch]

    def scores(self, sequence: Sequence) -> Tensor:
        """Scores `[heads, n]` of all slots of a context, with gradients."""
        resident = self._on_device(sequence)
        inputs = self._inputs(sequence) if resident is None else resident[2]
        with self.precision():
            return self.network(to_device(inputs, self.device)).float()

    def _inputs(self, sequence: Sequence) -> Tensor:
        """What the networks read of a context, `[heads, n, f]` on the host."""
        return sequence_inputs(sequence, self.settings.inputs, self.input_frequencies)

    def _tensors(self, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """Keys and values of a context, on the model's device where they stay there."""
        resident = self._on_device(sequence)
        return recorded_tensors(sequence) if resident is None else resident[:2]

    def _on_device(self, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and inputs of a context, which stay where they are read; None where there is no room for all."""
        if sequence.id not in self._resident:
            keys, values = recorded_tensors(sequence)
            if 3 * (keys.nbytes + values.nbytes) * len(self.sequences) > self._resident_limit:  # inputs take a third
                return None
            inputs = to_device(self._inputs(sequence), self.device)
            own = self.model.device
            self._resident[sequence.id] = to_device(keys, own), to_device(values, own), inputs
        return self._resident[sequence.id]

    def gated_logits(
        self, sequences: list[Sequence], gates: list[Tensor], indices: list[list[int]], near: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The model over some continuations of contexts whose slots have gates.

        Args:
            sequences: contexts of similar length.
            gates: of each, `[heads, n]` with n slots in all: 0 behind the context's end.
            indices: which of its continuations each context reads, as many for all.
            near: likewise, slots that are read at all; the others have gates of 0. None: all of them.

        Returns:
            Logits `[C, Q, m, vocabulary]` float32; the continuations' tokens and the mask of the real ones, both
            `[C, Q, m]`.
        """
        device = self.model.device
        contexts = RecordedContexts.of(sequences, device, self._tensors)
        shape = contexts.keys.shape[:4]
        joined = to_device(torch.stack(gates).view(shape), device)
        tokens, mask = padded_continuations(sequences, indices, device)
        read = None if near is None else to_device(torch.stack(near).view(shape), device)
        with self.precision():
            logits = continuation_logits(self.model, contexts, joined, tokens, read).float()
        return logits, tokens, mask

    def divergence_from_full(
        self, logits: Tensor, mask: Tensor, sequences: list[Sequence], indices: list[list[int]]
    ) -> Tensor:
        """Kullback-Leibler divergence of predictions from those over the full cache, nats per token: `[contexts]`.

        With `top` log-probabilities it is the divergence of distributions in which all other tokens are one: never more
        than the whole one, and less by P times the divergence within those tokens, where P is their probability with
        the full cache. Its gradient with respect to the logits of a token differs by at most 2 P, summed over the
        vocabulary.

        Args:
            logits, mask: of :meth:`gated_logits`.
            sequences: the contexts.
            indices: which continuations the predictions are of.
        """
        known = [self._full(sequence, chosen) for sequence, chosen in zip(sequences, indices, strict=True)]
        full, chosen = (
            torch.stack([pad(part, (0, 0, 0, mask.shape[2] - part.shape[1])) for part in parts])
            for parts in zip(*known, strict=True)
        )
        cut = logits.gather(-1, chosen) - logits.logsumexp(-1, keepdim=True)
        divergence = (full.exp() * (full - cut)).sum(-1)
        if full.shape[-1] < logits.shape[-1]:
            rest, cut_rest = ((1 - part.exp().sum(-1)).clamp(min=SMALLEST_REST) for part in (full, cut))
            divergence = divergence + rest * (rest.log() - cut_rest.log())
        return (divergence * mask).sum((1, 2)) / mask.sum((1, 2))

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
        contexts = RecordedContexts.of([sequence], self.model.device, self._tensors)
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
