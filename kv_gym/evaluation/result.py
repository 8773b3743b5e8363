"""Result files: rows with everything that is needed to make them again."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError
from kv_gym.files import whole_file

_PACKAGES = ("gymnasium", "h5py", "kv-gym", "numpy", "stable-baselines3", "torch", "transformers")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def result(rows: list[dict], **about: Any) -> dict:
    """A result: rows, the command that made them, versions, and whatever else identifies the run."""
    return {"rows": rows, "command": _command(), "versions": versions(), **about}


def _command() -> str:
    program, *arguments = sys.argv
    *folders, name = Path(program).parts[-3:] or ("",)
    ours = name == "__main__.py" and "kv_gym" in folders  # started by `python -m kv_gym`, or `kv_gym.cli`
    return shlex.join(["kv-gym" if ours else Path(program).name, *arguments])


def refuse_unwritable(file: str | Path) -> None:
    """Raise a UserError, before any work, where `file` cannot be written to."""
    file = Path(file)
    if not file.name or os.path.isdir(file):
        raise UserError(f"{file} is a folder; name a file to write the result to")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {file.parent} ({error.strerror}); name another file") from None
    trial = file.with_name(file.name + ".tmp")  # the name that `whole_file` writes to
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}); name another file") from None


def write_json(file: str | Path, data: dict) -> Path:
    """Write JSON whole or not at all."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as part:
        part.write_text(json.dumps(data, indent=1) + "\n")
    return file


def read_json(file: str | Path) -> dict:
    """Read a result file; a UserError where it is missing or none of ours."""
    try:
        data = json.loads(Path(file).read_text())
        if isinstance(data["rows"], list) and all({"policy", "budget"} <= set(row) for row in data["rows"]):
            return data
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file} is no result of kv-gym evaluate; expected a JSON file with rows")
