"""The agent `attention_gate`: a gate sees the whole context and keeps or evicts every token, trained through the model.

Paper: In-context KV-Cache Eviction for LLMs via Attention-Gate, arXiv 2410.12876. Of it is certain: before every
attention layer a small attention module reads the layer's input of the whole context, and its flags, one for each
token and head, say what is kept of the prompt; only the gates are trained, by the language-model loss plus an eviction
loss towards a target, with a straight-through estimator for the flags; about half of the tokens go. Its full text was
not available, so all else is kv_gym's own specification: the network (:mod:`kv_gym.policies.scoring.attention_gate`);
flags that stand for the decision after the prompt, so that continuations read gated slots and the prompt itself does
not; the local window, which is the newest tokens of the context; and the eviction loss, the mean over layers of what
their mean probability to be kept exceeds the target by. The paper also trains with LoRA; here the model is frozen.

The exported policy ranks slots by the gate's logit, so that any budget may cut them; the allocation ``threshold:0``
takes the flags as they are. A gate that was trained towards one rate ranks badly far from it, since only the logits
near its threshold mattered. So each step draws its rate r from a range, and keeps what lies above logit(h) - logit(r),
where h is the highest rate of the range: one gate then has an ordered set of thresholds, and 0 is that of h. This is
our own, too; a range of one number is the paper's single rate.
"""

from __future__ import annotations

import math
from itertools import cycle
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies.base import Paper
from kv_gym.policies.scorer import Scorer
from kv_gym.policies.scoring.attention_gate import AttentionGate as GateNetwork
from kv_gym.policies.scoring.inputs import HIDDEN
from kv_gym.traces.sequence import Contexts, Sequence
from kv_gym.training.learner import InputNames, Metrics, Protection, Settings
from kv_gym.training.masked_context import frozen_model
from kv_gym.training.through_model import ModelLearner, ModelLearnerSettings


def _ascending(rates: tuple[float, float]) -> tuple[float, float]:
    if rates[0] > rates[1]:
        raise ValueError(f"expected the lower rate first, such as [{rates[1]:g}, {rates[0]:g}]")
    return rates


def _pair(rate: Any) -> Any:
    """One rate as a range of itself."""
    return (rate, rate) if isinstance(rate, int | float) else rate


_Rate = Annotated[float, Field(gt=0, lt=1)]
KeepRates = Annotated[tuple[_Rate, _Rate], Field(strict=False), BeforeValidator(_pair), AfterValidator(_ascending)]


class AttentionGateSettings(ModelLearnerSettings):
    """Settings of `attention_gate`, with those of every agent that trains through the model.

    Attributes:
        hidden: width of the gate's attention heads together.
        gate_heads: how many they are.
        protect: first tokens, and the local window of newest ones, that are kept whatever the gate says; also those
            that the exported policy protects.
        keep_rate: the share of the tokens that a layer's gates may keep at no cost: one number, or the ends of a range
            from which each step draws a rate log-uniformly.
        eviction_weight: factor on the eviction loss.
        eviction: the eviction loss: ``hinge`` charges for what is kept beyond the keep rate, ``absolute`` also for what
            is kept less, without which a gate of a range keeps as little at its highest rate as at its lowest.
        aim: ``continuation``, the negative log-likelihood of the continuation's tokens; or ``full``, the divergence
            from the predictions over the full cache.
    """

    inputs: InputNames = (HIDDEN,)
    protect: Protection = (0, 16)
    gate_heads: PositiveInt = 4
    keep_rate: KeepRates = (0.5, 0.5)
    eviction_weight: NonNegativeFloat = 5.0
    eviction: Literal["hinge", "absolute"] = "hinge"
    aim: Literal["continuation", "full"] = "continuation"


class AttentionGate(ModelLearner):
    """Trains gates that see the whole context, by the model's loss and the share of the tokens that they keep."""

    paper = Paper("In-context KV-Cache Eviction for LLMs via Attention-Gate", "2410.12876")
    settings_class = AttentionGateSettings
    network_class = GateNetwork
    absolute = True
    settings: AttentionGateSettings
    network: GateNetwork

    @classmethod
    def make_network(cls, settings: Settings, fingerprint: Fingerprint, hidden_size: int) -> GateNetwork:
        """Gates for all layers of a model."""
        assert isinstance(settings, AttentionGateSettings)
        heads = len(fingerprint.layers) * fingerprint.kv_heads
        return GateNetwork(heads, fingerprint.kv_heads, hidden_size, settings.hidden, settings.gate_heads)

    def step(self, step: int) -> Metrics:
        """Gate some contexts, and descend the model's loss over them plus the eviction loss."""
        self.start_step(step)
        batch = self._sample_contexts(self.settings.contexts)
        with frozen_model(self.model):
            continuations = self._sample_continuations(batch)
            low, high = self.settings.keep_rate
            rate = low if low == high else low * (high / low) ** float(torch.rand(()))
            task, eviction, kept = self.losses(batch, continuations, rate)
            loss = task + self.settings.eviction_weight * eviction
            norm = self.optimizer_step(loss)
        parts = {"task_loss": task.detach(), "eviction_loss": eviction.detach(), "kept": kept}
        return {"loss": loss.detach(), **parts, "gradient_norm": norm}

    def losses(self, sequences: list[Sequence], indices: list[list[int]], rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """The model's loss over gated contexts, the eviction loss, and the share of the slots that the flags keep.

        Args:
            sequences: contexts of similar length.
            indices: which of its continuations each context reads, as many for all.
            rate: the share that may be kept.
        """
        longest = max(len(sequence.tokens) for sequence in sequences)
        threshold = _logit(self.settings.keep_rate[1]) - _logit(rate)
        logits = [self.scores(sequence) - threshold for sequence in sequences]
        probabilities = [each.sigmoid() for each in logits]
        flags = [straight_through(each, *self.settings.protect) for each in probabilities]
        gates = [pad(each, (0, longest - each.shape[1])) for each in flags]
        predictions, tokens, mask = self.gated_logits(sequences, gates, indices)
        if self.settings.aim == "full":
            task = self.divergence_from_full(predictions, mask, sequences, indices).mean()
        else:
            task = continuation_loss(predictions, tokens, mask)
        layers = torch.stack([each.unflatten(0, (-1, self.network.kv_heads)).mean((1, 2)) for each in probabilities])
        eviction = eviction_loss(layers.mean(0), rate, self.settings.eviction)
        kept = torch.stack([each.detach().mean() for each in flags]).mean()
        return task, eviction, kept

    def reward(self, policy: Scorer, validation: Contexts) -> float:
        """Minus the training loss on contexts that the optimiser never saw, at rates of the range in turn."""
        total = 0.0
        low, high = self.settings.keep_rate
        rates = (low, math.sqrt(low * high), high)
        with frozen_model(self.model), torch.no_grad():
            for sequence, rate in zip(validation, cycle(rates)):
                indices = [list(range(len(sequence.continuations)))]
                task, eviction, _ = self.losses([sequence], indices, rate)
                total += float(task + self.settings.eviction_weight * eviction)
        return -total / len(validation)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def straight_through(probabilities: Tensor, sinks: int, window: int) -> Tensor:
    """Flags `[heads, n]`: 1 where a probability is above a half, else 0, with the gradient of the probability.

    Args:
        probabilities: of tokens to be kept.
        sinks, window: first and newest tokens whose flags are 1, without a gradient.
    """
    n = probabilities.shape[1]
    hard = (probabilities > 0.5).to(probabilities.dtype)
    flags = hard + probabilities - probabilities.detach()
    place = torch.arange(n, device=flags.device)
    return torch.where((place < sinks) | (place >= n - window), 1.0, flags)


def eviction_loss(kept: Tensor, rate: float, form: Literal["hinge", "absolute"]) -> Tensor:
    """What layers keep beyond a rate (or differ from it by), as a mean over the layers.

    Args:
        kept: `[layers]`, mean probability of a token to be kept.
        rate: the target, the same for every layer.
        form: ``hinge`` or ``absolute``. As printed the paper's loss is their difference, whose gradient does not
            depend on the target.
    """
    beyond = kept - rate
    return (beyond.relu() if form == "hinge" else beyond.abs()).mean()


def continuation_loss(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of the continuations' tokens after the first, in nats.

    Args:
        logits: `[C, Q, m, vocabulary]`.
        tokens, mask: `[C, Q, m]`.
    """
    real = mask[:, :, 1:]
    losses = cross_entropy(logits[:, :, :-1].flatten(0, 2), tokens[:, :, 1:].flatten(), reduction="none")
    return (losses * real.flatten()).sum() / real.sum()
