"""Files: read with limits and clear refusals, written whole or not at all; and where bundled data lies.

Everything that comes from outside the package (JSON, JSON lines, YAML) is read here. The readers refuse what plain
data never needs and what hurts a program that trusts it: text that is not UTF-8, nesting beyond 64 levels, numbers of
more than 100 characters, NaN and infinity, lone surrogates, control characters in keys, duplicate keys, YAML aliases,
anchors and tags, and files above a size limit. A refusal is one :class:`~kv_gym.errors.UserError` that names the file
and the line and never repeats the data.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, get_args

from kv_gym.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

_PACKAGE = Path(__file__).parent

MODEL = _PACKAGE / "reference" / "model"
"""Folder of the reference model and its tokenizer, as transformers loads them."""

_IN_REPOSITORY = {
    "agents": "agents",
    "page_agents": "agents/pages",
    "requests": "traces/requests",
    "traces": "traces/sample",
}

LARGEST_JSON = 2**28
"""Bytes of a JSON document, and of one line of JSON lines, at most."""
LARGEST_YAML = 2**18
"""Bytes of a YAML document at most."""
LARGEST_TEXT = 2**30
"""Bytes of a plain text at most."""
DEEPEST = 64
"""Levels of nested lists and objects at most."""
LONGEST_NUMBER = 100
"""Characters of a number at most."""

ADDRESS = re.compile(r"([A-Za-z][\w+-]+):/{1,3}(.*)", re.ASCII)  # pathlib makes one slash of two
"""What a name is when it is no path but an address of fsspec, such as ``s3://bucket/folder``."""

_JSON_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[\[\]{}]|[^\s,:\[\]{}"]+')
_CHUNK = 2**24  # bytes
SURROGATE = re.compile(r"[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

_Class = TypeVar("_Class", bound=type)
_Model = TypeVar("_Model", bound="BaseModel")


class _RefusedDataError(ValueError):
    """A JSON text holds something that is refused; :func:`_first_refusal` says what and where."""


def read_text(path: str | Path, expected: str = "expected a UTF-8 text", largest: int = LARGEST_TEXT) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Args:
        path: the file.
        expected: what the file should be, to end the error's sentence.
        largest: limit in bytes.

    Raises:
        UserError: the file cannot be opened, is too large or is not UTF-8.
    """
    return _decoded(read_bytes(path, expected, largest), str(path), 1, expected)


def read_bytes(path: str | Path, expected: str, largest: int = LARGEST_TEXT) -> bytes:
    """The bytes of a file; arguments and errors of :func:`read_text`."""
    data = bytearray()
    with open_file(path, expected) as file:
        while chunk := file.read(min(largest + 1 - len(data), _CHUNK)):  # `read` allocates what it is asked for
            data += chunk
            if len(data) > largest:
                raise UserError(f"{path} is larger than {largest} bytes; {expected}")
    return bytes(data)


def exists(name: str | Path) -> bool:
    """Whether a name is that of a file or folder; one that none can have, such as a long list of tasks, is not."""
    try:
        return Path(name).exists()
    except OSError:  # longer than the system allows
        return False


@contextmanager
def open_file(path: str | Path, expected: str) -> Iterator[BinaryIO]:
    """A file that is read in binary; arguments as for :func:`read_text`.

    Raises:
        UserError: it cannot be opened, or read within the block; or it is a device or a named pipe, which may have no
            end or never begin.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a null character, or half of a surrogate pair
        raise UserError(f"{path} is no name of a file; {expected}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {expected}") from None
    try:
        if stat.S_ISFIFO(mode) and not str(path).startswith("/dev/"):  # there a shell puts its own
            raise UserError(f"{path} is a named pipe and no file; {expected}")
        with open(path, "rb") as file:
            if stat.S_ISCHR(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path} is a device and no file; {expected}")
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {expected}") from None


def read_json(
    path: str | Path,
    expected: str = "expected a JSON document",
    *,
    largest: int = LARGEST_JSON,
    non_finite_as_null: bool = False,
) -> Any:
    """The content of a JSON file: dicts, lists, texts, numbers, booleans and None.

    Args:
        path: the file.
        expected: what the file should hold, to end the error's sentence.
        largest: limit in bytes.
        non_finite_as_null: read NaN and infinity, which Python's own writer emits, as None instead of refusing them.

    Raises:
        UserError: the file cannot be read, is no JSON, or holds what the module's readers refuse.
    """
    text = read_text(path, expected, largest)
    return parse_json(text, str(path), expected, non_finite_as_null=non_finite_as_null)


def parse_json(
    text: str,
    where: str,
    expected: str = "expected a JSON document",
    *,
    line: int = 1,
    non_finite_as_null: bool = False,
) -> Any:
    """The content of a JSON text; see :func:`read_json`.

    Args:
        text: the JSON.
        where: the file, or the place in it, that the text was taken from.
        expected: what the text should hold, to end the error's sentence.
        line: number of the text's first line in the file.
        non_finite_as_null: as in :func:`read_json`.

    Raises:
        UserError: no JSON, or what the module's readers refuse.
    """

    def number(literal: str, kind: type = float) -> Any:
        value = None if len(literal) > LONGEST_NUMBER else kind(literal)
        if value is None or not (non_finite_as_null or math.isfinite(value)):
            raise _RefusedDataError
        return value if math.isfinite(value) else None

    try:
        data = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=lambda literal: number(literal, int),
            parse_float=number,
            parse_constant=number,
        )
        if isinstance(data, dict | list) and _is_deep(data):
            raise _RefusedDataError
        if "\\ud" in text or "\\uD" in text:
            json.dumps(data, ensure_ascii=False).encode()
        return data
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {line + error.lineno - 1}: no JSON ({error.msg}); {expected}") from None
    except (_RefusedDataError, RecursionError, UnicodeEncodeError):
        reason, start = _first_refusal(text, non_finite_as_null)
    raise UserError(f"{where}, line {line + text.count(chr(10), 0, start)}: {reason}; {expected}")


def read_json_lines(
    path: str | Path,
    expected: str = "expected one JSON document a line",
    *,
    partial_last_line: bool = False,
    non_finite_as_null: bool = False,
) -> Iterator[tuple[int, Any]]:
    """The documents of a file of JSON lines, read as they are asked for; empty lines are skipped.

    Args:
        path: a file in UTF-8, with or without a byte order mark.
        expected: what a line should hold, to end the error's sentence.
        partial_last_line: leave out a last line without its line end that is no JSON: it is being written, or its
            writer was interrupted.
        non_finite_as_null: as in :func:`read_json`.

    Yields:
        Number of the line, from 1, and its content.

    Raises:
        UserError: the file cannot be read, or a line is no JSON or holds what the module's readers refuse.
    """
    with open_file(path, expected) as file:
        number = 0
        while line := file.readline(LARGEST_JSON + 1):
            number += 1
            if len(line) > LARGEST_JSON:
                raise UserError(f"{path}, line {number}: longer than {LARGEST_JSON} bytes; {expected}")
            try:
                text = _decoded(line, str(path), number, expected)
                if text.strip():
                    data = parse_json(text, str(path), expected, line=number, non_finite_as_null=non_finite_as_null)
                    yield number, data
            except UserError:
                if partial_last_line and not line.endswith(b"\n"):
                    return
                raise


def read_yaml(path: str | Path, expected: str = "expected a YAML document", largest: int = LARGEST_YAML) -> Any:
    """The content of a YAML file: plain data as from :func:`read_json`, and dates; None for an empty file.

    Args:
        path: the file.
        expected: what the file should hold, to end the error's sentence.
        largest: limit in bytes.

    Raises:
        UserError: the file cannot be read, is no YAML, or holds what the module's readers refuse.
    """
    return parse_yaml(read_text(path, expected, largest), str(path), expected)


def parse_yaml(text: str, where: str, expected: str = "expected a YAML document") -> Any:
    """The content of a YAML text; see :func:`read_yaml`.

    Args:
        text: the YAML.
        where: the file, or the place in it, that the text was taken from.
        expected: what the text should hold, to end the error's sentence.

    Raises:
        UserError: no YAML, or what the module's readers refuse.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain scalars, lists and mappings only; a refusal knows its line."""

        depth = 0

        def compose_node(self, parent, index):
            event = self.peek_event()
            if event.anchor is not None:
                refuse("aliases and anchors are not read: write the value out", event)
            if event.tag is not None:
                refuse("tags are not read: write a plain value", event)
            levels = not isinstance(event, yaml.ScalarEvent)
            self.depth += levels
            if self.depth > DEEPEST:
                refuse(f"nested deeper than {DEEPEST} levels", event)
            node = super().compose_node(parent, index)
            self.depth -= levels
            return node

        def construct_mapping(self, node, deep=False):
            names = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    refuse("a key is a list or a mapping, not a text", key)
                if _CONTROL.search(key.value):
                    refuse("a key holds control characters", key)
                if key.value in names:
                    refuse(f"key {reprlib.repr(key.value)} stands twice", key)
                names.add(key.value)
            return super().construct_mapping(node, deep=deep)

        def construct_object(self, node, deep=False):
            kind = node.tag.rpartition(":")[2]
            if kind in ("int", "float") and len(node.value) > LONGEST_NUMBER:
                refuse(f"a number of {len(node.value)} characters", node)
            value = super().construct_object(node, deep=deep)
            if isinstance(value, float) and not math.isfinite(value):
                refuse("a number is not finite", node)
            if isinstance(value, str) and SURROGATE.search(value):
                refuse("a text holds half of a surrogate pair", node)
            return value

    def refuse(reason: str, node: Any) -> None:
        raise UserError(f"{where}, line {node.start_mark.line + 1}: {reason}; {expected}")

    try:
        return Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{where}, line {mark.line + 1}" if mark else where
        raise UserError(f"{at}: no YAML ({error.problem or error.context}); {expected}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: no YAML ({str(error).splitlines()[0]}); {expected}") from None
    except RecursionError:
        raise UserError(f"{where}: nested deeper than {DEEPEST} levels; {expected}") from None
    except UserError:
        raise
    except (ValueError, OverflowError) as error:  # such as the 45th of a month
        raise UserError(f"{where}: no YAML ({error}); {expected}") from None


def validated(model: type[_Model], data: Any, where: str) -> _Model:
    """Plain data from outside as an object of a pydantic model.

    Args:
        model: a subclass of pydantic's BaseModel.
        data: as JSON or YAML gave it.
        where: file and line, for the error.

    Raises:
        UserError: the data does not fit; one sentence about the first field that does not.
    """
    from pydantic import ValidationError

    if not isinstance(data, Mapping):
        raise UserError(f"{where} holds {type(data).__name__}; expected keys {', '.join(model.model_fields)}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(_sentence(model, error.errors()[0], where)) from None


def is_of_type(value: Any, hint: Any) -> bool:
    """Whether a setting is of the type that it is annotated with; no number is NaN or infinite."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False, strict=True)
    try:
        TypeAdapter(hint, config=config).validate_python(value)
    except ValidationError:
        return False
    return True


def only_class(found: Sequence[_Class], module: str) -> _Class:
    """The class that a file of a registry defines.

    Raises:
        UserError: none, or several.
    """
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise UserError(f"module {module} defines {names}; expected one such class in a file")
    return found[0]


def _sentence(model: type[BaseModel], error: Mapping[str, Any], where: str) -> str:
    *path, name = error["loc"] or ("",)
    for step in path:
        known = _model_within(model.model_fields[step].annotation) if step in model.model_fields else None
        model = known or model
    place = f"{where}, {' '.join(str(step)[:60] for step in path)}" if path else where
    kind, name, given = error["type"], str(name)[:60], reprlib.repr(error["input"])
    if kind == "missing":
        return f"{place} has no {name}; expected keys {', '.join(model.model_fields)}"
    if kind == "extra_forbidden":
        return f"{place} has unknown key {name!r}; known: {', '.join(model.model_fields)}"
    if kind == "value_error":
        reason = error["ctx"]["error"]
        return f"{place}: {reason}" if isinstance(reason, UserError) else f"{place}: {name} is {given}; {reason}"
    kinds = {
        "string": "a text", "bool": "true or false", "dict": "keys and values", "model": "keys and values",
        "int": "a whole number", "float": "a number", "list": "a list", "tuple": "a list",
    }  # fmt: skip
    expected = kinds.get(kind.partition("_")[0], error["msg"].removeprefix("Input should be "))
    return f"{place}: {name} is {given}; expected {expected}"


def _model_within(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in an annotation such as ``tuple[Model, ...]``."""
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_within, get_args(annotation))), None)


def _decoded(data: bytes, where: str, line: int, expected: str) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        at = line + data.count(b"\n", 0, error.start)
        raise UserError(f"{where}, line {at}: not UTF-8 text; {expected}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs) or any(map(_CONTROL.search, content)):
        raise _RefusedDataError
    return content


def _is_deep(data: Any) -> bool:
    level = [data]
    for _ in range(DEEPEST):
        nested = (value.values() if isinstance(value, dict) else value for value in level)
        level = [inner for values in nested for inner in values if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _first_refusal(text: str, non_finite_as_null: bool) -> tuple[str, int]:
    """What is refused first in a JSON text, and at which character it stands."""
    keys: list[set[str]] = []  # of each list and object that is open
    for match in _JSON_TOKEN.finditer(text):
        try:
            reason = _refusal(match, keys, non_finite_as_null)
        except (ValueError, LookupError):
            reason = "no JSON"
        if reason:
            return reason, match.start()
    return "no JSON", 0


def _refusal(match: re.Match, keys: list[set[str]], non_finite_as_null: bool) -> str:
    token, string, colon = match[0], match[1], match[2]
    if token in "[{":
        keys.append(set())
        return f"nested deeper than {DEEPEST} levels" if len(keys) > DEEPEST else ""
    if token in "]}":
        keys.pop()
    elif string:
        content = json.loads(string)
        if SURROGATE.search(content):
            return "a text holds half of a surrogate pair"
        if colon and _CONTROL.search(content):
            return "a key holds control characters"
        if colon and content in keys[-1]:
            return f"key {reprlib.repr(content)} stands twice"
        if colon:
            keys[-1].add(content)
    elif token not in ("true", "false", "null"):
        if len(token) > LONGEST_NUMBER:
            return f"a number of {len(token)} characters"
        if not (non_finite_as_null or math.isfinite(float(token))):
            return f"the number {token} is not finite"
    return ""


def refuse_address(path: str | Path) -> None:
    """Raise a UserError for an address to write to; as a path, ``s3://bucket`` would become a folder named ``s3:``."""
    if ADDRESS.fullmatch(str(path)) and not exists(path):
        address = str(path) if "://" in str(path) else str(path).replace(":/", "://", 1)
        raise UserError(
            f"{address} is an address; expected a path of this machine: write there and copy it to the address (only "
            "`kv-gym record` and `kv-gym leaderboard` write to addresses)"
        )


def make_folder(folder: str | Path, mode: int = 0o777) -> Path:
    """Make a folder to write to and those above it; one that is there stays as it is.

    Raises:
        UserError: an address, or a folder that cannot be made.
    """
    refuse_address(f"{folder}/")  # the slash, because the folder of s3:/file.json is `s3:`
    folder = Path(folder)
    try:
        folder.mkdir(mode, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {folder} ({error.strerror}); name another one") from None
    return folder


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when the block ends well; an earlier file stays until then.

    The file and its folder are flushed to the disk, so that what bears the name is whole after a power failure too.

    Raises:
        OSError: `path` cannot be written to; the error names it, and comes before the block begins.
        UserError: `path` is an address.
    """
    refuse_address(path)
    path = Path(path)
    part = path.with_name(path.name + ".tmp")
    try:
        part.touch()  # not all who write here raise OSError where a folder is read-only: safetensors does not
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    except ValueError:  # a null character, or half of a surrogate pair
        raise OSError(errno.EINVAL, "no name of a file", str(path)) from None
    try:
        yield part
        flush_to_disk(part)
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # a write that fails names no file, and a failed open the temporary one
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(part)):
            raise type(error)(error.errno, error.strerror, str(path)) from None
        raise
    if os.name != "nt":  # the rename itself must reach the disk; Windows opens no folders
        flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def bundled(name: str) -> Path:
    """The folder of bundled data.

    Args:
        name: `"traces"`, the small recorded sample that environments replay by default, `"requests"`, that of page
            requests, or `"agents"` or `"page_agents"`, the training settings `<agent>.yml`.

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
