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
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from kv_gym.attention import attach, detach, full_layers, refuse_unserved
from kv_gym.budgets import Allocation, parse_allocation, parse_budget, protection_for
from kv_gym.errors import UserError
from kv_gym.fingerprint import Fingerprint
from kv_gym.live.eviction import Eviction
from kv_gym.live.layers import EvictingLayer
from kv_gym.live.padding import fresh_tokens, refuse_shifted
from kv_gym.live.panel import watched
from kv_gym.live.tiers import Tier, parse_tier
from kv_gym.live.trigger import Trigger
from kv_gym.policies import Policy, StatefulPolicy, make_policy


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
            brings. ``global:zscore`` (or ``softmax``, ``rank``) is for policies whose scores of different heads
            cannot be compared as they are.
        trigger: ``prefill`` evicts once, at the end of the first forward, and later tokens are appended;
            ``every:64`` also evicts whenever 64 tokens came since it last did, at the end of that forward;
            ``block:256`` evicts after every 256 tokens, also inside a forward (with ``global`` only at its end), so
            that reading a long prompt never takes more than the budget and a block; ``lagged:64`` is ``every:64``
            with the newest 64 tokens left alone.
        sinks, recent: first and last tokens that always stay; None means the policy's own.
        evicted: what becomes of evicted pairs: ``drop``; ``merge`` (keys and values join the most similar survivor)
            or ``merge:values``; ``bits:2``, ``bits:4`` or ``bits:8``: they stay visible in so many bits per number
            (``bits:2:balanced``: with a channel balancer), beside the budget, which counts full-precision slots.

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
    ):
        refuse_unserved(model)
        chosen, rule = make_policy(policy), parse_allocation(allocation)
        for each in watched(chosen):
            _refuse_unfit(each, model)
            if each is chosen:
                rule.refuse_unfit(each)
        config = model.config.get_text_config()
        tier = parse_tier(evicted)
        tier.refuse_unfit(config)
        full = full_layers(config)
        self._eviction = Eviction(
            chosen,
            parse_budget(budget),
            *protection_for(chosen, sinks, recent),
            Trigger.parse(trigger),
            rule,
            watched(chosen),
            len(full),
            tier,
        )
        layers = list(DynamicCache(config=config).layers)
        for place, index in enumerate(full):
            layers[index] = EvictingLayer(index, place, self._eviction)
        super().__init__(layers=layers)
        self._model = model
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

    # what it does

    @torch.no_grad()
    def compress(self) -> None:
        """Evict now, whatever the trigger says; the budget counts the tokens seen so far.

        Raises:
            UserError: nothing was seen yet.
        """
        self._refuse_empty()
        if self._eviction.allocation.whole_model:
            self._cut_all(None, exact=True)
        else:
            for layer in self._evicting:
                layer.contents.evict(exact=True)

    def fork(
        self,
        policy: str | Path | Policy | None = None,
        budget: str | int | float | None = None,
        sinks: int | None = None,
        recent: int | None = None,
        allocation: str | Allocation | None = None,
        evicted: str | Tier | None = None,
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

        Raises:
            UserError: the policy needs state or queries that the cache did not keep, or the allocation cannot use
                its scores.
        """
        eviction = self._eviction
        if policy is not None:
            eviction = self._with_policy(eviction, make_policy(policy))
        eviction = replace(
            eviction,
            budget=eviction.budget if budget is None else parse_budget(budget),
            sinks=eviction.sinks if sinks is None else sinks,
            recent=eviction.recent if recent is None else recent,
            allocation=eviction.allocation if allocation is None else parse_allocation(allocation),
            evicted=eviction.evicted if evicted is None else parse_tier(evicted),
        )
        if policy is not None or allocation is not None:
            eviction.allocation.refuse_unfit(eviction.policy)
        protection_for(eviction.policy, eviction.sinks, eviction.recent)  # refuses negative ones
        eviction.evicted.refuse_unfit(self._model.config.get_text_config())
        twin = copy.copy(self)
        twin._eviction = eviction
        twin.layers = [
            layer.fork(eviction) if isinstance(layer, EvictingLayer) else _copied(layer) for layer in self.layers
        ]
        twin._attach()
        return twin

    def __deepcopy__(self, memo: dict) -> EvictingCache:
        """The same as :meth:`fork`: the model is not copied."""
        return self.fork()

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

    def after_forward(self) -> None:
        """A forward ended: cut the whole model if the allocation needs all layers for that, and it is time."""
        if self._eviction.allocation.whole_model:
            due = self._evicting[0].contents.due()
            if any(due):
                self._cut_all(due)

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
        attach(self._model)
        # alive until called: by detach, or when the cache is collected
        self._attachment = weakref.finalize(self, detach, self._model)

    @torch.no_grad()
    def _cut_all(self, due: list[bool] | None, exact: bool = False) -> None:
        held = [layer.contents for layer in self._evicting]
        if all(contents.fits(due) for contents in held):
            for contents in held:
                contents.mark(due)
            return
        judged = [contents.judged(due) for contents in held]
        for contents, layer, slots in zip(held, judged, self._eviction.slots(judged), strict=True):
            contents.cut(layer, slots, exact)

    def _refuse_empty(self) -> None:
        if not self.seen:
            raise UserError("the cache is empty: run the model with past_key_values=cache first")

    def _with_policy(self, eviction: Eviction, policy: Policy) -> Eviction:
        if policy not in eviction.watched:
            _refuse_unfit(policy, self._model)
        missing = isinstance(policy, StatefulPolicy) and policy not in eviction.watched
        if missing or policy.needs_queries > eviction.queries:
            raise UserError(
                f"the cache did not keep what policy {policy.name!r} needs: make it with that policy, or with a Panel "
                "that has it as a member"
            )
        sinks, recent = protection_for(policy, None, None)
        return replace(eviction, policy=policy, sinks=sinks, recent=recent, watched=(policy,))


def _refuse_unfit(policy: Policy, model) -> None:
    if policy.needs_future:
        raise UserError(
            f"policy {policy.name!r} is an oracle: it sees the future, which live decoding does not have; "
            "evaluate it on traces"
        )
    if policy.needs_hidden:
        raise UserError(f"policy {policy.name!r} needs the layers' inputs, which live decoding does not keep yet")
    fingerprint = getattr(policy, "fingerprint", None)
    if fingerprint is not None:
        fingerprint.refuse_other(Fingerprint.of(model), f"policy {policy.name!r}", type(model).__name__)


def _copied(layer):
    """An independent copy of one of transformers' own layers."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(twin, name, value.clone())
    return twin
