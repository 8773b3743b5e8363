"""`kv-gym leaderboard`: policies x budgets x allocations x tasks x seeds, measured once each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kv_gym.cli.options import Progress


def leaderboard(
    spec: Annotated[Path, typer.Argument(help="YAML: model, tasks, budgets, policies, ...")],
    out: Annotated[Path, typer.Option(help="Folder of the rows; run again to go on.")] = Path("results"),
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")] = 2,
    publish: Annotated[Path | None, typer.Option(help="Folder to write compact rows into, a file per task.")] = None,
    page: Annotated[Path | None, typer.Option(help="Markdown file to write the tables into.")] = None,
    progress: Progress = True,
) -> None:
    """Measure what a specification asks for and the folder does not hold yet."""
    from kv_gym.evaluation.leaderboard import compact, read_spec
    from kv_gym.evaluation.leaderboard import leaderboard as measure
    from kv_gym.evaluation.leaderboard import page as tables
    from kv_gym.evaluation.leaderboard import publish as write_rows
    from kv_gym.files import whole_file

    rows = measure(read_spec(spec), out, workers, progress)
    refused = sum(bool(row.get("refused")) for row in rows)
    typer.echo(f"{len(rows)} rows in {out / 'rows.jsonl'}" + (f", {refused} of them refused" if refused else ""))
    if publish is not None:
        for file in write_rows(rows, publish):
            typer.echo(f"{file}: {file.stat().st_size:,} bytes")
    if page is not None:
        with whole_file(page) as part:
            part.write_text(tables(compact(rows)), encoding="utf-8")
        typer.echo(f"wrote {page}")
