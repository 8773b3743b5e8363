"""Rows on disk: finished ones as JSON lines, and what batches of unfinished ones gave.

    <out>/rows.jsonl     one line per cell of the specification: the results, from which everything else is made
    <out>/other.jsonl    {"cell", "row"}: rows of validation contexts and of earlier specifications
    <out>/batches/       one file per measured batch, until all its cells are rows

Every file is whole or not there; whatever a batch gave is written at once, so that an interruption loses at most the
batches under way.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.evaluation.leaderboard.identity import digest
from kv_gym.evaluation.outcomes import Outcome
from kv_gym.files import whole_file
from kv_gym.policies import current_name

ROWS, OTHER, BATCHES = "rows.jsonl", "other.jsonl", "batches"
MEASURED = (
    "n", "questions", "accuracy", "nll", "parts", "contexts", "cache_bytes", "policy_bytes", "milliseconds", "slots",
    "utility_kept", "head_utility",
)  # fmt: skip


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a file of JSON lines, or of all such files in a folder; none where it is not there.

    Raises:
        UserError: a line that is no row.
    """
    path = Path(path)
    if path.is_dir():
        return [row for file in sorted(path.glob("*.jsonl")) if file.name != OTHER for row in read_rows(file)]
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            row["cell"]
            if "policy" in row:
                row["policy"] = current_name(row["policy"])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}, line {number} is no row of a leaderboard; move the file away") from None
        rows.append(row)
    return rows


def write_rows(file: Path, rows: Iterable[Mapping], separators: tuple[str, str] = (", ", ": ")) -> None:
    """Write rows as JSON lines, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, separators=separators) + "\n" for row in rows)
    with whole_file(file) as part:
        part.write_text(text, encoding="utf-8")


class Results:
    """What a folder holds.

    Args:
        folder: made where it is not there.

    Attributes:
        rows: every finished cell, by its id.
        current: ids of those that the last specification asked for, in its order.
        batches: what batches gave, by cell and number of the batch.

    Raises:
        UserError: a folder that cannot be made, or a file that is none of ours.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            (self.folder / BATCHES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make folder {folder} ({error.strerror}); name another with --out") from None
        self.rows = {row["cell"]: row for row in read_rows(self.folder / ROWS)}
        self.current = list(self.rows)
        self.rows |= {line["cell"]: line["row"] for line in read_rows(self.folder / OTHER)}
        self.batches: dict[str, dict[int, dict]] = defaultdict(dict)
        for file in sorted((self.folder / BATCHES).glob("*.jsonl")):
            self.take(file)

    def take(self, file: Path) -> None:
        """Read what a batch gave."""
        for line in read_rows(file):
            self.batches[line["cell"]][line["batch"]] = line

    def save(self) -> None:
        """Write the rows: the current ones as results, the others beside."""
        shown = dict.fromkeys(cell for cell in self.current if cell in self.rows)
        write_rows(self.folder / ROWS, (self.rows[cell] for cell in shown))
        rest = ({"cell": cell, "row": row} for cell, row in self.rows.items() if cell not in shown)
        write_rows(self.folder / OTHER, rest)

    def sweep(self) -> None:
        """Remove the files of batches all of whose cells are rows."""
        for file in (self.folder / BATCHES).glob("*.jsonl"):
            if all(line["cell"] in self.rows for line in read_rows(file)):
                file.unlink()


def write_batch(folder: Path, number: int, lines: Sequence[dict]) -> Path:
    """Write what the cells of one batch gave into a file of their own."""
    name = digest([number, sorted(line["cell"] for line in lines)])[:24]
    file = folder / BATCHES / f"{name}.jsonl"
    write_rows(file, lines)
    return file


def batch_line(cell: str, number: int, outcomes: Sequence[Outcome], policy_bytes: int) -> dict[str, Any]:
    """What one cell gave in one batch, as plain data; JSON has no NaN, so what was not measured is null."""
    parts = [
        {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in vars(outcome).items()
            if name != "nll"
        }
        | {"nll": None if math.isnan(outcome.nll) else outcome.nll}
        for outcome in outcomes
    ]
    return {"cell": cell, "batch": number, "policy_bytes": policy_bytes, "outcomes": parts}


def finished(lines: Sequence[dict]) -> dict[str, Any]:
    """The measured part of a row, from what all its batches gave, in the order of the batches."""
    empty = dict.fromkeys(MEASURED)
    refused = next((line["refused"] for line in lines if line.get("refused")), None)
    if refused is not None:
        return empty | {"refused": refused}
    contexts: dict[str, list[dict]] = {}
    for line in lines:
        for outcome in line["outcomes"]:
            contexts.setdefault(outcome["context"], []).append(outcome)
    slots = [parts[-1]["slots"] for parts in contexts.values()]
    row = {
        "n": len(contexts),
        "policy_bytes": lines[0]["policy_bytes"],
        "milliseconds": 1000 * fmean(sum(part["seconds"] for part in parts) for parts in contexts.values()),
        "slots": None if None in slots else _grid_mean(slots),
    }
    replayed = any("kept" in parts[0] for parts in contexts.values())
    return empty | row | (_replayed(contexts) if replayed else _answered(contexts))


def _answered(contexts: Mapping[str, Sequence[dict]]) -> dict[str, Any]:
    entries = {}
    parts: dict[str, dict] = {}
    for name, same in contexts.items():
        losses = [part["nll"] for part in same]
        nll = None if None in losses else round(sum(losses), 6)
        right = sum(part["correct"] for part in same)
        entries[name] = [int(right) if right == int(right) else right, sum(part["questions"] for part in same), nll]
        for outcome in same:
            if outcome["part"]:
                known = parts.setdefault(outcome["part"], {"questions": 0, "correct": 0})
                known["questions"] += outcome["questions"]
                known["correct"] += outcome["correct"]
    asked = sum(entry[1] for entry in entries.values())
    losses = [entry[2] for entry in entries.values()]
    return {
        "questions": asked,
        "accuracy": sum(entry[0] for entry in entries.values()) / asked,
        "nll": None if None in losses else sum(losses) / asked,
        "parts": parts,
        "contexts": entries,
        "cache_bytes": fmean(max(part["cache_bytes"] for part in same) for same in contexts.values()),
    }


def _replayed(contexts: Mapping[str, Sequence[dict]]) -> dict[str, Any]:
    kept, total = ([part[name] for (part,) in contexts.values()] for name in ("kept", "total"))
    sums = [[sum(map(sum, grid)) for grid in grids] for grids in (kept, total)]
    heads = [
        [round(up / down, 6) if down else None for up, down in zip(*rows, strict=True)]
        for rows in zip(_grid_mean(kept, 12), _grid_mean(total, 12), strict=True)
    ]
    entries = {name: [*entry, None] for name, *entry in zip(contexts, *sums, strict=True)}
    return {"contexts": entries, "utility_kept": sum(sums[0]) / sum(sums[1]), "head_utility": heads}


def _grid_mean(grids: Sequence[list[list[float]]], digits: int = 6) -> list[list[float]]:
    """The mean of several `[layers][heads]`."""
    return [[round(fmean(values), digits) for values in zip(*rows, strict=True)] for rows in zip(*grids, strict=True)]
