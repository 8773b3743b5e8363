"""The schema of a trace shard: one HDF5 group per sequence, written once and checked whenever it is read.

`traces/README.md` has it as a table. Arrays carry HDF5's Fletcher-32 checksum, which every read verifies, and a
SHA-256 of their content; a sequence's `digest` covers these and its attributes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from collections.abc import Sequence as Row
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from kv_gym.errors import UserError
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.traces import safe_hdf5 as checked
from kv_gym.traces.sequence import Continuation, Sequence
from kv_gym.traces.stored_hidden_states import StoredHidden

FORMAT = "kv_gym traces"
VERSION = "1.0"
# what a resumed recording must share with the one it resumes; versions and the model's name may differ
_MUST_MATCH = ("format", "fingerprint", "tokenizer", "dtype", "storage", "settings", "recipe")
_STATE = ("float32", "float64", "int64")


@dataclass(frozen=True)
class Entry:
    """What a shard says of one sequence without its arrays.

    Attributes:
        path: the shard.
        id: of the sequence.
        ordinal: place in the order of the prompts.
        tokens: context length.
        continuations: how many were recorded.
        task, split, text_hash: as in :class:`~kv_gym.traces.prompts.Prompt`.
        prompt: hash of the tokens of context and continuations.
        digest: hash of everything.
    """

    path: Path
    id: str
    ordinal: int
    tokens: int
    continuations: int
    task: str
    split: str
    text_hash: str
    prompt: str
    digest: str


def check_manifest(data: Any, where: str) -> dict[str, Any]:
    """The manifest of a trace set, if this version can read what it describes.

    Raises:
        UserError: not a manifest, or one of a newer major version.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{where} is not the manifest of a trace set; expected one that `kv-gym record` wrote")
    version = str(data.get("version", ""))
    major = version.partition(".")[0]
    if not major.isdigit():
        raise UserError(f"{where} has trace format version {version!r}; expected {VERSION}")
    if int(major) > int(VERSION.partition(".")[0]):
        raise UserError(f"{where} has trace format version {version} and this kv_gym reads up to {VERSION}: upgrade it")
    missing = [name for name in (*_MUST_MATCH, "versions") if name not in data]
    if missing or not isinstance(data["fingerprint"], dict):
        raise UserError(f"{where} is damaged: its {(missing or ['fingerprint'])[0]!r} is missing or no object")
    if data["dtype"] not in ("float32", "float64", "float16", "bfloat16"):
        raise UserError(f"{where} has dtype {data['dtype']!r}; expected float32, float64, float16 or bfloat16")
    Fingerprint.from_json(data["fingerprint"])
    return data


def refuse_other_manifest(there: dict[str, Any], here: dict[str, Any], where: str) -> None:
    """Raise a UserError naming what differs between the set in `where` and the recording that would join it."""
    mine, theirs = (Fingerprint.from_json(data["fingerprint"]) for data in (there, here))
    mine.refuse_other(theirs, f"the trace set {where}", "the recording to be added")
    for name in _MUST_MATCH:
        if there[name] != here[name]:
            raise UserError(
                f"the trace set {where} was recorded with {name} {json.dumps(there[name])}, now it is "
                f"{json.dumps(here[name])}: record with the same, or into another folder"
            )


def prompt_hash(context: Row[int] | np.ndarray, continuations: Iterable[Row[int] | np.ndarray]) -> str:
    """Hash of the token ids of a context and its continuations."""
    ids = [[int(i) for i in row] for row in (context, *continuations)]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def write_sequence(parent: h5py.Group, sequence: Sequence, ordinal: int, storage: str) -> None:
    """Write one sequence as a group of its own.

    Args:
        parent: the shard's group of sequences.
        sequence: what was recorded; empty `queries` and `stats` and missing `hidden` are left out.
        ordinal: place in the order of the prompts.
        storage: type of keys, values, queries and hidden states: ``float32``, ``float16`` or ``bfloat16``.
    """
    group = parent.create_group(sequence.id)
    group.attrs.update(ordinal=ordinal, tokens=len(sequence.tokens), scaling=np.array(sequence.scaling, np.float64))
    prompt = prompt_hash(sequence.tokens, [c.tokens for c in sequence.continuations])
    checked.set_text(group, task=sequence.task, split=sequence.split, text_hash=sequence.text_hash, prompt=prompt)
    context = group.create_group("context")
    _write(context, "tokens", np.asarray(sequence.tokens, np.int64))
    for name in ("keys", "values", "queries"):
        array = getattr(sequence, name)
        if array.size:
            _write(context, name, _stored(array, storage), by_head=True)
    if sequence.hidden is not None:
        hidden = np.stack([sequence.hidden[layer] for layer in range(len(sequence.layers))])
        _write(context, "hidden", _stored(hidden, storage), chunks=(1, *hidden.shape[1:]))
    for policy, states in sequence.stats.items():
        for state, array in states.items():
            _write(context.require_group(f"stats/{policy}"), state, array)
    for i, continuation in enumerate(sequence.continuations):
        one = group.create_group(f"continuation/{i:04d}")
        one.attrs["block"] = continuation.block
        _write(one, "tokens", np.asarray(continuation.tokens, np.int64))
        _write(one, "future", np.asarray(continuation.future, np.float32), by_head=True)
    checked.set_text(group, digest=_digest(group))


def read_entry(parent: h5py.Group, name: str, path: Path) -> Entry:
    """What a shard says of the sequence `name`, its arrays left unread."""
    group = checked.group_at(parent, name)
    return Entry(
        path=path,
        id=name,
        ordinal=checked.whole_attribute(group, "ordinal"),
        tokens=checked.whole_attribute(group, "tokens"),
        continuations=len(checked.names_in(group, "continuation")),
        task=checked.text_attribute(group, "task"),
        split=checked.text_attribute(group, "split"),
        text_hash=checked.text_attribute(group, "text_hash"),
        prompt=checked.text_attribute(group, "prompt"),
        digest=checked.text_attribute(group, "digest"),
    )


def read_sequence(group: h5py.Group, fingerprint: Fingerprint, dtype: str) -> Sequence:
    """One sequence, every array of it checked against the schema.

    Args:
        group: as :func:`write_sequence` left it.
        fingerprint: of the recorded model.
        dtype: the type the model computed in.

    Raises:
        UserError: anything that does not fit.
    """
    heads, query_heads, d = fingerprint.kv_heads, fingerprint.query_heads, fingerprint.head_dim
    layers, n = len(fingerprint.layers), checked.whole_attribute(group, "tokens")
    context = checked.group_at(group, "context")
    slots = (layers, heads, n)
    keys = _widened(context, "keys", (*slots, d))
    return Sequence(
        id=group.name.rpartition("/")[2],
        tokens=checked.array_at(context, "tokens", ("int64",), (n,)),
        keys=keys,
        values=_widened(context, "values", (*slots, d)),
        queries=(
            _widened(context, "queries", (layers, query_heads, None, d))
            if checked.has(context, "queries")
            else np.zeros((layers, query_heads, 0, d), np.float32)
        ),
        continuations=tuple(
            _read_continuation(checked.group_at(group, f"continuation/{name}"), slots)
            for name in checked.names_in(group, "continuation")
        ),
        layers=fingerprint.layers,
        scaling=checked.numbers_attribute(group, "scaling", layers),
        stats={
            policy: {
                state: checked.array_at(context, f"stats/{policy}/{state}", _STATE, (*slots, -1))
                for state in checked.names_in(checked.group_at(context, "stats"), policy)
            }
            for policy in checked.names_in(context, "stats")
        },
        task=checked.text_attribute(group, "task"),
        split=checked.text_attribute(group, "split"),
        text_hash=checked.text_attribute(group, "text_hash"),
        dtype=dtype,
        hidden=StoredHidden.in_context(context, layers, n) if checked.has(context, "hidden") else None,
    )


def verify_sequence(group: h5py.Group) -> int:
    """Compute every hash of a sequence again and return the number of its arrays.

    Raises:
        UserError: an array or an attribute is not what was written.
    """
    arrays = _arrays(group)
    for data in arrays.values():
        if checked.sha256(data[()]) != checked.text_attribute(data, "sha256"):
            raise UserError(
                f"{data.file.filename}:{data.name} fails its checksum: the file is damaged, record it again"
            )
    if _digest(group) != checked.text_attribute(group, "digest"):
        raise UserError(f"{group.file.filename}:{group.name} fails its digest: its attributes were changed")
    return len(arrays)


def _read_continuation(group: h5py.Group, slots: tuple[int, ...]) -> Continuation:
    tokens = checked.array_at(group, "tokens", ("int64",), (None,))
    block = checked.whole_attribute(group, "block")
    if not len(tokens) or not block:
        raise UserError(f"{group.file.filename}:{group.name} is empty; expected at least one token and a block of one")
    future = checked.array_at(group, "future", ("float32",), (*slots, -(-len(tokens) // block), 2))
    if future.min() < 0:
        raise UserError(f"{group.file.filename}:{group.name}/future is negative; expected attention received")
    return Continuation(tokens, future, block)


def _write(
    group: h5py.Group, name: str, array: np.ndarray, by_head: bool = False, chunks: tuple[int, ...] | None = None
) -> None:
    whole = (1, 1, *array.shape[2:]) if by_head else array.shape
    data = group.create_dataset(name, data=array, chunks=chunks or whole, fletcher32=True)
    checked.set_text(data, sha256=checked.sha256(array))
    if array.dtype == np.uint16:
        checked.set_text(data, type="bfloat16")


def _stored(array: np.ndarray, storage: str) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, storage))
    return tensor.view(torch.uint16).numpy() if storage == "bfloat16" else tensor.numpy()


def _widened(group: h5py.Group, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    return checked.widened(checked.declared_at(group, name, checked.CACHED, shape))


def _arrays(group: h5py.Group, prefix: str = "") -> dict[str, h5py.Dataset]:
    found: dict[str, h5py.Dataset] = {}
    for name in sorted(group):
        link = group.get(name, getlink=True)
        below = group[name] if isinstance(link, h5py.HardLink) else None
        if isinstance(below, h5py.Group) and prefix.count("/") < 4:  # the schema is no deeper
            found.update(_arrays(below, f"{prefix}{name}/"))
        else:
            found[prefix + name] = checked.dataset_at(group, name)
    return found


def _digest(group: h5py.Group) -> str:
    parts: dict[str, Any] = {name: checked.attributes(data) for name, data in _arrays(group).items()}
    parts[""] = {name: value for name, value in checked.attributes(group).items() if name != "digest"}
    for name in checked.names_in(group, "continuation"):
        parts[f"continuation/{name}"] = checked.attributes(checked.group_at(group, f"continuation/{name}"))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
