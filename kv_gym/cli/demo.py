"""`kv-gym demo`: the main job in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kv_gym.cli.options import Progress


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the training contexts and of the policy.")] = 0,
    progress: Progress = True,
) -> None:
    """The main job on the bundled reference model: record, train, compare, export, decode."""
    from kv_gym.fit.demo import demo as run

    run(out, seed, progress)
