"""Caches as files: one safetensors file with all that is needed to go on exactly, and nothing that is ever run.

Tensors are named `<layer>.<kind>.<name>`; everything else is JSON in the header: settings, counts, and the
fingerprint of the model, without which the numbers mean nothing. A file is read as if somebody else had written it.
Buffers are written with their room for tokens to come, zeroed, because it decides in which order slots are
overwritten, and with it the last digit of what follows.

Bundled policies are saved by name and settings; a trained one, or one of the user's own class, as a digest, and must
be given again by whoever loads the cache. So must a trained tier, whose state is saved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kv_gym.budgets import Allocation, parse_allocation
from kv_gym.budgets.thresholds import NORMALISATIONS
from kv_gym.cache_view import CacheView
from kv_gym.checksums import described_tensors_hash
from kv_gym.errors import UserError, short_reason
from kv_gym.files import atomic_write, parse_json
from kv_gym.live.config import CacheConfig, PolicyGroup
from kv_gym.live.layer import EvictingLayer
from kv_gym.live.layer_state import LayerState
from kv_gym.live.selection import parse_selection
from kv_gym.live.slots import EqualSlots, RaggedSlots, Slots
from kv_gym.live.tiers import Drop, LowRankState, Tier, parse_tier
from kv_gym.models.attention import attention_modules
from kv_gym.models.fingerprint import Fingerprint, state_dict_hash
from kv_gym.policies import Policy, current_name, list_policies, make_policy

KIND, FORMAT = "kv_gym cache", 4  # 1: keys at their original positions; before 3: no checksum; before 4: no tier
MAX_TOKENS = 2**31  # positions beyond are not ranked
_MAX_NESTED_POLICIES = 4
# what a damaged file makes of reading it
_DAMAGE = (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError, AttributeError)


def refuse_unsavable(config: CacheConfig) -> None:
    """Raise a UserError where a cache with these settings holds what no file has a place for."""
    if not isinstance(config.layer_tier, Drop | LowRankState):
        raise UserError(
            f"a cache with evicted={config.layer_tier.name!r}, a guard or offload=True holds more than its slots, "
            "which no file has a place for: save one that was made without them"
        )
    if parse_selection(config.select.name) != config.select:
        raise UserError(
            f"the settings of {config.select.name!r} are not those that its name has, and a file knows the name: save "
            "a cache with another selection"
        )


def write_cache(file: Path, config: CacheConfig, layers: Sequence[Any], seen: int) -> Path:
    """Write a cache that has seen something; see :meth:`EvictingCache.save`.

    Args:
        file: its name.
        config: the cache's settings.
        layers: the cache's layers, as transformers knows them.
        seen: tokens seen.

    Raises:
        UserError: settings that :func:`refuse_unsavable` refuses, or a file that cannot be written.
    """
    refuse_unsavable(config)
    tensors: dict[str, Tensor] = {}
    about_layers: dict[str, dict[str, Any]] = {}
    parts: dict[str, Tensor | None]
    for index, layer in enumerate(layers):
        if isinstance(layer, EvictingLayer):
            state = layer.state
            state.observe_pending()
            about, parts = _slots_to_write(state.slots)
            about_layers[str(index)] = about | {"scaling": state.scaling}
            parts |= {"queries": state.queries, "unread": state.unread}
            parts |= {f"tier.{name}": getattr(state.tier, name) for name in state.tier.row_tensors}
        else:
            about_layers[str(index)] = {"seen": layer.get_seq_length()}
            parts = {"window.keys": layer.keys, "window.values": layer.values}
        for name, tensor in parts.items():
            if tensor is not None:
                tensors[f"{index}.{name}"] = tensor.detach().cpu().contiguous()
    first = next(layer.state for layer in layers if isinstance(layer, EvictingLayer))
    header = {
        "kind": KIND,
        "format": FORMAT,
        "model": Fingerprint.of(config.model).to_json(),
        "dtype": str(config.model.dtype),
        "policy": _describe_policy(config.policy),
        "budget": config.budget,
        "allocation": {"name": config.allocation.name, "plain": _has_name(config.allocation)},
        "trigger": config.trigger.name,
        "positions": config.positions,
        "select": config.select.name,
        "delay": config.delay,
        "tier": config.evicted.digest if isinstance(config.evicted, LowRankState) else None,
        "probe": list(config.probe),
        "sinks": config.sinks,
        "recent": config.recent,
        "seen": seen,
        "rows": first.tokens_seen,
        "fired": first.evicted_at,
        "loose": first.appended,
        "layers": about_layers,
    }
    text = json.dumps(header)
    digest = described_tensors_hash(text, sorted(tensors.items()))
    try:
        with atomic_write(file) as part:
            save_file(tensors, part, {"kv_gym": text, "sha256": digest})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} cannot be written ({short_reason(error)}); name a file in a folder that exists"
        ) from None
    return file


def _slots_to_write(slots: Slots) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """What to write of a layer's slots: numbers for the header, and tensors; room for tokens to come is zero."""
    parts: dict[str, Tensor | None] = {}
    if isinstance(slots, RaggedSlots):
        filled = slots.filled()
        for name, buffer in slots.buffers.items():
            parts[f"slots.{name}"] = copy = torch.zeros_like(buffer)
            copy[filled] = buffer[filled]
        # copies: the capacities may be the lengths, and safetensors writes no tensor twice
        return {}, parts | {"lengths": slots.lengths, "capacities": slots.capacities.clone()}
    assert isinstance(slots, EqualSlots)
    slots.close_gap()
    for name, buffer in slots.buffers.items():
        parts[f"slots.{name}"] = copy = buffer.clone()
        copy[:, :, slots.length :] = 0
    return {"length": slots.length, "foreign": slots.borrowed}, parts


class SavedCache:
    """A cache's file that is being read.

    Attributes:
        file: its path.
        header: the JSON in it.
        fingerprint: of the model whose cache it is.
    """

    def __init__(self, file: Path, stored):
        text = (stored.metadata() or {}).get("kv_gym", "{}")
        header = parse_json(text, str(file), "expected a cache that EvictingCache.save wrote")
        if not isinstance(header, dict) or header.get("kind") != KIND:
            raise UserError(f"{file} holds no cache; expected one that EvictingCache.save wrote")
        if not isinstance(header["format"], int) or header["format"] > FORMAT:
            raise UserError(f"{file} has cache format {header['format']}, newer than {FORMAT}: upgrade kv-gym")
        if header["format"] >= 3 or "sha256" in stored.metadata():
            every = ((name, stored.get_tensor(name)) for name in sorted(stored.keys()))
            if described_tensors_hash(text, every) != stored.metadata().get("sha256"):
                raise _damaged(file, "its checksum does not hold")
        self.file, self.header = file, header
        self.fingerprint = Fingerprint.from_json(header["model"])
        self._stored = stored

    @classmethod
    @contextmanager
    def open(cls, file: Path) -> Iterator[SavedCache]:
        """Open a file; whatever its damage raises inside the block becomes a UserError."""
        if not file.is_file():
            raise UserError(f"there is no file {file}; expected one that EvictingCache.save wrote")
        try:
            with safe_open(file, "pt") as stored:
                try:
                    yield cls(file, stored)
                except _DAMAGE as error:
                    if isinstance(error, UserError):
                        raise
                    raise _damaged(file, f"{type(error).__name__}: {error}") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read now ({short_reason(error)})") from None
        except SafetensorError as error:
            raise _damaged(file, error) from None

    def settings(
        self,
        model,
        policy: str | Path | Policy | None,
        allocation: str | Allocation | None,
        evicted: str | Tier | None,
    ) -> dict[str, Any]:
        """What to make the cache with; arguments and errors are those of :meth:`EvictingCache.load`."""
        header, file = self.header, self.file
        self.fingerprint.refuse_other(Fingerprint.of(model), f"the cache in {file}", type(model).__name__)
        if header["dtype"] != str(model.dtype):
            raise UserError(
                f"the cache in {file} is of {header['dtype']} and the model of {model.dtype}: load the model so"
            )
        return {
            "policy": _choose_policy(header["policy"], policy, file),
            "budget": header["budget"],
            "allocation": _choose_allocation(header["allocation"], allocation, file),
            "trigger": header["trigger"],
            "sinks": _count(header["sinks"], MAX_TOKENS),
            "recent": _count(header["recent"], MAX_TOKENS),
            "positions": str(header.get("positions", "original")),
            "select": str(header.get("select", "all")),
            "delay": _count(header.get("delay", 0), MAX_TOKENS),
            "evicted": _choose_tier(header.get("tier"), evicted, file),
            "probe": tuple(header.get("probe", ())),
        }

    def restore_layers(self, model, layers: Sequence[Any]) -> None:
        """Fill the layers of a cache that was made with :meth:`settings`."""
        header = self.header
        seen = _count(header["seen"], MAX_TOKENS, least=1)
        rows = [_count(row, seen) for row in header["rows"]]
        evicted_at = [None if at is None else _count(at, row) for at, row in zip(header["fired"], rows, strict=True)]
        appended = _count(header["loose"], seen)
        if not rows or set(header["layers"]) != {str(index) for index in range(len(layers))}:
            raise self._damaged("it has other layers than the model")
        modules = attention_modules(model)
        names = {int(name.partition(".")[0]) for name in self._stored.keys()}  # noqa: SIM118
        if names - set(range(len(layers))):
            raise self._damaged("it has tensors of layers that the model does not have")
        for index, layer in enumerate(layers):
            about = header["layers"][str(index)]
            tensors = self._read_layer(index, next(modules[index].parameters()).device)
            if not isinstance(layer, EvictingLayer):
                self._restore_window(layer, about, tensors, len(rows), seen)
                continue
            state = layer.state
            state.tokens_seen, state.evicted_at, state.appended = list(rows), list(evicted_at), appended
            self._restore_state(state, about, tensors, seen)
            state.use_output_projection(modules[index], self.fingerprint.query_heads, self.fingerprint.head_dim)
            layer.seen = seen
            layer.lazy_initialization(state.slots.buffers["keys"])

    def _read_layer(self, index: int, device: torch.device) -> dict[str, Tensor]:
        """The tensors of a layer, without the layer in their names."""
        tensors, prefix = {}, f"{index}."
        for name in self._stored.keys():  # noqa: SIM118
            if name.startswith(prefix):
                tensor = self._stored.get_tensor(name)
                if tensor.is_floating_point() and bool(tensor.isnan().any()):
                    raise self._damaged(f"{name} holds NaN")
                tensors[name.removeprefix(prefix)] = tensor.to(device, copy=True)  # on a CPU it is a view of the file
        return tensors

    def _restore_state(self, state: LayerState, about: dict[str, Any], tensors: dict[str, Tensor], seen: int) -> None:
        """Fill the state of an evicting layer, whose counts of tokens are there already."""
        state.scaling = about["scaling"]
        if type(state.scaling) is not float or not 0 < state.scaling < 1e6:
            raise ValueError(f"a factor of {state.scaling!r} on products")
        expected = self._expected_tensors(state, tensors, seen)
        if tensors.keys() != expected.keys():
            raise self._damaged(f"a layer holds {sorted(tensors)} and its settings need {sorted(expected)}")
        for name, (shape, dtype) in expected.items():
            found = list(tensors[name].shape)
            sizes = zip(found, shape, strict=False)
            if len(found) != len(shape) or not all(size in ([n] if isinstance(n, int) else n) for size, n in sizes):
                raise self._damaged(f"{name} has shape {found}")
            if tensors[name].dtype != dtype:
                raise self._damaged(f"{name} are of {tensors[name].dtype}")
        # in the order in which a cache has them
        buffers = {name.removeprefix("slots."): tensors[name] for name in expected if name.startswith("slots.")}
        if not all(bool(buffers[name].isfinite().all()) for name in ("keys", "values")):
            raise self._damaged("keys or values are not finite")
        if "lengths" in tensors:
            lengths, capacities = tensors["lengths"].cpu(), tensors["capacities"].cpu()
            if bool(((lengths < 0) | (lengths > capacities) | (capacities > len(buffers["keys"]))).any()):
                raise self._damaged("lengths of heads that do not fit their room")
            if int(capacities.sum()) != len(buffers["keys"]):
                raise self._damaged("room of heads that is not that of the tensors")
            state.slots = RaggedSlots(buffers, lengths, capacities)
        else:
            length = _count(about["length"], buffers["keys"].shape[2])
            state.slots = EqualSlots(buffers, length, about["foreign"] is True)
        state.queries, state.unread = tensors.get("queries"), tensors.get("unread")
        for name in state.tier.row_tensors:
            setattr(state.tier, name, tensors.get(f"tier.{name}"))
        if state.unread is not None:
            counts = (state.unread[..., 0] >= 0).sum(1).tolist()
            state.unread_is_padded = any(count < state.unread.shape[1] for count in counts)
            too_many = any(count > row for count, row in zip(counts, state.tokens_seen, strict=True))
            if too_many or bool((state.unread >= MAX_TOKENS).any()):
                raise self._damaged("tokens that were never seen")
        self._check_positions(state.slots, state.tokens_seen)
        if int(state.slots.counts().min()) < state.appended:
            raise self._damaged("a head holds fewer tokens than came since the last eviction")

    def _expected_tensors(
        self, state: LayerState, tensors: dict[str, Tensor], seen: int
    ) -> dict[str, tuple[list[int | range], torch.dtype]]:
        """Name of every tensor that the layer must have -> its shape, where a range leaves a size open, and dtype."""
        model, config, rows = self.fingerprint, state.config, len(state.tokens_seen)
        heads, d = model.kv_heads, model.head_dim
        dtype = tensors["slots.keys"].dtype
        if not dtype.is_floating_point:
            raise self._damaged(f"keys are of {dtype}")
        keys, positions = torch.zeros(1, heads, 1, d), torch.zeros(1, heads, 1, dtype=torch.int64)
        valid, one = torch.ones_like(positions, dtype=torch.bool), torch.ones(1, dtype=torch.int64)
        view = CacheView(keys, keys, positions, valid, one, one.expand(1, heads), state.index, state.scaling)
        buffers = {"keys": ([d], dtype), "values": ([d], dtype), "positions": ([], torch.int64)}
        for i, policy in config.stateful_policies:
            for name, tensor in policy.initial_state(view).items():
                buffers[f"{i}/{name}"] = list(tensor.shape[3:]), tensor.dtype
        buffers |= {name: ([], torch.float32) for name in config.stored_scores}
        expected: dict[str, tuple[list[int | range], torch.dtype]] = {}
        size = tensors["slots.keys"].shape
        front = [size[0]] if "lengths" in tensors else [rows, heads, size[2]]
        for name, (inner, kind) in buffers.items():
            expected[f"slots.{name}"] = [*front, *inner], kind
        if "lengths" in tensors:
            expected |= {name: ([rows, heads], torch.int64) for name in ("lengths", "capacities")}
        if config.num_queries and not config.probe:
            expected["queries"] = [rows, model.query_heads, range(1, config.num_queries + 1), d], dtype
        if any(name.startswith("tier.") for name in tensors):  # none before the first eviction
            for name, (shape, kind) in state.tier.saved_shapes(rows, dtype).items():
                expected[f"tier.{name}"] = [*shape], kind
        if "unread" in tensors and config.needs_second_reading and state.ordinal == 0:
            expected["unread"] = [rows, range(seen + 1), 2], torch.int64
        return expected

    def _check_positions(self, slots: Slots, tokens_seen: Sequence[int]) -> None:
        """Refuse unless every head holds distinct tokens that its row has seen."""
        counts, positions = slots.counts().flatten().cpu(), slots.data("positions").flatten()
        if isinstance(slots, RaggedSlots):
            positions = positions[slots.filled()]
        positions = positions.cpu()
        head = torch.arange(len(counts)).repeat_interleave(counts)
        seen = torch.tensor(tokens_seen).repeat_interleave(len(counts) // len(tokens_seen))[head]
        if bool(((positions < 0) | (positions >= seen)).any()):
            raise self._damaged("a position of a token that was never seen")
        both = (head * max(tokens_seen) + positions).sort().values
        if bool((both[1:] == both[:-1]).any()):
            raise self._damaged("a head holds a token twice")

    def _restore_window(
        self, layer: Any, about: dict[str, Any], tensors: dict[str, Tensor], rows: int, seen: int
    ) -> None:
        """Fill a layer of transformers' own, with the tokens of its window."""
        keys, values = tensors.pop("window.keys"), tensors.pop("window.values")
        if tensors or keys.shape != values.shape or len(keys) != rows:
            raise self._damaged("the window of a layer has other sizes than its header says")
        layer.lazy_initialization(keys, values)
        if about["seen"] != seen or keys.shape[2] != min(seen, layer.sliding_window - 1):
            raise self._damaged(f"a window of {keys.shape[2]} tokens after {seen}")
        layer.keys, layer.values, layer.cumulative_length = keys, values, seen

    def _damaged(self, why: object) -> UserError:
        return _damaged(self.file, why)


def _describe_policy(policy: Policy) -> dict[str, Any]:
    """Plain JSON data: `name` and `settings`; or `name` and a digest, of a policy that no file can name."""
    if isinstance(policy, PolicyGroup):
        return {"name": "panel", "members": [_describe_policy(member) for member in policy.members]}
    settings = {f.name: getattr(policy, f.name) for f in fields(policy) if f.init}
    settings = {
        name: _describe_policy(value) if isinstance(value, Policy) else value for name, value in settings.items()
    }
    plain = {"name": policy.name, "settings": settings}
    try:
        if _rebuild_policy(plain) == policy:
            return plain
    except (UserError, TypeError, ValueError):
        pass
    return {"name": policy.name, "digest": _policy_digest(policy)}


def _choose_policy(stored: dict[str, Any], given: str | Path | Policy | None, file: Path) -> Policy:
    """The policy of a saved cache: as the file describes it, or the one given, which must be the same.

    Raises:
        UserError: another one was given, or none and the file cannot name it.
    """
    stored = _with_current_names(stored)
    name = str(stored["name"])
    if given is not None:
        policy = make_policy(given)
        if _describe_policy(policy) != stored:
            raise UserError(
                f"the cache in {file} was saved with policy {name!r}, and {policy.name!r} was given or its settings "
                "are others: load it with that one, then fork(policy=...)"
            )
        return policy
    if "digest" in stored:
        raise UserError(
            f"the cache in {file} was saved with policy {name!r}, which no file can name: give its folder, its class "
            "path or the object as policy="
        )
    return _rebuild_policy(stored)


def _rebuild_policy(stored: dict[str, Any], depth: int = 0) -> Policy:
    if depth > _MAX_NESTED_POLICIES:
        raise ValueError("policies over policies without end")
    if stored["name"] == "panel":
        return PolicyGroup(tuple(_rebuild_policy(member, depth + 1) for member in stored["members"]))
    name = stored["name"]
    if name not in list_policies() or name == "scorer":
        raise ValueError(f"{name!r} is no bundled policy")
    usual, settings = make_policy(name), {}
    for key, value in stored["settings"].items():
        default = getattr(usual, key, None)
        if isinstance(default, Policy):
            value = _rebuild_policy(value, depth + 1)
        elif type(value) is not type(default) and not (type(value) is int and type(default) is float):
            raise ValueError(f"policy {name!r} with {key}={value!r}")
        settings[key] = value
    return make_policy(name, **settings)


def _with_current_names(stored: Any) -> Any:
    """What an earlier version described, with today's names of policies."""
    if not isinstance(stored, dict):
        return stored
    parts = {key: _with_current_names(value) for key, value in stored.items()}
    if isinstance(members := stored.get("members"), list):
        parts["members"] = [_with_current_names(member) for member in members]
    return parts | ({"name": current_name(str(stored["name"]))} if "name" in stored else {})


def _policy_digest(policy: Policy) -> str:
    name = f"{type(policy).__module__}:{type(policy).__qualname__}"
    network = getattr(policy, "network", None)
    if network is None:
        return hashlib.sha256(f"{name}{policy!r}".encode()).hexdigest()
    return state_dict_hash(network.state_dict(), prefix=name)  # a learned policy is its weights


def _choose_allocation(stored: dict, given: str | Allocation | None, file: Path) -> str | Allocation:
    name = str(stored["name"])
    if given is not None:
        allocation = parse_allocation(given)
        if allocation.name != name:
            raise UserError(f"the cache in {file} was saved with allocation {name!r} and {allocation.name!r} was given")
        return allocation
    # what follows a colon is the name of a normalisation, never of a file that somebody else wants read
    if stored["plain"] is not True or any(
        part.partition(":")[2] not in ("", *NORMALISATIONS) for part in name.split("+")
    ):
        raise UserError(f"the cache in {file} has allocation {name!r}, which no file can name: give it as allocation=")
    return name


def _choose_tier(digest: str | None, given: str | Tier | None, file: Path) -> Tier:
    """The tier of a saved cache: `drop`, or the trained one that was given, which must be the same.

    Raises:
        UserError: another one was given, or none where the cache has one.
    """
    tier = parse_tier("drop" if given is None else given)
    found = tier.digest if isinstance(tier, LowRankState) else None
    if digest is not None and given is None:
        raise UserError(f"the cache in {file} has a state that kernels were trained for: give them as evicted=")
    if found != digest or not isinstance(tier, Drop | LowRankState):
        raise UserError(f"the cache in {file} was saved with another tier than evicted={tier.name!r}: give that one")
    return tier


def _has_name(allocation: Allocation) -> bool:
    try:
        return parse_allocation(allocation.name) == allocation
    except UserError:
        return False


def _count(value: Any, most: int, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is no number from {least} to {most}")
    return value


def _damaged(file: Path, why: object) -> UserError:
    return UserError(f"{file} is damaged ({short_reason(why)}); save the cache again")
