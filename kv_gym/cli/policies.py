"""`kv-gym policies`: what there is."""

from __future__ import annotations

from typing import Annotated

import typer


def policies(
    table: Annotated[
        bool, typer.Option("--table", help="all methods with papers and needs, as a Markdown page (docs/methods.md)")
    ] = False,
) -> None:
    """List the bundled policies, each with the first sentence of its file."""
    from importlib import import_module

    from kv_gym.policies import list_policies

    if table:
        from kv_gym.method_table import method_tables

        typer.echo(method_tables(), nl=False)
        return
    for name in list_policies():
        about = import_module(f"kv_gym.policies.{name}").__doc__ or ""
        typer.echo(f"{name:24} {' '.join(about.split(chr(10) * 2)[0].split())}")
