"""SHA-256 beside what is written, checked when it is read: a flipped bit in weights is no error anywhere else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_gym.errors import UserError
from kv_gym.files import atomic_write, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

_MARK = b"kv_gym sha256 "
_LARGEST = 2**38


def described_data_hash(description: Mapping[str, Any], data: bytes) -> str:
    """SHA-256 of plain JSON data, however its keys are ordered, with the bytes that it describes."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


def described_tensors_hash(description: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of a text with the names, types, shapes and exact values of tensors, in the order in which they come."""
    import torch

    digest = hashlib.sha256(description.encode())
    for name, tensor in tensors:
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checked(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all: a line with the SHA-256 of `data`, then `data`; see :func:`read_checked`."""
    with atomic_write(path) as part, open(part, "wb") as file:
        file.write(_MARK + hashlib.sha256(data).hexdigest().encode() + b"\n")
        file.write(data)


def read_checked(path: str | Path, expected: str) -> bytes:
    """The data of a file of :func:`write_checked`.

    Args:
        path: the file.
        expected: what the file should be, to end the error's sentence.

    Raises:
        UserError: the file cannot be read, or its data is not what was written.
    """
    line, _, data = read_bytes(path, expected, _LARGEST).partition(b"\n")
    if line != _MARK + hashlib.sha256(data).hexdigest().encode():
        raise UserError(f"{path} is damaged, or an earlier version wrote it: its checksum does not hold; {expected}")
    return data
