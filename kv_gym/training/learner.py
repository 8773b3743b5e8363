"""The base of every agent: validated settings, training contexts in memory, and the learner classes.

An agent is a :class:`Learner`. Most are a :class:`LossLearner`, which is one loss of the scores of a random batch.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.devices import HostCopy, resident_limit, to_device
from kv_gym.errors import UserError
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies.base import Paper
from kv_gym.policies.scorer import GroupedScorer, Scorer, input_frequencies
from kv_gym.policies.scoring.inputs import DEFAULT, HIDDEN, INPUTS, check_inputs, read_inputs, slot_inputs
from kv_gym.policies.scoring.network import ScoringNetwork
from kv_gym.traces.bounded_cache import UNLIMITED, BoundedCache
from kv_gym.traces.sequence import Contexts, Sequence
from kv_gym.training.data_parallel import Processes

STANDARDISATION_CONTEXTS = 32  # the first contexts, which give mean and scale of the inputs
Metrics = dict[str, Tensor | float]
"""What a training step reports, by the name that TensorBoard shows."""

Count = Annotated[PositiveInt, Field(le=10**9)]
Protection = Annotated[tuple[NonNegativeInt, NonNegativeInt], Field(strict=False)]
InputNames = Annotated[
    tuple[str, ...],
    Field(strict=False),
    AfterValidator(lambda names: check_inputs(names, "the agent")),
]


class Settings(BaseModel):
    """Settings that all agents have; an agent with more of them has a subclass.

    Attributes:
        steps: training steps: optimiser steps, or rollouts with the optimiser steps that follow them.
        contexts: contexts per step.
        slots: random slots per head of a context and step (all slots of a shorter context).
        hidden: width of the hidden layers.
        rate: peak learning rate of AdamW; a warm-up, then a cosine to zero.
        weight_decay: of AdamW.
        protect: first and last tokens that the exported policy protects.
        validation: share of the documents held out to choose the best checkpoint.
        every: steps between validations (and checkpoints).
        inputs: what the networks read of a slot: names of :data:`~kv_gym.policies.scoring.inputs.INPUTS`.
        bf16: mixed precision: products of the networks, and of the model that they train through, are in bfloat16
            (``torch.autocast``); weights, losses and the optimiser stay in float32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    steps: Count = 600
    contexts: Count = 8
    slots: Count = 256
    hidden: Annotated[PositiveInt, Field(le=8192)] = 64
    rate: NonNegativeFloat = 1e-2
    weight_decay: NonNegativeFloat = 0.01
    protect: Protection = (1, 1)
    validation: NonNegativeFloat = 0.1
    every: Count = 50
    inputs: InputNames = DEFAULT
    bf16: bool = False

    @property
    def depth(self) -> int:
        """Hidden layers of the networks."""
        return 2


@dataclass
class TrainingContext:
    """What training reads of one recorded context; A heads (layers x KV heads), L layers, n slots.

    Attributes:
        inputs: `[A, n, f]` float32, all inputs but the hidden states.
        utility: `[A, n]` float32, what a slot is worth to the agent; non-negative.
        hidden_states: `[L, n, D]` float32, held once for all heads of a layer; None where they are no input.
    """

    inputs: Tensor
    utility: Tensor
    hidden_states: Tensor | None = None

    def network_inputs(self, slots: Tensor | None = None) -> Tensor:
        """Inputs `[A, m, f + D]` of the slots `[m]` (None: all of them); hidden states come last."""
        inputs = self.inputs if slots is None else self.inputs.index_select(1, slots)
        if self.hidden_states is None:
            return inputs
        states = self.hidden_states if slots is None else self.hidden_states.index_select(1, slots)
        return torch.cat((inputs, states.repeat_interleave(len(inputs) // len(states), 0)), -1)

    def to(self, device: torch.device) -> TrainingContext:
        """The same on a device."""
        states = None if self.hidden_states is None else to_device(self.hidden_states, device)
        return TrainingContext(to_device(self.inputs, device), to_device(self.utility, device), states)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        states = 0 if self.hidden_states is None else self.hidden_states.nbytes
        return self.inputs.nbytes + self.utility.nbytes + states

    def without_protected(self, sinks: int, recent: int) -> TrainingContext:
        """The context without its first `sinks` and last `recent` slots (views, no copies); one slot always stays."""
        end = max(sinks + 1, self.utility.shape[1] - recent)
        states = None if self.hidden_states is None else self.hidden_states[:, sinks:end]
        return TrainingContext(self.inputs[:, sinks:end], self.utility[:, sinks:end], states)

    def standardise(self, network: ScoringNetwork) -> None:
        """Standardise the inputs in place, once, as `network` would at every step."""
        width, mean, scale = self.inputs.shape[-1], network.mean.cpu(), network.scale.cpu()
        self.inputs.sub_(mean[..., :width]).mul_(scale[..., :width])
        if self.hidden_states is not None:
            # the heads of a layer have the same mean and scale of its hidden states: take those of the first
            first = slice(None, None, network.heads // len(self.hidden_states))
            self.hidden_states.sub_(mean[first, :, width:]).mul_(scale[first, :, width:])


class TrainingContexts:
    """What training reads of recorded contexts: as many are in memory as a limit holds, others are read when drawn.

    Args:
        sequences: the recorded contexts.
        read: makes a training context of one.
        limit: bytes that those in memory may take together.
        device: where they are drawn. If it has room for all of them, each stays there once it was drawn.
        resident: bytes that they may take of the device's memory.

    Attributes:
        protect: first and last slots that are left out.
    """

    def __init__(
        self,
        sequences: Contexts,
        read: Callable[[Sequence], TrainingContext],
        limit: int,
        device: torch.device | None = None,
        resident: int = 0,
    ):
        self.protect = (0, 0)
        self._sequences, self._read_sequence = sequences, read
        self._cache: BoundedCache[TrainingContext] = BoundedCache(limit, lambda context: context.nbytes)
        self._network: ScoringNetwork | None = None
        self._device, self._resident = device or torch.device("cpu"), resident
        self._on_device: dict[int, TrainingContext] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, number: int) -> TrainingContext:
        number = int(number)  # of a tensor
        context = self._on_device.get(number) or self._cache.get(number, lambda: self._read(number))
        if self._network is not None and number not in self._on_device and self._stays_on_device(context):
            context = self._on_device[number] = context.to(self._device)
        return context.without_protected(*self.protect) if any(self.protect) else context

    def _stays_on_device(self, context: TrainingContext) -> bool:
        """Whether the device has room for all contexts, if they are as large as this one."""
        return len(self) * context.nbytes <= self._resident

    def _read(self, number: int) -> TrainingContext:
        context = self._read_sequence(self._sequences[number])
        if self._network is not None:
            context.standardise(self._network)
        return context

    def first(self) -> list[TrainingContext]:
        """The first contexts: all that the limit holds, and one at least."""
        contexts = [self[0]]
        taken = 2 * contexts[0].nbytes  # with the next one, of which the last tells the size
        while len(contexts) < len(self) and taken <= self._cache.limit:
            contexts.append(self[len(contexts)])
            taken += contexts[-1].nbytes
        return contexts

    def forget(self) -> None:
        """Read every context again when it is drawn."""
        self._cache.clear()
        self._on_device.clear()

    def standardise(self, network: ScoringNetwork) -> None:
        """Standardise all contexts, once each, as `network` would at every step."""
        self._network = network
        for context in self._cache.values():
            context.standardise(network)


def read_context(
    sequence: Sequence,
    utility: Callable[[Sequence], np.ndarray] | None = None,
    names: tuple[str, ...] = DEFAULT,
    frequencies: Tensor | None = None,
) -> TrainingContext:
    """Inputs and utility of a recorded context as it was at its end.

    Args:
        sequence: the context.
        utility: gives `[L, H, n]` of a context; None takes the mean attention per query over its continuations.
        names: of the inputs.
        frequencies: `[pairs]` of the model's rotary embedding, for inputs that need them.

    Raises:
        UserError: the context was recorded without what the inputs need.
    """
    states = None
    if names[-1] == HIDDEN:
        states = torch.from_numpy(np.stack([sequence.hidden_of(i) for i in range(len(sequence.layers))]))
    inputs = _inputs_from_slots(sequence, tuple(name for name in names if name != HIDDEN), frequencies)
    slot_utility = sequence.utility() if utility is None else utility(sequence)
    return TrainingContext(inputs, torch.from_numpy(slot_utility).flatten(0, 1), states)


def sequence_inputs(
    sequence: Sequence, names: tuple[str, ...] = DEFAULT, frequencies: Tensor | None = None
) -> Tensor:  # fmt: skip
    """What the networks read of every slot of a recorded context, `[heads, n, f]` float32; see :func:`read_context`."""
    nothing = np.empty((*sequence.keys.shape[:2], 0), np.float32)
    return read_context(sequence, lambda _: nothing, names, frequencies).network_inputs()


def _inputs_from_slots(sequence: Sequence, names: tuple[str, ...], frequencies: Tensor | None) -> Tensor:
    """All inputs but the hidden states, `[heads, n, f]`; f may be 0."""
    window = max((INPUTS[name].queries for name in names), default=0)
    if window:
        sequence.refuse_sampled(f"training on inputs {list(names)}")
    if window > sequence.queries.shape[2]:
        raise UserError(
            f"inputs {list(names)} need the last {window} queries and context {sequence.id} has "
            f"{sequence.queries.shape[2]}: record with --window {window}"
        )
    if window:
        layers = range(len(sequence.layers))
        views = (replace(sequence.view(layer), frequencies=frequencies) for layer in layers)
        return torch.cat([read_inputs(view, names)[0] for view in views])
    # no input depends on the layer: all heads of the model at once
    keys, values = (torch.from_numpy(array).flatten(0, 1) for array in (sequence.keys, sequence.values))
    if names == DEFAULT:
        positions = torch.from_numpy(sequence.slot_positions).expand(keys.shape[:2])
        return slot_inputs(keys, values, positions, torch.tensor(len(sequence.tokens)))
    if not names:
        return keys[..., :0].clone()
    view = CacheView.of(keys[None], values[None])
    positions = torch.from_numpy(sequence.slot_positions).expand(view.positions.shape)
    seen = torch.tensor([len(sequence.tokens)])
    return read_inputs(replace(view, positions=positions, seen=seen, frequencies=frequencies), names)[0]


class Learner(ABC):
    """A learning algorithm that trains one network in place.

    A step seeds its random draws by its own number, so it depends only on the state before it: a resumed run repeats
    an uninterrupted one exactly.

    Contexts stay in the host's memory, up to :attr:`memory`; a step moves what it draws of them to :attr:`device`,
    where the network is.

    Args:
        settings: of :attr:`settings_class`.
        seed: of all random draws.
        network: of :attr:`network_class`, trained in place.
        from_scratch: the network has not taken mean and scale of its inputs yet.
        model: the transformers decoder of the traces, for agents and utilities that need it.

    Attributes:
        paper: the paper that the agent follows, or None.
        settings_class: class of the agent's settings.
        network_class: class of the networks that it trains.
        calibrated: scores are trained against one another across heads, so that one threshold may cut all heads.
        absolute: a score means the same in every context, so that a threshold may be fixed ahead.
        any_inputs: it learns from whatever inputs its settings name, not from key, value and position alone.
        needs_model: it trains through the model itself, whatever the settings.
        data_parallel: its steps take their share of a batch by :attr:`processes`, so that torchrun may start several.
        processes: that train together.
        memory: bytes of contexts that may be held; those beyond are read again when they are drawn.
    """

    paper: ClassVar[Paper | None] = None
    settings_class: ClassVar[type[Settings]] = Settings
    network_class: ClassVar[type[ScoringNetwork]] = GroupedScorer
    calibrated: bool = False
    absolute: bool = False
    any_inputs: ClassVar[bool] = True
    needs_model: ClassVar[bool] = False
    data_parallel: ClassVar[bool] = False
    processes: Processes = Processes()
    memory: int = UNLIMITED

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Accept `worth`, the former name of :meth:`utility`."""
        super().__init_subclass__(**keywords)
        if "worth" in vars(cls):
            warnings.warn(f"{cls.__name__}.worth is now named utility", DeprecationWarning, stacklevel=2)
            cls.utility = vars(cls)["worth"]  # type: ignore[method-assign]

    def __init__(
        self, settings: Settings, seed: int, network: ScoringNetwork, from_scratch: bool = True, model: Any = None
    ):
        self.settings, self.seed, self.network = settings, seed, network
        self.from_scratch, self.model = from_scratch, model
        self.calibrated = self.scores_comparable(settings)
        self._loss: HostCopy | None = None
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.rate, weight_decay=settings.weight_decay
        )

    @property
    def device(self) -> torch.device:
        """Where the network is, and the batches of a step."""
        return self.network.mean.device

    @cached_property
    def input_frequencies(self) -> Tensor | None:
        """Rotary frequencies that the network's inputs need, on the host, where contexts are read."""
        return None if self.network.frequencies is None else self.network.frequencies.cpu()

    def precision(self) -> AbstractContextManager:
        """In which products are computed in bfloat16, where the settings say so."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.settings.bf16 else nullcontext()

    @classmethod
    def resolve_settings(cls, settings: Settings, has_model: bool) -> Settings:
        """Settings with every choice made that depends on what there is to learn from.

        Args:
            settings: as they were given.
            has_model: the model is given, and the traces hold every slot of their contexts, as it needs them.
        """
        return settings

    @classmethod
    def statistics(cls, settings: Settings) -> tuple[str, ...]:
        """Policies whose statistics it learns from, so that traces must hold them."""
        return ()

    @classmethod
    def make_network(cls, settings: Settings, fingerprint: Fingerprint, hidden_size: int) -> ScoringNetwork:
        """The networks for all heads of a model, untrained: one MLP per head, unless a subclass says otherwise.

        Args:
            settings: of the agent.
            fingerprint: of the model.
            hidden_size: width of its hidden states where they are an input, else 0.
        """
        heads = len(fingerprint.layers) * fingerprint.kv_heads
        sizes = settings.hidden, settings.inputs, hidden_size, settings.depth
        return GroupedScorer(heads, fingerprint.head_dim, *sizes, input_frequencies(settings.inputs, fingerprint))

    @classmethod
    def scores_comparable(cls, settings: Settings) -> bool:
        """Whether one threshold may cut the scores of all heads; :attr:`calibrated` unless settings decide."""
        return cls.calibrated

    @classmethod
    def model_requirement(cls, settings: Settings) -> str:
        """What it needs the model for, as the end of "agent 'x' ...", or "" where it needs none."""
        return "trains through the model" if cls.needs_model else ""

    def utility(self, sequence: Sequence) -> np.ndarray:
        """What the agent learns to rank the slots of a context by, `[L, H, n]` float32, non-negative.

        Mean attention per query over the continuations, unless a subclass says otherwise.
        """
        return sequence.utility()

    @abstractmethod
    def prepare(self, sequences: Contexts) -> None:
        """Take the training contexts, and let a network from scratch standardise its inputs."""

    def fit_standardisation(self, inputs: Iterable[Tensor]) -> None:
        """Give a network from scratch mean and scale of its inputs, by the first contexts, each `[heads, n, f]`."""
        if not self.from_scratch:
            return
        sample: list[Tensor] = []
        for context in islice(inputs, STANDARDISATION_CONTEXTS):
            sample.append(context)
            if sum(each.nbytes for each in sample) > self.memory // 2:
                break
        self.network.standardise(torch.cat(sample, 1))

    @abstractmethod
    def step(self, step: int) -> Metrics:
        """Train once; `step` counts from 0. The metrics hold at least ``loss``."""

    @property
    def samples(self) -> int:
        """Rankings that one step learns from: one per context and head, unless a subclass draws more."""
        return self.settings.contexts * self.network.heads

    def reward(self, policy: Scorer, validation: Contexts) -> float | None:
        """What checkpoints are chosen by, higher is better; None: the utility that `policy` keeps."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data from which :meth:`load_state_dict` continues."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from an earlier :meth:`state_dict`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    def start_step(self, step: int) -> None:
        """Seed the random draws of a step and set its learning rate: 20 steps of warm-up, a cosine to zero."""
        torch.manual_seed(self.seed * 1_000_003 + step)
        factor = min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / self.settings.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * factor

    def optimizer_step(self, loss: Tensor) -> Tensor:
        """One optimiser step; returns the norm of the gradient before it was clipped to 1.

        Args:
            loss: of all contexts of the step, or this process's part of the sum; `total_loss` is the whole of it then.

        Raises:
            UserError: the loss is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.total_loss = self.processes.add_gradients(self.network.parameters(), loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        if self.device.type == "cpu":
            self.refuse_non_finite(self.total_loss.item())
        else:  # an accelerator is not waited for: an earlier loss that has arrived by now will do
            if self._loss is not None and self._loss.has_arrived():
                self.refuse_non_finite(self._loss.tensor.item())
                self._loss = None
            self._loss = self._loss or HostCopy(self.total_loss)
        return norm

    def refuse_non_finite(self, loss: float) -> None:
        """Raise a UserError where training diverged."""
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss}: train with a lower rate than {self.settings.rate}")


class ContextLearner(Learner):
    """A learner on decisions at the end of contexts; all heads train in one batched product."""

    contexts: TrainingContexts
    network: GroupedScorer

    def prepare(self, sequences: Contexts) -> None:
        """Read inputs and utility of the contexts, as many as memory may hold."""
        self.contexts = TrainingContexts(
            sequences,
            lambda sequence: read_context(sequence, self.utility, self.settings.inputs, self.input_frequencies),
            self.memory,
            self.device,
            resident_limit(self.device),
        )
        self.fit_standardisation(context.network_inputs() for context in self.contexts.first())
        self.contexts.standardise(self.network)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from an earlier state; its mean and scale may be of more or fewer contexts than fit here."""
        before = self.network.mean.clone()
        super().load_state_dict(state)
        if not torch.equal(before, self.network.mean):
            self.contexts.forget()

    def sample_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs `[heads, contexts * n, f]` and utility `[contexts, heads, n]` of random slots, on the device."""
        picked = [self.contexts[i] for i in torch.randint(len(self.contexts), (self.settings.contexts,))]
        n = min(self.settings.slots, min(context.utility.shape[1] for context in picked))
        slots = [to_device(torch.randperm(each.utility.shape[1])[:n], each.utility.device) for each in picked]
        pairs = list(zip(picked, slots, strict=True))
        inputs = torch.cat([context.network_inputs(chosen) for context, chosen in pairs], 1)
        utility = torch.stack([context.utility.index_select(1, chosen) for context, chosen in pairs])
        return to_device(inputs, self.device), to_device(utility, self.device)

    def score(self, inputs: Tensor, network: ScoringNetwork | None = None, contexts: int | None = None) -> Tensor:
        """Scores `[contexts, heads, n]` of a batch's inputs, by the network in training or another."""
        with self.precision():
            scores = (network or self.network).scores(inputs).float()
        return scores.view(len(scores), contexts or self.settings.contexts, -1).transpose(0, 1)


class LossLearner(ContextLearner):
    """A learner that is one loss of the scores of a random batch."""

    def step(self, step: int) -> Metrics:
        """Draw contexts and slots, and descend the loss of their scores."""
        self.start_step(step)
        inputs, utility = self.sample_batch()
        if self.processes.count > 1:
            own = self.processes.own(len(utility))
            inputs = inputs.unflatten(1, (len(utility), -1))[:, own].flatten(1, 2)
            utility = utility[own]
        part = len(utility) / self.settings.contexts
        loss, metrics = self.loss(self.score(inputs, contexts=len(utility)), utility)
        norm = self.optimizer_step(loss * part)
        return {"loss": self.total_loss, **metrics, "gradient_norm": norm}

    @abstractmethod
    def loss(self, scores: Tensor, utility: Tensor) -> tuple[Tensor, Metrics]:
        """The loss of scores `[contexts, heads, n]` under utility of the same shape, and other metrics to log."""
