"""The schema of a trace set: its manifest, what a shard says of each sequence, and the hashes of content.

`traces/README.md` has the schema as a table: one HDF5 group per sequence. Arrays carry HDF5's Fletcher-32 checksum,
which every read verifies, and a SHA-256 of their content; a sequence's `digest` covers these and its attributes, and
its `identity` the digest, the sequence's id and the manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from collections.abc import Sequence as Row
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt

from kv_gym.errors import UserError
from kv_gym.files import validated
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.traces import safe_hdf5

FORMAT = "kv_gym traces"
VERSION = "1.0"
SAMPLED_VERSION = "2.0"
"""Version of sets in which a context may hold some of its slots only; version 1 readers expect all of them."""
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Ids of sequences: plain names, which are safe as names of groups and files, and on a terminal."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# what a resumed recording must share with the one it resumes; versions and the model's name may differ
_MUST_MATCH = ("format", "fingerprint", "tokenizer", "dtype", "storage", "settings", "recipe")


def _plain_text(text: str) -> str:
    if CONTROL.search(text):
        raise ValueError("expected a text without control characters")
    return text


def _id(text: str) -> str:
    if not ID.fullmatch(text):
        raise ValueError("expected up to 100 letters, digits and . _ -")
    return text


PlainText = Annotated[str, AfterValidator(_plain_text)]


class Manifest(BaseModel):
    """How a trace set was recorded.

    Attributes:
        format: the name of the format.
        version: of the format, as ``major.minor``.
        model: name of the recorded model, for display only.
        fingerprint: of the recorded model, as :meth:`~kv_gym.models.fingerprint.Fingerprint.to_json` gives it.
        tokenizer: hash of the tokenizer, or "".
        dtype: the type the model computed in.
        storage: the type of stored keys, values, queries and hidden states.
        settings: of the recorder.
        recipe: how the prompts were made.
        versions: of the packages that recorded.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    format: Literal["kv_gym traces"]
    version: str
    model: PlainText = ""
    fingerprint: dict[str, Any]
    tokenizer: PlainText
    dtype: Literal["float32", "float64", "float16", "bfloat16"]
    storage: Literal["float32", "float16", "bfloat16"]
    settings: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str]


class Entry(BaseModel):
    """What a shard says of one sequence without its arrays.

    Attributes:
        path: the shard.
        id: of the sequence.
        ordinal: place in the order of the prompts.
        tokens: context length.
        slots: how many of these tokens were recorded.
        continuations: how many were recorded.
        task, split, text_hash: as in :class:`~kv_gym.traces.prompts.Prompt`.
        prompt: hash of the tokens of context and continuations.
        digest: hash of everything.
        recordings: how many shards hold the sequence; the first of them is read.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    path: Path
    id: Annotated[str, AfterValidator(_id)]
    ordinal: NonNegativeInt
    tokens: NonNegativeInt
    slots: NonNegativeInt
    continuations: NonNegativeInt
    task: PlainText
    split: Literal["train", "test"]
    text_hash: PlainText
    prompt: PlainText
    digest: PlainText
    recordings: int = 1


def check_manifest(data: Any, where: str) -> dict[str, Any]:
    """The manifest of a trace set, if this version can read what it describes.

    Raises:
        UserError: not a manifest, or one of a newer major version.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{where} is not the manifest of a trace set; expected one that `kv-gym record` wrote")
    version = str(data.get("version", ""))[:20]
    major = version.partition(".")[0]
    if not (major.isascii() and major.isdigit()):
        raise UserError(f"{where} has trace format version {version!r}; expected {VERSION}")
    if int(major) > int(SAMPLED_VERSION.partition(".")[0]):
        raise UserError(
            f"{where} has trace format version {version} and this kv_gym reads up to {SAMPLED_VERSION}: upgrade it"
        )
    validated(Manifest, data, where)
    Fingerprint.from_json(data["fingerprint"])
    return data


def refuse_other_manifest(manifest: dict[str, Any], other: dict[str, Any], where: str) -> None:
    """Raise a UserError naming the first difference between a trace set and a recording that would join it.

    Args:
        manifest: of the trace set.
        other: of the recording.
        where: the trace set, for the error.
    """
    fingerprint, other_fingerprint = (Fingerprint.from_json(data["fingerprint"]) for data in (manifest, other))
    fingerprint.refuse_other(other_fingerprint, f"the trace set {where}", "the recording to be added")
    for name in _MUST_MATCH:
        if manifest[name] != other[name]:
            raise UserError(
                f"the trace set {where} was recorded with {name} {json.dumps(manifest[name])[:500]}, now it "
                f"is {json.dumps(other[name])[:500]}: record with the same, or into another folder"
            )


def prompt_hash(context: Row[int] | np.ndarray, continuations: Iterable[Row[int] | np.ndarray]) -> str:
    """Hash of the token ids of a context and its continuations."""
    ids = [[int(i) for i in row] for row in (context, *continuations)]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def identity_of(id: str, digest: str, manifest: dict[str, Any]) -> str:
    """SHA-256 that ties a sequence's content to its id and to how it was recorded.

    Args:
        id: of the sequence.
        digest: of its content.
        manifest: of the trace set; versions and the model's name are no part of it.
    """
    recorded = {name: manifest[name] for name in _MUST_MATCH}
    return hashlib.sha256(json.dumps([id, digest, recorded], sort_keys=True).encode()).hexdigest()


def arrays_of(group: h5py.Group, prefix: str = "") -> dict[str, h5py.Dataset]:
    """All arrays of a sequence's group, by their path in it; no number of them is read."""
    arrays: dict[str, h5py.Dataset] = {}
    for name in sorted(group):
        link = group.get(name, getlink=True)
        member = group[name] if isinstance(link, h5py.HardLink) else None
        if isinstance(member, h5py.Group) and prefix.count("/") < 4:  # the schema is no deeper
            arrays.update(arrays_of(member, f"{prefix}{name}/"))
        else:
            arrays[prefix + name] = safe_hdf5.plain_dataset(group, name)
    return arrays


def digest_of(group: h5py.Group) -> str:
    """SHA-256 over all attributes of a sequence's group and of what it holds; the hashes of arrays are among them."""
    parts: dict[str, Any] = {name: safe_hdf5.attributes(data) for name, data in arrays_of(group).items()}
    about = safe_hdf5.attributes(group)
    parts[""] = {name: value for name, value in about.items() if name not in ("digest", "identity")}
    for name in safe_hdf5.member_names(group, "continuation"):
        parts[f"continuation/{name}"] = safe_hdf5.attributes(safe_hdf5.open_group(group, f"continuation/{name}"))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
