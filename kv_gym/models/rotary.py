"""Keys as they were before the rotary embedding: what a token says of itself, without where it stands.

Rotary embedding: Su et al. 2021, arXiv 2104.09864. A trace or a cache holds keys after it; their positions and the
model's frequencies are enough to turn them back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.files import parse_json

KNOWN_TYPES = ("default", "linear", "llama3")


def rotary_frequencies(rope: str, head_dim: int) -> Tensor:
    """Angle per position of each rotated pair of a key's numbers, `[pairs]` float32.

    Args:
        rope: the rotary embedding's parameters, as :attr:`kv_gym.models.fingerprint.Fingerprint.rope` has them.
        head_dim: of the keys; a part of their numbers may be rotated.

    Raises:
        UserError: no rotary embedding, or one whose angles do not follow from its parameters alone.
    """
    expected = (
        f"keys before the rotary embedding are known for the types {', '.join(KNOWN_TYPES)}, and this model has "
        f"{rope[:100]}: train with the input 'key' instead of 'pre_rope_key'"
    )
    try:
        settings = parse_json(rope, "the rotary embedding")
    except UserError:
        raise UserError(expected) from None
    if not isinstance(settings, dict):
        raise UserError(expected)
    kind, base = settings.get("rope_type", "default"), settings.get("rope_theta")
    if kind not in KNOWN_TYPES or isinstance(base, bool) or not isinstance(base, int | float) or not base > 0:
        raise UserError(expected)
    try:
        rotated = int(head_dim * settings.get("partial_rotary_factor", 1.0)) // 2 * 2
        frequencies = 1.0 / base ** (torch.arange(0, rotated, 2, dtype=torch.float64) / max(rotated, 1))
        if kind == "linear":
            frequencies = frequencies / settings["factor"]
        elif kind == "llama3":
            frequencies = _llama3(frequencies, settings)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"the rotary embedding's parameters {rope[:100]} are incomplete: {error}") from None
    return frequencies.float()


def _llama3(frequencies: Tensor, settings: dict) -> Tensor:
    """Low frequencies are divided by a factor, high ones kept, those between interpolated (Llama 3.1)."""
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = settings["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (share + (1 - share) / settings["factor"])


def before_rotation(keys: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Keys without the rotary embedding, `[..., n, d]` float32.

    Pairs are the numbers i and i + pairs of a key, as transformers' Llama and most models have them.

    Args:
        keys: `[..., n, d]` after the embedding.
        positions: `[..., n]` int64, where each was rotated to.
        frequencies: `[pairs]` of :func:`rotary_frequencies`.
    """
    angle = positions[..., None].float() * frequencies
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = keys.float().tensor_split((len(frequencies), 2 * len(frequencies)), -1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), -1)
