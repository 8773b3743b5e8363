"""Which model a trace or a policy belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from kv_gym.errors import UserError, short_reason
from kv_gym.models.attention import full_layers
from kv_gym.models.wrapped_model import effective_parameters, transformers_model

LONGEST_FIELD = 100_000  # characters; rotary embeddings may list a factor for every frequency


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a model, as far as its cached keys and values depend on it.

    Attributes:
        architecture: model type of the configuration, such as ``llama``.
        weights: SHA-256 over the names, shapes and about 4,096 evenly spaced values of every parameter.
        rope: the rotary embedding's parameters, as canonical JSON.
        layers: indices of the layers with full attention.
        query_heads, kv_heads, head_dim: sizes of one layer.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    architecture: str
    weights: str
    rope: str
    layers: tuple[int, ...]
    query_heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model) -> Fingerprint:
        """Read a transformers model.

        A checkpoint has one fingerprint in float32 and bfloat16, and in float16 too if it was saved in 16 bits; a
        float32 checkpoint loaded in float16 is rounded to another model and has another weights hash. What counts is
        what the model computes with: a model with an adapter has the fingerprint of the merged model, and offloaded
        or repacked weights have that of the same weights in memory.

        Args:
            model: a transformers decoder, or a wrapper of one.

        Raises:
            UserError: weights that are not there.
        """
        model = transformers_model(model)
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        return cls(
            architecture=config.model_type,
            weights=_weights_hash(model),
            rope=json.dumps(rope, sort_keys=True, default=str),
            layers=tuple(full_layers(config)),
            query_heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    @classmethod
    def from_json(cls, data: dict) -> Fingerprint:
        """Rebuild from :meth:`to_json`.

        Raises:
            UserError: a field is missing, unknown or of another type.
        """
        try:
            found = TypeAdapter(cls).validate_json(json.dumps(data))
            unfit = next((name for name, value in vars(found).items() if not _is_plain(value)), None)
            if unfit is not None:
                raise UserError(
                    f"the model fingerprint in the file is damaged: its field {unfit!r} is no plain text; expected one "
                    "written by kv_gym"
                )
            return found
        except ValidationError as error:
            field = error.errors()[0]["loc"][:1]
            reason = f"its field {str(field[0])[:60]!r} is not as expected" if field else "it holds no fields"
            raise UserError(
                f"the model fingerprint in the file is damaged: {reason}; expected one written by kv_gym"
            ) from None

    def to_json(self) -> dict:
        """Plain JSON data."""
        return {**asdict(self), "layers": list(self.layers)}

    def refuse_other(self, other: Fingerprint, owner: str, other_owner: str, sizes_only: bool = False) -> None:
        """Raise a UserError naming the first difference: `owner` has this fingerprint, `other_owner` the other.

        Args:
            other: the other fingerprint.
            owner, other_owner: what they belong to, for the error.
            sizes_only: accept other weights, positions and another architecture.
        """
        sizes = ("kv_heads", "head_dim", "query_heads", "layers")
        for field in sizes if sizes_only else (*sizes, "architecture", "rope", "weights"):
            value, other_value = getattr(self, field), getattr(other, field)
            if value != other_value:
                label = field
                if field == "weights":
                    label, value, other_value = "weights hash", value[:12], other_value[:12]
                raise UserError(
                    f"{owner} was made for a model with {label} {short_reason(value)}, and {other_owner} has "
                    f"{short_reason(other_value)}: "
                    "use the model it was made for, or make it anew for this one"
                )


def _is_plain(value: Any) -> bool:
    return not isinstance(value, str) or (value.isprintable() and len(value) <= LONGEST_FIELD)


def state_dict_hash(tensors: Mapping[str, Tensor], prefix: str = "") -> str:
    """SHA-256 over the names, shapes and float32 values of all tensors, sorted by name.

    Args:
        tensors: a module's ``state_dict()``.
        prefix: text that is hashed in front of the tensors.
    """
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _weights_hash(model) -> str:
    digest = hashlib.sha256()
    for name, parameter in effective_parameters(model):
        flat = parameter.flatten()
        values = flat[:: max(1, flat.numel() // 4096)]
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        # through bfloat16, so that a checkpoint has one hash in every precision that it is loaded in
        digest.update(values.float().cpu().bfloat16().float().numpy().tobytes())
    return digest.hexdigest()
