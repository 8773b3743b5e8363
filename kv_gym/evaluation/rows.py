"""Rows: the one schema of results, and the files that hold them.

``kv-gym evaluate``, ``kv-gym leaderboard`` and ``kv-gym fit`` all write these rows, and the report reads nothing else.
In memory a row is a plain dict with every field of :class:`Row`; what was not measured is None. Files are JSON
(``{"rows": [...], "command", "versions", ...}``) or JSON lines (a row per line).
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainValidator, StrictBool, StrictStr, model_validator

from kv_gym.errors import UserError
from kv_gym.files import atomic_write, make_folder, read_json, read_json_lines, refuse_address, validated
from kv_gym.notebook import Result
from kv_gym.policies import current_name

FULL = "full_cache"  # the policy of rows where nothing is evicted
EXPECTED = "expected rows of policy and budget, as `kv-gym evaluate --json` or a leaderboard writes them"
_PACKAGES = ("gymnasium", "h5py", "kv-gym", "numpy", "stable-baselines3", "torch", "transformers")


def _number(value: Any) -> int | float | None:
    """A number; NaN and infinity, which JSON does not know, are None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number")
    return value if math.isfinite(value) else None


def _budget(value: Any) -> int | float:
    number = _number(value)
    if number is None or number <= 0:
        raise ValueError("expected a number above zero")
    return number


def _interval(value: Any) -> Any:
    return [_number(end) for end in value] if isinstance(value, list) and len(value) == 2 else _number(value)


def _count(value: Any) -> int | float:
    number = _number(value)
    if number is None or number < 0:
        raise ValueError("expected counts of answers, numbers from 0")
    return number


def _contexts(value: Any) -> dict[str, list] | None:
    value = {} if value is None else value
    if not isinstance(value, dict) or not all(isinstance(entry, list) and len(entry) == 3 for entry in value.values()):
        raise ValueError("expected a list of correct, questions and nll for each context")
    return {name: [_count(first), _count(second), _number(third)] for name, (first, second, third) in value.items()}


def _parts(value: Any) -> dict[str, dict]:
    value = {} if value is None else value
    old = {"asked": "questions", "right": "correct"}  # their names before version 0.2
    found = {}
    for name, part in value.items() if isinstance(value, dict) else [("", value)]:
        part = {old.get(key, key): count for key, count in part.items()} if isinstance(part, dict) else {}
        if not {"questions", "correct"} <= set(part):
            raise ValueError("expected questions and correct for each part")
        found[name] = part | {key: _count(part[key]) for key in ("questions", "correct")}
    return found


def _grid(value: Any) -> list[list] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(layer, list) for layer in value):
        raise ValueError("expected a list of numbers for each layer, [layers][kv_heads]")
    return [[_number(head) for head in layer] for layer in value]


Number = Annotated[float | None, PlainValidator(_number)]
Interval = Annotated[Any, PlainValidator(_interval)]
Grid = Annotated[list[list] | None, PlainValidator(_grid)]


class Row(BaseModel):
    """One configuration (a policy and how its cache is held) on one task, in one training run.

    Fields that are not listed are kept as they are, so that a benchmark can add its own.

    Attributes:
        policy: its name; ``full_cache`` evicts nothing.
        budget: slots per KV head (int), or a share of the tokens (float in (0, 1]).
        task: what was asked, such as ``multi_key 512``; replay of traces is a task, too.
        allocation: who gets the slots.
        evicted: what becomes of evicted pairs.
        select: which of the held slots a query reads.
        episodes: how the context is divided into episodes, each with a cache of its own; ``none``: it is not.
        sinks, recent: first and last tokens that always stay; None is the policy's own protection.
        window: the policy's setting of that name where it is not the default.
        trigger: when slots are evicted, such as ``prefill`` or ``every:16``.
        seed: training run of a policy with weights; None for policies without.
        seeds: how many training runs a row sums up, for rows that sum up several.
        n: contexts.
        questions: answers that were judged, over all contexts: questions, spans or tokens, as the task says.
        accuracy: share of the answers that match exactly and whole, or the task's own score in [0, 1].
        nll: negative log-likelihood of the expected answers, nats: mean over answers of the mean over their tokens.
        utility_kept: share of the recorded future attention that the kept slots received (ratio of sums over
            contexts, layers and heads). Replay only.
        kept_share: share of the slots that stay, mean over contexts. Replay only.
        hit_rate, byte_hit_rate: of page policies: share of the accesses, and of the bytes, that the cache held; the
            budget is then the capacity, in pages or bytes.
        accuracy_interval, nll_interval, utility_kept_interval: of rows that sum up several runs, half the width of the
            95 % interval, or its two ends.
        loss, loss_upper: what the configuration loses against the full cache on the same contexts (share of the
            questions, or nats per answer), and the upper end of its 95 % interval. ``kv-gym fit`` only.
        contexts: ``{id: [correct, questions, nll]}``, the nll summed over the context's answers; in replay ``{id:
            [utility kept, utility, None]}``. Differences between configurations are paired by these.
        answers: ``{id: [[grade, nll], ...]}`` of tasks that list them: grade 2 where an answer is right, 1 where
            only its first token is, else 0; nll of the whole answer. :func:`kv_gym.evaluation.summary.regraded` makes
            rows of other measures of them.
        parts: ``{part: {"questions", "correct"}}`` for tasks with parts, such as the turns of a dialogue.
        slots_read: of every KV head, slots that the last token of an answer read at most, mean over answers, layers and
            heads; None where that is not measured.
        tokens_read: tokens that the model read before the questions for this configuration alone, probes included, mean
            over contexts; None where configurations share that reading.
        cache_bytes: all that the compressed cache of one context holds, mean over contexts.
        policy_bytes: weights of the policy, held once.
        accept_fingerprint: whether a trained policy was to serve any model of its sizes, not its own alone.
        milliseconds: CPU time of a context for the cuts and all that follows the first one, mean over contexts.
        slots: `[layers][kv_heads]`, slots held after the last cut, mean over contexts.
        head_utility: `[layers][kv_heads]`, `utility_kept` of each head.
        chosen_on_validation: whether the setting did best on validation contexts.
        refused: the sentence with which the model, task or allocation refused the configuration; then nothing else
            was measured.
        cell: SHA-256 of all that the result depends on, in a leaderboard.
        tasks_hash, model_hash, policy_hash: SHA-256 of what was asked, of the model's files and of the policy.
        command: that made the row.
        versions: of Python and the packages.
    """

    model_config = ConfigDict(extra="allow")

    policy: StrictStr
    budget: Annotated[int | float, PlainValidator(_budget)]
    task: StrictStr = ""
    allocation: StrictStr = "uniform"
    evicted: StrictStr = "drop"
    select: StrictStr = "all"
    episodes: StrictStr = "none"
    sinks: Number = None
    recent: Number = None
    window: Number = None
    trigger: StrictStr | None = None
    seed: Number = None
    seeds: Number = None
    n: Number = None
    questions: Number = None
    accuracy: Number = None
    nll: Number = None
    utility_kept: Number = None
    kept_share: Number = None
    hit_rate: Number = None
    byte_hit_rate: Number = None
    accuracy_interval: Interval = None
    nll_interval: Interval = None
    utility_kept_interval: Interval = None
    loss: Number = None
    loss_upper: Number = None
    contexts: Annotated[dict[str, list], PlainValidator(_contexts)] = {}
    answers: dict[str, list[tuple[int, float]]] | None = None
    parts: Annotated[dict[str, dict], PlainValidator(_parts)] = {}
    slots_read: Number = None
    tokens_read: Number = None
    cache_bytes: Number = None
    policy_bytes: Number = None
    accept_fingerprint: StrictBool = False
    milliseconds: Number = None
    slots: Grid = None
    head_utility: Grid = None
    chosen_on_validation: StrictBool = False
    refused: StrictStr | None = None
    cell: StrictStr | None = None
    tasks_hash: StrictStr | None = None
    model_hash: StrictStr | None = None
    policy_hash: StrictStr | None = None
    command: StrictStr | None = None
    versions: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, data: Any) -> Any:
        """Null means absent, and rows of earlier versions say what today's rows say."""
        if not isinstance(data, Mapping):
            return data
        row = {name: value for name, value in data.items() if value is not None}
        if "asked" in row:
            row.setdefault("questions", row.pop("asked"))
        if "seed" not in row and (row.get("policy_bytes") or row.get("seeds")):
            row["seed"] = 0  # it has weights, and one row for all its training runs
        if isinstance(row.get("policy"), str):
            row["policy"] = current_name(row["policy"])
        if "capacity" in row and "budget" not in row:  # of `kv-gym pages simulate`
            row |= {"budget": row["capacity"], "task": page_task(row.get("trace"), row.get("semantics"))}
            row.setdefault("n", row.get("accesses"))
        return row


def page_task(trace: Any, semantics: Any, warm_up: float = 0.0) -> str:
    """The task of rows of page policies on a trace of requests, of which the first share only warms the cache."""
    part = f", last {1 - warm_up:.0%}" if warm_up else ""
    return f"pages {trace or 'of requests'}, {semantics or 'objects'}{part}"


class AblationRow(BaseModel):
    """One variant of an ablation.

    Attributes:
        variant: its name.
        budget, task: as in :class:`Row`.
        accuracy: mean over training runs.
        interval: half the width of its 95 % interval, or its two ends.
        difference: to the first variant.
    """

    model_config = ConfigDict(extra="allow")

    variant: StrictStr
    budget: Annotated[int | float, PlainValidator(_budget)]
    task: StrictStr | None = None
    accuracy: Number = None
    interval: Interval = None
    difference: Number = None


FIELDS = tuple(Row.model_fields)


def complete(row: Mapping[str, Any], where: str = "a row") -> dict[str, Any]:
    """The row with every field of :class:`Row`, checked.

    Args:
        row: plain data.
        where: file and line, for the error.

    Raises:
        UserError: no policy or budget, or a field of another type.
    """
    if not isinstance(row, Mapping) or row.get("policy") is None or row.get("budget", row.get("capacity")) is None:
        raise UserError(f"{where} has no policy and budget; {EXPECTED}")
    return validated(Row, row, where).model_dump()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a result file (``.json``, ``.jsonl``), or of all ``.jsonl`` files in a folder; [] if it is not there.

    Raises:
        UserError: a file that is no result, or a bad row, with file and line.
    """
    path = Path(path)
    if path.is_dir():
        return [row for file in sorted(path.glob("*.jsonl")) for row in read_rows(file)]
    return read_result(path)["rows"] if path.is_file() else []


def read_result(file: str | Path) -> dict[str, Any]:
    """A result file: its complete rows, and whatever stands beside them.

    Args:
        file: ``.jsonl`` with a row per line, else JSON with ``rows``. A last line of JSON lines that is being written,
            or was when its writer was interrupted, is left out.

    Raises:
        UserError: the file is missing or no result, or a bad row, with file and line.
    """
    file = Path(file)
    if file.suffix == ".jsonl":
        lines = read_json_lines(file, EXPECTED, partial_last_line=True, non_finite_as_null=True)
        return {"rows": [complete(row, f"{file}, line {number}") for number, row in lines]}
    data = read_json(file, EXPECTED, non_finite_as_null=True)
    if not isinstance(data, dict) or not isinstance(data.get("rows"), list):
        raise UserError(f"{file} is no result file; {EXPECTED}")
    return data | {"rows": [complete(row, f"{file}, row {number}") for number, row in enumerate(data["rows"], 1)]}


def write_rows(file: str | Path, rows: Iterable[Any], separators: tuple[str, str] = (", ", ": ")) -> None:
    """Write rows, or other plain data, as JSON lines; whole or not at all."""
    file = Path(file)
    make_folder(file.parent)
    text = "".join(json.dumps(row, separators=separators) + "\n" for row in rows)
    with atomic_write(file) as part:
        part.write_text(text, encoding="utf-8")


def result(rows: list[dict], **about: Any) -> Result:
    """A result: rows, the command that made them, versions, and whatever else identifies the run."""
    return Result(rows=rows, command=_command(), versions=versions(), **about)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _command() -> str:
    program, *arguments = sys.argv
    *folders, name = Path(program).parts[-3:] or ("",)
    ours = name == "__main__.py" and "kv_gym" in folders  # started by `python -m kv_gym`, or `kv_gym.cli`
    return shlex.join(["kv-gym" if ours else Path(program).name, *map(_relative, arguments)])


def _relative(argument: str) -> str:
    """An argument; a path of the working directory without that directory, whose name is the machine's own affair."""
    path = Path(argument)
    inside = path.is_absolute() and path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd())) if inside else argument


def refuse_unwritable(file: str | Path) -> None:
    """Raise a UserError, before any work, where `file` cannot be written to."""
    refuse_address(file)
    file = Path(file)
    if not file.name or os.path.isdir(file):
        raise UserError(f"{file} is a folder; name a file to write the result to")
    make_folder(file.parent)
    trial = file.with_name(file.name + ".tmp")  # the name that `atomic_write` writes to
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}); name another file") from None


def write_json(file: str | Path, data: dict) -> Path:
    """Write JSON whole or not at all."""
    file = Path(file)
    make_folder(file.parent)
    with atomic_write(file) as part:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return file
