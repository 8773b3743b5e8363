"""Decoding steps of an evicting cache, and its evictions, replayed as CUDA graphs.

A decoding step of a large model takes Python longer to issue than a GPU to run. Between two evictions every step does
the same to the same memory: slots have room for tokens to come, and how long heads are is known to the device alone. So
one step is captured, and replayed with another token until the room is used up. Evictions leave the slots in that
memory; those that do the same every time are captured and replayed too. No paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kv_gym.errors import UserError
from kv_gym.live.cache import EvictingCache
from kv_gym.live.layer import EvictingLayer
from kv_gym.live.layer_state import LayerState
from kv_gym.live.ragged_attention import backend_for
from kv_gym.live.slots import RaggedSlots
from kv_gym.models.cache_name import with_cache
from kv_gym.models.wrapped_model import transformers_model

MIN_ROOM = 64  # steps that a captured one can be replayed; a capture costs about as much as two steps of Python


class CapturedSteps:
    """Decodes token by token; on a GPU most steps are replays of a captured one, with the same logits.

        steps = CapturedSteps(model, cache)
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        for _ in range(100):
            logits = steps(logits.argmax(-1, keepdim=True))

    The first step runs as usual, and so does every one where :meth:`refusal` says why it cannot be captured, and one
    where the trigger fires if heads are to change their lengths layer by layer (``ada``, ``pyramid``) or a tier takes
    what is evicted. The cache may be used otherwise in between; the next step notices.

    Args:
        model: the cache's model, as it is called.
        cache: has read a prompt without padding.
        compiled: compile the model's own operations with ``torch.compile`` first, which takes a minute or more once and
            needs a C compiler; logits then differ by the rounding of the model's type.

    Attributes:
        replayed: steps so far that were replays.

    Raises:
        UserError: the model is another than the cache's.
    """

    def __init__(self, model, cache: EvictingCache, compiled: bool = False):
        if transformers_model(model).base_model is not cache.model.base_model:
            raise UserError(
                f"the cache was made for another model than this {type(model).__name__}: give the one it was made for"
            )
        self.model, self.cache, self.replayed = model, cache, 0
        self._mask = torch.zeros(1, 1, 1, 1, device=transformers_model(model).device)
        self._captured: _Captured | None = None
        self._eviction: _Eviction | None = None
        self._ran_before = False  # a step as usual, which compiles and chooses kernels
        self._run: Callable[..., Any] = _compiled(model) if compiled else model
        self._compiled_for: int | None = None  # rows, once a step over uneven heads has run and all is compiled

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Read one token of every row.

        Args:
            tokens: `[batch, 1]` int64.

        Returns:
            Logits of the next token, `[batch, vocabulary]`; a tensor of its own.

        Raises:
            UserError: the cache is empty, or its rows have seen different numbers of tokens.
        """
        states = self._states()
        seen = set(states[0].tokens_seen)
        if len(seen) != 1:
            read = "nothing" if not seen else "rows of different lengths"
            raise UserError(f"the cache has read {read}: read a prompt with it first, without padding")
        (position,) = seen
        evicts = self._evicts_next()
        stays = not evicts or self._evicts_in_place
        if not stays or self._captured is None or not self._captured.fits(states, tokens):
            self._captured = None
            usual = evicts or self.refusal() is not None or not all(state.steps_repeat for state in states)
            if usual or not self._ran_before:
                self._ran_before = True
                return self._forward(tokens, torch.full_like(tokens, position))
            self._captured = self._capture(tokens, position)
        logits = self._captured.replay(tokens)
        for layer in self._layers():
            layer.seen += 1
            layer.state.note_replayed_token()
        self.replayed += 1
        if evicts:
            self._evict(self._captured)
        return logits

    def refusal(self) -> str | None:
        """Why no step of this cache can be captured, or None."""
        config = self.cache.config
        if len(self._layers()) < len(self.cache.layers):
            return "some layers have a cache of transformers' own"
        if config.stateful_policies or config.needs_second_reading:
            return f"policy {config.policy.name!r} remembers every step"
        if config.probe:
            return "a probe is read before every cut"
        if config.needs_hidden:
            return f"policy {config.policy.name!r} reads hidden states"
        if config.guard is not None or config.offload or config.layer_tier.sees_queries:
            return "a guard, offload=True or the tier measures every step"
        if config.rope_shift is not None:
            return "positions='cache' moves all keys at every step"
        if config.select.name != "all":
            return f"select={config.select.name!r} chooses anew what every step reads"
        if config.trigger.every == 1:
            return "the trigger fires at every step"
        state = self._states()[0]
        keys = state.slots.buffers["keys"]
        if len({layer.state.slots.device for layer in self._layers()}) > 1:
            return "layers lie on several devices"
        if backend_for(keys.new_empty(1, 1, 1, keys.shape[-1])) != "kernel":
            return "the kernel over heads of different lengths does not run here"
        if not state.stored_as_read:
            return "the pairs of the tier cannot be read in place"
        return None

    @property
    def _evicts_in_place(self) -> bool:
        """Whether an eviction may follow a replay, and leave the slots in the memory that the replays read."""
        config = self.cache.config
        knows_lengths = config.allocation.equal or config.allocation.whole_model  # at one wait at most
        return knows_lengths and not config.allocation.cascades and self._states()[0].tier.drops

    def _layers(self) -> list[EvictingLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, EvictingLayer)]

    def _states(self) -> list[LayerState]:
        return [layer.state for layer in self._layers()]

    def _evicts_next(self) -> bool:
        state = self._states()[0]
        fires = state.config.trigger.fires
        return any(fires(seen + 1, at) for seen, at in zip(state.tokens_seen, state.evicted_at, strict=True))

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        # a mask of four dimensions is taken as it is: without it transformers makes one during a capture, and only then
        settings = {"position_ids": positions, "attention_mask": self._mask, "logits_to_keep": 1}
        with self.cache.masks_ignored():
            return self._run(tokens, **with_cache(self.cache), **settings).logits[:, -1]

    def _capture(self, tokens: Tensor, position: int) -> _Captured:
        """Capture the step at `position`, and leave cache and bookkeeping as they were."""
        states = self._states()
        for state in states:
            state.slots = state.slots.to_ragged()
            room = max(MIN_ROOM, state.config.trigger.every or state.slots.mean // 16)
            # heads, and layers, of one threshold gain and lose at every eviction
            spare = 0 if state.config.allocation.equal else room
            state.slots.reserve(room, spare if self._evicts_in_place else None)
        now = torch.full_like(tokens, position)
        input_ids, before = tokens.clone(), [_Tensors.of(state) for state in states]

        def step() -> Tensor:
            logits = self._forward(input_ids, now)
            for state, tensors in zip(states, before, strict=True):
                tensors.take_over(state)
            now.add_(1)
            return logits

        if self._run is not self.model and self._compiled_for != len(tokens):
            with self._host_unchanged(now):
                self._forward(input_ids, now)  # writes behind the last slots
            self._compiled_for = len(tokens)
        with self._host_unchanged(now):
            replay, logits = capture(step)
        return _Captured(input_ids, now, logits, replay, before)

    @contextmanager
    def _host_unchanged(self, now: Tensor) -> Iterator[None]:
        """Take back what happens to the cache on the host; in the meantime layers read the position from `now`."""
        things: list[object] = [self.cache]
        for layer in self._layers():
            things += (layer, layer.state, layer.state.slots)
        host = [(thing, dict(vars(thing))) for thing in things]
        for state in self._states():
            state.next_position = now[:1, None]
        try:
            yield
        finally:
            for thing, attributes in host:
                vars(thing).clear()
                vars(thing).update(attributes)

    @torch.no_grad()
    def _evict(self, captured: _Captured) -> None:
        """Evict after a replay; where an eviction did the same before, by a replay too."""
        states = self._states()
        sizes = [state.repeatable_eviction(state.row_budgets(None)) for state in states]
        if None in sizes or not all(states[0].rows_to_evict()):
            self.cache.evict_if_due()
            return
        eviction = self._eviction
        if eviction is None or eviction.sizes != sizes or eviction.memory is not captured:
            with _TransferWatch(states[0].slots.device) as watch:
                self.cache.evict_if_due()
            self._eviction = None if watch.found else _Eviction(sizes, captured)
            return
        if eviction.run is None:

            def evict() -> Tensor:
                for state in states:
                    state.evict()
                return states[0].slots.counts() + 0

            with self._host_unchanged(captured.positions):
                eviction.run, _ = capture(evict)
        eviction.run()
        for state, size in zip(states, sizes, strict=True):
            assert size is not None
            state.note_replayed_eviction(size[0] - size[1])


def _compiled(model) -> Callable[..., Any]:
    """The model's forward, compiled around the cache and its attention, which stay in Python.

    Layers differ in their number, which must not count as another program; and products with one row are read as sums,
    which is near the bandwidth of the memory.
    """
    forward = torch.compile(model.forward, options={"coordinate_descent_tuning": True})

    def run(*args, **kwargs) -> Any:
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=256):
            return forward(*args, **kwargs)

    return run


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """A CUDA graph of what `step` does to tensors: its replay, and the tensor that the result is written to."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


@dataclass(frozen=True)
class _Tensors:
    """The tensors of one layer that a step reads and writes: it must leave its results in the same ones."""

    slots: RaggedSlots
    reach: int
    buffers: dict[str, Tensor]
    starts: Tensor
    lengths: Tensor
    queries: Tensor | None
    pending: Tensor | None

    @classmethod
    def of(cls, state: LayerState) -> _Tensors:
        slots = state.slots
        assert isinstance(slots, RaggedSlots)
        return cls(
            slots, slots.reach, dict(slots.buffers), slots.starts_on_device, slots.lengths, *state.kept_queries()
        )  # fmt: skip

    def take_over(self, state: LayerState) -> None:
        """Copy what a step left in new tensors into these."""
        after = _Tensors.of(state)
        assert after.slots is self.slots and all(after.buffers[name] is buffer for name, buffer in self.buffers.items())
        for old, new in ((self.lengths, after.lengths), (self.queries, after.queries), (self.pending, after.pending)):
            if old is not None and new is not None and new is not old:
                old.copy_(new)

    def are_of(self, state: LayerState) -> bool:
        """Whether the layer still holds these, with room for one token more."""
        slots = state.slots
        if slots is not self.slots or slots.lengths is not self.lengths or slots.starts_on_device is not self.starts:
            return False
        if slots.reach != self.reach or not slots.has_room():
            return False
        queries, pending = state.kept_queries()
        same = queries is self.queries and pending is self.pending
        return same and all(slots.buffers.get(name) is buffer for name, buffer in self.buffers.items())


@dataclass(frozen=True)
class _Captured:
    """A captured step: where its token goes in and its logits come out, and the tensors that it works on.

    A graph keeps only what its own operations allocate alive: everything else that it reads or writes is held here.
    """

    tokens: Tensor
    positions: Tensor
    logits: Tensor
    run: Callable[[], object]
    tensors: list[_Tensors]

    def fits(self, states: list[LayerState], tokens: Tensor) -> bool:
        """Whether a replay would do what the next step has to do."""
        return tokens.shape == self.tokens.shape and all(map(_Tensors.are_of, self.tensors, states))

    def replay(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.run()
        return self.logits.clone()


@dataclass
class _Eviction:
    """An eviction that has happened once, and what it did.

    Attributes:
        sizes: of every layer, slots of each head before and after.
        memory: the captured step whose tensors it works on.
        run: its replay; None before it was captured.
    """

    sizes: list[tuple[int, int] | None]
    memory: _Captured
    run: Callable[[], object] | None = None


class _TransferWatch(TorchDispatchMode):
    """Notes whether numbers go between the host and a device, which a CUDA graph cannot repeat.

    Args:
        device: nothing is noted on a CPU.

    Attributes:
        found: some did.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.found = device, False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if self.device.type != "cpu" and not self.found:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            on_device = {tensor.device.type != "cpu" for tensor in tensors}
            reads = operation is torch.ops.aten._local_scalar_dense.default and True in on_device
            self.found = reads or len(on_device) > 1
        return out
