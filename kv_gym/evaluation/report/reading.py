"""What a report is made of: rows of results and of ablations, read from files and folders."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kv_gym.budgets import budget_key
from kv_gym.errors import UserError
from kv_gym.evaluation.summary import ARM
from kv_gym.policies import current_name

EXPECTED = "expected rows of policy and budget, as `kv-gym evaluate --json` or a leaderboard writes them"
# what a row means that does not say it
DEFAULTS = {"allocation": "uniform", "evicted": "drop", "task": ""}
_NUMBERS = (
    "accuracy", "accuracy_interval", "asked", "cache_bytes", "milliseconds", "n", "nll", "nll_interval", "policy_bytes",
    "recent", "seed", "seeds", "sinks", "utility_kept", "utility_kept_interval", "window",
)  # fmt: skip
_TEXTS = ("allocation", "evicted", "trigger", "task", "policy", "command", "cell")
_GRIDS = ("slots", "head_utility")


@dataclass
class Results:
    """All that the files of one report hold.

    Attributes:
        rows: one for each cell, policy x setting x budget x task x seed, of live decoding and of replay; a later
            row of the same cell replaces an earlier one.
        ablations: rows of variant, budget, accuracy, interval and difference.
        commands: that made the rows, each once, in the order of the files.
        versions: of the packages that the rows stand on; versions that differ stand side by side.
    """

    rows: list[dict] = field(default_factory=list)
    ablations: list[dict] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    _cells: dict[tuple, int] = field(default_factory=dict, repr=False)

    def add(self, data: dict, where: str) -> None:
        """Take in ``{"rows": [...], "command", "versions"}``.

        Args:
            data: as :func:`kv_gym.evaluation.evaluate` returns it.
            where: the file, for error sentences.

        Raises:
            UserError: a row without policy and budget, or a field that is not what it should be.
        """
        for number, row in enumerate(data["rows"], 1):
            self._add_row(row, f"{where}, row {number}")
        self._add_origin(data)

    def _add_row(self, row: dict, where: str) -> None:
        if isinstance(row, dict) and "variant" in row:
            self.ablations.append(_checked(row, where, ("variant", "task"), ("accuracy", "interval", "difference")))
            return
        if not isinstance(row, dict) or row.get("policy") is None or row.get("budget") is None:
            raise UserError(f"{where} has no policy and budget; {EXPECTED}")
        row = _checked(row, where, _TEXTS, _NUMBERS, _GRIDS)
        place = self._cells.setdefault(_cell(row), len(self.rows))
        self.rows[place : place + 1] = [row]
        self._add_origin(row)

    def _add_origin(self, data: dict) -> None:
        command, versions = data.get("command"), data.get("versions")
        if isinstance(command, str) and command and command not in self.commands:
            self.commands.append(command)
        for name, version in versions.items() if isinstance(versions, dict) else ():
            known = self.versions.setdefault(str(name), str(version))
            if str(version) not in known.split(" and "):
                self.versions[str(name)] = f"{known} and {version}"


def read_results(paths: Iterable[str | Path]) -> Results:
    """Read result files: folders (every ``.json`` and ``.jsonl`` below that holds results), or files by name.

    Raises:
        UserError: a path that is not there, a named file that is no result, a folder without any, or a bad row.
    """
    results = Results()
    for path in map(Path, paths):
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*.json*")) if file.suffix in (".json", ".jsonl")]
            taken = [_read(file, results, required=False) for file in found]
            if not any(taken):
                raise UserError(f"folder {path} holds no results; {EXPECTED}")
        else:
            _read(path, results, required=True)
    return results


def _read(file: Path, results: Results, required: bool) -> bool:
    """Take in one file; False where it holds other things and is not `required` to."""
    try:
        text = file.read_text(encoding="utf-8")
        data = {"rows": _lines(text)} if file.suffix == ".jsonl" else json.loads(text)
        told = [_is_result(row) for row in data["rows"]]
        # a folder may hold measurements of other things beside
        usable = any(told) and (required or all(told))
    except (OSError, ValueError, KeyError, TypeError):
        usable = False
    if usable:
        for row in data["rows"]:
            if "policy" in row:
                row["policy"] = current_name(row["policy"])
        results.add(data, str(file))
    elif required:
        raise UserError(f"{file} is no result file; {EXPECTED}")
    return usable


def _cell(row: dict) -> tuple:
    """What a row tells of: by its hash where it has one."""
    if row.get("cell"):
        return (row["cell"],)
    # replay and live decoding write rows of the same arm, which complete one another
    told = (DEFAULTS.get(name) if row.get(name) is None else row[name] for name in (*ARM, "task", "seed"))
    return (*told, budget_key(row["budget"]), row.get("accuracy") is None)


def _is_result(row: dict) -> bool:
    if "variant" in row:
        return True
    return {"policy", "budget"} <= set(row) and bool({"accuracy", "utility_kept", "nll", "refused"} & set(row))


def _lines(text: str) -> list[dict]:
    """The rows of JSON lines; a last line without its end is one that is being written, or was interrupted."""
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def _checked(given: dict, where: str, texts: Iterable[str], numbers: Iterable[str], grids: Iterable[str] = ()) -> dict:
    """The row with fields of known types only; NaN, which JSON does not know, becomes None."""
    row = dict(given)
    for name in texts:
        if row.get(name) is not None and not isinstance(row[name], str):
            raise UserError(f"{where}: {name} is {row[name]!r}; expected a text")
    for name in (*numbers, "budget"):
        value = row.get(name)
        if value is None:
            continue
        if name.endswith("interval") and isinstance(value, list) and len(value) == 2:  # by its ends
            row[name] = [_number(end, name, where) for end in value]
        else:
            row[name] = _number(value, name, where)
    if row.get("budget") is None or row["budget"] <= 0:
        raise UserError(f"{where}: budget is {given.get('budget')!r}; expected a number above zero")
    for name in grids:
        grid = row.get(name)
        if grid is not None:
            if not isinstance(grid, list) or not all(isinstance(line, list) for line in grid):
                raise UserError(f"{where}: {name} is no list of a list for each layer; expected [layers][heads]")
            row[name] = [[_number(value, name, where) for value in line] for line in grid]
    _refuse_counts(row, where)
    if row.get("contexts"):
        row["contexts"] = {name: [*c[:2], _number(c[2], "contexts", where)] for name, c in row["contexts"].items()}
    return row


def _refuse_counts(row: dict, where: str) -> None:
    """Raise a UserError for what was counted in contexts and in parts of them, where it is not as expected."""
    contexts, parts = row.get("contexts") or {}, row.get("parts") or {}
    if not isinstance(contexts, dict) or not all(isinstance(c, list) and len(c) == 3 for c in contexts.values()):
        raise UserError(f"{where}: contexts is not as expected, a list of right, asked and nll for each of them")
    known = {"asked", "right"}
    if not isinstance(parts, dict) or not all(isinstance(p, dict) and known <= set(p) for p in parts.values()):
        raise UserError(f"{where}: parts is not as expected, asked and right for each of them")
    counts = [("contexts", value) for entry in contexts.values() for value in entry[:2]]
    counts += [("parts", part[name]) for part in parts.values() for name in sorted(known)]
    for name, value in counts:
        if _number(value, name, where) is None or value < 0:
            raise UserError(f"{where}: {name} counts {value!r} answers; expected a number from 0")


def _number(value: object, name: str, where: str) -> int | float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {name} is {value!r}; expected a number")
    return value if math.isfinite(value) else None
