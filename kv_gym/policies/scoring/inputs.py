"""What a learned scorer sees of a slot, by name: every input is a small function of a cache view.

``key``, ``value`` and ``position`` are those of KVP (arXiv 2602.10238, section 4). Beside them: the key before the
rotary embedding, which is the same wherever a token stands; norms (as in Knorm),
similarity to the mean (the idea of KeyDiff, arXiv 2504.15364), redundancy (the idea of R-KV, arXiv 2505.24133, whose
score is another), recent attention (ForesightKV, arXiv 2602.03203, gives its scorer eight statistics per query head)
and the layer's hidden state (KVzap, arXiv 2601.07891).

Every function returns `[batch, kv_heads, tokens, width]` float32. Invalid slots have no influence on others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.models.rotary import before_rotation

DEFAULT = ("key", "value", "position")
WHEREVER = ("pre_rope_key", "value", "position")  # the same with keys that do not depend on the place
HIDDEN = "hidden"
POSITION_FEATURES = 2
WINDOW = 16  # queries whose attention is an input
_LEAST = 1e-6  # norms and attention below are as good as zero, whose logarithm is none
_CHUNK = 64  # keys compared with all others at a time


@dataclass(frozen=True)
class Input:
    """One input of a scorer.

    Attributes:
        read: takes it from a view, `[batch, kv_heads, tokens, width]` float32.
        width: numbers per slot, from the head dimension and the width of the model's hidden states.
        static: it depends on the token alone, not on other slots nor on what was seen since.
        queries: last queries that it needs.
        hidden: it needs the layer's hidden states.
        rotary: it needs the frequencies of the model's rotary embedding.
    """

    read: Callable[[CacheView], Tensor]
    width: Callable[[int, int], int]
    static: bool = False
    queries: int = 0
    hidden: bool = False
    rotary: bool = False


def key(view: CacheView) -> Tensor:
    """The cached key, after the rotary embedding: d numbers."""
    return view.keys.float()


def pre_rope_key(view: CacheView) -> Tensor:
    """The key before the rotary embedding, turned back by its position: d numbers that do not depend on the place."""
    if view.frequencies is None:
        raise ValueError("this view has no rotary frequencies: a policy whose networks know them sets them")
    return before_rotation(view.keys, view.positions.clamp(min=0), view.frequencies)


def value(view: CacheView) -> Tensor:
    """The cached value: d numbers."""
    return view.values.float()


def position(view: CacheView) -> Tensor:
    """Logarithms of position and age, two numbers: a policy meets lengths it was not trained on."""
    return _log_position_and_age(view.positions, view.seen[:, None, None])


def norms(view: CacheView) -> Tensor:
    """Natural logarithms of the Euclidean norms of key and value, two numbers."""
    lengths = [torch.linalg.vector_norm(tensor.float(), dim=-1) for tensor in (view.keys, view.values)]
    return torch.stack(lengths, -1).clamp_(min=_LEAST).log_()


def similarity(view: CacheView) -> Tensor:
    """Cosines of key and value to the mean key and mean value of the head's valid slots, two numbers.

    Unlike KeyDiff's anchor the mean is of the keys as they are, so long ones count for more.
    """
    weight = view.valid[:, :, None].float()
    return torch.stack([_cosine_to_mean(tensor.float(), weight) for tensor in (view.keys, view.values)], -1)


def redundancy(view: CacheView) -> Tensor:
    """Cosine to the most similar other key of the head, one number; 0 where there is no other.

    Quadratic in the tokens, linear in memory: 64 rows of the similarities are held at a time.
    """
    unit = torch.nn.functional.normalize(view.keys.float(), dim=-1, eps=_LEAST)
    others, n = unit.transpose(-1, -2), unit.shape[2]
    invalid = ~view.valid[:, :, None]
    largest = []
    for start in range(0, n, _CHUNK):
        cosines = (unit[:, :, start : start + _CHUNK] @ others).masked_fill_(invalid, float("-inf"))
        cosines.diagonal(start, -2, -1).fill_(float("-inf"))
        largest.append(cosines.amax(-1))
    best = torch.cat(largest, -1)
    return best.masked_fill(best == float("-inf"), 0.0)[..., None]


def attention(view: CacheView) -> Tensor:
    """Mean and maximum attention of the last 16 queries, two numbers: logarithms, of a millionth at least.

    Query by query the maximum over the KV head's query heads. The mean is over all of these queries, also over those
    that came before the slot's token and pay it nothing.
    """
    received = view.attention(WINDOW).unflatten(1, (view.keys.shape[1], -1)).amax(2)  # [B, H, m, n]
    queries = view.seen.clamp(min=1, max=received.shape[2])[:, None, None]
    return torch.stack((received.sum(2) / queries, received.amax(2)), -1).clamp_(min=_LEAST).log_()


def hidden(view: CacheView) -> Tensor:
    """The hidden state that the layer's attention receives of the slot's token, the same for all heads.

    The network's first product projects it, with a matrix for each head. A live cache has it while the token
    arrives and never again: a policy that reads it scores a token once, on arrival, and the state is dropped.
    """
    if view.hidden is None:
        raise ValueError("this view holds no hidden states: a policy with `needs_hidden` is given them")
    return view.hidden.float()[:, None].expand(-1, view.keys.shape[1], -1, -1)


INPUTS = {
    "key": Input(key, lambda d, _: d, static=True),
    "value": Input(value, lambda d, _: d, static=True),
    "position": Input(position, lambda *_: POSITION_FEATURES),
    "pre_rope_key": Input(pre_rope_key, lambda d, _: d, static=True, rotary=True),
    "norms": Input(norms, lambda *_: 2, static=True),
    "similarity": Input(similarity, lambda *_: 2),
    "redundancy": Input(redundancy, lambda *_: 1),
    "attention": Input(attention, lambda *_: 2, queries=WINDOW),
    "hidden": Input(hidden, lambda _, width: width, static=True, hidden=True),
}


def read_inputs(view: CacheView, names: tuple[str, ...] = DEFAULT) -> Tensor:
    """All inputs of the slots of one layer next to each other, `[batch, kv_heads, tokens, f]` float32."""
    return torch.cat([INPUTS[name].read(view) for name in names], -1)


def slot_inputs(keys: Tensor, values: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
    """The default inputs of plain tensors, `[..., n, 2 d + 2]` float32: key, value, log position, log age.

    Args:
        keys, values: `[..., n, d]`.
        positions: `[..., n]` int64 original positions.
        seen: tokens seen, broadcastable to `positions`.
    """
    when = _log_position_and_age(positions, seen)
    return torch.cat((keys.float(), values.float(), when.expand(*keys.shape[:-1], -1)), -1)


def input_width(names: Iterable[str], head_dim: int, hidden_size: int = 0) -> int:
    """Numbers per slot that a network with these inputs takes."""
    return sum(INPUTS[name].width(head_dim, hidden_size) for name in names)


def check_inputs(names: Iterable[str], source: str | Path) -> tuple[str, ...]:
    """The names of a scorer's inputs, if they are some, hidden states last; `source` is named in errors.

    Raises:
        UserError: no name, an unknown one, one twice, or hidden states together with an input that changes as tokens
            come: a live cache has the hidden state of a token only when it arrives.
    """
    chosen = tuple(names)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(INPUTS):
        raise UserError(f"{source} has inputs {list(chosen)}; expected some of {', '.join(INPUTS)}, each once")
    changing = [name for name in chosen if not INPUTS[name].static]
    if any(INPUTS[name].hidden for name in chosen) and changing:
        static = ", ".join(name for name, feature in INPUTS.items() if feature.static and not feature.hidden)
        raise UserError(
            f"{source} has inputs 'hidden' and {changing[0]!r}: hidden states are there only while a token arrives, so "
            f"with them expected inputs that never change ({static})"
        )
    return tuple(sorted(chosen, key=HIDDEN.__eq__))


def _log_position_and_age(positions: Tensor, seen: Tensor) -> Tensor:
    return torch.stack((positions, seen - 1 - positions), -1).clamp(min=0).float().log1p() / 4


def _cosine_to_mean(tensor: Tensor, weight: Tensor) -> Tensor:
    # the sum points where the mean does
    mean = torch.nn.functional.normalize(weight @ tensor, dim=-1, eps=_LEAST)  # [B, H, 1, d]
    lengths = torch.linalg.vector_norm(tensor, dim=-1).clamp_(min=_LEAST)
    return (mean @ tensor.transpose(-1, -2))[:, :, 0] / lengths
