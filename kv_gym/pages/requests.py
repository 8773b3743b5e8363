"""A trace of cache requests: which pages were asked for, in what order, how large, and how long they stay valid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from kv_gym.errors import UserError

LARGEST_SIZE = 2**48
"""Bytes of a page at most."""
NEVER = np.iinfo(np.int64).max
"""The next use of a page that is not requested again."""


@dataclass(frozen=True, eq=False)
class RequestTrace:
    """Page accesses in order, grouped into requests.

    A page is a block of a prompt (serving logs) or a whole object (web logs). Pages are numbered from 0 in the order
    of their first access. A request is a chain of pages: page j + 1 of a prompt can only be used together with page j.

    Attributes:
        name: what tables call it, usually the file's name.
        pages: `[accesses]` int64, the page of each access.
        starts: `[requests + 1]` int64, where each request begins in `pages`; the last entry is the number of accesses.
        sizes: `[accesses]` int64 bytes, or None where every page takes one unit.
        times: `[accesses]` float64 seconds, ascending, or None where the log has none.
        ttl: `[accesses]` float64 seconds for which a page that is stored now stays valid (infinite: for ever), or None.
        lines: `[accesses]` int64 line numbers of the file, for messages, or None.
    """

    name: str
    pages: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray | None = None
    times: np.ndarray | None = None
    ttl: np.ndarray | None = None
    lines: np.ndarray | None = None

    @classmethod
    def from_keys(
        cls,
        keys: Sequence | np.ndarray,
        name: str = "requests",
        *,
        starts: Sequence[int] | None = None,
        sizes: Sequence[int] | np.ndarray | None = None,
        times: Sequence[float] | np.ndarray | None = None,
        ttl: Sequence[float] | np.ndarray | None = None,
        lines: Sequence[int] | np.ndarray | None = None,
    ) -> RequestTrace:
        """A trace from any hashable keys.

        Args:
            keys: the key of each access: numbers or texts.
            name: of the trace.
            starts: where each request begins; None: every access is a request.
            sizes, times, ttl, lines: of each access, see the class.

        Raises:
            UserError: no access, a negative size, or times that go back; the message names the line.
        """
        if not len(keys):
            raise UserError(f"{name} holds no request; expected at least one")
        numbers: dict = {}
        pages = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(keys))
        begins = np.arange(len(pages) + 1) if starts is None else np.append(np.asarray(starts, np.int64), len(pages))
        made = cls(
            name,
            pages,
            begins,
            None if sizes is None else _whole(sizes),
            None if times is None else np.asarray(times, float),
            None if ttl is None else np.asarray(ttl, float),
            None if lines is None else np.asarray(lines, np.int64),
        )
        made._check()
        return made

    def _check(self) -> None:
        if self.sizes is not None and ((self.sizes < 0) | (self.sizes > LARGEST_SIZE)).any():
            at = int(((self.sizes < 0) | (self.sizes > LARGEST_SIZE)).argmax())
            raise UserError(f"{self._place(at)}: size {self.sizes[at]}; expected a size from 0 to {LARGEST_SIZE} bytes")
        if self.ttl is not None and np.isnan(self.ttl).any():
            raise UserError(f"{self._place(int(np.isnan(self.ttl).argmax()))}: the time that it is valid is no number")
        if self.times is not None:
            back = np.diff(self.times) < 0
            if back.any():
                at = int(back.argmax()) + 1
                raise UserError(
                    f"{self._place(at)}: time {self.times[at]:g} comes after {self.times[at - 1]:g}; "
                    "expected requests in order of time: sort the file"
                )

    def _place(self, access: int) -> str:
        return f"{self.name}, line {self.lines[access] if self.lines is not None else access + 1}"

    def __len__(self) -> int:
        return len(self.pages)

    def __repr__(self) -> str:
        sized = "" if self.sizes is None else ", with sizes"
        counts = f"{self.requests} requests, {len(self)} accesses, {self.footprint} pages{sized}"
        return f"RequestTrace({self.name!r}, {counts})"

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return len(self.starts) - 1

    @cached_property
    def footprint(self) -> int:
        """How many different pages are asked for."""
        return int(self.pages.max()) + 1

    @cached_property
    def chained(self) -> bool:
        """Whether any request asks for more than one page."""
        return self.requests < len(self)

    @cached_property
    def next_use(self) -> np.ndarray:
        """`[accesses]` int64, the next access of the same page, or :data:`NEVER`."""
        order = np.argsort(self.pages, kind="stable")
        following = np.full(len(order), NEVER)
        same = self.pages[order[1:]] == self.pages[order[:-1]]
        following[order[:-1][same]] = order[1:][same]
        return following

    @cached_property
    def parents(self) -> np.ndarray:
        """`[footprint]` int64, the page before each one where it was first asked for, or -1."""
        before = np.concatenate(([-1], self.pages[:-1]))
        before[self.starts[:-1]] = -1
        return self._at_first_use(before, -1)

    @cached_property
    def depth(self) -> np.ndarray:
        """`[footprint]` int64, the place of each page in the request that first asked for it, from 0."""
        return self._at_first_use(np.arange(len(self)) - np.repeat(self.starts[:-1], np.diff(self.starts)), 0)

    def _at_first_use(self, values: np.ndarray, missing: int) -> np.ndarray:
        """Of each page the value of its first access; a part of a trace may lack some pages."""
        found = np.full(self.footprint, missing)
        pages, first = np.unique(self.pages, return_index=True)
        found[pages] = values[first]
        return found

    @cached_property
    def lists(self) -> dict[str, list]:
        """The arrays as Python lists, of which single entries are read much faster; each is made once."""
        arrays = {
            "pages": self.pages,
            "starts": self.starts,
            "next_use": self.next_use,
            "depth": self.depth,
            "parents": self.parents,
            "sizes": self.sizes,
            "times": self.times,
            "ttl": self.ttl,
        }
        return {name: array.tolist() for name, array in arrays.items() if array is not None}

    def check_capacity(self, capacity: int) -> None:
        """Refuse a capacity that some object does not fit into.

        Raises:
            UserError: the capacity is no positive number, or an object is larger; the message names its line.
        """
        if capacity < 1:
            raise UserError(f"a cache of capacity {capacity} holds nothing; expected 1 or more")
        if self.sizes is not None and int(self.sizes.max()) > capacity:
            at = int((self.sizes > capacity).argmax())
            raise UserError(
                f"{self._place(at)}: an object of {self.sizes[at]} bytes is larger than the cache of {capacity}: "
                "give a larger capacity, or let such objects pass uncached (oversize='pass', --oversize pass)"
            )

    def part(self, start: int, stop: int) -> RequestTrace:
        """The requests from number `start` up to `stop`; pages keep their numbers."""
        a, b = int(self.starts[start]), int(self.starts[stop])
        cut: dict[str, Any] = {
            field: None if getattr(self, field) is None else getattr(self, field)[a:b]
            for field in ("sizes", "times", "ttl", "lines")
        }
        return replace(self, pages=self.pages[a:b], starts=self.starts[start : stop + 1] - a, **cut)

    def summary(self) -> dict[str, float | int | str | None]:
        """What ``kv-gym pages info`` prints.

        Returns:
            ``name``, ``requests``, ``accesses``, ``footprint`` (different pages), ``bytes`` (of the footprint) or
            None, ``seconds`` or None, ``best_hit_rate`` (an endless cache, no expiry), and the quartiles of the reuse
            distance, in accesses: ``reuse_25``, ``reuse_50``, ``reuse_75``.
        """
        again = self.next_use != NEVER
        gaps = (self.next_use - np.arange(len(self)))[again]
        quartiles = np.percentile(gaps, (25, 50, 75)) if len(gaps) else (None,) * 3
        _, first = np.unique(self.pages, return_index=True)
        return {
            "name": self.name,
            "requests": self.requests,
            "accesses": len(self),
            "footprint": self.footprint,
            "bytes": None if self.sizes is None else int(self.sizes[first].sum()),
            "seconds": None if self.times is None else float(self.times[-1] - self.times[0]),
            "best_hit_rate": float(again.mean()),
            **{f"reuse_{q}": None if v is None else float(v) for q, v in zip((25, 50, 75), quartiles, strict=True)},
        }


def _whole(numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """`[n]` int64; numbers beyond are the largest of their sign."""
    try:
        return np.asarray(numbers, np.int64)
    except OverflowError:
        limits = np.iinfo(np.int64)
        return np.asarray([min(max(number, limits.min), limits.max) for number in numbers], np.int64)
