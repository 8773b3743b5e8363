"""Files: written whole or not at all, and where the data that ships with the library lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kv_gym.errors import UserError

_PACKAGE = Path(__file__).parent

MODEL = _PACKAGE / "reference" / "model"
"""Folder of the reference model and its tokenizer, as transformers loads them."""

_IN_REPOSITORY = {"agents": "agents", "requests": "traces/requests", "traces": "traces/sample"}


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when the block ends well; an earlier file stays until then.

    Raises:
        OSError: `path` cannot be written to; the error names it, and comes before the block begins.
    """
    path = Path(path)
    part = path.with_name(path.name + ".tmp")
    try:
        part.touch()  # not all who write here raise OSError where a folder is read-only: safetensors does not
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        yield part
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)


def bundled(name: str) -> Path:
    """The folder of bundled data.

    Args:
        name: `"traces"`, the small recorded sample that environments replay by default, or `"agents"`, the
            training settings `<agent>.yml`.

    Raises:
        UserError: the data is not there.
        KeyError: no such kind of data.
    """
    repository = _PACKAGE.parent
    in_repository = repository / _IN_REPOSITORY[name]
    installed = _PACKAGE / "_data" / name
    # beside an installed package lie other people's folders: only a checkout has setup.cfg there
    folder = in_repository if (repository / "setup.cfg").is_file() else installed
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(
            f"the bundled {name} are missing ({folder}): install kv-gym again, or name a folder of your own"
        )
    return folder
