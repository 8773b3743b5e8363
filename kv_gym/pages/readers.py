"""Read request traces: serving logs, key lists, cache traces of several projects, and access logs of NGINX."""

from __future__ import annotations

import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

import numpy as np

from kv_gym.errors import UserError, short_reason
from kv_gym.files import parse_json
from kv_gym.pages.requests import RequestTrace

MOST_ACCESSES = 200_000_000
LONGEST_LINE = 1 << 20  # bytes

Lines = Iterator[tuple[int, str]]


def read_requests(path: str | Path, format: str = "auto") -> RequestTrace:
    """A request trace from a file, also compressed with gzip or xz.

    Args:
        path: the file.
        format: one of :data:`FORMATS`, or ``auto``: by the file's name and first lines.

            ``mooncake``: JSON lines with ``timestamp`` (milliseconds) and ``hash_ids``, the blocks of a prompt;
            ``keys``: a key on each line; empty lines and lone ``*`` are left out;
            ``times``: ``time id size`` on each line, in seconds and bytes;
            ``csv``: libCacheSim's, with a header that names time, id and size columns;
            ``nginx``: access log in the combined format, followed by ``"$upstream_cache_status" "$cache_key"
            "$upstream_response_time" "$cache_ttl"``; requests that never asked the cache (``-``, ``BYPASS``) are left
            out;
            ``cache2k``: 32-bit big-endian keys.

    Raises:
        UserError: no such file or format, or a line that is not of the format; the message names the line.
    """
    path = Path(path)
    if format not in ("auto", *FORMATS):
        raise UserError(f"request format {format!r} is not known; expected auto or one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise UserError(f"there is no file {path}; expected a trace of requests")
    try:
        kind = _detect(path) if format == "auto" else format
        return FORMATS[kind](path)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {short_reason(error)}") from None


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    with path.open("rb") as file:
        magic = file.read(6)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(path)  # type: ignore[return-value]
    if magic == b"\xfd7zXZ\x00":
        return lzma.open(path)
    return path.open("rb")


def _lines(path: Path) -> Lines:
    """Numbers and texts of the lines that are not empty."""
    with _open(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}, line {number}: longer than {LONGEST_LINE} bytes; expected a line of a log")
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError:
                raise UserError(f"{path}, line {number}: no UTF-8 text; expected a line of a log") from None
            if text:
                yield number, text


def _detect(path: Path) -> str:
    with _open(path) as file:
        head = file.read(4096)
    if not head:
        raise UserError(f"{path} is empty; expected a trace of requests")
    if b"\x00" in head[:64]:
        return "cache2k"
    first = next((line for line in io.StringIO(head.decode("utf-8", "replace")) if line.strip()), "").strip()
    if first.startswith("{"):
        return "mooncake"
    if _NGINX.match(first) or ' "' in first:
        return "nginx"
    if "," in first:
        return "csv"
    return "times" if len(first.split()) == 3 else "keys"


def _wrong(path: Path, number: int, text: str, expected: str) -> UserError:
    shown = text if len(text) <= 60 else text[:57] + "..."
    return UserError(f"{path}, line {number}: {shown!r}; expected {expected}")


def _mooncake(path: Path) -> RequestTrace:
    keys: list[int] = []
    starts, times, lines = [], [], []
    for number, text in _lines(path):
        try:
            entry = parse_json(text, str(path))
            blocks, stamp = entry["hash_ids"], entry.get("timestamp")
            valid = isinstance(blocks, list) and all(type(block) is int for block in blocks)
            valid = valid and (stamp is None or type(stamp) in (int, float))
        except (ValueError, KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise _wrong(path, number, text, "a JSON object with hash_ids, a list of block numbers, and timestamp")
        if blocks:
            starts.append(len(keys))
            keys += blocks
            times += [(stamp or 0) / 1000] * len(blocks)
            lines += [number] * len(blocks)
    return _made(path, keys, starts=starts, times=times, lines=lines)


def _keys(path: Path) -> RequestTrace:
    keys, lines = [], []
    for number, text in _lines(path):
        if text == "*":
            continue
        if len(text.split()) != 1:
            raise _wrong(path, number, text, "one key on each line")
        keys.append(text)
        lines.append(number)
    return _made(path, keys, lines=lines)


def _times(path: Path) -> RequestTrace:
    keys, times, sizes, lines = [], [], [], []
    for number, text in _lines(path):
        parts = text.split()
        try:
            time, key, size = float(parts[0]), parts[1], int(parts[2])
            valid = len(parts) == 3 and np.isfinite(time)
        except (ValueError, IndexError):
            valid = False
        if not valid:
            raise _wrong(path, number, text, "`time id size`: seconds, a key, and bytes")
        keys.append(key)
        times.append(time)
        sizes.append(size)
        lines.append(number)
    return _made(path, keys, times=times, sizes=sizes, lines=lines)


_COLUMNS = {
    "time": {"time", "timestamp", "clock_time"},
    "key": {"id", "key", "obj_id", "object", "objid"},
    "size": {"size", "obj_size", "bytes"},
    "ttl": {"ttl"},
}


def _csv(path: Path) -> RequestTrace:
    keys, lines = [], []
    numbers: dict[str, list[float]] = {"time": [], "size": [], "ttl": []}
    places: dict[str, int] = {}
    for number, text in _lines(path):
        parts = [part.strip() for part in text.split(",")]
        if not places:
            names = [part.lower().lstrip("#").strip() for part in parts]
            places = {what: names.index(name) for what, known in _COLUMNS.items() for name in known if name in names}
            if "key" not in places:
                raise _wrong(path, number, text, "a header that names the column of keys: id, key or obj_id")
            continue
        try:
            keys.append(parts[places["key"]])
            for what in places.keys() - {"key"}:
                value = float(parts[places[what]])
                if not np.isfinite(value):
                    raise ValueError
                numbers[what].append(value)
        except (ValueError, IndexError):
            raise _wrong(path, number, text, "the columns of the header, numbers in those of time and size") from None
        lines.append(number)
    sizes = [int(size) for size in numbers["size"]] or None
    return _made(path, keys, times=numbers["time"] or None, sizes=sizes, ttl=numbers["ttl"] or None, lines=lines)


_NGINX = re.compile(
    r'\S+ \S+ \S+ \[(?P<time>[^\]]+)\] "(?P<request>(?:[^"\\]|\\.)*)" \d{3} (?P<bytes>\d+|-) '
    r'"(?:[^"\\]|\\.)*" "(?:[^"\\]|\\.)*"'
    r'(?: "(?P<status>[A-Z-]*)" "(?P<key>(?:[^"\\]|\\.)*)" "(?P<took>[^"]*)" "(?P<ttl>[^"]*)")?\s*$'
)


def _nginx(path: Path) -> RequestTrace:
    keys, times, sizes, ttl, lines = [], [], [], [], []
    for number, text in _lines(path):
        found = _NGINX.match(text)
        try:
            if found is None:
                raise ValueError
            when = datetime.strptime(found["time"], "%d/%b/%Y:%H:%M:%S %z").timestamp()
            left = found["ttl"]
            seconds = float(left) if left not in (None, "", "-") else float("inf")
            key = found["key"] or found["request"].split()[1]
            size = 0 if found["bytes"] == "-" else int(found["bytes"])
        except (ValueError, IndexError):
            raise _wrong(path, number, text, "a line of NGINX's combined log, with its cache fields") from None
        if found["status"] in ("-", "BYPASS"):
            continue
        keys.append(key)
        times.append(when)
        sizes.append(size)
        ttl.append(seconds)
        lines.append(number)
    expiring = ttl if any(seconds != float("inf") for seconds in ttl) else None
    return _made(path, keys, times=times, sizes=sizes, ttl=expiring, lines=lines)


def _cache2k(path: Path) -> RequestTrace:
    with _open(path) as file:
        data = file.read(4 * MOST_ACCESSES + 1)
    if len(data) % 4:
        raise UserError(f"{path} holds {len(data)} bytes; expected 32-bit keys, four bytes each")
    return _made(path, np.frombuffer(data, ">u4").tolist())


def _made(path: Path, keys: list, **rest) -> RequestTrace:
    if not keys:
        raise UserError(f"{path} holds no request; expected at least one line")
    name = path.name
    for ending in (".gz", ".xz", ".jsonl", ".trace", ".csv", ".log", ".txt"):
        name = name.removesuffix(ending)
    return RequestTrace.from_keys(keys, name, **rest)


FORMATS: dict[str, Callable[[Path], RequestTrace]] = {
    "mooncake": _mooncake,
    "keys": _keys,
    "times": _times,
    "csv": _csv,
    "nginx": _nginx,
    "cache2k": _cache2k,
}
"""Readers by the name of what they read."""
