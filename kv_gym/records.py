"""Records: JSON lines, rows of a Hugging Face dataset, or rows of the files that hold one.

A source is a file of JSON lines, a ``.parquet`` or ``.arrow`` file, a folder that ``Dataset.save_to_disk`` wrote, or in
Python any iterable of mappings, such as a ``datasets.Dataset``. Arrow files are read with pyarrow (extra
``datasets``); the library ``datasets`` itself is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from kv_gym.errors import UserError
from kv_gym.files import exists, read_json, read_json_lines

Source = str | Path | Iterable[Mapping[str, Any]]

_ROWS_AT_ONCE = 256
_BYTES_AT_ONCE = 1 << 26  # where a file unpacks to many times its size
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # as `save_to_disk` writes for one split and for several


def read_records(source: Source, expected: str, count: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a source; a key whose value is null is absent.

    Args:
        source: see the module; empty lines of a file are skipped.
        expected: what a record should hold, for the errors.
        count: how many to read, all by default.

    Yields:
        File and line, or row, as errors name them, and the record.

    Raises:
        UserError: a source that cannot be read, a record that is no mapping, no record at all, or a missing extra.
    """
    expected = f"expected records with {expected}"
    where = ""
    for where, data in islice(_places(source, expected), count):
        if not isinstance(data, Mapping):
            raise UserError(f"{where} is no JSON object; {expected}")
        yield where, {name: value for name, value in data.items() if value is not None}
    if not where:
        raise UserError(f"{name_of(source)} holds no record; {expected}")


def is_dataset(source: Any) -> bool:
    """Whether a source is a dataset's rows, file or folder, and not a text file."""
    if not isinstance(source, str | Path):
        return True
    path = Path(source)
    return (exists(path) and path.is_dir()) or path.suffix in (".arrow", ".parquet")


def name_of(source: Source) -> str:
    """What errors and results call a source: its path, or the type of an object."""
    return str(source) if isinstance(source, str | Path) else type(source).__name__


def _places(source: Source, expected: str) -> Iterator[tuple[str, Any]]:
    name = name_of(source)
    if not isinstance(source, str | Path):
        if isinstance(source, Mapping):
            splits = ", ".join(map(str, source))
            raise UserError(f"a {name} of {splits[:200]} was given; expected the rows of one, such as data['test']")
        for number, row in enumerate(source):
            yield f"{name}, row {number}", row
    elif is_dataset(source):
        for number, row in enumerate(_arrow_rows(Path(source), expected)):
            yield f"{name}, row {number}", row
    else:
        for number, row in read_json_lines(source, expected):
            yield f"{name}, line {number}", row


def _arrow_rows(path: Path, expected: str) -> Iterator[dict[str, Any]]:
    files = _saved_files(path) if path.is_dir() else [path]
    pyarrow = _pyarrow(path)
    for file in files:
        try:
            for batch in _batches(pyarrow, file):
                # in Python, every row has its own copy of a value that a dictionary holds once
                shared = any(pyarrow.types.is_dictionary(kind) for kind in batch.schema.types)
                step = 1 if shared else max(batch.num_rows, 1)
                for first in range(0, batch.num_rows, step):
                    yield from batch.slice(first, step).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{file} cannot be read ({reason[:200]}); {expected}") from None


def _saved_files(folder: Path) -> list[Path]:
    if (folder / _SAVED_SPLITS).is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{_SAVED}"))
        raise UserError(f"{folder} holds the splits {', '.join(splits)}; name one, such as {folder / splits[0]}"
                        if splits else f"{folder} holds no split")  # fmt: skip
    wanted = "expected a folder that Dataset.save_to_disk wrote"
    if not (folder / _SAVED).is_file():
        raise UserError(f"{folder} is a folder without {_SAVED}; {wanted}")
    state = read_json(folder / _SAVED, wanted)
    listed = state.get("_data_files") if isinstance(state, dict) else None
    names: list[Any] = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed or ()]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{folder / _SAVED} names no files of its folder; {wanted}")
    return [folder / name for name in names]


def _batches(pyarrow: ModuleType, file: Path) -> Iterator[Any]:
    if file.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file) as reader:
            inflated = 20 * file.stat().st_size
            for group in range(reader.num_row_groups):
                # A long value that is stored once may stand in every row, and no value is longer than its group.
                size, rows = reader.metadata.row_group(group).total_byte_size, _ROWS_AT_ONCE
                if size > inflated:
                    rows = max(1, min(rows, _BYTES_AT_ONCE // size))
                yield from reader.iter_batches(rows, [group])
        return
    with pyarrow.memory_map(str(file)) as stream:  # a stream, as `datasets` writes it, or a file with an index
        try:
            reader = pyarrow.ipc.open_stream(stream)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(stream)
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)
            return
        yield from reader


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise UserError(f"reading {path} needs the extra datasets: pip install 'kv-gym[datasets]'") from None
    return pyarrow
