"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when the block ends well; an earlier file stays until then."""
    path = Path(path)
    part = path.with_name(path.name + ".tmp")
    yield part
    os.replace(part, path)
