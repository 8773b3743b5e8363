"""Values that are made again when they are asked for, of which as many stay in memory as a limit allows."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

from kv_gym.errors import UserError

UNLIMITED = 1 << 62  # bytes
Value = TypeVar("Value")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class BoundedCache(Generic[Value]):
    """Values by key; those that were not asked for the longest go first.

    The value that was asked for last is always held, even where it is larger than the limit.

    Args:
        limit: bytes that the values may take together.
        size: bytes of a value.

    Attributes:
        limit: as given.
        bytes: of all values that are held.
    """

    def __init__(self, limit: int, size: Callable[[Value], int]):
        self.limit, self.bytes = limit, 0
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made where it is not held."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = make()
        self._values[key] = value
        self.bytes += self._size(value)
        while self.bytes > self.limit and len(self._values) > 1:
            self.bytes -= self._size(self._values.popitem(last=False)[1])
        return value

    def clear(self) -> None:
        """Drop all values."""
        self._values.clear()
        self.bytes = 0

    def values(self) -> list[Value]:
        """All values in the cache."""
        return list(self._values.values())


def memory_limit(gigabytes: float | None) -> int:
    """Bytes of a limit in gigabytes (10^9 bytes); None: half of this machine's memory, or of the container's.

    Raises:
        UserError: not above 0.
    """
    if gigabytes is not None:
        if not gigabytes > 0:
            raise UserError(f"memory is {gigabytes}; expected gigabytes above 0")
        return int(gigabytes * 1e9)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8_000_000_000
    if _CGROUP_LIMIT.is_file() and (text := _CGROUP_LIMIT.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total // 2
