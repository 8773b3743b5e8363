"""Arrays that are made from recorded contexts: all in memory, or those of the contexts that were asked for last."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from kv_gym.traces.bounded_cache import BoundedCache

Arrays = dict[str, np.ndarray]


class ContextArrays:
    """Arrays of float32 whose rows belong to contexts: first all rows of the first context, then those of the next.

    Every context is read once at the beginning. Where all of them fit into the limit they are stacked, so that a batch
    of rows is one gather. Otherwise a context is read again when its rows are asked for and it is not held.

    Args:
        rows: how many each context has.
        shapes: shape of a row of each array.
        read: gives the arrays of a context by its number, `[its rows, *shape]`.
        limit: bytes that may be held.
    """

    def __init__(
        self, rows: Seq[int], shapes: Mapping[str, tuple[int, ...]], read: Callable[[int], Arrays], limit: int
    ):
        self._first = np.concatenate(([0], np.cumsum(rows, dtype=np.int64)))
        self._shapes, self._read = dict(shapes), read
        self._cache: BoundedCache[Arrays] = BoundedCache(limit, lambda arrays: sum(a.nbytes for a in arrays.values()))
        self._stacked: Arrays = {}
        needed = 4 * int(self._first[-1]) * sum(math.prod(shape) for shape in self._shapes.values())
        if needed > limit:
            for context in range(len(rows)):
                self._of(context)
            return
        stacked = {name: np.empty((self._first[-1], *shape), np.float32) for name, shape in self._shapes.items()}
        for context, (start, stop) in enumerate(zip(self._first, self._first[1:], strict=False)):
            for name, array in read(context).items():
                stacked[name][start:stop] = array
        self._stacked = stacked
        del self._read  # and with it the contexts

    def take(self, rows: NDArray[np.int64]) -> Arrays:
        """New arrays with the rows `[B]`."""
        if self._stacked:
            return {name: array.take(rows, axis=0) for name, array in self._stacked.items()}
        taken = {name: np.empty((len(rows), *shape), np.float32) for name, shape in self._shapes.items()}
        contexts = np.searchsorted(self._first, rows, "right") - 1
        for context in np.unique(contexts).tolist():
            chosen = contexts == context
            for name, array in self._of(context).items():
                taken[name][chosen] = array[rows[chosen] - self._first[context]]
        return taken

    def _of(self, context: int) -> Arrays:
        return self._cache.get(context, lambda: self._read(context))
