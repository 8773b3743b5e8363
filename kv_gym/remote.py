"""Folders that lie elsewhere, at an address that fsspec knows such as ``s3://bucket/folder``.

Trace sets and the results of leaderboards may lie there; all else is written to this machine alone
(:func:`kv_gym.files.refuse_address`). Files are read and written on this machine: a folder has a
copy below ``$XDG_CACHE_HOME/kv_gym`` (by default ``~/.cache/kv_gym``), into which its files are fetched where they are
new or have changed, and from which finished files are put. A file appears at the address under its name when it is
whole.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from kv_gym.errors import UserError, short_reason
from kv_gym.files import ADDRESS, atomic_write, exists


def remote_folder(name: str | Path) -> RemoteFolder | None:
    """The folder at an address, or None where it is a path of this machine.

    Args:
        name: such as ``s3://bucket/folder``; ``file:///folder`` is a path.

    Raises:
        UserError: a protocol that fsspec does not know, or whose package is not installed.
    """
    found = ADDRESS.fullmatch(str(name))
    if found is None or found[1] == "file" or exists(name):
        return None
    return RemoteFolder(f"{found[1]}://{found[2].strip('/')}")


def local_path(name: str | Path) -> Path:
    """The path of a name that is no address, or of ``file:///folder``."""
    return Path(re.sub(r"^file:/{1,3}", "/", str(name)))


class RemoteFolder:
    """A folder at an address; plain data to other processes, which make their own connection.

    Args:
        address: as ``PROTOCOL://PATH``.

    Attributes:
        address: as given.
        copy: folder of this machine for its files.
    """

    def __init__(self, address: str):
        self.address = address
        protocol, _, path = address.partition("://")
        parts = PurePosixPath(path).parts
        if not parts or ".." in parts:
            raise UserError(f"{address} names no folder; expected an address such as s3://bucket/folder")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.copy = cache.joinpath("kv_gym", protocol, *parts)
        self._system, self._path = _connect(address)

    def __reduce__(self) -> tuple:
        return RemoteFolder, (self.address,)

    def fetch(self, patterns: Sequence[str]) -> Path:
        """Bring the copy up to date and return it; what is no longer at the address goes.

        Args:
            patterns: of the names of files, such as ``*.h5``; a file may lie in a folder of the folder.

        Raises:
            UserError: the address cannot be read.
        """
        with self._explained("read"):
            self._system.invalidate_cache()
            there = self._system.find(self._path) if self._system.exists(self._path) else []
        root = self._path.rstrip("/") + "/"
        names = [file.removeprefix(root) for file in there]
        chosen = {
            name
            for name in names
            if any(fnmatch(name, pattern) for pattern in patterns) and ".." not in PurePosixPath(name).parts
        }
        self.copy.mkdir(parents=True, exist_ok=True)
        for file in [path for path in self.copy.rglob("*") if path.is_file()]:
            name = file.relative_to(self.copy).as_posix()
            if any(fnmatch(name, pattern) for pattern in patterns) and name not in chosen:
                file.unlink(missing_ok=True)
        for name in sorted(chosen):
            with self._explained("read"):
                key = self._system.ukey(root + name)
            if not (self.copy / name).is_file() or self._key(name) != key:
                (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(self.copy / name) as part, self._explained("read"):
                    self._system.get_file(root + name, str(part))
                self._keep_key(name, key)
        return self.copy

    def put(self, file: Path, name: str) -> None:
        """Write a file of this machine to the address; it becomes part of the copy.

        Args:
            file: a whole file; moved into the copy where it lies elsewhere.
            name: of the file in the folder, with slashes.

        Raises:
            UserError: the address cannot be written to.
        """
        target = f"{self._path.rstrip('/')}/{name}"
        part = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
        with self._explained("written to"):
            self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._system.put_file(str(file), part)
            self._system.mv(part, target)
            self._system.invalidate_cache()
            key = self._system.ukey(target)
        if file != self.copy / name:
            (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, self.copy / name)
        self._keep_key(name, key)

    def has(self, name: str) -> bool:
        """Whether the folder holds a file of this name."""
        with self._explained("read"):
            return self._system.exists(f"{self._path.rstrip('/')}/{name}")

    def remove(self, name: str) -> None:
        """Remove a file from the address and from the copy."""
        if self.has(name):
            with self._explained("written to"):
                self._system.rm_file(f"{self._path.rstrip('/')}/{name}")
        (self.copy / name).unlink(missing_ok=True)

    def _key_file(self, name: str) -> Path:
        return (self.copy / name).with_name(f".{PurePosixPath(name).name}.key")

    def _key(self, name: str) -> str:
        file = self._key_file(name)
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def _keep_key(self, name: str, key: Any) -> None:
        """Note by what the file at the address is told from another of its name."""
        self._key_file(name).write_text(str(key), encoding="utf-8")

    @contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # every protocol has errors of its own
            raise UserError(
                f"{self.address} cannot be {verb} ({short_reason(error)}): check the address, its permissions and the "
                "network"
            ) from None


def _connect(address: str) -> tuple[Any, str]:
    """The file system of an address and the path in it."""
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{address} needs the package fsspec: pip install 'kv-gym[fsspec]'") from None
    try:
        return fsspec.url_to_fs(address)
    except ImportError as error:  # its text names the package, such as s3fs
        raise UserError(f"{address} needs another package: {short_reason(error)}") from None
    except ValueError as error:
        raise UserError(
            f"{address} cannot be used ({short_reason(error)}): expected a path, or an address that fsspec knows such "
            "as s3://bucket/folder"
        ) from None
