"""The folder of a leaderboard, and rows for keeping in a repository.

    <out>/rows.jsonl            one row per cell of the specification: the results, from which all else is made
    <out>/state/other.jsonl     {"cell", "row"}: rows of validation contexts and of earlier specifications
    <out>/state/batches/        one file per measured batch, until all its cells are rows

Every file is whole or not there; what a batch gave is written at once, so that an interruption loses at most the
batches under way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from kv_gym.errors import UserError
from kv_gym.evaluation.leaderboard.identity import digest
from kv_gym.evaluation.outcomes import from_json, measured_fields
from kv_gym.evaluation.rows import read_rows, write_rows
from kv_gym.evaluation.summary import NULLS
from kv_gym.files import read_json_lines
from kv_gym.remote import local_path, remote_folder

ROWS, STATE, BATCHES = "rows.jsonl", "state", "state/batches"
_FILES = (ROWS, f"{STATE}/*.jsonl")
ONCE = ("command", "versions", "tasks_hash", "model_hash")  # stand in the first row of each task, and where they change
_SETTING = ("allocation", "evicted", "select", "episodes", "sinks", "recent", "window")


class ResultFolder:
    """What a folder holds.

    Args:
        folder: made where it is not there; or an address such as ``s3://bucket/folder``, whose files have a copy here.

    Attributes:
        folder: of this machine.
        rows: every finished cell, by its id.
        current: ids of those that the last specification asked for, in its order.
        batches: what batches gave, by cell and number of the batch.

    Raises:
        UserError: a folder that cannot be made, or a file that is none of ours.
    """

    def __init__(self, folder: str | Path):
        self._remote = remote_folder(folder)
        self.folder = local_path(folder) if self._remote is None else self._remote.fetch(_FILES)
        self._other, self._batches = self.folder / STATE / "other.jsonl", self.folder / BATCHES
        try:
            self._batches.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make folder {folder} ({error.strerror}); name another one") from None
        self.rows = {row["cell"]: row for row in read_rows(self.folder / ROWS)}
        self.current = list(self.rows)
        self.rows |= {line["cell"]: line["row"] for line in _lines(self._other)}
        self.batches: dict[str, dict[int, dict]] = defaultdict(dict)
        for file in sorted(self._batches.glob("*.jsonl")):
            self.add_batch(file)

    def write_batch(self, number: int, lines: Sequence[dict]) -> None:
        """Keep what a batch gave, see :func:`write_batch`."""
        file = write_batch(self.folder, number, lines)
        self._put(file)
        self.add_batch(file)

    def add_batch(self, file: Path) -> None:
        """Read what a batch gave.

        Raises:
            UserError: the file is not as :func:`write_batch` left it.
        """
        for line in _batch_lines(file):
            self.batches[line["cell"]][line["batch"]] = line

    def save(self) -> None:
        """Write the rows: the current ones as results, the others apart."""
        shown = dict.fromkeys(cell for cell in self.current if cell in self.rows)
        write_rows(self.folder / ROWS, (self.rows[cell] for cell in shown))
        write_rows(self._other, ({"cell": cell, "row": row} for cell, row in self.rows.items() if cell not in shown))
        self._put(self.folder / ROWS)
        self._put(self._other)

    def remove_finished_batches(self) -> None:
        """Remove the files of batches all of whose cells are rows."""
        for file in self._batches.glob("*.jsonl"):
            if all(line["cell"] in self.rows for line in _batch_lines(file)):
                file.unlink()
                if self._remote is not None:
                    self._remote.remove(self._name(file))

    def _put(self, file: Path) -> None:
        if self._remote is not None:
            self._remote.put(file, self._name(file))

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def measured(self, cell: str, batches: int) -> dict[str, Any] | None:
        """The measured fields of a cell's row; None where batches are missing and none of them refused it."""
        lines = [self.batches[cell][number] for number in sorted(self.batches[cell])]
        refused = next((line["refused"] for line in lines if line.get("refused")), None)
        if refused is not None:
            return {"refused": refused}
        if len(lines) < batches:
            return None
        outcomes: Any = [from_json(outcome) for line in lines for outcome in line["outcomes"]]
        return {"policy_bytes": lines[0]["policy_bytes"]} | measured_fields(outcomes)


def write_batch(folder: Path, number: int, lines: Sequence[dict]) -> Path:
    """Write what the cells of one batch gave into a file of their own in the folder of a leaderboard."""
    name = digest([number, sorted(line["cell"] for line in lines)])[:24]
    write_rows(folder / BATCHES / f"{name}.jsonl", [*lines, {"sha256": digest(lines)}])
    return folder / BATCHES / f"{name}.jsonl"


def _batch_lines(file: Path) -> list[dict[str, Any]]:
    expected = "remove it, and its cells are measured again"
    *lines, last = [line for _, line in read_json_lines(file, expected)] or [None]
    if last != {"sha256": digest(lines)}:
        raise UserError(f"{file} is damaged, or an earlier version wrote it: {expected}")
    return lines


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = [line for _, line in read_json_lines(file, "expected what a leaderboard wrote; move the file away")]
    if not all(isinstance(line, dict) and "cell" in line for line in lines):
        raise UserError(f"{file} was not written by a leaderboard; move the file away")
    return lines


def publish(rows: Iterable[Mapping], folder: str | Path) -> list[Path]:
    """Write rows into `folder`, a file for each task: :func:`compact` ones; what else there is of rows goes.

    Raises:
        UserError: the folder holds what is no leaderboard, or the results of one, which would be lost.
    """
    folder = Path(folder)
    if any((folder / name).exists() for name in (ROWS, STATE)):
        raise UserError(f"{folder} holds the results themselves; name another folder to publish compact rows in")
    read_rows(folder)  # refuses a folder of something else
    files: dict[Path, list[Mapping]] = {}
    for row in rows:
        name = "".join(letter if letter.isalnum() else "-" for letter in row["task"])
        files.setdefault(folder / f"{name}.jsonl", []).append(row)
    for file, same in files.items():
        write_rows(file, compact(same), (",", ":"))
    for file in set(folder.glob("*.jsonl")) - set(files):
        file.unlink()
    return list(files)


def compact(rows: Iterable[Mapping]) -> list[dict]:
    """The same rows, shorter.

    What is not known is left out, hashes are cut to 16 digits, numbers to what tables show. Contexts, answers and slots
    are listed for one setting of each heuristic and task, the one that competes: chosen on validation contexts or,
    where none was, of highest mean; learned policies and null hypotheses, which pages show in every allocation, list
    them in all. Contexts of replay are numbered in the order of their ids.
    """
    rows = list(rows)
    best = _best_settings(rows)
    found, before = [], dict[tuple[str, str], Any]()
    for row in rows:
        known = {name: value for name, value in row.items() if value not in (None, {}) and value is not False}
        short = {name: _shorter(name, value, "accuracy" not in known) for name, value in known.items()}
        everywhere = row.get("seed") is not None or row["policy"] in NULLS
        if best[row["task"], row["policy"]] != _setting(row) and not everywhere:
            short = {name: value for name, value in short.items() if name not in ("contexts", "slots", "answers")}
        for name in ONCE:
            if name in short and before.get((row["task"], name)) == short[name]:
                del short[name]
            else:
                before[row["task"], name] = short.get(name)
        found.append(short)
    return found


def _setting(row: Mapping) -> tuple:
    return tuple(row.get(name) for name in _SETTING)


def _best_settings(rows: Iterable[Mapping]) -> dict[tuple[str, str], tuple]:
    """By task and policy the setting that was chosen on validation contexts, or else has the highest mean."""
    quality: dict[tuple[str, str], dict[tuple, list[float]]] = {}
    for row in rows:
        measured = row.get("utility_kept") if row.get("accuracy") is None else row["accuracy"]
        bonus = 1.0 if row.get("chosen_on_validation") else 0.0  # above every share
        settings = quality.setdefault((row["task"], row["policy"]), {})
        settings.setdefault(_setting(row), []).append((measured or 0.0) + bonus)
    return {key: max(found, key=lambda setting: fmean(found[setting])) for key, found in quality.items()}


def _shorter(name: str, value: Any, replayed: bool) -> Any:
    if name == "cell" or name.endswith("_hash"):
        return value[:16]
    if name in ("slots", "head_utility"):
        digits = 1 if name == "slots" else 3
        return [[_rounded(head, digits) for head in layer] for layer in value]
    if name == "contexts":
        ids = {context: str(number) if replayed else context for number, context in enumerate(sorted(value))}
        return {ids[context]: [_rounded(each, 3) for each in entry] for context, entry in value.items()}
    if name == "parts":
        return {part: {key: _rounded(each, 3) for key, each in sums.items()} for part, sums in value.items()}
    if name == "budget":
        return value  # a third is no 0.333333
    return _rounded(value, 1 if name == "milliseconds" else 6)


def _rounded(value: Any, digits: int) -> Any:
    if not isinstance(value, float):
        return value
    return int(value) if value == int(value) and abs(value) > 1 else round(value, digits)
