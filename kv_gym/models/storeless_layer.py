"""A layer of a transformers cache that stores nothing: it passes new keys and values on and attends by itself."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kv_gym.models.attention import AttentionCall, observe_next_attention


class StorelessLayer(CacheLayerMixin):
    """Base of such layers; they bring :meth:`attend`, ``get_mask_sizes`` and ``get_seq_length``."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing is allocated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are, which :meth:`attend` sees next."""
        observe_next_attention(self)
        return key_states, value_states

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """What the layer's attention gives in place of the model's own."""
        raise NotImplementedError

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length
