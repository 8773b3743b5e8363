"""Write a trace set shard by shard, so that whatever bears a final name is whole and a killed run can go on."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from kv_gym.errors import UserError
from kv_gym.traces import safe_hdf5 as checked
from kv_gym.traces.prompts import Prompt
from kv_gym.traces.reader import MANIFEST, read_manifest, read_shards
from kv_gym.traces.schema import Entry, prompt_hash, refuse_other_manifest, write_sequence
from kv_gym.traces.sequence import Sequence

_LARGEST_MANIFEST = 60_000  # bytes; an HDF5 attribute holds 64 KiB


class TraceWriter:
    """Adds shards to a folder.

    Args:
        out: the folder; made when the first shard is begun.
        manifest: how these traces are recorded.

    Raises:
        UserError: the folder holds something else, a set with another manifest, or a damaged shard.
    """

    def __init__(self, out: str | Path, manifest: dict[str, Any]):
        self.out = Path(out)
        self.manifest = manifest
        self._text = json.dumps(manifest)
        if len(self._text) > _LARGEST_MANIFEST:
            raise UserError(
                f"the recipe makes a manifest of {len(self._text)} bytes; expected {_LARGEST_MANIFEST} at most"
            )
        self.entries: dict[str, Entry] = {}
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out} is a file; expected a folder to write traces to")
        if (self.out / MANIFEST).exists():
            there = read_manifest(self.out)
            refuse_other_manifest(there, manifest, str(self.out))
            self.entries = {entry.id: entry for entry in read_shards(self.out, there)}
        elif self.out.is_dir() and any(not path.name.endswith(".tmp") for path in self.out.iterdir()):
            raise UserError(f"folder {self.out} is not empty and holds no trace set; choose another one")

    def missing(self, prompts: list[Prompt]) -> list[tuple[int, Prompt]]:
        """The prompts that no whole shard holds yet, with their places.

        Raises:
            UserError: an id twice, an id that was recorded from other tokens, or a document in both splits.
        """
        splits = {entry.text_hash: entry.split for entry in self.entries.values()}
        ids: set[str] = set()
        missing = []
        for ordinal, prompt in enumerate(prompts):
            if prompt.id in ids:
                raise UserError(f"two prompts have the id {prompt.id!r}; expected every id once")
            ids.add(prompt.id)
            if prompt.text_hash and splits.setdefault(prompt.text_hash, prompt.split) != prompt.split:
                raise UserError(
                    f"the text of prompt {prompt.id} is in both train and test; keep a document in one split"
                )
            held = self.entries.get(prompt.id)
            if held is None:
                missing.append((ordinal, prompt))
            elif held.prompt != prompt_hash(prompt.context_ids, prompt.continuation_ids):
                raise UserError(f"{self.out} holds a sequence {prompt.id} of other tokens: record into another folder")
        return missing

    @contextmanager
    def shard(self, first: int, ids: list[str]) -> Iterator[Shard]:
        """Write one shard; it appears under its final name when the block ends well, and not at all otherwise.

        Args:
            first: place of its first prompt.
            ids: of all its sequences; they name the file, so that no two recordings give one name to two contents.
        """
        new_folder = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        name = f"shard-{first:06d}-{hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8]}.h5"
        temporary = self.out / f"{name}.{_run()}.tmp"
        try:
            # the 1.10 layout guards its own structures by checksums; readers crash on damage in older ones
            with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
                checked.set_text(file, manifest=self._text)
                yield Shard(file.create_group("sequences"), self.manifest["storage"])
            _sync(temporary)
            if not (self.out / MANIFEST).exists():
                self._write_manifest()
            os.replace(temporary, self.out / name)
            if os.name != "nt":  # the rename itself must reach the disk
                _sync(self.out)
        except BaseException:
            temporary.unlink(missing_ok=True)
            if new_folder and not any(self.out.iterdir()):
                self.out.rmdir()
            raise

    def _write_manifest(self) -> None:
        temporary = self.out / f"{MANIFEST}.{_run()}.tmp"
        temporary.write_text(json.dumps(self.manifest, indent=2) + "\n", encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, self.out / MANIFEST)

    def _remove_abandoned(self) -> None:
        """Unfinished files of runs that were killed on this machine; those of running ones are theirs."""
        for path in self.out.glob("*.tmp"):
            host, _, process = path.name.removesuffix(".tmp").rpartition(".")[2].rpartition("-")
            if host == _host() and process.isdigit() and not _is_running(int(process)):
                path.unlink(missing_ok=True)


class Shard:
    """An open shard."""

    def __init__(self, group: h5py.Group, storage: str):
        self._group = group
        self._storage = storage

    def add(self, sequence: Sequence, ordinal: int) -> None:
        """Write one sequence.

        Args:
            sequence: what was recorded.
            ordinal: place in the order of the prompts.
        """
        write_sequence(self._group, sequence, ordinal, self._storage)


def _run() -> str:
    return f"{_host()}-{os.getpid()}"


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isalnum()) or "host"


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # only one shard is open at a time, so a file of this process is a reused number
    if os.name == "nt":
        return True  # there, signal 0 is no question but Ctrl-C
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
