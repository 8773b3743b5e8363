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
takes the flags as they are.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
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


class AttentionGateSettings(ModelLearnerSettings):
    """Settings of `attention_gate`, with those of every agent that trains through the model.

    Attributes:
        hidden: width of the gate's attention heads together.
        gate_heads: how many they are.
        protect: first tokens, and the local window of newest ones, that are kept whatever the gate says; also those
            that the exported policy protects.
        keep_rate: the share of the tokens that a layer's gates may keep at no cost.
        eviction_weight: factor on the eviction loss.
        eviction: the eviction loss: ``hinge`` charges for what is kept beyond the keep rate, ``absolute`` also for what
            is kept less.
        aim: ``continuation``, the negative log-likelihood of the continuation's tokens; or ``full``, the divergence
            from the predictions over the full cache.
    """

    inputs: InputNames = (HIDDEN,)
    protect: Protection = (0, 16)
    gate_heads: PositiveInt = 4
    keep_rate: Annotated[float, Field(gt=0, lt=1)] = 0.5
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
            task, eviction, kept = self.losses(batch, self._sample_continuations(batch))
            loss = task + self.settings.eviction_weight * eviction
            norm = self.optimizer_step(loss)
        parts = {"task_loss": task.detach(), "eviction_loss": eviction.detach(), "kept": kept}
        return {"loss": loss.detach(), **parts, "gradient_norm": norm}

    def losses(self, sequences: list[Sequence], indices: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """The model's loss over gated contexts, the eviction loss, and the share of the slots that the flags keep.

        Args:
            sequences: contexts of similar length.
            indices: which of its continuations each context reads, as many for all.
        """
        longest = max(len(sequence.tokens) for sequence in sequences)
        logits = [self.scores(sequence) for sequence in sequences]
        probabilities = [each.sigmoid() for each in logits]
        flags = [straight_through(each, *self.settings.protect) for each in probabilities]
        gates = [pad(each, (0, longest - each.shape[1])) for each in flags]
        predictions, tokens, mask = self.gated_logits(sequences, gates, indices)
        if self.settings.aim == "full":
            task = self.divergence_from_full(predictions, mask, sequences, indices).mean()
        else:
            task = continuation_loss(predictions, tokens, mask)
        layers = torch.stack([each.unflatten(0, (-1, self.network.kv_heads)).mean((1, 2)) for each in probabilities])
        eviction = eviction_loss(layers.mean(0), self.settings.keep_rate, self.settings.eviction)
        kept = torch.stack([each.detach().mean() for each in flags]).mean()
        return task, eviction, kept

    def reward(self, policy: Scorer, validation: Contexts) -> float:
        """Minus the training loss on contexts that the optimiser never saw."""
        total = 0.0
        with frozen_model(self.model), torch.no_grad():
            for sequence in validation:
                task, eviction, _ = self.losses([sequence], [list(range(len(sequence.continuations)))])
                total += float(task + self.settings.eviction_weight * eviction)
        return -total / len(validation)


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
