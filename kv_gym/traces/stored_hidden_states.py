"""Hidden states that stay on the disk until somebody reads them: they are larger than all else in a trace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from kv_gym.traces import safe_hdf5 as checked


@dataclass(frozen=True)
class StoredHidden:
    """Hidden states `[L, n, D]` in a shard; `stored[layer]` reads one layer's `[n, D]` float32, checked, every time.

    Attributes:
        path: the shard.
        group: name of the HDF5 group that holds them, as ``hidden``.
        shape: L recorded layers, n tokens, width D of the model.
    """

    path: Path
    group: str
    shape: tuple[int, int, int]

    @classmethod
    def in_context(cls, context: h5py.Group, layers: int, tokens: int) -> StoredHidden:
        """Hidden states of an open shard, if their type and shape are right; no number of them is read.

        Raises:
            UserError: another type or shape, links, filters, or a size beyond the file.
        """
        data = checked.declared_at(context, "hidden", checked.CACHED, (layers, tokens, None))
        return cls(Path(context.file.filename), context.name.lstrip("/"), data.shape)

    def __getitem__(self, layer: int) -> np.ndarray:
        """One recorded layer's, `[n, D]` float32.

        Raises:
            UserError: the file is gone, damaged or another one, or a number is not finite.
        """
        with checked.opened(self.path) as file:
            data = checked.declared_at(checked.group_at(file, self.group), "hidden", checked.CACHED, self.shape)
            return checked.widened(data, layer)
