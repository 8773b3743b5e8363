"""Numbers in 2, 4 or 8 bits: asymmetric, per token and group of channels, round to nearest, packed into bytes.

Source: the quantiser of MiKV (arXiv 2402.18096) and of KIVI's values (arXiv 2402.02750). Differs from them in: codes
are chosen for the scale and zero as they are stored, in float16, so that their rounding does not add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float16).max


def quantise(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes and grids of `x [..., d]`.

    Args:
        x: floating.
        bits: 2, 4 or 8.
        group: channels that share a scale and a zero; divides d.

    Returns:
        `[..., d * bits / 8]` uint8, channel after channel from the lowest bits of a byte on; and `[..., d / group, 2]`
        float16, the scale and the zero (the least number) of each group.
    """
    grouped = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    grid = torch.stack(((high - low) / (2**bits - 1), low), -1).clamp(-LARGEST, LARGEST).half()
    scale, zero = grid.to(grouped.dtype)[..., None].unbind(-2)
    codes = ((grouped - zero) / scale.masked_fill(scale == 0, 1)).round().clamp(0, 2**bits - 1).to(torch.uint8)
    unpacked = codes.flatten(-2).unflatten(-1, (-1, 8 // bits))
    packed = unpacked[..., 0].clone()
    for index in range(1, 8 // bits):
        packed |= unpacked[..., index] << (bits * index)
    return packed, grid


def dequantise(codes: Tensor, grid: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Numbers `[..., d]` of `dtype` from :func:`quantise`'s codes and grids."""
    exact = torch.promote_types(dtype, torch.float32)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    unpacked = (codes[..., None] >> shifts) & (2**bits - 1)
    grouped = unpacked.flatten(-2).unflatten(-1, (grid.shape[-2], -1)).to(exact)
    scale, zero = grid.to(exact)[..., None].unbind(-2)
    return grouped.mul_(scale).add_(zero).flatten(-2).to(dtype)
