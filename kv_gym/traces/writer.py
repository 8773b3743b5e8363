"""Write a trace set shard by shard: a file with a final name is whole, and an interrupted recording can resume."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from kv_gym.errors import UserError
from kv_gym.files import flush_to_disk
from kv_gym.traces import safe_hdf5
from kv_gym.traces.prompts import Prompt
from kv_gym.traces.reader import MANIFEST, read_manifest, read_shards
from kv_gym.traces.schema import Entry, digest_of, identity_of, prompt_hash, refuse_other_manifest
from kv_gym.traces.sequence import Sequence

_LARGEST_MANIFEST = 60_000  # bytes; an HDF5 attribute holds 64 KiB


class ShardWriter:
    """Adds shards to a folder that is known to be fit for it; several processes may do so at once.

    Args:
        out: the folder; made when the first shard is begun.
        manifest: how these traces are recorded.

    Raises:
        UserError: a manifest that is too large.
    """

    def __init__(self, out: str | Path, manifest: dict[str, Any]):
        self.out = Path(out)
        self.manifest = manifest
        self._text = json.dumps(manifest)
        if len(self._text) > _LARGEST_MANIFEST:
            raise UserError(
                f"the recipe makes a manifest of {len(self._text)} bytes; expected {_LARGEST_MANIFEST} at most"
            )

    @contextmanager
    def shard(self, first: int, ids: list[str]) -> Iterator[Shard]:
        """Write one shard; it appears under its final name when the block ends well, and not at all otherwise.

        Args:
            first: place of its first prompt.
            ids: of all its sequences.

        Raises:
            UserError: the disk is full or cannot be written to.
        """
        new_folder = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        name = shard_name(first, ids)
        temporary = self.out / f"{name}.{_writer_name()}.tmp"
        try:
            # the 1.10 layout guards its own structures by checksums; readers crash on damage in older ones
            with _ShardFile(temporary, "w+b") as raw:
                with h5py.File(raw, "w", libver=("v110", "v110")) as file:
                    safe_hdf5.set_text(file, manifest=self._text)
                    yield Shard(file.create_group("sequences"), self.manifest, raw)
                raw.raise_failure()
            flush_to_disk(temporary)
            if not (self.out / MANIFEST).exists():
                self._write_manifest()
            os.replace(temporary, self.out / name)
            if os.name != "nt":  # the rename itself must reach the disk
                flush_to_disk(self.out)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if new_folder and not any(self.out.iterdir()):
                self.out.rmdir()
            if isinstance(error, OSError) and error.errno:
                reason = os.strerror(error.errno)
                raise UserError(
                    f"{self.out} cannot be written to ({reason}): make room, then record again; whole shards are kept"
                ) from None
            raise

    def _write_manifest(self) -> None:
        temporary = self.out / f"{MANIFEST}.{_writer_name()}.tmp"
        temporary.write_text(json.dumps(self.manifest, indent=2) + "\n", encoding="utf-8")
        flush_to_disk(temporary)
        os.replace(temporary, self.out / MANIFEST)

    def _remove_abandoned(self) -> None:
        """Remove unfinished files of processes on this machine that have ended."""
        for path in self.out.glob("*.tmp"):
            host, _, process = path.name.removesuffix(".tmp").rpartition(".")[2].rpartition("-")
            if host == _host() and process.isdigit() and not _is_running(int(process)):
                path.unlink(missing_ok=True)


def shard_name(first: int, ids: list[str]) -> str:
    """Name of a shard's file. Ids are part of it, so that no two recordings give one name to two contents."""
    return f"shard-{first:06d}-{hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8]}.h5"


class TraceWriter(ShardWriter):
    """Adds shards to a folder that may hold some of them already.

    Args:
        out: the folder; made when the first shard is begun.
        manifest: how these traces are recorded.

    Raises:
        UserError: the folder holds something else, a set with another manifest, or a damaged shard.
    """

    def __init__(self, out: str | Path, manifest: dict[str, Any]):
        super().__init__(out, manifest)
        self.entries: dict[str, Entry] = {}
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out} is a file; expected a folder to write traces to")
        if (self.out / MANIFEST).exists():
            existing = read_manifest(self.out)
            refuse_other_manifest(existing, manifest, str(self.out))
            self.entries = {entry.id: entry for entry in read_shards(self.out, existing)}
        elif self.out.is_dir() and any(
            not path.name.endswith(".tmp") and not path.name.startswith(".") for path in self.out.iterdir()
        ):
            raise UserError(f"folder {self.out} is not empty and holds no trace set; choose another one")

    def missing(self, prompts: list[Prompt]) -> list[tuple[int, Prompt]]:
        """The prompts that no whole shard holds yet, each with its place among all prompts.

        Raises:
            UserError: an id twice, an id that was recorded from other tokens, or a document in both splits.
        """
        splits: dict[str, str] = {entry.text_hash: entry.split for entry in self.entries.values()}
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
            entry = self.entries.get(prompt.id)
            if entry is None:
                missing.append((ordinal, prompt))
            elif entry.prompt != prompt_hash(prompt.context_ids, prompt.continuation_ids):
                raise UserError(f"{self.out} holds a sequence {prompt.id} of other tokens: record into another folder")
        return missing


class _ShardFile(io.FileIO):
    """A file that remembers its first failed write and then drops all others.

    HDF5 would go on to write what it could not, and crashes when the process ends; so it is told of no failure.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of the data, or remember why not."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self.failure is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failure = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Change the file's size, or remember why not."""
        try:
            return super().truncate(size) if self.failure is None else size or 0
        except OSError as error:
            self.failure = error
            return size or 0

    def raise_failure(self) -> None:
        """Raise the OSError of the first write that failed."""
        if self.failure is not None:
            raise self.failure


class Shard:
    """An open shard.

    Args:
        group: its group of sequences.
        manifest: of the trace set; its `storage` is the type of keys, values, queries and hidden states.
        file: the file that the shard is written to.
    """

    def __init__(self, group: h5py.Group, manifest: dict[str, Any], file: _ShardFile):
        self._group = group
        self._manifest = manifest
        self._file = file

    def add(self, sequence: Sequence, ordinal: int) -> None:
        """Write one sequence as a group of its own.

        Args:
            sequence: what was recorded; empty `queries` and `stats` and missing `hidden` are left out.
            ordinal: place in the order of the prompts.
        """
        group = self._group.create_group(sequence.id)
        group.attrs.update(ordinal=ordinal, tokens=len(sequence.tokens), scaling=np.array(sequence.scaling, np.float64))
        prompt = prompt_hash(sequence.tokens, [c.tokens for c in sequence.continuations])
        texts = {"task": sequence.task, "split": sequence.split, "text_hash": sequence.text_hash, "prompt": prompt}
        safe_hdf5.set_text(group, **texts)
        context = group.create_group("context")
        _write_array(context, "tokens", np.asarray(sequence.tokens, np.int64))
        if sequence.positions is not None:
            group.attrs["slots"] = sequence.slots
            _write_array(context, "positions", np.asarray(sequence.positions, np.int64))
        for name in ("keys", "values", "queries"):
            array = getattr(sequence, name)
            if array.size:
                _write_array(context, name, self._stored(array), by_head=True)
        if sequence.hidden is not None:
            hidden = np.stack([sequence.hidden[layer] for layer in range(len(sequence.layers))])
            _write_array(context, "hidden", self._stored(hidden), chunks=(1, *hidden.shape[1:]))
        for policy, states in sequence.stats.items():
            for state, array in states.items():
                _write_array(context.require_group(f"stats/{policy}"), state, array)
        for i, continuation in enumerate(sequence.continuations):
            subgroup = group.create_group(f"continuation/{i:04d}")
            subgroup.attrs["block"] = continuation.block
            _write_array(subgroup, "tokens", np.asarray(continuation.tokens, np.int64))
            _write_array(subgroup, "future", np.asarray(continuation.future, np.float32), by_head=True)
        digest = digest_of(group)
        safe_hdf5.set_text(group, digest=digest, identity=identity_of(sequence.id, digest, self._manifest))
        self._group.file.flush()
        self._file.raise_failure()

    def _stored(self, array: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, self._manifest["storage"]))
        return tensor.view(torch.uint16).numpy() if self._manifest["storage"] == "bfloat16" else tensor.numpy()


def _write_array(
    group: h5py.Group, name: str, array: np.ndarray, by_head: bool = False, chunks: tuple[int, ...] | None = None
) -> None:
    whole = (1, 1, *array.shape[2:]) if by_head else array.shape
    data = group.create_dataset(name, data=array, chunks=chunks or whole, fletcher32=True)
    safe_hdf5.set_text(data, sha256=safe_hdf5.sha256(array))
    if array.dtype == np.uint16:
        safe_hdf5.set_text(data, type="bfloat16")


def _writer_name() -> str:
    """Host and process, so that a later run knows whose an unfinished file is."""
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
