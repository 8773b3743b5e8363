"""Open a trace set: a folder of shards, or one shard, read one sequence at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError
from kv_gym.files import bundled
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.traces import safe_hdf5 as checked
from kv_gym.traces.schema import (
    Entry,
    check_manifest,
    read_entry,
    read_sequence,
    refuse_other_manifest,
    verify_sequence,
)
from kv_gym.traces.sequence import Sequence

MANIFEST = "manifest.json"


def open_traces(path: str | Path | TraceSet | None = None) -> TraceSet:
    """Open recorded traces.

    Args:
        path: a folder that `kv-gym record` wrote, one of its shards, an open set, or None for the bundled sample.

    Raises:
        UserError: nothing there, no trace set, a newer format, or a damaged file.
    """
    if isinstance(path, TraceSet):
        return path
    place = bundled("traces") if path is None else Path(path)
    if place.is_file():
        manifest, entries = read_shard(place)
    elif not place.is_dir():
        raise UserError(f"there are no traces at {place}; expected a folder or file that `kv-gym record` wrote")
    else:
        manifest = read_manifest(place)
        entries = read_shards(place, manifest)
        if not entries:
            raise UserError(f"the trace set {place} holds no whole shard yet: let `kv-gym record` finish one")
    return TraceSet(sorted(entries, key=lambda entry: (entry.ordinal, entry.id)), manifest)


class TraceSet:
    """Recorded sequences, in the order of their prompts; each is read and checked when it is asked for.

    Attributes:
        entries: what the shards say of each sequence, without arrays.
        manifest: how the set was recorded; plain JSON data.
    """

    def __init__(self, entries: list[Entry], manifest: dict[str, Any]):
        self.entries = list(entries)
        self.manifest = manifest
        self._index = {entry.id: i for i, entry in enumerate(self.entries)}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: int | str) -> Sequence:
        """The sequence at a place or with an id.

        Raises:
            UserError: no such id, or a damaged file.
            IndexError: no such place.
        """
        entry = self.entries[self._place(key)]
        with checked.opened(entry.path) as file:
            group = checked.group_at(file, f"sequences/{entry.id}")
            return read_sequence(group, self.fingerprint, self.manifest["dtype"])

    def __iter__(self) -> Iterator[Sequence]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<TraceSet of {len(self)} sequences of {self.manifest.get('model') or self.fingerprint.architecture}>"

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
        return TraceSet(chosen, self.manifest)

    def load(self) -> list[Sequence]:
        """All sequences, in memory."""
        return list(self)

    def verify(self, key: int | str) -> int:
        """Read a sequence, compute all its hashes again, and return the number of its arrays.

        Raises:
            UserError: the first defect found.
        """
        entry = self.entries[self._place(key)]
        self[key]
        with checked.opened(entry.path) as file:
            return verify_sequence(checked.group_at(file, f"sequences/{entry.id}"))

    def _place(self, key: int | str) -> int:
        if isinstance(key, str):
            if key not in self._index:
                raise UserError(f"there is no sequence {key!r}; the first of {len(self)} is {self.ids[:1]}")
            return self._index[key]
        return key


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a trace set in a folder."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"folder {folder} has no {MANIFEST}; expected a trace set that `kv-gym record` wrote")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected JSON that `kv-gym record` wrote") from None
    return check_manifest(data, str(path))


def read_shards(folder: Path, manifest: dict[str, Any]) -> list[Entry]:
    """Entries of all shards of a folder, each of which must belong to the manifest.

    Raises:
        UserError: a damaged shard, one of another set, or an id in two shards.
    """
    entries: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.h5")):
        own, found = read_shard(path)
        refuse_other_manifest(manifest, own, f"{folder} (compared with its {path.name})")
        for entry in found:
            if entry.id in entries:
                raise UserError(f"sequence {entry.id} is in {entries[entry.id].path} and in {path}: remove one of them")
            entries[entry.id] = entry
    return list(entries.values())


def read_shard(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Manifest and entries of one shard."""
    with checked.opened(path) as file:
        if "manifest" not in file.attrs:
            raise UserError(f"{path} is HDF5 and no trace file; expected one that `kv-gym record` wrote")
        try:
            manifest = json.loads(checked.text_attribute(file, "manifest"))
        except ValueError as error:
            raise UserError(f"{path} has a damaged manifest ({error}): remove it and record again") from None
        manifest = check_manifest(manifest, str(path))
        sequences = checked.group_at(file, "sequences")
        return manifest, [read_entry(sequences, name, path) for name in sequences]
