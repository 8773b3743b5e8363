"""Results of a report: rows of results and of ablations, read from files and folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kv_gym.budgets import budget_key
from kv_gym.errors import UserError
from kv_gym.evaluation.rows import EXPECTED, AblationRow, complete
from kv_gym.evaluation.summary import CONFIGURATION
from kv_gym.files import read_json, read_json_lines, validated


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

    def add(self, data: Mapping[str, Any], where: str) -> None:
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

    def read(self, path: str | Path) -> None:
        """Read a result file, or a folder: every ``.json`` and ``.jsonl`` below that holds results.

        Raises:
            UserError: a path that is not there, a named file that is no result, a folder without any, or a bad row.
        """
        path = Path(path)
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*.json*")) if file.suffix in (".json", ".jsonl")]
            if not [file for file in files if _read(file, self, required=False)]:
                raise UserError(f"folder {path} holds no results; {EXPECTED}")
        else:
            _read(path, self, required=True)

    def _add_row(self, row: dict, where: str) -> None:
        if isinstance(row, dict) and "variant" in row:
            self.ablations.append(validated(AblationRow, row, where).model_dump())
            return
        row = complete(row, where)
        place = self._cells.setdefault(_cell(row), len(self.rows))
        self.rows[place : place + 1] = [row]
        self._add_origin(row)

    def _add_origin(self, data: Mapping[str, Any]) -> None:
        command, versions = data.get("command"), data.get("versions")
        if isinstance(command, str) and command and command not in self.commands:
            self.commands.append(command)
        for name, version in versions.items() if isinstance(versions, dict) else ():
            known = self.versions.setdefault(str(name), str(version))
            if str(version) not in known.split(" and "):
                self.versions[str(name)] = f"{known} and {version}"


def read_results(paths: Iterable[str | Path]) -> Results:
    """Read result files and folders, see :meth:`Results.read`."""
    results = Results()
    for path in paths:
        results.read(path)
    return results


def _read(file: Path, results: Results, required: bool) -> bool:
    """Take in one file; False where it holds other things and is not `required` to."""
    try:
        if file.suffix == ".jsonl":
            lines = read_json_lines(file, EXPECTED, partial_last_line=True, non_finite_as_null=True)
            data = {"rows": [row for _, row in lines]}
        else:
            data = read_json(file, EXPECTED, non_finite_as_null=True)
        known = [_is_result(row) for row in data["rows"]]
        # a folder may hold measurements of other things, too
        usable = any(known) and (required or all(known))
    except (OSError, ValueError, KeyError, TypeError):
        usable = False
    if usable:
        results.add(data, str(file))
    elif required:
        raise UserError(f"{file} is no result file; {EXPECTED}")
    return usable


def _cell(row: dict) -> tuple:
    """A key of what a row measured: its hash where it has one."""
    if row.get("cell"):
        return (row["cell"],)
    # replay and live decoding write rows of the same configuration, which complete one another
    return (
        *(row[name] for name in (*CONFIGURATION, "task", "seed")),
        budget_key(row["budget"]),
        row["accuracy"] is None,
    )


def _is_result(row: dict) -> bool:
    if "variant" in row:
        return True
    if "hit_rate" in row:
        return "policy" in row and bool({"budget", "capacity"} & set(row))
    return {"policy", "budget"} <= set(row) and bool({"accuracy", "utility_kept", "nll", "refused"} & set(row))
