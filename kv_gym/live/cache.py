"""EvictingCache: a transformers cache that keeps the tokens a policy chooses and frees the rest."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from kv_gym.budgets import Allocation, parse_budget
from kv_gym.errors import UserError
from kv_gym.live import rollback, saving
from kv_gym.live.guard import Guard
from kv_gym.live.layer import EvictingLayer, copied
from kv_gym.live.padding import fresh_tokens, refuse_shifted
from kv_gym.live.safety import SafetyNet, guarded, put_back, under_watch
from kv_gym.live.settings import changed, settings_of
from kv_gym.live.tiers import Tier
from kv_gym.live.whole_model import cut_all, repeat
from kv_gym.models.attention import attach, detach, full_layers
from kv_gym.models.hidden_states import listen, unlisten
from kv_gym.policies import Policy


class EvictingCache(Cache):
    """Give it to ``model.generate(past_key_values=cache)``, or to plain forward calls, and the cache stays small.

    Every KV head of every full-attention layer keeps its own tokens; sliding-window layers are left alone. Keys keep
    their original rotary positions, and later tokens take the positions they would have without eviction. The cache
    switches the model to a watched attention function and back: after the last `detach` of a model, garbage
    collection of its last cache, or a forward that raised.

        cache = EvictingCache(model, policy="h2o", budget=0.25)
        model.generate(**inputs, past_key_values=cache)

    Args:
        model: a transformers decoder on the attention interface, with sdpa or eager attention.
        policy: name, class path, exported folder, or :class:`~kv_gym.policies.Policy`.
        budget: an int is slots per KV head, a share in (0, 1] is of the tokens seen when the trigger fires; what is
            protected counts. At or above the length nothing is evicted.
        allocation: who gets the slots: ``uniform`` gives every head as many; ``global`` sets one threshold over all
            slots of the model, so that a head may hold none or all of its tokens while the total stays exact. All
            layers then stay full until the last one has been read: the peak is the full cache of what one forward
            brings; the same with any allocation under a policy that has the context read again. ``global:zscore`` (or
            ``softmax``, ``rank``) is for policies whose scores of different heads cannot be compared as they are.
        trigger: ``prefill`` evicts once, at the end of the first forward, and later tokens are appended;
            ``every:64`` also evicts whenever 64 tokens came since it last did, at the end of that forward;
            ``block:256`` evicts after every 256 tokens, also inside a forward (with ``global``, or a policy that has
            the context read again, only at its end), so that reading a long prompt never takes more than the budget
            and a block; ``lagged:64`` is ``every:64`` with the newest 64 tokens left alone.
        sinks, recent: first and last tokens that always stay; None means the policy's own.
        evicted: what becomes of evicted pairs: ``drop``; ``merge`` (keys and values join the most similar survivor)
            or ``merge:values``; ``bits:2``, ``bits:4`` or ``bits:8``: they stay visible in so many bits per number
            (``bits:2:balanced``: with a channel balancer), beside the budget, which counts full-precision slots.
        guard: a safety net: what is measured at every forward, and what follows when it is too much. What it saw is
            in ``cache.net``, a :class:`~kv_gym.live.safety.SafetyNet`.
        offload: keep a copy of every evicted pair in the host's memory, for :meth:`restore`.
        positions: rotary positions of kept keys: ``original``; ``cache``: their places among those that are left, so
            that no query is farther from a key than the cache is long; None: the policy's own.

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
    ):
        tier = under_watch(evicted, guard, offload)
        self.eviction = settings_of(model, policy, budget, allocation, trigger, sinks, recent, tier, positions)
        self.net = None if guard is None else SafetyNet(guard, self.eviction.layers)
        config = model.config.get_text_config()
        layers = list(DynamicCache(config=config).layers)
        for place, index in enumerate(full_layers(config)):
            layers[index] = EvictingLayer(index, place, self.eviction)
        super().__init__(layers=layers)
        self.model = model
        self._attach()

    # what it holds

    @property
    def seen(self) -> int:
        """Tokens seen by every row, evicted ones and padding included."""
        return self._evicting[0].seen

    @property
    def evicting_layers(self) -> list[int]:
        """Indices of the layers that evict, those with full attention."""
        return [layer.contents.index for layer in self._evicting]

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
        filled, valid = self._evicting[self.evicting_layers.index(layer)].contents.slots.padded(("positions",))
        last = torch.iinfo(torch.int64).max
        positions = filled["positions"].masked_fill(~valid, last).sort(-1).values
        return positions.masked_fill(positions == last, -1)

    def kept(self) -> Tensor:
        """How many tokens each head holds, `[evicting layers, batch, kv_heads]` int64.

        Raises:
            UserError: nothing was seen yet.
        """
        self._refuse_empty()
        return torch.stack([layer.contents.slots.counts() for layer in self._evicting])

    def nbytes(self) -> int:
        """Bytes of all that the cache holds: keys, values, positions, state, queries, tiers, with buffers' slack."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self._tensors()}
        return sum(storage.nbytes() for storage in storages.values())

    def host_nbytes(self) -> int:
        """Bytes of the copies of evicted pairs in the host's memory, which :meth:`nbytes` leaves out."""
        held = (tensor for layer in self._evicting for tensor in layer.contents.tier.host_tensors())
        return sum({storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in held)}.values())

    # what it does

    @torch.no_grad()
    def compress(self) -> None:
        """Evict now, whatever the trigger says; the budget counts the tokens seen so far.

        Raises:
            UserError: nothing was seen yet.
        """
        self._refuse_empty()
        if self.eviction.at_the_end:
            cut_all(self.model, self.layers, [layer.contents for layer in self._evicting], None, exact=True)
        else:
            for layer in self._evicting:
                layer.contents.evict(exact=True)

    def read_again(self) -> None:
        """Do the policy's second reading now, where it has one; cuts do it themselves, forks of this cache need not.

        Raises:
            UserError: nothing was seen yet.
        """
        self._refuse_empty()
        repeat(self.model, self.layers, [layer.contents for layer in self._evicting])

    def restore(self) -> None:
        """Put back every evicted pair in full precision, in all rows, and evict nothing from here on.

        Tokens that came since they were evicted stay as they were computed: to have those anew too, fork the cache
        before they come, and restore the fork.

        Raises:
            UserError: the cache was made without ``offload=True``.
        """
        put_back(layer.contents for layer in self._evicting)
        self.adopt_budget(1.0)

    def adopt_budget(self, budget: str | int | float) -> None:
        """Have another budget whenever the trigger fires from here on."""
        self.eviction = replace(self.eviction, budget=parse_budget(budget))
        for layer in self._evicting:
            layer.contents.eviction = self.eviction

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
    ) -> EvictingCache:
        """An independent copy of the same context, which may evict differently from here on.

        One prefill serves many questions, budgets and policies: prefill at budget 1.0 with a
        :class:`~kv_gym.live.Panel` of the policies, fork with one of them, `compress`, fork again for every question.

        Args:
            policy: another policy for the copy, or None for the same.
            budget: another budget, or None for the same.
            sinks, recent: another protection; None means the other policy's own, or as before for the same policy.
            allocation: another allocation, or None for the same.
            evicted: another fate of what is evicted from here on, or None for the same.
            guard: another safety net, or None for the same.
            positions: other positions of keys; None means the other policy's own, or as before for the same policy.

        Raises:
            UserError: the policy needs state or queries that the cache did not keep, or the allocation cannot use
                its scores.
        """
        eviction = changed(self.eviction, self.model, policy, budget, sinks, recent, allocation, evicted, positions)
        twin = copy.copy(self)
        twin.net = None if self.net is None else self.net.copy()
        if guard is not None:
            eviction = guarded(eviction, guard, [layer.contents for layer in self._evicting])
            twin.net = SafetyNet(guard, eviction.layers)
        twin.eviction = eviction
        twin.layers = [
            layer.fork(eviction) if isinstance(layer, EvictingLayer) else copied(layer) for layer in self.layers
        ]
        twin._attach()
        return twin

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
        return saving.save(self, Path(file))

    @classmethod
    def load(
        cls,
        file: str | Path,
        model,
        policy: str | Path | Policy | None = None,
        allocation: str | Allocation | None = None,
    ) -> EvictingCache:
        """A cache as it was when it was saved; nothing in the file is ever run.

        Args:
            file: what :meth:`save` wrote.
            model: the same model in the same precision, on any device.
            policy: a trained policy, or one of the user's own class; None where the file can name it.
            allocation: one that is read from a file or is the user's own; None where the file can name it.

        Raises:
            UserError: another model or policy, or a damaged or newer file.
        """
        return saving.load(cls, Path(file), model, policy, allocation)

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

    # what transformers calls

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Add one layer's new keys and values; see :meth:`EvictingLayer.update`.

        Raises:
            UserError: the cache is detached.
        """
        if not self._attachment.alive:
            raise UserError(
                "the cache is detached from its model, by detach() or because a forward failed: "
                "make a new one, or write `with cache:` around what uses it"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def before_forward(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a forward that the cache would get wrong, and learn which of its tokens are padding.

        Args:
            arguments: the decoder's.

        Raises:
            UserError: a mask of more than two dimensions, or one that hides other tokens than it did; packed or
                shifted positions; or images.
        """
        if arguments.get("pixel_values") is not None:
            raise UserError("an evicting cache serves text only and was given images: leave pixel_values out")
        fresh = fresh_tokens(arguments.get("attention_mask"), self.seen, self._evicting[0].contents.rows)
        for layer in self._evicting:
            layer.fresh = fresh
        positions = arguments.get("position_ids")
        # a single token's position is not checked: that would make every decoding step wait for the device
        if positions is not None and positions.shape[-1] > 1 and fresh is None:
            refuse_shifted(positions, self.seen, self._evicting[0].contents.rows)
        if self.eviction.rereads:
            self._evicting[0].contents.remember(arguments.get("input_ids"), positions, fresh, self.seen)

    def after_forward(self) -> None:
        """A forward ended: heed the guard; cut now if that needs all layers to have read it."""
        if self.net is not None:
            self.net.after_attention(self)
        if self.eviction.at_the_end:
            due = self._evicting[0].contents.due()
            if any(due):
                cut_all(self.model, self.layers, [layer.contents for layer in self._evicting], due)

    def activate_past_recording(self) -> None:
        """Assisted decoding begins: newer transformers say so, older ones crop all of a sudden.

        Raises:
            UserError: what follows could not equal decoding token by token.
        """
        rollback.refuse_drafts(self._evicting[0].contents)
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, as if they had never come: rejected drafts of assisted decoding, for one.

        Args:
            tokens_to_remove: minus how many; above zero, as older transformers have it: how many shall be left.

        Raises:
            UserError: the cache evicted since they came, or remembers their queries.
        """
        count = rollback.newest(tokens_to_remove, self.seen, [layer.contents for layer in self._evicting])
        layer: Any  # a sliding one is transformers' own
        for layer in self.layers:
            if isinstance(layer, EvictingLayer):
                layer.take_back(count)
            elif count or getattr(layer, "record_past", False):
                layer.crop(-count)

    def forward_failed(self) -> None:
        """A forward with this cache raised: some layers may hold its tokens and some not."""
        self.detach()

    # the rest

    @property
    def _evicting(self) -> list[EvictingLayer]:
        return [layer for layer in self.layers if isinstance(layer, EvictingLayer)]

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            if isinstance(layer, EvictingLayer):
                yield from layer.tensors()
            elif isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None:
                yield from (layer.keys, layer.values)

    def _attach(self) -> None:
        attach(self.model)
        hears = self.eviction.needs_hidden
        if hears:
            listen(self.model)
        hook = None if self.net is None else self.net.listen(self)
        # alive until called: by detach, or when the cache is collected
        self._attachment = weakref.finalize(self, _let_go, self.model, hook, hears)

    def _refuse_empty(self) -> None:
        if not self.seen:
            raise UserError("the cache is empty: run the model with past_key_values=cache first")


def _let_go(model, hook: RemovableHandle | None, hears: bool) -> None:
    detach(model)
    if hears:
        unlisten(model)
    if hook is not None:
        hook.remove()
