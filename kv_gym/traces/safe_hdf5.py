"""Read HDF5 that a stranger may have made: plain arrays inside one file, whole and finite, or a refusal."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kv_gym.errors import UserError

FLOAT_TYPES = ("float32", "float16", "uint16")
"""Types of what a model computed; uint16 holds bfloat16, which HDF5 does not know."""


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading.

    Raises:
        UserError: what HDF5 cannot read in the file, also within the block. A file that cannot be opened now, such as
            one that is being written or lies on a disk that fails, is not called damaged.
    """
    if not path.is_file():
        raise UserError(f"there is no trace file {path}; expected one that `kv-gym record` wrote")
    try:
        with open(path, "rb"):
            is_hdf5 = h5py.is_hdf5(path)
        if not is_hdf5:
            raise UserError(f"{path} is no HDF5 file; expected one that `kv-gym record` wrote")
        with h5py.File(path, "r") as file:
            yield file
    except UserError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} {_explained(error)}") from None


def _explained(error: Exception) -> str:
    """What an error says of a file: it cannot be read now, or it is damaged."""
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    # of a failed read, HDF5 reports the system's error within its text
    number = re.search(r"errno = (\d+)", str(error))
    code = getattr(error, "errno", None) or (int(number[1]) if number else 0)
    if code:
        return f"cannot be read now ({os.strerror(code)}): close the program that writes to it, or check its disk"
    return f"is damaged or cut short ({reason}): remove it and record again, what is whole is kept"


def open_group(parent: h5py.Group, name: str) -> h5py.Group:
    """A group that lies in the same file."""
    member = _member(parent, name)
    if not isinstance(member, h5py.Group):
        raise UserError(f"{_name(parent, name)} is no group; expected a trace file that `kv-gym record` wrote")
    return member


def has_member(parent: h5py.Group, name: str) -> bool:
    """Whether a group has a member of this name; a link is not followed."""
    return parent.get(name, getlink=True) is not None


def member_names(parent: h5py.Group, name: str) -> list[str]:
    """Names in an optional group, sorted; none where the group is missing."""
    return sorted(open_group(parent, name)) if has_member(parent, name) else []


def read_array(parent: h5py.Group, name: str, types: tuple[str, ...], shape: tuple[int | None, ...]) -> np.ndarray:
    """A whole array: its size is compared with the file's before memory is taken, its numbers must be finite.

    Args:
        parent: the group it lies in.
        name: of the dataset.
        types: NumPy types that are allowed, such as ``float32``.
        shape: expected lengths, None where any will do; more axes may follow a final ``-1``.

    Raises:
        UserError: missing, linked, virtual, filtered, of another type or shape, larger than its file, or not finite.
    """
    return _read(open_dataset(parent, name, types, shape))


def open_dataset(
    parent: h5py.Group, name: str, types: tuple[str, ...], shape: tuple[int | None, ...]
) -> h5py.Dataset:  # fmt: skip
    """A dataset of the expected type and shape, its numbers unread; arguments and errors of :func:`read_array`."""
    data = plain_dataset(parent, name)
    where = _name(parent, name)
    if data.dtype.name not in types:
        raise UserError(f"{where} is of type {data.dtype}; expected {' or '.join(types)}")
    more_axes = shape[-1] == -1
    expected = shape[:-1] if more_axes else shape
    fits = len(data.shape) >= len(expected) if more_axes else len(data.shape) == len(expected)
    if not fits or any(e is not None and e != s for e, s in zip(expected, data.shape, strict=False)):
        shown = ", ".join("any" if w is None else "..." if w == -1 else str(w) for w in shape)
        raise UserError(f"{where} has shape {list(data.shape)}; expected [{shown}]")
    return data


def read_float32(data: h5py.Dataset, part: int | None = None) -> np.ndarray:
    """The numbers of a dataset of one of :data:`FLOAT_TYPES`, finite, as float32.

    Args:
        data: the dataset.
        part: index on its first axis; None reads all.
    """
    array = _read(data, part)
    if array.dtype == np.uint16:
        if text_attribute(data, "type") != "bfloat16":
            raise UserError(f"{_name(data)} is 16 bits of an unknown type")
        # bfloat16 is the upper half of float32
        array = (array.astype(np.uint32) << 16).view(np.float32)
    wide = array.astype(np.float32, copy=False)
    if not np.isfinite(wide).all():
        raise UserError(f"{_name(data)} holds NaN or infinite numbers; expected finite ones")
    return wide


def plain_dataset(parent: h5py.Group, name: str) -> h5py.Dataset:
    """A dataset whose bytes lie in the same file, with a checksum as its only filter; nothing is read yet."""
    data = _member(parent, name)
    where = _name(parent, name)
    if not isinstance(data, h5py.Dataset) or data.shape is None:
        raise UserError(f"{where} is no array; expected a trace file that `kv-gym record` wrote")
    if data.is_virtual or data.external:
        raise UserError(f"{where} takes its data from other files, which is refused; copy the data into one file")
    properties = data.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if filters != [h5py.h5z.FILTER_FLETCHER32]:
        raise UserError(f"{where} has HDF5 filters {filters}; expected the Fletcher-32 checksum and nothing else")
    stored, size = data.id.get_storage_size(), data.file.id.get_filesize()
    if math.prod(data.shape) * data.dtype.itemsize > stored or stored > size:
        raise UserError(f"{where} declares shape {list(data.shape)}, more than the file's {size} bytes can hold")
    return data


def set_text(owner: h5py.Group | h5py.Dataset, **texts: str) -> None:
    """Set text attributes, each of the length of its UTF-8 bytes."""
    for name, text in texts.items():
        data = text.encode("utf-8")
        owner.attrs.create(name, np.array(data, h5py.string_dtype("utf-8", max(1, len(data)))))


def attributes(owner: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    """All attributes, which are texts, numbers and lists of numbers."""
    values = {name: _attribute(owner, name, object) for name in owner.attrs}
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in values.items()}


def text_attribute(owner: h5py.Group | h5py.Dataset, name: str) -> str:
    """A text attribute."""
    return _attribute(owner, name, str)


def integer_attribute(owner: h5py.Group | h5py.Dataset, name: str) -> int:
    """An integer attribute, at least 0."""
    value = int(_attribute(owner, name, np.integer))
    if value < 0:
        raise UserError(f"attribute {name!r} of {_name(owner)} is {value}; expected a number from 0")
    return value


def float_attributes(owner: h5py.Group, name: str, count: int) -> tuple[float, ...]:
    """An attribute of `count` finite numbers."""
    value = np.asarray(_attribute(owner, name, np.ndarray))
    if value.shape != (count,) or value.dtype.kind != "f" or not np.isfinite(value).all():
        raise UserError(f"attribute {name!r} of {_name(owner)} is not {count} finite numbers")
    return tuple(float(x) for x in value)


def sha256(array: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and bytes in C order."""
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256(f"{array.dtype.name}{list(array.shape)}".encode())
    digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def _attribute(owner: h5py.Group | h5py.Dataset, name: str, kind: type) -> Any:
    if name not in owner.attrs:
        raise UserError(f"{_name(owner)} has no attribute {name!r}; expected a trace file that `kv-gym record` wrote")
    attribute = owner.attrs.get_id(name)
    # text of variable length lies in a heap without a checksum: HDF5 may loop for ever where that is damaged
    plain = attribute.dtype.kind in "Siuf" and attribute.get_storage_size() <= owner.file.id.get_filesize()
    value = owner.attrs[name] if plain else None
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if value is None or not isinstance(value, kind):
        raise UserError(f"attribute {name!r} of {_name(owner)} is of type {attribute.dtype}; expected {kind.__name__}")
    return value


def _member(parent: h5py.Group, name: str) -> Any:
    first, _, rest = name.partition("/")
    if rest:  # step by step, so that no link hides in the middle of a path
        return _member(open_group(parent, first), rest)
    link = parent.get(name, getlink=True)
    if link is None:
        raise UserError(f"{_name(parent)} has no {name!r}; expected a trace file that `kv-gym record` wrote")
    if not isinstance(link, h5py.HardLink):
        raise UserError(f"{_name(parent, name)} is a link, which is refused; copy what it points to into the file")
    return parent[name]


def _read(data: h5py.Dataset, part: int | None = None) -> np.ndarray:
    try:
        array = data[()] if part is None else data[part]
    except OSError as error:
        raise UserError(f"{_name(data)} {_explained(error)}") from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{_name(data)} holds NaN or infinite numbers; expected finite ones (did the model overflow?)")
    return array


def _name(owner: h5py.Group | h5py.Dataset, name: str = "") -> str:
    return f"{owner.file.filename}:{owner.name.rstrip('/')}/{name}".rstrip("/")
