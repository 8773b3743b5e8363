"""Damaged and hostile versions of a file, for `hardening.py`: by its bytes, by its structure, or in its place."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml

Mutation = Callable[[Path, random.Random], None]

PLACE = "@@here@@"
"""Stands in a document for the text that replaces a value."""

# texts of JSON values that readers may not expect; those that are no JSON are among them
HOSTILE_JSON = (
    "null", "true", "0", "-1", "1e999", "-1e999", "NaN", "Infinity", "1" * 5000, "1e99999999", "9223372036854775808",
    "-9223372036854775809", "0.1", "1.5e-320", '""', '" "', '"\\ud83d"', '"\\u0000"', '"\\u001b[31m"', '"a\\nb"',
    '"../../etc/passwd"', '"/dev/zero"', '"' + "x" * 100_000 + '"', "[]", "{}", "[[]]", "[null]", '["a", 1, null]',
    "[" * 100 + "]" * 100, "[" * 100_000 + "]" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "[" * 2000,
    '{"a": 1, "a": 2}', "01", "'a'", "undefined", "1_000", "0x10", '"\\x41"', "// comment", "[1,]", '"\\ud83d\\ude00"',
)  # fmt: skip
HOSTILE_YAML = (
    "*missing", "&a [*a]", "!!python/object/apply:os.system ['true']", "!!binary aaaa", "2026-99-99", "2026-01-01",
    ".inf", "-.inf", ".nan", "0o17", "0x1F", "1_000_000", "190:20:30", "~", "yes", "no", "'", '"\\ud83d"', '"\\x00"',
    "? [a]\n: b", "<<: {a: 1}", "{<<: *a}", "|\n  text", "[a, b", "{a: b", "\t- a", "%YAML 9.9", "1" * 5000, "1e999",
    "[" * 1000, "[" * 70 + "]" * 70, "@at", "`tick`", "!!set {a, b}", "!!timestamp nonsense", "a: b: c",
)  # fmt: skip
LENGTHS = (0, 1, 2**7, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


# by bytes


def flip_a_bit(file: Path, draw: random.Random) -> None:
    """One bit of the file."""
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def flip_bits(file: Path, draw: random.Random) -> None:
    """Two to 64 bits."""
    data = bytearray(file.read_bytes())
    for _ in range(draw.randint(2, 64)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def cut_short(file: Path, draw: random.Random) -> None:
    """The end is missing, sometimes everything."""
    data = file.read_bytes()
    file.write_bytes(data[: draw.choice((0, 1, draw.randrange(len(data)), len(data) - 1))])


def lengthen(file: Path, draw: random.Random) -> None:
    """Random bytes, zeros or the file itself behind it."""
    data = file.read_bytes()
    file.write_bytes(data + draw.choice((draw.randbytes(draw.randint(1, 999)), bytes(4096), data)))


def lose_a_piece(file: Path, draw: random.Random) -> None:
    """Bytes in the middle are missing or stand twice."""
    data = file.read_bytes()
    start = draw.randrange(len(data))
    stop = min(len(data), start + draw.randint(1, 200))
    file.write_bytes(data[:start] + draw.choice((b"", data[start:stop] * 2)) + data[stop:])


def blank_a_piece(file: Path, draw: random.Random) -> None:
    """A piece is zeros, ones or random, as after a torn write."""
    data = bytearray(file.read_bytes())
    size = draw.choice((1, 8, 64, 512, 4096))
    start = draw.randrange(len(data))
    piece = data[start : start + size]
    piece[:] = draw.choice((bytes(len(piece)), b"\xff" * len(piece), draw.randbytes(len(piece))))
    data[start : start + size] = piece
    file.write_bytes(data)


def overwrite_a_number(file: Path, draw: random.Random) -> None:
    """A number of 2, 4 or 8 bytes, such as a length, is another."""
    data = bytearray(file.read_bytes())
    size = draw.choice((2, 4, 8))
    number = draw.choice(LENGTHS) % 2 ** (8 * size)
    start = draw.randrange(max(1, len(data) - size)) // draw.choice((1, size)) * 1
    data[start : start + size] = number.to_bytes(size, draw.choice(("little", "big")))
    file.write_bytes(data)


BYTES = (flip_a_bit, flip_bits, cut_short, lengthen, lose_a_piece, blank_a_piece, overwrite_a_number)


# in its place


def link_to_itself(file: Path, draw: random.Random) -> None:
    """A symbolic link that leads nowhere."""
    file.unlink()
    file.symlink_to(draw.choice((file.name, "missing", "../" * 40 + "missing")))


def device(file: Path, draw: random.Random) -> None:
    """A link to a device that gives bytes without end, or none."""
    file.unlink()
    file.symlink_to(draw.choice(("/dev/zero", "/dev/null", "/dev/full", "/dev/urandom")))


def folder(file: Path, draw: random.Random) -> None:
    """A folder of the file's name."""
    file.unlink()
    file.mkdir()


def missing(file: Path, draw: random.Random) -> None:
    """No file."""
    file.unlink()


def another_file(file: Path, draw: random.Random) -> None:
    """A link to a file of another kind."""
    file.unlink()
    file.symlink_to(draw.choice(("/etc/passwd", "/proc/self/status", "/proc/self/environ", __file__, "/proc/self/mem")))


PLACES = (link_to_itself, device, folder, missing, another_file)


# of text


def other_encoding(file: Path, draw: random.Random) -> None:
    """UTF-16, UTF-32, a byte order mark, Latin-1, other line ends."""
    text = file.read_text()
    encoded = (
        text.encode("utf-16"), text.encode("utf-32"), text.encode("utf-8-sig"), "é".encode("latin-1") + text.encode(),
        text.replace("\n", "\r\n").encode(), text.replace("\n", "\r").encode(), text.replace(" ", "\u2028").encode(),
        text.encode("utf-7"), b"\xef\xbb\xbf" * 2 + text.encode(),
    )  # fmt: skip
    file.write_bytes(draw.choice(encoded))


def hostile_characters(file: Path, draw: random.Random) -> None:
    """Bytes that are no text, or no visible one, somewhere in it."""
    data = file.read_bytes()
    at = draw.randrange(len(data))
    strange = (b"\x00", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", "\u202e".encode(), b"\x1b[2J", b"\x0c", b"\x85", b"\r")
    file.write_bytes(data[:at] + draw.choice(strange) + data[at:])


def without_a_line(file: Path, draw: random.Random) -> None:
    """A line is missing, stands twice, is empty or very long."""
    lines = file.read_bytes().splitlines(keepends=True)
    at = draw.randrange(len(lines))
    lines[at] = draw.choice((b"", lines[at] * 2, b"\n", b"   \n", b"x" * 2_000_000 + b"\n", lines[at].strip() * 2))
    file.write_bytes(b"".join(lines))


def other_word(file: Path, draw: random.Random) -> None:
    """A word, or a number, is another."""
    words = file.read_text().split(" ")
    strange = (
        "-1",
        "0",
        "1e999",
        "nan",
        "inf",
        "9" * 5000,
        "",
        '"',
        "\\",
        "[",
        "99999999999999999999",
        "０",
        "x" * 9999,
    )
    words[draw.randrange(len(words))] = draw.choice(strange)
    file.write_text(" ".join(words))


TEXT = (other_encoding, hostile_characters, without_a_line, other_word)


# of JSON and YAML


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested lists and objects: what holds it, and its key."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _with_change(data: Any, draw: random.Random, hostile: tuple[str, ...], write: Callable[[Any], str]) -> str:
    """A document in which one place was changed."""
    places = list(_places(data)) if isinstance(data, dict | list) else []
    if not places:
        return draw.choice(hostile)
    holder, key = draw.choice(places)
    change = draw.choice(("value", "value", "value", "value", "key", "lost", "unknown", "twice", "whole", "number"))
    text = draw.choice(hostile)
    if change == "value":
        holder[key] = PLACE
    elif change == "lost":
        del holder[key]
    elif change == "number" and isinstance(holder[key], int | float):
        text = json.dumps(draw.choice((-holder[key], holder[key] + 1, holder[key] * 2**33, holder[key] / 3)))
        holder[key] = PLACE
    elif change == "whole":
        return text
    elif isinstance(holder, list):
        holder.insert(key, draw.choice((holder[key], PLACE)))
    elif change == "key":
        holder[draw.choice(("", "a\nb", "\x1b[31m", "__class__", "x" * 5000, "é"))] = holder.pop(key)
    elif change == "twice":
        return write(data).replace(json.dumps(key), f"{json.dumps(key)}: {text}, {json.dumps(key)}", 1)
    else:
        holder["unknown"] = PLACE
    document = write(data)
    for quoted in (f'"{PLACE}"', f"'{PLACE}'", PLACE):
        document = document.replace(quoted, text, 1)
    return document


def change_json(file: Path, draw: random.Random) -> None:
    """One place of a JSON document is something else."""
    file.write_text(_with_change(json.loads(file.read_text()), draw, HOSTILE_JSON, json.dumps))


def change_line(file: Path, draw: random.Random) -> None:
    """One place in a line of JSON lines is something else."""
    lines = file.read_text().splitlines()
    at = draw.randrange(len(lines))
    lines[at] = _with_change(json.loads(lines[at]), draw, HOSTILE_JSON, json.dumps)
    file.write_text("\n".join(lines) + draw.choice(("", "\n")))


def change_yaml(file: Path, draw: random.Random) -> None:
    """One place of a YAML document is something else; flow style, or block style."""
    flow = draw.random() < 0.5
    write = lambda data: yaml.safe_dump(data, default_flow_style=flow)  # noqa: E731
    file.write_text(_with_change(yaml.safe_load(file.read_text()), draw, HOSTILE_YAML + HOSTILE_JSON, write))


def many_aliases(file: Path, draw: random.Random) -> None:
    """YAML of a few lines that stands for billions of values."""
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    file.write_text("\n".join(lines) + "\n" + file.read_text())


# of binary formats


def safetensors_header(file: Path, draw: random.Random) -> None:
    """One place of the header is something else: names, types, shapes, offsets, or the description."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    described = header.get("__metadata__", {})
    if "kv_gym" in described and draw.random() < 0.6:
        described["kv_gym"] = _with_change(json.loads(described["kv_gym"]), draw, HOSTILE_JSON, json.dumps)
        text = json.dumps(header)
    else:
        text = _with_change(header, draw, HOSTILE_JSON, json.dumps)
    encoded = text.encode("utf-8", "surrogatepass")
    encoded += b" " * (-len(encoded) % 8)
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + size :])


def safetensors_size(file: Path, draw: random.Random) -> None:
    """Another length of the header."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    file.write_bytes(struct.pack("<Q", draw.choice((*LENGTHS, length - 1, length + 1, length + 8))) + data[8:])


def safetensors_numbers(file: Path, draw: random.Random) -> None:
    """A number of a tensor is NaN, infinite, or another."""
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    at = begin + draw.randrange(max(1, (len(data) - begin) // 4)) * 4
    data[at : at + 4] = struct.pack("<f", draw.choice((float("nan"), float("inf"), 0.0, 1e30, draw.random())))
    file.write_bytes(data)


def hdf5_structure(file: Path, draw: random.Random) -> None:
    """One member or attribute of an HDF5 file is something else, written by HDF5 with right checksums."""
    with h5py.File(file, "r+", libver=("v110", "v110")) as opened:
        groups: list[Any] = [opened]
        arrays: list[Any] = []
        opened.visititems(lambda _, member: (arrays if isinstance(member, h5py.Dataset) else groups).append(member))
        if draw.random() < 0.4:
            _change_attribute(draw.choice([*(each for each in groups + arrays if len(each.attrs))]), draw)
        else:
            _change_member(draw.choice(arrays), draw)


def _change_attribute(owner: Any, draw: random.Random) -> None:
    name = draw.choice(sorted(owner.attrs))
    values: list[Any] = [
        -1, 0, 2**62, 1.5, float("nan"), "text", "a\x1b[31m\nb", b"bytes", np.zeros(0), np.arange(3), [], "x" * 60_000,
        np.array(["a", "b"], dtype=h5py.string_dtype()), h5py.Empty("f"), np.bool_(True), np.float16(1),
        np.uint64(2**63), np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
        owner.ref, "", "é" * 100, np.void(b"opaque"), 1 + 2j,
    ]  # fmt: skip
    value = draw.choice(values)
    if draw.random() < 0.2:
        del owner.attrs[name]
    elif draw.random() < 0.2:
        owner.attrs["unknown"] = value
    else:
        owner.attrs[name] = value


def _change_member(data: h5py.Dataset, draw: random.Random) -> None:
    parent, name, array = data.parent, data.name.rpartition("/")[2], data[()]
    checksum = {"fletcher32": True, "chunks": True}

    def replace(**made: Any) -> None:
        attributes = dict(data.attrs)
        del parent[name]
        new = parent.create_dataset(name, **made)
        new.attrs.update(attributes)

    def outside(file: str) -> None:
        del parent[name]
        parent[name] = h5py.ExternalLink(file, "/")

    def soft(path: str) -> None:
        del parent[name]
        parent[name] = h5py.SoftLink(path)

    def virtual() -> None:
        layout = h5py.VirtualLayout(array.shape, array.dtype)
        layout[...] = h5py.VirtualSource("/etc/passwd", "x", array.shape)
        attributes = dict(data.attrs)
        del parent[name]
        parent.create_virtual_dataset(name, layout).attrs.update(attributes)

    def group() -> None:
        del parent[name]
        parent.create_group(name)

    def rename() -> None:
        parent.move(name, draw.choice(("x", "é", "a b", "x" * 500, "\x1b[31m")))

    def circle() -> None:
        del parent[name]
        parent[name] = parent

    wide = np.asarray(array, np.float64)
    choices: list[Callable[[], None]] = [
        group, rename, circle, virtual,
        lambda: soft(draw.choice(("/", ".", "/missing", data.name))),
        lambda: outside(draw.choice(("/etc/passwd", "x.h5"))),
        lambda: replace(data=array), lambda: replace(data=array, compression="gzip", **checksum),
        lambda: replace(data=wide, **checksum), lambda: replace(data=array.astype(np.int8), **checksum),
        lambda: replace(data=np.full(array.shape, np.nan, np.float32), **checksum) if array.size else group(),
        lambda: replace(data=np.full(array.shape, -1, array.dtype), **checksum) if array.dtype.kind != "u" else group(),
        lambda: replace(shape=(2**40,), dtype=array.dtype, chunks=(1024,), fletcher32=True),
        lambda: replace(shape=array.shape, dtype=array.dtype, fletcher32=True, chunks=array.shape or None, fillvalue=7)
        if array.size else group(),
        lambda: replace(data=np.zeros((0,), array.dtype)), lambda: replace(data=np.zeros((), array.dtype)),
        lambda: replace(data=array[..., None], **checksum) if array.size else group(),
        lambda: replace(data=array.T.copy(), **checksum) if array.ndim > 1 else group(),
        lambda: replace(data=h5py.Empty("f4")), lambda: replace(data="text"),
        lambda: parent.__setitem__("unknown", array),
    ]  # fmt: skip
    draw.choice(choices)()


_BY_KIND: dict[str, tuple[Mutation, ...]] = {
    "bytes": BYTES,
    "text": (*BYTES, *TEXT),
    "json": (*BYTES, *TEXT, *([change_json] * 12)),
    "lines": (*BYTES, *TEXT, *([change_line] * 12)),
    "yaml": (*BYTES, *TEXT, *([change_yaml] * 12), many_aliases),
    "safetensors": (*BYTES, *([safetensors_header] * 6), safetensors_size, *([safetensors_numbers] * 2)),
    "hdf5": (*BYTES, *([hdf5_structure] * 9)),
}


def mutate(file: Path, kind: str, draw: random.Random) -> str:
    """Change a file in a way that its kind of content allows; what was done, for reports."""
    mutation = draw.choice((*_BY_KIND[kind] * 2, *PLACES))
    mutation(file, draw)
    return mutation.__name__


def restore(file: Path, original: Path) -> None:
    """Undo :func:`mutate`."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    elif file.is_symlink() or file.exists():
        os.unlink(file)
    shutil.copyfile(original, file)
