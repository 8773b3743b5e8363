"""A kvpress press that runs any kv_gym policy: ``PolicyPress(compression_ratio=0.5, policy="h2o")``.

kvpress (github.com/NVIDIA/kvpress, checked with 0.5.5) is no dependency: it needs transformers < 5.3 and is imported
with this file alone. Importing kvpress wraps every attention function of transformers; that is kvpress's own doing.

What differs from :class:`kv_gym.EvictingCache`: kvpress keeps `int(n * (1 - ratio))` tokens, fires once, at the end of
the first forward, and gives every head equally many. The tokens kept are those of replay and of the live cache for
that budget: protection and ties (the newer wins) follow kv_gym's rules, and the kept pairs stay in their order.
Wrappers of kvpress that call :meth:`PolicyPress.score` alone (AdaKV, chunks) get kv_gym's scores with +inf at
protected tokens, and break ties as torch's topk does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kv_gym.budgets import keep_order, protection_for
from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.interop.queries import prompt_queries
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies import Policy, StatefulPolicy, make_policy
from kv_gym.policies.scoring.block_schedule import observe_blocks

try:
    from kvpress import ScorerPress
    from kvpress.utils import compute_n_kept
except ImportError:
    raise UserError(
        "PolicyPress needs kvpress, which is not installed here: use an environment with kvpress==0.5.5 and "
        "transformers below 5.3 (in a checkout, `make kvpress` makes one)"
    ) from None


@dataclass
class PolicyPress(ScorerPress):
    """Scores and compresses as a kv_gym policy would.

    Args:
        compression_ratio: share of the prompt's tokens to remove, in [0, 1).
        policy: a name, class path, exported folder, hub id or :class:`kv_gym.Policy`.
        sinks: first tokens always kept; None means the policy's own number.
        recent: last tokens always kept; None means the policy's own number.

    Raises:
        UserError: no such policy, an oracle, a policy of another model, padded rows, a model whose queries are not
            known to :mod:`kv_gym.interop.queries`, or a cache from which tokens were dropped before.
    """

    policy: Policy | str = "keydiff"
    sinks: int | None = None
    recent: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy = make_policy(self.policy)
        if self.policy.needs_future:
            raise UserError(
                f"policy {self.policy.name!r} is an oracle and a press sees no future: evaluate it on traces"
            )
        if self.policy.needs_hidden:
            raise UserError(f"policy {self.policy.name!r} needs the layers' inputs, which a press does not give it")
        if self.policy.repetition:
            raise UserError(f"policy {self.policy.name!r} has the context read again, which a press cannot do")
        protection_for(self.policy, self.sinks, self.recent)

    def post_init_from_model(self, model: nn.Module) -> None:
        """Refuse a model that the policy was not trained for."""
        fingerprint = getattr(self.policy, "fingerprint", None)
        if fingerprint is not None:
            accept = getattr(self.policy, "accept_fingerprint", False)
            owner = f"policy {self.policy.name!r}"  # type: ignore[union-attr]
            fingerprint.refuse_other(Fingerprint.of(model), owner, type(model).__name__, accept)

    @torch.no_grad()
    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Scores `[batch, kv_heads, tokens]` float32, +inf at protected tokens.

        Args:
            module: the attention module.
            hidden_states: `[batch, tokens, D]`, its input.
            keys, values: `[batch, kv_heads, tokens, d]`, the whole prompt's.
            attentions: not used; a policy's attention is computed in float32 whatever the implementation.
            kwargs: of the module's forward; `position_embeddings` and `attention_mask` are read.
        """
        policy = self._policy
        view = self._view(module, hidden_states, keys, values, kwargs)
        protected = view.protected(*protection_for(policy, self.sinks, self.recent))
        return policy.score(view).float().masked_fill(protected, float("inf"))

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Kept keys and values `[batch, kv_heads, kept, d]`, in the order of the text."""
        if self.compression_ratio == 0:
            return keys, values
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        order = keep_order(scores, CacheView.of(keys, values, layer=module.layer_idx))  # type: ignore[arg-type]
        kept = order[..., : self._kept(keys)].sort(-1).values[..., None]
        return tuple(tensor.gather(2, kept.expand(-1, -1, -1, tensor.shape[-1])) for tensor in (keys, values))  # type: ignore[return-value]

    @property
    def _policy(self) -> Policy:
        assert isinstance(self.policy, Policy)
        return self.policy

    def _kept(self, keys: Tensor) -> int:
        return compute_n_kept(keys.shape[2], self.compression_ratio)

    def _view(
        self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, kwargs: dict[str, Any]
    ) -> CacheView:
        """The layer as the policy may see it at the end of the prompt."""
        _refuse_unfit(hidden_states, keys, kwargs.get("attention_mask"))
        policy = self._policy
        view = CacheView.of(keys, values, self._kept(keys), layer=module.layer_idx, scaling=module.scaling)  # type: ignore[arg-type]
        if policy.needs_output:
            weight = module.o_proj.weight  # type: ignore[union-attr]
            view = replace(view, output=weight.T.unflatten(0, (-1, keys.shape[-1])))  # type: ignore[operator]
        state = policy.initial_state(view) if isinstance(policy, StatefulPolicy) else {}
        wanted = keys.shape[2] if state else policy.needs_queries  # a memory sees every query of the prompt
        if wanted == 0:
            return view
        queries = prompt_queries(module, hidden_states, kwargs["position_embeddings"], wanted)
        if isinstance(policy, StatefulPolicy) and state:
            state = observe_blocks(policy, view, queries, state)
        window = queries[:, :, -policy.needs_queries :] if policy.needs_queries else None
        return replace(view, state=state, queries=window)


def _refuse_unfit(hidden_states: Tensor, keys: Tensor, mask: Tensor | None) -> None:
    tokens, stored = hidden_states.shape[1], keys.shape[2]
    if tokens != stored:
        raise UserError(
            f"the press was given {tokens} hidden states and {stored} cached tokens: a policy must know every token's "
            "position, which kvpress forgets after the first compression; kv_gym.EvictingCache evicts while decoding"
        )
    if mask is None:
        return
    # of the last query's row: additive (0 = visible), boolean, or one number per token (0 = padding)
    newest = mask if mask.dim() == 2 else mask[:, 0, -1, :stored]
    visible = newest == 0 if mask.dim() == 4 and mask.is_floating_point() else newest != 0
    if not bool(visible.all()):
        raise UserError(
            "the batch holds padded rows, whose padding kvpress counts as tokens: give each prompt alone, or use "
            "kv_gym.EvictingCache"
        )
