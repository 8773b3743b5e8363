"""EvictingCache: a transformers cache that keeps the tokens a policy chooses and frees the rest.

The way of one forward: :meth:`EvictingCache.before_forward` checks the inputs; every layer's
:meth:`~kv_gym.live.layer.EvictingLayer.update` and ``attend`` store keys and values, attend, observe the queries and
evict; :meth:`EvictingCache.after_forward` evicts where that needs all layers.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from kv_gym.budgets import Allocation
from kv_gym.budgets.cake import Cake
from kv_gym.devices import HostCopy, to_device
from kv_gym.errors import UserError
from kv_gym.live.cascade import Cascade
from kv_gym.live.config import CacheConfig
from kv_gym.live.decoding import decide_together, remove_lowest
from kv_gym.live.forward_inputs import (
    new_token_mask,
    new_tokens,
    prefill_is_unfinished,
    refuse_attention_weights,
    refuse_shifted,
    text_positions,
)
from kv_gym.live.guard import Guard, GuardMonitor
from kv_gym.live.layer import EvictingLayer, copy_layer
from kv_gym.live.layer_state import MAX_PENDING, LayerState
from kv_gym.live.saving import SavedCache, write_cache
from kv_gym.live.selection import Selection
from kv_gym.live.tiers import Tier, TierRecorder
from kv_gym.models.attention import attach, attention_modules, detach, full_layers
from kv_gym.models.cache_name import cache_argument
from kv_gym.models.hidden_states import attach_hidden_state_hooks, remove_hidden_state_hooks
from kv_gym.models.loading import token_rows
from kv_gym.models.probe import read_probe
from kv_gym.models.second_reading import run_second_reading
from kv_gym.policies import Policy, StatefulPolicy

_NO_DRAFTS = (
    "with assisted or prompt-lookup decoding generate() reads drafts before it is known whether they stay, and a cache "
    "would evict by them: generate without drafts, or into an empty cache of budget 1.0, and fork() that one with "
    "another budget"
)

_RENAMED = {"net": "monitor", "eviction": "config", "read_again": "run_second_reading", "adopt_budget": "set_budget"}


class EvictingCache(Cache):
    """Give it to ``model.generate(past_key_values=cache)``, or to plain forward calls, and the cache stays small.

    Every KV head of every full-attention layer keeps its own tokens; sliding-window layers are left alone. Keys keep
    their original rotary positions, and later tokens take the positions they would have without eviction. The cache
    switches the model to an attention function that shows it the queries, and back: after the last `detach` of a
    model, garbage collection of its last cache, or a forward that raised.

        cache = EvictingCache(model, policy="h2o", budget=0.25)
        model.generate(**inputs, past_key_values=cache)

    Args:
        model: a transformers decoder on the attention interface, with sdpa or eager attention; or a wrapper of one,
            such as PEFT's.
        policy: name, class path, exported folder, or :class:`~kv_gym.policies.Policy`.
        budget: an int is slots per KV head, a share in (0, 1] is of the tokens seen when the trigger fires; what is
            protected counts. At or above the length nothing is evicted.
        allocation: who gets the slots: ``uniform`` gives every head as many; ``global`` sets one threshold over all
            slots of the model, so that a head may hold none or all of its tokens while the total stays exact. All
            layers then stay full until the last one has been read: the peak is the full cache of what one forward
            brings; the same with any allocation under a policy that has the context read again. ``global:zscore`` (or
            ``softmax``, ``rank``) is for policies whose scores of different heads cannot be compared as they are.
        trigger: ``prefill`` evicts once, at the end of the first forward (of all chunks of it, with
            ``generate(prefill_chunk_size=...)``), and later tokens are appended;
            ``every:64`` also evicts whenever 64 tokens came since it last did, at the end of that forward;
            ``block:256`` evicts after every 256 tokens, also inside a forward (with ``global``, or a policy that has
            the context read again, only at its end), so that reading a long prompt never takes more than the budget
            and a block; ``lagged:64`` is ``every:64`` with the newest 64 tokens left alone.
        sinks, recent: first and last tokens that always stay; None means the policy's own.
        evicted: what becomes of evicted pairs: ``drop``; ``merge`` (keys and values join the most similar survivor)
            or ``merge:values``; ``bits:2``, ``bits:4`` or ``bits:8``: they stay visible in so many bits per number
            (``bits:2:balanced``: with a channel balancer), beside the budget, which counts full-precision slots. That
            grows with the text; ``bits:4:most=512`` keeps at most so many for each KV head, of the latest tokens;
            ``less:FOLDER``: they are absorbed into a state of fixed size, by kernels that `kv-gym train-less` wrote.
        guard: what is measured at every forward, and what follows when it is too much. What it measured is in
            ``cache.monitor``, a :class:`~kv_gym.live.guard.GuardMonitor`.
        offload: keep a copy of every evicted pair in the host's memory, for :meth:`restore`.
        positions: rotary positions of kept keys: ``original``; ``cache``: their places among those that are left, so
            that no query is farther from a key than the cache is long; None: the policy's own.
        select: which of the slots a query reads, in every forward after the first: ``all``, or ``mpcache:0.2`` and
            others of :mod:`kv_gym.live.selection`. It saves the bytes that a step reads, and none that the cache holds.
        delay: a token is judged when so many others have come after it, by policies that have seen what these attended
            to; the newest ones always stay. They count in the budget, of which half at most is protected.
        probe: token ids that the model reads behind the context before every cut and forgets. Policies see the
            attention of their queries over all slots instead of the newest tokens' (those with memory: beside it), so
            that tokens are judged by a text of your choice, such as an expected question. Evictions then come at the
            end of a forward; to read a long prompt in blocks, give the blocks one by one: see
            :class:`~kv_gym.live.EpisodicCache`, which does.

    Attributes:
        model: the transformers decoder, without its wrapper.
        config: the settings, resolved and validated.
        monitor: what the guard measured; None without a guard.

    Batches may be padded: padding is never stored, and every row keeps what it would keep alone.

    Raises:
        UserError: an oracle, a policy made for another model, a model that cannot be served, a bad budget, an
            allocation or trigger that is not known, or an allocation that cannot use the policy's scores.
    """

    def __init__(
        self,
        model,
        policy: str | Path | Policy = "h2o",
        budget: str | int | float = 0.25,
        allocation: str | Allocation = "uniform",
        trigger: str = "prefill",
        sinks: int | None = None,
        recent: int | None = None,
        evicted: str | Tier = "drop",
        guard: Guard | None = None,
        offload: bool = False,
        positions: str | None = None,
        select: str | Selection = "all",
        delay: int = 0,
        probe: Sequence[int] = (),
    ):
        self.config = CacheConfig.parse(
            model, policy=policy, budget=budget, allocation=allocation, trigger=trigger, sinks=sinks, recent=recent,
            evicted=evicted, guard=guard, offload=offload, positions=positions, select=select,
            delay=delay, probe=tuple(probe) if isinstance(probe, list) else probe,
        )  # fmt: skip
        self._initial_budget = self.config.budget
        self.monitor = None if guard is None else GuardMonitor(guard)
        self.model = self.config.model
        text_config = self.model.config.get_text_config()
        layers = list(DynamicCache(config=text_config).layers)
        for ordinal, index in enumerate(full_layers(text_config)):
            layers[index] = EvictingLayer(index, ordinal, self.config)
        super().__init__(layers=layers)
        self._in_forward = self._decoding = False  # whether a forward is under way; whether the last one was one token
        self._ignores_masks = False
        self._newest_are_real: HostCopy | None = None  # of a decoding step's mask, see `_check_later`
        self._attach()

    # what it holds

    @property
    def seen(self) -> int:
        """Tokens seen by every row, evicted ones and padding included."""
        return self._evicting[0].seen

    @property
    def evicting_layers(self) -> list[int]:
        """Indices of the layers that evict, those with full attention."""
        return [state.index for state in self._states]

    def kept_positions(self, layer: int) -> Tensor:
        """Original positions of the tokens that each head of a layer holds, `[batch, kv_heads, kept]` int64.

        Ascending; a head with fewer tokens than the largest is filled with -1.

        Raises:
            UserError: the layer does not evict, or nothing was seen yet.
        """
        if layer not in self.evicting_layers:
            known = ", ".join(map(str, self.evicting_layers))
            raise UserError(f"layer {layer} does not evict; the layers with full attention are {known}")
        self._refuse_empty()
        filled, valid = self._states[self.evicting_layers.index(layer)].slots.padded(("positions",))
        last = torch.iinfo(torch.int64).max
        positions = filled["positions"].masked_fill(~valid, last).sort(-1).values
        return positions.masked_fill(positions == last, -1)

    def kept(self) -> Tensor:
        """How many tokens each head holds, `[evicting layers, batch, kv_heads]` int64 on the CPU.

        Raises:
            UserError: nothing was seen yet.
        """
        self._refuse_empty()
        return torch.stack([state.slots.counts().cpu() for state in self._states])

    def slots_read(self) -> Tensor:
        """How many slots a query of the last forward read at most, `[evicting layers, batch, kv_heads]` on the CPU.

        Those that are held, unless `select` chooses among them.

        Raises:
            UserError: nothing was seen yet.
        """
        self._refuse_empty()
        return torch.stack(
            [
                held if state.selection.read is None else state.selection.read.cpu()
                for state, held in zip(self._states, self.kept(), strict=True)
            ]
        )

    def nbytes(self) -> int:
        """Bytes of all that the cache holds: keys, values, positions, state, queries, tiers, with buffers' slack."""
        return _storage_bytes(self._tensors())

    def host_nbytes(self) -> int:
        """Bytes of the copies of evicted pairs in the host's memory, which :meth:`nbytes` leaves out."""
        return _storage_bytes(tensor for state in self._states for tensor in state.tier.host_tensors())

    def layer_signals(self) -> list[Tensor]:
        """What the guard measured at the last forward, `[batch]` for each layer that it averages."""
        tiers = [state.tier for state in self._states if isinstance(state.tier, TierRecorder)]
        return [tier.signal for tier in tiers if tier.signal is not None]

    # what it does

    @torch.no_grad()
    def compress(self) -> None:
        """Evict now, whatever the trigger says; the budget counts the tokens seen so far.

        Raises:
            UserError: nothing was seen yet.
        """
        self._refuse_empty()
        if self.config.evicts_after_forward or self.config.allocation.cascades:
            self._evict_together(None, trim=True)
        else:
            for state in self._states:
                state.evict(trim=True)

    def run_second_reading(self) -> None:
        """Do the policy's second reading now, where it has one.

        Evictions do it themselves; a fork of this cache then need not.

        Raises:
            UserError: nothing was seen yet.
        """
        self._refuse_empty()
        states, policy = self._states, self.config.policy
        unread = states[0].unread
        if isinstance(policy, StatefulPolicy) and policy.repetition and unread is not None and unread.shape[1]:
            by_index = {state.index: state for state in states}
            padded = states[0].unread_is_padded
            run_second_reading(self.model, policy, unread, by_index, self.layers, self.seen, padded)
            states[0].unread, states[0].unread_is_padded = None, False

    def run_probe(self) -> None:
        """Have the model read the probe now, where there is one: policies see its queries until the next cut.

        Evictions do it themselves.

        Raises:
            UserError: nothing was seen yet, or rows of a batch that hold padding.
        """
        self._refuse_empty()
        if self.config.probe:
            if set(self._states[0].tokens_seen) != {self.seen}:
                raise UserError(
                    "a probe is read behind texts of one length, and rows of this batch hold padding: give the rows "
                    "one at a time"
                )
            states = {state.index: state for state in self._states}
            rows = token_rows(self.model, [self.config.probe] * len(self._states[0].tokens_seen))
            read_probe(self.model, rows, states, self.layers, self.seen)

    def restore(self) -> None:
        """Put back every evicted pair in full precision, in all rows, and evict nothing until :meth:`reset`.

        Tokens that came since they were evicted stay as they were computed: to have those anew too, fork the cache
        before they come, and restore the fork.

        Raises:
            UserError: the cache was made without ``offload=True``.
        """
        for state in self._states:
            state.restore_evicted()
        self._use_budget(1.0)

    def set_budget(self, budget: str | int | float) -> None:
        """Have another budget whenever the trigger fires from here on."""
        self._use_budget(budget)
        self._initial_budget = self.config.budget

    def reset(self) -> None:
        """Forget everything: tokens, alarms, and the budget that :meth:`restore` or a guard's alarm changed."""
        self._use_budget(self._initial_budget)
        if self.monitor is not None:
            self.monitor = GuardMonitor(self.monitor.guard)
        super().reset()

    def fork(
        self,
        policy: str | Path | Policy | None = None,
        budget: str | int | float | None = None,
        sinks: int | None = None,
        recent: int | None = None,
        allocation: str | Allocation | None = None,
        evicted: str | Tier | None = None,
        guard: Guard | None = None,
        positions: str | None = None,
        select: str | Selection | None = None,
    ) -> EvictingCache:
        """An independent copy of the same context, which may evict differently from here on.

        One prefill serves many questions, budgets and policies: prefill at budget 1.0 with a
        :class:`~kv_gym.live.PolicyGroup`, fork with one of its policies, `compress`, fork again for every question.

        Args:
            policy: another policy for the copy, or None for the same.
            budget: another budget, or None for the same.
            sinks, recent: another protection; None means the other policy's own, or as before for the same policy.
            allocation: another allocation, or None for the same.
            evicted: another tier for what is evicted from here on, or None for the same.
            guard: another guard, or None for the same.
            positions: other positions of keys; None means the other policy's own, or as before for the same policy.
            select: what a query reads from here on, or None for the same.

        Raises:
            UserError: settings that the constructor refuses, or that need state, queries or keys that the cache did
                not keep.
        """
        config = self.config.fork(
            policy=policy, budget=budget, allocation=allocation, sinks=sinks, recent=recent, evicted=evicted,
            guard=guard, positions=positions, select=select,
        )  # fmt: skip
        twin = copy.copy(self)
        twin.config, twin._in_forward = config, False
        twin._initial_budget = self._initial_budget if budget is None else config.budget
        twin.monitor = copy.copy(self.monitor) if guard is None else GuardMonitor(guard)
        twin.layers = [
            layer.fork(config) if isinstance(layer, EvictingLayer) else copy_layer(layer) for layer in self.layers
        ]
        twin._attach()
        return twin

    def move(self, device: str | torch.device | None = None) -> None:
        """Move all that the cache holds, for a time in which the model does not need it.

        Args:
            device: such as ``"cpu"``; None moves it back to where the model's layers are.

        Raises:
            UserError: a tier that stores evicted pairs, a guard, or copies on the host.
        """
        modules = attention_modules(self.model)
        layer: Any  # a sliding one is transformers' own
        for index, layer in enumerate(self.layers):
            target = next(modules[index].parameters()).device if device is None else torch.device(device)
            if isinstance(layer, EvictingLayer):
                layer.state.move(target)
            elif layer.keys is not None:
                layer.keys, layer.values = layer.keys.to(target), layer.values.to(target)

    def __deepcopy__(self, memo: dict) -> EvictingCache:
        """The same as :meth:`fork`: the model is not copied."""
        return self.fork()

    def save(self, file: str | Path) -> Path:
        """Write all that is needed to go on exactly, in another process too: see :mod:`kv_gym.live.saving`.

        Args:
            file: its name, such as ``context.safetensors``; an earlier one is replaced when the new one is whole.

        Raises:
            UserError: nothing was seen yet, or settings that have no name.
        """
        self._refuse_empty()
        return write_cache(Path(file), self.config, self.layers, self.seen)

    @classmethod
    def load(
        cls,
        file: str | Path,
        model,
        policy: str | Path | Policy | None = None,
        allocation: str | Allocation | None = None,
        evicted: str | Tier | None = None,
    ) -> EvictingCache:
        """A cache as it was when it was saved; nothing in the file is ever run.

        Args:
            file: what :meth:`save` wrote.
            model: the same model in the same precision, on any device.
            policy: a trained policy, or one of the user's own class; None where the file can name it.
            allocation: one that is read from a file or is the user's own; None where the file can name it.
            evicted: the trained tier ``less:FOLDER``, where the cache has one; None: evicted pairs are dropped.

        Raises:
            UserError: another model, policy or tier, or a damaged or newer file.
        """
        with SavedCache.open(Path(file)) as saved:
            cache = cls(model, **saved.settings(model, policy, allocation, evicted))
            try:
                saved.restore_layers(model, cache.layers)
            except BaseException:
                cache.detach()
                raise
        return cache

    def detach(self) -> None:
        """Give the model's attention back; the cache can be read, and used again after ``with cache:``."""
        self._attachment()

    def __enter__(self) -> EvictingCache:
        if not self._attachment.alive:
            if len({layer.seen for layer in self._evicting}) > 1:
                raise UserError("a forward failed midway, so the cache's layers disagree: make a new cache")
            self._attach()
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    # what transformers and the attention function call

    @_disable_dynamo
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Add one layer's new keys and values; see :meth:`EvictingLayer.update`.

        Raises:
            UserError: the cache is detached, or the forward did not announce itself to the cache.
        """
        if not self._attachment.alive:
            raise UserError(
                "the cache is detached from its model, by detach() or because a forward failed: "
                "make a new one, or write `with cache:` around what uses it"
            )
        if not self._in_forward:  # neither padding nor the forward's end would be seen
            raise UserError(
                f"a forward reached the cache past the hooks on {type(self.model.base_model).__name__}: give the cache "
                "to the model that it was made for, called as a whole"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def before_forward(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a forward that the cache would get wrong, and learn which of its tokens are padding.

        Args:
            arguments: the decoder's.

        Raises:
            UserError: no tokens; a mask of more than two dimensions, or one that hides other tokens than it did;
                packed or shifted positions; images; or attention weights are asked for.
        """
        count, first = new_tokens(arguments), self._states[0]
        refuse_attention_weights(arguments, self.model.config)
        mask = None if self._ignores_masks else arguments.get("attention_mask")
        if isinstance(mask, Tensor) and self._is_decoding_step(mask):
            self._check_later(mask)
            mask = None
        token_mask = new_token_mask(mask, self.seen, first.tokens_seen, count)
        positions = text_positions(arguments.get("position_ids"))
        # a step of decoding must not make an accelerator wait: only the first one after a longer forward is checked
        checked = positions is not None and (count > 1 or positions.device.type == "cpu" or not self._decoding)
        if positions is not None and checked and token_mask is None:
            refuse_shifted(positions, self.seen, first.tokens_seen)
        self._decoding = count == 1
        once = self.config.trigger.every is None and any(at is None for at in first.evicted_at or [None])
        unfinished = once and prefill_is_unfinished()
        allocation = self.config.allocation
        cascade = Cascade(allocation) if isinstance(allocation, Cake) and allocation.cascades else None
        for layer in self._evicting:
            layer.token_mask, layer.state.prefill_unfinished, layer.cascade = token_mask, unfinished, cascade
        if self.config.select.paired:
            selections = [state.selection for state in self._states]
            for before, selection in zip(selections[2::2], selections[3::2], strict=False):
                selection.partner = before
        if self.config.needs_second_reading:
            first.store_unread(arguments.get("input_ids"), positions, token_mask, self.seen)
        self._in_forward = True

    @contextmanager
    def masks_ignored(self) -> Iterator[None]:
        """Take no attention mask to say that tokens are padding."""
        self._ignores_masks = True
        try:
            yield
        finally:
            self._ignores_masks = False

    def _is_decoding_step(self, mask: Tensor) -> bool:
        """Whether a mask is for a single new token and on an accelerator, which is not to be waited for."""
        return mask.device.type != "cpu" and mask.shape == (mask.shape[0], self.seen + 1)

    def _check_later(self, mask: Tensor) -> None:
        """Take a single new token as real, and refuse the mask of an earlier one that turns out to hide it.

        Raises:
            UserError: an earlier mask hid its new token in some row.
        """
        if self._newest_are_real is None:
            self._newest_are_real = HostCopy(mask[:, -1].all())
        elif self._newest_are_real.has_arrived():
            hidden, self._newest_are_real = not bool(self._newest_are_real.tensor), None
            if hidden:
                raise UserError(
                    "the attention mask hid a single new token, which on an accelerator is taken to be real: give "
                    "tokens one by one without padding, and leave rows that have ended out of the batch"
                )

    def after_forward(self) -> None:
        """A forward ended: check the guard's signal, and evict now if that needs all layers to have read it."""
        self._in_forward = False
        for layer in self._evicting:
            layer.cascade = None
        if self.monitor is not None and (signals := self.layer_signals()):
            self._check_guard(torch.stack([signal.to(signals[0].device) for signal in signals]).mean(0))
        undecided = [state for state in self._states if state.newest is not None]
        for device in dict.fromkeys(state.slots.device for state in undecided):  # layers may lie on several
            decide_together([state for state in undecided if state.slots.device == device])
        if self.config.evicts_after_forward:
            self.evict_if_due()

    @torch.no_grad()
    def evict_if_due(self) -> None:
        """Evict where the trigger fires now, when all layers have read the newest tokens."""
        rows_to_evict = self._states[0].rows_to_evict()
        if any(rows_to_evict):
            self._evict_together(rows_to_evict)

    def forward_failed(self) -> None:
        """A forward with this cache raised: some layers may hold its tokens and some not."""
        self._in_forward = False
        self.detach()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, `beam_idx [batch]`; an accelerator is waited for once, and not by every layer."""
        super().reorder_cache(self._rows(beam_idx))  # type: ignore[arg-type]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices [rows]` of the batch."""
        super().batch_select_indices(self._rows(indices))

    def _rows(self, indices: Tensor) -> Tensor:
        """Numbers of rows on the CPU, checked before any layer takes them.

        Raises:
            UserError: a number that is that of no row.
        """
        indices, rows = indices.cpu(), len(self._states[0].tokens_seen)
        if not rows:
            return indices
        if indices.is_floating_point() or bool(((indices < 0) | (indices >= rows)).any()):
            raise UserError(f"rows {indices.tolist()} are asked for and the cache has {rows}, counted from 0")
        return indices

    def activate_past_recording(self) -> None:
        """Assisted decoding begins; transformers up to 5.12 does not announce it and calls :meth:`crop` at once.

        transformers reads the prompt and its first drafts in one forward; of a cache that has read a part already, it
        reads that part again.

        Raises:
            UserError: what follows could not equal decoding token by token.
        """
        if self._states[0].tokens_seen or not self.config.keeps_everything:
            raise UserError(_NO_DRAFTS)
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, as if they had never come: rejected drafts of assisted decoding, for one.

        Args:
            tokens_to_remove: minus how many; above zero, as transformers has it up to 5.12: how many shall be left.
                That call comes right after every forward with drafts, and nothing announces drafts before.

        Raises:
            UserError: the cache evicted since they came, or remembers their queries.
        """
        removable = min(state.removable for state in self._states)
        config, absolute = self.config, tokens_to_remove > 0
        if absolute and not config.keeps_everything and (config.trigger.every is not None or not removable):
            raise UserError(_NO_DRAFTS)
        count = max(0, self.seen - tokens_to_remove) if absolute else -tokens_to_remove
        if count > removable:
            raise UserError(
                f"the cache cannot be cropped by the newest {count} tokens but by {removable}: what was evicted does "
                "not return and policies with memory can forget the last forward alone, of at most "
                f"{MAX_PENDING} tokens; fork() the cache before tokens that you may want to take back"
            )
        layer: Any  # a sliding one is transformers' own
        for layer in self.layers:
            if isinstance(layer, EvictingLayer):
                layer.remove_newest(count)
            elif count or getattr(layer, "record_past", False):
                layer.crop(-count)

    # the rest

    @property
    def _evicting(self) -> list[EvictingLayer]:
        return [layer for layer in self.layers if isinstance(layer, EvictingLayer)]

    @property
    def _states(self) -> list[LayerState]:
        return [layer.state for layer in self._evicting]

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            if isinstance(layer, EvictingLayer):
                yield from layer.tensors()
            elif isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None:
                yield from (layer.keys, layer.values)

    def _evict_together(self, rows_to_evict: Sequence[bool] | None, trim: bool = False) -> None:
        """Cut all evicting layers when every one has read the forward, after the policy's second reading.

        Args:
            rows_to_evict: which rows to cut; None means all.
            trim: keep no room for tokens to come.
        """
        states, allocation = self._states, self.config.allocation
        if all(state.fits_budget(rows_to_evict) for state in states):
            for state in states:
                state.mark_evicted(rows_to_evict)
            return
        self.run_second_reading()
        self.run_probe()
        if not allocation.whole_model:
            for state in states:
                state.evict(rows_to_evict, trim)
                state.forget_probe()
            return
        if trim or not all(rows_to_evict or [True]) or not remove_lowest(states):
            self._keep_together(rows_to_evict, trim)
        for state in states:
            state.forget_probe()

    def _keep_together(self, rows_to_evict: Sequence[bool] | None, trim: bool) -> None:
        """Copy the slots that one rule over all layers keeps; arguments as of :meth:`_evict_together`."""
        states = self._states
        masks = self.config.allocation.kept([state.score_slots(rows_to_evict) for state in states])
        lengths: Iterable[Tensor | None] = [None] * len(states)
        if any(state.waits_to_keep(trim) for state in states):  # one wait for all layers
            lengths = HostCopy.read(torch.stack([to_device(kept.sum(2), masks[0].device) for kept in masks]))
        for state, kept, counts in zip(states, masks, lengths, strict=True):
            state.keep_slots(kept, trim, counts)

    def _use_budget(self, budget: str | int | float) -> None:
        self.config = self.config.fork(budget=budget)
        for state in self._states:
            state.config = self.config

    def _check_guard(self, signal: Tensor) -> None:
        """React to a signal `[batch]` of the guard."""
        assert self.monitor is not None
        guard = self.monitor.guard
        if self.monitor.raises_alarm(signal):
            if guard.then == "restore":
                self.restore()
            elif guard.then == "enlarge":
                self._use_budget(guard.enlarged(self.config.budget))

    def _attach(self) -> None:
        attach(self.model)
        if self.config.needs_hidden:
            attach_hidden_state_hooks(self.model)
        # alive until called: by detach, or when the cache is collected
        self._attachment = weakref.finalize(
            self, _detach, self.model, self._output_hook(), self.config.needs_hidden
        )  # fmt: skip

    def _output_hook(self) -> RemovableHandle | None:
        """Read the output of every forward with this cache, where the guard's signal is of that."""
        if self.monitor is None or not self.monitor.guard.reads_output:
            return None
        this = weakref.ref(self)

        def read_output(module, args, kwargs, output) -> None:
            cache, logits = this(), getattr(output, "logits", None)
            if cache is not None and cache is cache_argument(kwargs) and logits is not None:
                tier = cache._states[0].tier  # follows the rows of the batch
                assert isinstance(tier, TierRecorder)
                cache._check_guard(tier.measure_output(logits[:, -1].detach()))

        return self.model.register_forward_hook(read_output, with_kwargs=True)

    def _refuse_empty(self) -> None:
        if not self.seen:
            raise UserError("the cache is empty: run the model with past_key_values=cache first")


def _deprecated(old: str, new: str) -> property:
    def read(cache: EvictingCache) -> Any:
        warnings.warn(
            f"EvictingCache.{old} is now called {new}; the old name goes with the next version",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(cache, new)

    return property(read, doc=f"Deprecated name of `{new}`.")


for _old, _new in _RENAMED.items():
    setattr(EvictingCache, _old, _deprecated(_old, _new))


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def _detach(model, hook: RemovableHandle | None, needs_hidden: bool) -> None:
    detach(model)
    if needs_hidden:
        remove_hidden_state_hooks(model)
    if hook is not None:
        hook.remove()
