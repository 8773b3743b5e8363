"""`kv-gym evaluate`: policies compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kv_gym.cli.options import (
    Device,
    Dtype,
    Evicted,
    Progress,
    Recent,
    ReferenceTask,
    ReferenceTokens,
    Sinks,
    named_model,
)
from kv_gym.errors import UserError

_TASKS = (
    "What to ask a --model, with commas: FILE.jsonl, multi_key:512, multi_key:512:seen, dialogue:512, copy:128, "
    "fact:1024, text:FILE, ruler:FILE, longbench:FILE; or `reference` with --task and --tokens."
)


def evaluate(
    policies: Annotated[str, typer.Option(help="Names, class paths or folders, with commas.")],
    budgets: Annotated[
        str, typer.Option(help="Slots per head or shares, with commas: 64,0.25,1/8.")
    ] = "0.5,0.25,0.125",
    traces: Annotated[Path | None, typer.Option(help="Replay on this trace set.")] = None,
    model: Annotated[str | None, typer.Option(help="Decode with this model (or `reference`).")] = None,
    tasks: Annotated[str | None, typer.Option(help=_TASKS)] = None,
    task: ReferenceTask = "multi_key",
    tokens: ReferenceTokens = 512,
    count: Annotated[int | None, typer.Option(help="Contexts of each task (default: all).")] = None,
    split: Annotated[str, typer.Option(help="Of the traces; `all` takes every context.")] = "test",
    sinks: Sinks = None,
    recent: Recent = None,
    allocation: Annotated[str, typer.Option(help="uniform, global, global:NORMALISATION ...; several with commas.")] = (
        "uniform"
    ),
    evicted: Evicted = "drop",
    decision_value: Annotated[
        str | None, typer.Option(help="With --traces: what each policy's cuts are worth against this baseline's.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File to write the result to.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    progress: Progress = True,
) -> None:
    """Compare policies on traces (replay) or on a decoding model (live)."""
    from kv_gym.budgets import parse_budget
    from kv_gym.evaluation import evaluate as compare
    from kv_gym.evaluation.report import markdown, merged
    from kv_gym.evaluation.tasks import parse_tasks, reference_tasks

    chosen = [parse_budget(budget) for budget in budgets.split(",")]
    if decision_value is not None:
        if traces is None or model is not None or evicted != "drop":
            raise UserError("--decision-value replays traces: give --traces, and neither --model nor --evicted")
        from kv_gym.evaluation import decision_value as against
        from kv_gym.evaluation.decision_table import markdown as decision_table

        data = against(
            [name.strip() for name in policies.split(",") if name.strip()], decision_value, traces, chosen,
            split=None if split == "all" else split, sinks=sinks, recent=recent,
            allocations=[name.strip() for name in allocation.split(",")], json=json, progress=progress,
        )  # fmt: skip
        typer.echo(decision_table(data["rows"]))
        return
    loaded = None
    asked: list | None = None
    if (traces is None) == (model is None):
        raise UserError("evaluate compares either on --traces or on a --model with --tasks; give exactly one of them")
    if model is not None:
        if tasks is None:
            raise UserError("evaluate --model needs --tasks: a name such as multi_key:512, or FILE.jsonl")
        loaded, tokenizer = named_model(model, device, dtype)
        if tasks == "reference":
            asked = reference_tasks(task, tokens, count, tokenizer=tokenizer)
        else:
            asked = parse_tasks(tasks, tokenizer, count)
    data = compare(
        [name.strip() for name in policies.split(",") if name.strip()], chosen, traces=traces, model=loaded,
        tasks=asked, split=None if split == "all" else split, sinks=sinks, recent=recent,
        allocations=[name.strip() for name in allocation.split(",")], json=json, progress=progress,
        evicted=[name.strip() for name in evicted.split(",")],
    )  # fmt: skip
    typer.echo(markdown(merged(data)))
    for sentence in data["left_out"]:
        typer.echo(f"left out: {sentence}", err=True)
