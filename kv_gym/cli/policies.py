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
    import sys

    from kv_gym.policies import list_policies, policy_class

    if table:
        from kv_gym.method_table import method_tables

        typer.echo(method_tables(), nl=False)
        return
    for name in list_policies():
        about = sys.modules[policy_class(name).__module__].__doc__ or ""
        typer.echo(f"{name:24} {' '.join(about.split(chr(10) * 2)[0].split())}")
