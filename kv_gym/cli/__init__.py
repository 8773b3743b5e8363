"""The command line `kv-gym`: its entry point, and what every verb has in common."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from kv_gym import __version__
from kv_gym.cli.verbs import app
from kv_gym.errors import UserError, printable

__all__ = ["app", "main"]

_RESUMABLE = {"record", "train", "fit", "leaderboard"}  # they find what was finished before an interruption


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kv-gym {__version__}")
        raise typer.Exit


@app.callback()
def _main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Threads of the CPU for one computation (default: all cores). Fewer where the CPU is busy."
        ),
    ] = None,
) -> None:
    """The gym for KV-cache eviction: record, replay, train, compare, export, decode."""
    if threads is not None:
        # before torch is imported; threads that wait for work hand their core to others instead of spinning
        os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)


def main() -> None:
    """Entry point: a user's mistake is one sentence on stderr and exit code 2."""
    sys.path.append(os.getcwd())  # for policies of the user's own, such as my_policy:MyPolicy
    warnings.formatwarning = lambda message, *_: f"kv-gym: note: {printable(str(message))}\n"  # type: ignore[assignment]
    try:
        app()
    except UserError as error:
        typer.echo(f"kv-gym: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        reason = f"cannot use {error.filename}: {error.strerror}" if error.filename else error  # HDF5 names no file
        typer.echo(f"kv-gym: {printable(str(reason))}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:
            resumable = _RESUMABLE.intersection(sys.argv[1:4])  # options of kv-gym itself stand in front
            advice = "run the same command again to go on" if resumable else "the same command begins anew"
            typer.echo(f"kv-gym: interrupted; {advice}", err=True)
        raise
