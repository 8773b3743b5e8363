"""Caches as files: one safetensors file with all that is needed to go on exactly, and nothing that is ever run.

Tensors are named `<layer>.<kind>.<name>`; everything else is JSON in the header: settings, counts, and the
fingerprint of the model, without which the numbers mean nothing. A file is read as if somebody else had written it.
Buffers are written with their room for tokens to come, zeroed, because it decides in which order slots are
overwritten, and with it the last digit of what follows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kv_gym.budgets import Allocation, parse_allocation
from kv_gym.budgets.normalisation import NORMALISATIONS
from kv_gym.errors import UserError
from kv_gym.files import whole_file
from kv_gym.live import saved_policy
from kv_gym.live.layer import EvictingLayer
from kv_gym.live.layer_state import Contents
from kv_gym.live.ragged import RaggedSlots
from kv_gym.live.saved_slots import check_positions, expected_slots, stored_slots
from kv_gym.live.slots import EqualSlots
from kv_gym.live.tiers import Drop
from kv_gym.models.attention import attention_of
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies import Policy

if TYPE_CHECKING:
    from kv_gym.live.cache import EvictingCache

KIND, FORMAT = "kv_gym cache", 2  # 1: keys have their original positions
MOST_TOKENS = 2**31  # positions beyond are not ranked


def save(cache: EvictingCache, file: Path) -> Path:
    """Write a cache that has seen something; see :meth:`EvictingCache.save`."""
    eviction = cache.eviction
    tensors: dict[str, Tensor] = {}
    if not isinstance(eviction.evicted, Drop):
        raise UserError(
            f"a cache with evicted={eviction.evicted.name!r}, a guard or offload=True holds more than its slots, which "
            "no file has a place for: save one that was made without them"
        )
    layers: dict[str, dict[str, Any]] = {}
    found: dict[str, Tensor]
    layer: Any  # a sliding one is transformers' own
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, EvictingLayer):
            held = layer.contents
            held.settle()
            kind, found = stored_slots(held.slots)
            layers[str(index)] = kind | {"scaling": held.scaling}
            found |= {
                name: tensor
                for name, tensor in (("queries", held.queries), ("unread", held.unread))
                if tensor is not None
            }
        else:
            layers[str(index)] = {"seen": layer.get_seq_length()}
            found = {"window.keys": layer.keys, "window.values": layer.values}
        tensors |= {f"{index}.{name}": tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    first = next(layer.contents for layer in cache.layers if isinstance(layer, EvictingLayer))
    about = {
        "kind": KIND,
        "format": 1 if eviction.turn is None else FORMAT,
        "model": Fingerprint.of(cache.model).to_json(),
        "dtype": str(cache.model.dtype),
        "policy": saved_policy.described(eviction.policy),
        "budget": eviction.budget,
        "allocation": {"name": eviction.allocation.name, "plain": _plain(eviction.allocation)},
        "trigger": eviction.trigger.text,
        "positions": "original" if eviction.turn is None else "cache",
        "sinks": eviction.sinks,
        "recent": eviction.recent,
        "seen": cache.seen,
        "rows": first.rows,
        "fired": first.fired,
        "loose": first.loose,
        "layers": layers,
    }
    try:
        with whole_file(file) as part:
            save_file(tensors, part, {"kv_gym": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be written ({error}); name a file in a folder that exists") from None
    return file


def load(
    kind: type[EvictingCache],
    file: Path,
    model,
    policy: str | Path | Policy | None,
    allocation: str | Allocation | None,
) -> EvictingCache:
    """Read a cache; see :meth:`EvictingCache.load`."""
    try:
        with safe_open(file, "pt") as stored:
            try:
                return _read(kind, file, stored, model, policy, allocation)
            except UserError:
                raise
            except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError, AttributeError) as error:
                raise _damaged(file, f"{type(error).__name__}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"there is no file {file}; expected one that EvictingCache.save wrote") from None
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None


def _read(kind, file: Path, stored, model, policy, allocation) -> EvictingCache:
    about = json.loads((stored.metadata() or {}).get("kv_gym", "{}"))
    if not isinstance(about, dict) or about.get("kind") != KIND:
        raise UserError(f"{file} holds no cache; expected one that EvictingCache.save wrote")
    if not isinstance(about["format"], int) or about["format"] > FORMAT:
        raise UserError(f"{file} has cache format {about['format']}, newer than {FORMAT}: upgrade kv-gym")
    print_ = Fingerprint.from_json(about["model"])
    print_.refuse_other(Fingerprint.of(model), f"the cache in {file}", type(model).__name__)
    if about["dtype"] != str(model.dtype):
        raise UserError(f"the cache in {file} is of {about['dtype']} and the model of {model.dtype}: load the model so")
    cache = kind(
        model,
        saved_policy.chosen(about["policy"], policy, file),
        about["budget"],
        _allocation(about["allocation"], allocation, file),
        about["trigger"],
        _count(about["sinks"], MOST_TOKENS),
        _count(about["recent"], MOST_TOKENS),
        positions=str(about.get("positions", "original")),
    )
    try:
        _fill(cache, about, stored, print_, file)
    except BaseException:
        cache.detach()
        raise
    return cache


def _fill(cache: EvictingCache, about: dict, stored, print_: Fingerprint, file: Path) -> None:
    seen = _count(about["seen"], MOST_TOKENS, least=1)
    rows = [_count(row, seen) for row in about["rows"]]
    fired = [None if at is None else _count(at, row) for at, row in zip(about["fired"], rows, strict=True)]
    loose = _count(about["loose"], seen)
    names = set(stored.keys())
    if not rows or set(about["layers"]) != {str(index) for index in range(len(cache.layers))}:
        raise _damaged(file, "it has other layers than the model")
    modules = attention_of(cache.model)
    for index, layer in enumerate(cache.layers):
        mine, prefix = about["layers"][str(index)], f"{index}."
        found = {name.removeprefix(prefix): stored.get_slice(name) for name in names if name.startswith(prefix)}
        names -= {prefix + name for name in found}
        module = modules[index]
        device = next(module.parameters()).device

        def read(name: str, prefix=prefix, device=device) -> Tensor:
            tensor = stored.get_tensor(prefix + name)
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise _damaged(file, f"{prefix}{name} holds numbers that are none")
            return tensor.to(device, copy=True)  # on a CPU it is a view of the file

        shapes = {name: list(part.get_shape()) for name, part in found.items()}
        if isinstance(layer, EvictingLayer):
            held = layer.contents
            held.rows, held.fired, held.loose, held.scaling = list(rows), list(fired), loose, _scaling(mine["scaling"])
            held.slots, rest = _slots(held, mine, shapes, read, print_, file)
            _unread(held, rest, shapes, read, seen, file)
            _queries(held, rest - {"unread"}, shapes, read, print_, file)
            check_positions(held.slots, rows, lambda why: _damaged(file, why))
            if min(held.slots.counts().min().item(), loose) < loose:
                raise _damaged(file, "a head holds fewer tokens than came since the last eviction")
            held.adopt_output(module, print_.query_heads, print_.head_dim)
            layer.seen = seen
            layer.lazy_initialization(held.slots.buffers["keys"])
        else:
            _window(layer, mine, shapes, read, len(rows), seen, file)
    if names:
        raise _damaged(file, f"nobody knows its tensor {min(names)}")


def _slots(held: Contents, mine: dict, shapes: dict, read, print_: Fingerprint, file: Path):
    """The slots of a layer, and the names of its other tensors."""
    rows, heads = len(held.rows), print_.kv_heads
    inner = {name.removeprefix("slots."): shape for name, shape in shapes.items() if name.startswith("slots.")}
    rest = {name for name in shapes if not name.startswith("slots.")}
    expected = expected_slots(held, heads, print_.head_dim)
    if set(inner) != set(expected):
        raise _damaged(file, f"a layer holds {sorted(inner)} and its policy needs {sorted(expected)}")
    ragged = "lengths" in rest
    if ragged:
        if shapes["lengths"] != [rows, heads] or shapes["capacities"] != [rows, heads]:
            raise _damaged(file, "lengths of heads that the model does not have")
        lengths, capacities = read("lengths").cpu(), read("capacities").cpu()
        total = inner["keys"][0]
        whole = lengths.dtype == capacities.dtype == torch.int64
        if not whole or bool(((lengths < 0) | (lengths > capacities) | (capacities > total)).any()):
            raise _damaged(file, "lengths of heads that do not fit their room")
        front, matches = [total], int(capacities.sum()) == total
    else:
        length = _count(mine["length"], MOST_TOKENS)
        front = [rows, heads, inner["keys"][2]]
        matches = length <= front[2]
    for name, shape in inner.items():
        matches &= shape == [*front, *expected[name][0]]
    if not matches:
        raise _damaged(file, "its tensors have other sizes than its header says")
    buffers = {name: read(f"slots.{name}") for name in expected}  # in the order in which a cache has them
    for name, tensor in buffers.items():
        wanted = expected[name][1] or buffers["keys"].dtype
        if tensor.dtype != wanted or not buffers["keys"].is_floating_point():
            raise _damaged(file, f"{name} are of {tensor.dtype}")
    if any(not bool(buffers[name].isfinite().all()) for name in ("keys", "values")):
        raise _damaged(file, "keys or values are not finite")
    if ragged:
        return RaggedSlots(buffers, lengths, capacities), rest - {"lengths", "capacities"}
    slots = EqualSlots()
    slots.restore(buffers, length, mine["foreign"] is True)
    return slots, rest


def _unread(held: Contents, rest: set[str], shapes: dict, read, seen: int, file: Path) -> None:
    """The tokens that a second reading has yet to repeat; none after a cut that nothing followed."""
    if "unread" not in rest:
        return
    shape = shapes["unread"]
    if not held.eviction.rereads or held.place or shape != [len(held.rows), shape[1], 2] or shape[1] > seen:
        raise _damaged(file, f"tokens of shape {shape} that nobody reads again")
    unread = held.unread = read("unread")
    counts = (unread[..., 0] >= 0).sum(1).tolist() if unread.dtype == torch.int64 else [seen + 1]
    if any(count > row for count, row in zip(counts, held.rows, strict=True)) or bool((unread >= MOST_TOKENS).any()):
        raise _damaged(file, "tokens that were never seen")


def _queries(held: Contents, rest: set[str], shapes: dict, read, print_: Fingerprint, file: Path) -> None:
    if rest - {"queries"}:
        raise _damaged(file, f"nobody knows its tensor {min(rest)}")
    wanted = held.eviction.queries
    if bool(rest) != bool(wanted):
        raise _damaged(file, "the last queries are missing, or there and not needed")
    if wanted:
        shape = shapes["queries"]
        outer = [len(held.rows), print_.query_heads, print_.head_dim]
        if len(shape) != 4 or [*shape[:2], shape[3]] != outer or not 0 < shape[2] <= wanted:
            raise _damaged(file, f"queries of shape {shape}")
        held.queries = read("queries")
        if held.queries.dtype != held.slots.buffers["keys"].dtype:
            raise _damaged(file, f"queries are of {held.queries.dtype}")


def _window(layer, mine: dict, shapes: dict, read, rows: int, seen: int, file: Path) -> None:
    """A layer of transformers' own, with the tokens of its window."""
    shape = shapes["window.keys"]
    if set(shapes) != {"window.keys", "window.values"} or shape != shapes["window.values"] or shape[0] != rows:
        raise _damaged(file, "the window of a layer has other sizes than its header says")
    keys, values = read("window.keys"), read("window.values")
    layer.lazy_initialization(keys, values)
    if mine["seen"] != seen or keys.shape[2] != min(seen, layer.sliding_window - 1):
        raise _damaged(file, f"a window of {keys.shape[2]} tokens after {seen}")
    layer.keys, layer.values, layer.cumulative_length = keys, values, seen


def _allocation(stored: dict, given: str | Allocation | None, file: Path) -> str | Allocation:
    name = str(stored["name"])
    if given is not None:
        rule = parse_allocation(given)
        if rule.name != name:
            raise UserError(f"the cache in {file} was saved with allocation {name!r} and {rule.name!r} was given")
        return rule
    # what follows a colon is the name of a normalisation, never of a file that somebody else wants read
    if stored["plain"] is not True or any(
        part.partition(":")[2] not in ("", *NORMALISATIONS) for part in name.split("+")
    ):
        raise UserError(f"the cache in {file} has allocation {name!r}, which no file can name: give it as allocation=")
    return name


def _plain(allocation: Allocation) -> bool:
    try:
        return parse_allocation(allocation.name) == allocation
    except UserError:
        return False


def _count(value: Any, most: int, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is no number from {least} to {most}")
    return value


def _scaling(value: Any) -> float:
    if type(value) is not float or not 0 < value < 1e6:
        raise ValueError(f"a factor of {value!r} on products")
    return value


def _damaged(file: Path, why: object) -> UserError:
    return UserError(f"{file} is damaged ({why}); save the cache again")
