"""What a cell is known by: hashes of policy, model and setting, found without loading a model or any weights.

A cell is measured anew when something changes that its result depends on: the policy's settings, weights or code
(comments, docstrings and layout aside), the model's files, what is asked, the budget and how slots are dealt out. The
package's version is no part of it; :data:`RESULTS` is, and rises when the machinery changes what comes out.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import tokenize
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError
from kv_gym.files import MODEL, exists, read_bytes, read_json
from kv_gym.models.fingerprint import state_dict_hash
from kv_gym.pages import PagePolicy, RequestTrace
from kv_gym.pages.policies.learned import Learned
from kv_gym.policies import Policy

RESULTS = 2
WHOLE_FILE = 2**28  # bytes; of larger weight files evenly spaced pieces stand for all
PIECES, PIECE = 4096, 4096


def digest(content: Any) -> str:
    """SHA-256 of plain JSON data, however its mappings are ordered."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def policy_hash(policy: Policy) -> str:
    """SHA-256 of a policy without weights: its class, its settings and its code."""
    return digest(_settings(policy))


def page_policy_hash(policy: PagePolicy) -> str:
    """SHA-256 of a page policy: its class, settings and code; of a trained one its card, with its weights' hash."""
    kind: Any = type(policy)
    settings = [f for f in fields(kind) if f.init and not f.metadata] if is_dataclass(kind) else []
    card = policy.card.model_dump() if isinstance(policy, Learned) else None
    return digest(
        [kind.__qualname__, {f.name: _settings(getattr(policy, f.name)) for f in settings}, card, _code_of(kind)]
    )


def requests_hash(trace: RequestTrace) -> str:
    """SHA-256 of a trace of requests."""
    arrays = (trace.pages, trace.starts, trace.sizes, trace.times, trace.ttl)
    return digest([None if array is None else hashlib.sha256(array.tobytes()).hexdigest() for array in arrays])


def exported_hash(folder: str | Path) -> str:
    """SHA-256 of an exported policy: its weights and description; how it was trained says nothing of what it does.

    Raises:
        UserError: the folder holds no exported policy, or one that cannot be read.
    """
    from kv_gym.policies import scorer
    from kv_gym.policies.scoring import inputs

    folder, expected = Path(folder), "expected what `kv-gym train` writes"
    about = read_json(folder / "policy.json", expected) if exists(folder / "policy.json") else None
    if not isinstance(about, dict):
        raise UserError(f"folder {folder} holds no exported policy; {expected}")
    weights = hashlib.sha256(read_bytes(folder / "policy.safetensors", expected)).hexdigest()
    about = {name: value for name, value in about.items() if name not in ("training", "sha256")}
    return digest(
        [about, weights, *(_code(Path(inspect.getfile(part)).read_text(encoding="utf-8")) for part in (scorer, inputs))]
    )


def model_hash(folder: str | Path) -> str:
    """SHA-256 of a model's configuration and weight files.

    Args:
        folder: one that ``save_pretrained`` wrote, or a hub snapshot.

    Raises:
        UserError: no configuration or no weights there.
    """
    folder = Path(folder)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if len(files) == 1 or not files[0].is_file():
        raise UserError(f"folder {folder} holds no model; expected config.json and weights as safetensors")
    return digest([(file.name, _file_hash(file)) for file in files])


def model_folder(name: str) -> Path:
    """Where the files of a model lie: ``reference``, a folder, or the newest snapshot of a hub id on this machine.

    Raises:
        UserError: a hub id that was never fetched.
    """
    if name == "reference":
        return Path(MODEL)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors"], local_files_only=True))
    except (OSError, ValueError):
        raise UserError(f"there is no model {name} on this machine; name a folder, or fetch it first") from None


def _file_hash(file: Path) -> str:
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= WHOLE_FILE:
            found.update(stream.read())
        else:
            for i in range(PIECES):
                stream.seek(i * (size - PIECE) // (PIECES - 1))
                found.update(stream.read(PIECE))
    return found.hexdigest()


def _settings(value: Any) -> Any:
    """A policy, or a setting of one, as plain data."""
    if isinstance(value, Policy):
        kind = type(value)
        kinds = [each for each in kind.__mro__ if issubclass(each, Policy) and not inspect.isabstract(each)]
        code = [_code_of(each) for each in kinds]
        return [f"{kind.__module__}:{kind.__qualname__}", _fields(value), code]
    if hasattr(value, "state_dict"):  # weights inside of a policy object
        return state_dict_hash(value.state_dict())
    if is_dataclass(value):
        return [type(value).__qualname__, _fields(value)]
    if isinstance(value, Mapping):
        return {str(name): _settings(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_settings(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: _settings(getattr(value, field.name)) for field in fields(value) if field.init}


def _code_of(kind: type) -> str:
    try:
        return _code(Path(inspect.getfile(kind)).read_text(encoding="utf-8"))
    except (OSError, TypeError):  # typed into an interpreter
        return ""


def _code(source: str) -> str:
    """SHA-256 of what a file does, the same under every Python: comments, docstrings and white space left out."""
    lines = source.splitlines(keepends=True)
    starts = [0, *accumulate(map(len, lines))]
    spans = [
        (starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1])
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            text = node.body[0]
            assert text.end_lineno is not None and text.end_col_offset is not None
            ends = ((text.lineno, text.col_offset), (text.end_lineno, text.end_col_offset))
            # columns of syntax trees count bytes
            first, last = (starts[line - 1] + len(lines[line - 1].encode()[:column].decode()) for line, column in ends)
            spans.append((first, last))
    kept, place = [], 0
    for first, last in sorted(spans):
        kept.append(source[place:first])
        place = max(place, last)
    code = "".join("".join([*kept, source[place:]]).split())
    return hashlib.sha256(code.encode()).hexdigest()
