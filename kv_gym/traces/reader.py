"""Open a trace set: a folder of shards, or one shard, read one sequence at a time."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kv_gym.errors import UserError
from kv_gym.files import bundled, parse_json, read_json, validated
from kv_gym.hub import download, is_hub_id
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.models.loading import recorded_tokenizer
from kv_gym.notebook import html_table
from kv_gym.remote import local_path, remote_folder
from kv_gym.traces import safe_hdf5
from kv_gym.traces.bounded_cache import BoundedCache
from kv_gym.traces.schema import Entry, arrays_of, check_manifest, digest_of, identity_of, refuse_other_manifest
from kv_gym.traces.sequence import Continuation, Sequence, StoredHiddenStates

MANIFEST = "manifest.json"
TRACE_FILES = (MANIFEST, "*.h5", "README.md")
_STATE_TYPES = ("float32", "float64", "int64")
_EXPECTED = "expected a manifest that `kv-gym record` wrote"


def open_traces(path: str | Path | TraceSet | Iterable[str | Path | TraceSet] | None = None) -> TraceSet:
    """Open recorded traces.

    Args:
        path: a folder that `kv-gym record` wrote, one of its shards, an address such as ``s3://bucket/folder``, an open
            set, the id ``owner/name`` or ``owner/name@revision`` of a dataset on the Hugging Face Hub, or None for the
            bundled sample. Several of them, or a folder whose folders are trace sets, are read as one set
            (:class:`JoinedTraces`).

    Raises:
        UserError: nothing there, no trace set, a newer format, a damaged file, or sets that cannot be joined.
    """
    if isinstance(path, TraceSet):
        return path
    if path is not None and not isinstance(path, str | Path):
        return _join([open_traces(each) for each in path])
    location = bundled("traces") if path is None else local_path(path)
    if path is not None and (remote := remote_folder(path)) is not None:
        location = remote.fetch(TRACE_FILES)
        if not any(location.glob(f"**/{MANIFEST}")):
            raise UserError(f"there are no traces at {path}; expected a folder that `kv-gym record` wrote")
    if is_hub_id(str(location)):
        location = _from_hub(str(location))
    if location.is_file():
        manifest, entries = _read_shard(location)
    elif not location.is_dir():
        raise UserError(f"there are no traces at {location}; expected a folder or file that `kv-gym record` wrote")
    elif not (location / MANIFEST).is_file() and (folders := sorted(location.glob(f"*/{MANIFEST}"))):
        return _join([open_traces(manifest.parent) for manifest in folders])
    else:
        manifest = read_manifest(location)
        entries = read_shards(location, manifest)
        if not entries:
            raise UserError(f"the trace set {location} holds no whole shard yet: let `kv-gym record` finish one")
    return TraceSet(sorted(entries, key=lambda entry: (entry.ordinal, entry.id)), manifest)


def names_trace_sets(traces: Any) -> bool:
    """Whether :func:`open_traces` opens it; else it holds sequences in memory."""
    if isinstance(traces, list | tuple):
        return bool(traces) and all(isinstance(each, str | Path | TraceSet) for each in traces)
    return traces is None or isinstance(traces, str | Path | TraceSet)


def _from_hub(name: str) -> Path:
    try:
        folder = download(name, TRACE_FILES, repo_type="dataset")
    except ValueError as reason:
        raise UserError(
            f"there are no traces at {name}, and no dataset of that name could be had from the Hub ({reason}): "
            "expected a folder or file that `kv-gym record` wrote"
        ) from None
    if not (folder / MANIFEST).is_file():
        raise UserError(f"dataset {name} on the Hub holds no {MANIFEST}; expected traces that `kv-gym push` wrote")
    return folder


class TraceSet:
    """Recorded sequences, in the order of their prompts; each is read and checked when it is asked for.

    Attributes:
        entries: what the shards say of each sequence, without arrays.
        manifest: how the set was recorded; plain JSON data.
        cache: sequences that stay in memory; None: none do. See :meth:`cached`.
    """

    def __init__(self, entries: list[Entry], manifest: dict[str, Any], cache: BoundedCache[Sequence] | None = None):
        self.entries = list(entries)
        self.manifest = manifest
        self.cache = cache
        self._index = {entry.id: i for i, entry in enumerate(self.entries)}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: int | str) -> Sequence:
        """The sequence with a number or an id.

        Raises:
            UserError: no such id, or a damaged file.
            IndexError: no such number.
        """
        entry = self.entries[self._position(key)]
        if self.cache is None:
            return self._read(entry)
        return self.cache.get((entry.path, entry.id), lambda: self._read(entry))

    def _read(self, entry: Entry) -> Sequence:
        with safe_hdf5.open_file(entry.path) as file:
            group = safe_hdf5.open_group(file, f"sequences/{entry.id}")
            return _read_sequence(group, self.fingerprint, self.manifest["dtype"])

    def __iter__(self) -> Iterator[Sequence]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<TraceSet of {len(self)} sequences of {self.manifest.get('model') or self.fingerprint.architecture}>"

    def _repr_html_(self) -> str:
        lengths = [entry.tokens for entry in self.entries]
        model = self.fingerprint
        about = {
            "model": self.manifest.get("model") or model.architecture,
            "heads": f"{len(model.layers)} layers of {model.kv_heads} KV heads, dimension {model.head_dim}",
            "sequences": ", ".join(
                f"{count:,} {name}" for name, count in Counter(e.split for e in self.entries).items()
            ),
            "tasks": ", ".join(f"{count:,} {name}" for name, count in Counter(e.task for e in self.entries).items()),
            "tokens": f"{sum(lengths):,}, at most {max(lengths, default=0):,} in a context",
            "hash": self.hash[:16],
        }
        return html_table(("TraceSet", f"{len(self):,} sequences"), about.items())

    @property
    def ids(self) -> list[str]:
        """Ids of the sequences, in order."""
        return [entry.id for entry in self.entries]

    @property
    def fingerprint(self) -> Fingerprint:
        """The recorded model."""
        return Fingerprint.from_json(self.manifest["fingerprint"])

    @property
    def hash(self) -> str:
        """SHA-256 over ids and digests: two sets with the same content have the same, however it is cut in shards."""
        content = json.dumps([(entry.id, entry.digest) for entry in self.entries])
        return hashlib.sha256(content.encode()).hexdigest()

    def select(self, split: str | None = None, task: str | None = None) -> TraceSet:
        """The sequences of a split and a task (None: any), possibly none; reads no array."""
        chosen = [
            entry
            for entry in self.entries
            if (split is None or entry.split == split) and (task is None or entry.task == task)
        ]
        return self.of(chosen)

    def of(self, entries: list[Entry]) -> TraceSet:
        """The sequences of some of the entries; what is held in memory is shared."""
        part = copy.copy(self)
        TraceSet.__init__(part, entries, self.manifest, self.cache)
        return part

    def cached(self, limit: int) -> TraceSet:
        """The same set, which keeps sequences that were read in memory, up to `limit` bytes together.

        Those that were not asked for the longest are dropped first, and read again when they are asked for.
        """
        cached = self.of(self.entries)
        cached.cache = BoundedCache(limit, lambda sequence: sequence.nbytes)
        return cached

    def load(self) -> list[Sequence]:
        """All sequences, in memory."""
        return list(self)

    def tokenizer(self) -> Any:
        """The recorded model's tokenizer where it is on this machine, else None; never a download."""
        return recorded_tokenizer(self.manifest.get("model", ""), self.manifest["tokenizer"])

    def verify(self, key: int | str) -> int:
        """Read a sequence, compute all its hashes again, and return the number of its arrays.

        Raises:
            UserError: the first defect found.
        """
        return self._verify(self.entries[self._position(key)])

    def _verify(self, entry: Entry) -> int:
        self._read(entry)
        with safe_hdf5.open_file(entry.path) as file:
            return _verify_sequence(safe_hdf5.open_group(file, f"sequences/{entry.id}"), entry, self.manifest)

    def _position(self, key: int | str) -> int:
        if isinstance(key, str):
            if key not in self._index:
                raise UserError(f"there is no sequence {key!r}; the first of {len(self)} is {self.ids[:1]}")
            return self._index[key]
        return key


class JoinedTraces(TraceSet):
    """Several trace sets of one model as one set, one after the other.

    A sequence that stands in two of them is read from the first. Where another one has the same id, the number of its
    set is added to its id, such as ``p0.2``. The manifest is the first set's, with the recipes of all.

    Args:
        sets: at least one.

    Raises:
        UserError: sets of different models or tokenizers, or a document in the split train of one set and test of
            another.
    """

    def __init__(self, sets: Iterable[TraceSet]):
        sets = list(sets)
        first = sets[0]
        self._origins: dict[str, tuple[TraceSet, Entry]] = {}
        entries: dict[str, Entry] = {}
        splits: dict[str, str] = {}
        for number, part in enumerate(sets, 1):
            self._refuse_other(first, part, number)
            for entry in part.entries:
                if entry.text_hash and splits.setdefault(entry.text_hash, entry.split) != entry.split:
                    raise UserError(
                        f"the text of sequence {entry.id} of trace set {number} is in train of one set and in test of "
                        "another: keep a document in one split, or leave a set out"
                    )
                name = entry.id
                if name in entries and entries[name].prompt == entry.prompt:
                    continue
                while name in entries:
                    name = f"{name}.{number}"
                entries[name] = entry.model_copy(update={"id": name})
                self._origins[name] = part, entry
        recipes = [part.manifest["recipe"] for part in sets]
        super().__init__(list(entries.values()), first.manifest | {"recipe": {"sets": recipes}})

    @staticmethod
    def _refuse_other(first: TraceSet, other: TraceSet, number: int) -> None:
        first.fingerprint.refuse_other(other.fingerprint, "the first trace set", f"trace set {number}")
        tokenizers = {part.manifest["tokenizer"] for part in (first, other)} - {""}
        if len(tokenizers) > 1:
            raise UserError(
                f"trace set {number} was recorded with another tokenizer than the first: join sets of one tokenizer"
            )

    def _read(self, entry: Entry) -> Sequence:
        part, original = self._origins[entry.id]
        return replace(part._read(original), id=entry.id)

    def _verify(self, entry: Entry) -> int:
        part, original = self._origins[entry.id]
        return part._verify(original)


def _join(sets: list[TraceSet]) -> TraceSet:
    if not sets:
        raise UserError("there is no trace set in the list; expected at least one that `kv-gym record` wrote")
    return sets[0] if len(sets) == 1 else JoinedTraces(sets)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a trace set in a folder."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"folder {folder} has no {MANIFEST}; expected a trace set that `kv-gym record` wrote")
    return check_manifest(read_json(path, _EXPECTED), str(path))


def read_shards(folder: Path, manifest: dict[str, Any]) -> list[Entry]:
    """Entries of all shards of a folder, each of which must belong to the manifest.

    Raises:
        UserError: a damaged shard, one of another set, or an id of two prompts.
    """
    entries: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.h5")):
        if path.name.startswith("."):  # such as ._x.h5, where macOS keeps attributes of x.h5
            continue
        shard_manifest, shard_entries = _read_shard(path)
        refuse_other_manifest(manifest, shard_manifest, f"{folder} (compared with its {path.name})")
        for entry in shard_entries:
            # two recorders at work in one folder may record a prompt twice: either recording serves
            earlier = entries.get(entry.id)
            if earlier is None:
                entries[entry.id] = entry
            elif earlier.prompt == entry.prompt:
                entries[entry.id] = earlier.model_copy(update={"recordings": earlier.recordings + 1})
            else:
                raise UserError(f"sequence {entry.id} has other tokens in {earlier.path} than in {path}: remove one")
    return list(entries.values())


def _read_shard(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Manifest and entries of one shard."""
    with safe_hdf5.open_file(path) as file:
        if "manifest" not in file.attrs:
            raise UserError(f"{path} is HDF5 and no trace file; expected one that `kv-gym record` wrote")
        manifest = parse_json(safe_hdf5.text_attribute(file, "manifest"), f"{path}, its manifest", _EXPECTED)
        check_manifest(manifest, str(path))
        sequences = safe_hdf5.open_group(file, "sequences")
        return manifest, [_read_entry(sequences, name, path) for name in sequences]


def _read_entry(parent: h5py.Group, name: str, path: Path) -> Entry:
    """What a shard says of the sequence `name`, its arrays left unread."""
    group = safe_hdf5.open_group(parent, name)
    numbers = {key: safe_hdf5.integer_attribute(group, key) for key in ("ordinal", "tokens")}
    texts = {key: safe_hdf5.text_attribute(group, key) for key in ("task", "split", "text_hash", "prompt", "digest")}
    numbers["slots"] = safe_hdf5.integer_attribute(group, "slots") if "slots" in group.attrs else numbers["tokens"]
    count = len(safe_hdf5.member_names(group, "continuation"))
    data = {"path": path, "id": name, "continuations": count, **numbers, **texts}
    return validated(Entry, data, f"{path}:sequences/{ascii(name)[1:-1]}")


def _read_sequence(group: h5py.Group, fingerprint: Fingerprint, dtype: str) -> Sequence:
    """One sequence, every array of it checked against the schema.

    Args:
        group: as :meth:`kv_gym.traces.writer.Shard.add` left it.
        fingerprint: of the recorded model.
        dtype: the type the model computed in.

    Raises:
        UserError: anything that does not fit.
    """
    heads, query_heads, d = fingerprint.kv_heads, fingerprint.query_heads, fingerprint.head_dim
    layers, n = len(fingerprint.layers), safe_hdf5.integer_attribute(group, "tokens")
    context = safe_hdf5.open_group(group, "context")
    positions = _read_positions(group, context, n)
    recorded = n if positions is None else len(positions)
    slots = (layers, heads, recorded)

    def floats(name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        return safe_hdf5.read_float32(safe_hdf5.open_dataset(context, name, safe_hdf5.FLOAT_TYPES, shape))

    keys = floats("keys", (*slots, d))
    has_queries, has_hidden = (safe_hdf5.has_member(context, name) for name in ("queries", "hidden"))
    return Sequence(
        id=group.name.rpartition("/")[2],
        tokens=safe_hdf5.read_array(context, "tokens", ("int64",), (n,)),
        keys=keys,
        values=floats("values", (*slots, d)),
        queries=(
            floats("queries", (layers, query_heads, None, d))
            if has_queries
            else np.zeros((layers, query_heads, 0, d), np.float32)
        ),
        continuations=tuple(
            _read_continuation(safe_hdf5.open_group(group, f"continuation/{name}"), slots)
            for name in safe_hdf5.member_names(group, "continuation")
        ),
        layers=fingerprint.layers,
        scaling=safe_hdf5.float_attributes(group, "scaling", layers),
        stats={
            policy: {
                state: safe_hdf5.read_array(context, f"stats/{policy}/{state}", _STATE_TYPES, (*slots, -1))
                for state in safe_hdf5.member_names(safe_hdf5.open_group(context, "stats"), policy)
            }
            for policy in safe_hdf5.member_names(context, "stats")
        },
        task=safe_hdf5.text_attribute(group, "task"),
        split=safe_hdf5.text_attribute(group, "split"),
        text_hash=safe_hdf5.text_attribute(group, "text_hash"),
        dtype=dtype,
        hidden=StoredHiddenStates.in_context(context, layers, recorded) if has_hidden else None,
        positions=positions,
    )


def _read_positions(group: h5py.Group, context: h5py.Group, tokens: int) -> np.ndarray | None:
    """Positions of the recorded slots of a context of so many tokens; None where all of them were recorded."""
    if "slots" not in group.attrs:
        return None
    slots = safe_hdf5.integer_attribute(group, "slots")
    positions = safe_hdf5.read_array(context, "positions", ("int64",), (slots,))
    if not slots or positions[0] < 0 or positions[-1] >= tokens or (np.diff(positions) <= 0).any():
        raise UserError(
            f"{context.file.filename}:{context.name}/positions does not ascend within the context's {tokens} tokens; "
            "expected a trace that `kv-gym record --slots` wrote"
        )
    return positions


def _read_continuation(group: h5py.Group, slots: tuple[int, ...]) -> Continuation:
    tokens = safe_hdf5.read_array(group, "tokens", ("int64",), (None,))
    block = safe_hdf5.integer_attribute(group, "block")
    if not len(tokens) or not block:
        raise UserError(f"{group.file.filename}:{group.name} is empty; expected at least one token and a block of one")
    future = safe_hdf5.read_array(group, "future", ("float32",), (*slots, -(-len(tokens) // block), 2))
    if future.min() < 0:
        raise UserError(f"{group.file.filename}:{group.name}/future is negative; expected attention received")
    return Continuation(tokens, future, block)


def _verify_sequence(group: h5py.Group, entry: Entry, manifest: dict[str, Any]) -> int:
    """Compute every hash of a sequence again and return the number of its arrays."""
    arrays = arrays_of(group)
    for data in arrays.values():
        if safe_hdf5.sha256(data[()]) != safe_hdf5.text_attribute(data, "sha256"):
            raise UserError(
                f"{data.file.filename}:{data.name} fails its checksum: the file is damaged, record it again"
            )
    place = f"{group.file.filename}:{group.name}"
    if digest_of(group) != entry.digest:
        raise UserError(f"{place} fails its digest: its attributes were changed")
    # recordings of earlier versions have no identity
    if "identity" in group.attrs and safe_hdf5.text_attribute(group, "identity") != identity_of(
        entry.id, entry.digest, manifest
    ):
        raise UserError(f"{place} was recorded under another id or with another manifest: record it again")
    return len(arrays)
