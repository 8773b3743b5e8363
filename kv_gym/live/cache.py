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
from kv_gym.budgets import parse_budget, protection_for
from kv_gym.errors import UserError
from kv_gym.fingerprint import Fingerprint
from kv_gym.live.layers import EvictingLayer
from kv_gym.live.panel import watched
from kv_gym.live.trigger import Eviction, Trigger
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
        allocation: who gets the slots; ``uniform`` gives every head as many.
        trigger: ``prefill`` evicts once, at the end of the first forward, and later tokens are appended;
            ``every:64`` also evicts whenever 64 tokens came since it last did, at the end of that forward.
        sinks, recent: first and last tokens that always stay; None means the policy's own.

    Raises:
        UserError: an oracle, a policy made for another model, a model that cannot be served, a bad budget, or an
            allocation or trigger that is not known.
    """

    def __init__(
        self,
        model,
        policy: str | Path | Policy = "h2o",
        budget: str | int | float = 0.25,
        allocation: str = "uniform",
        trigger: str = "prefill",
        sinks: int | None = None,
        recent: int | None = None,
    ):
        refuse_unserved(model)
        if allocation != "uniform":
            raise UserError(f"allocation {allocation!r} is not served live; expected 'uniform'")
        chosen = make_policy(policy)
        for each in watched(chosen):
            _refuse_unfit(each, model)
        protection = protection_for(chosen, sinks, recent)
        self._eviction = Eviction(chosen, parse_budget(budget), *protection, Trigger.parse(trigger), watched(chosen))
        config = model.config.get_text_config()
        layers = list(DynamicCache(config=config).layers)
        for index in full_layers(config):
            layers[index] = EvictingLayer(index, self._eviction)
        super().__init__(layers=layers)
        self._model = model
        self._attach()

    # what it holds

    @property
    def seen(self) -> int:
        """Tokens seen by every row, evicted ones included."""
        return self._evicting[0].seen

    @property
    def evicting_layers(self) -> list[int]:
        """Indices of the layers that evict, those with full attention."""
        return [layer.index for layer in self._evicting]

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
        return self._evicting[self.evicting_layers.index(layer)].slots["positions"].clone()

    def nbytes(self) -> int:
        """Bytes of all that the cache holds: keys, values, positions, state and queries, with the buffers' slack."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self._tensors()}
        return sum(storage.nbytes() for storage in storages.values())

    # what it does

    def compress(self) -> None:
        """Evict now, whatever the trigger says; the budget counts the tokens seen so far.

        Raises:
            UserError: nothing was seen yet.
        """
        self._refuse_empty()
        for layer in self._evicting:
            layer.evict()

    def fork(
        self,
        policy: str | Path | Policy | None = None,
        budget: str | int | float | None = None,
        sinks: int | None = None,
        recent: int | None = None,
    ) -> EvictingCache:
        """An independent copy of the same context, which may evict differently from here on.

        One prefill serves many questions, budgets and policies: prefill at budget 1.0 with a
        :class:`~kv_gym.live.Panel` of the policies, fork with one of them, `compress`, fork again for every question.

        Args:
            policy: another policy for the copy, or None for the same.
            budget: another budget, or None for the same.
            sinks, recent: another protection; None means the other policy's own, or as before for the same policy.

        Raises:
            UserError: the policy needs state or queries that the cache did not keep.
        """
        eviction = self._eviction
        if policy is not None:
            eviction = self._with_policy(eviction, make_policy(policy))
        eviction = replace(
            eviction,
            budget=eviction.budget if budget is None else parse_budget(budget),
            sinks=eviction.sinks if sinks is None else sinks,
            recent=eviction.recent if recent is None else recent,
        )
        protection_for(eviction.policy, eviction.sinks, eviction.recent)  # refuses negative ones
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
        """Refuse a forward that the cache would get wrong; `arguments` are the decoder's.

        Raises:
            UserError: padding, a mask of more than two dimensions, packed or shifted positions, or images.
        """
        mask = arguments.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UserError(
                "an evicting cache makes its own causal mask and was given an explicit one of other than two "
                "dimensions: leave attention_mask out"
            )
        if mask is not None and bool((mask == 0).any()):
            raise UserError(
                "the attention mask hides tokens, and an evicting cache serves batches without padding only: "
                "give it rows of equal length, or one row at a time"
            )
        if arguments.get("pixel_values") is not None:
            raise UserError("an evicting cache serves text only and was given images: leave pixel_values out")
        positions = arguments.get("position_ids")
        # a single token's position is not checked: that would make every decoding step wait for the device
        if positions is not None and positions.shape[-1] > 1:
            expected = torch.arange(self.seen, self.seen + positions.shape[-1], device=positions.device)
            if bool((positions != expected).any()):
                raise UserError(
                    f"the position ids do not count on from the {self.seen} tokens seen, and packed or shifted "
                    "sequences are not served: leave position_ids out"
                )

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
