"""`kv-gym fit`: from a model and a file of prompts to a policy and the smallest budget that suffices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kv_gym.cli.options import Device, Dtype, Model, Progress, Setting, named_model, settings_from


def fit(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="JSON lines with context, question and answer, or context and continuations; a text; or `reference`."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; run again to go on.")],
    tolerance: Annotated[
        float, typer.Option(help="Loss allowed: of accuracy (0.01 is a point), or nats per token of continuations.")
    ] = 0.01,
    agent: Annotated[str, typer.Option(help="What is trained; settings in agents/<agent>.yml.")] = "end_to_end",
    allocation: Annotated[
        str | None, typer.Option(help="Who gets the slots (default: global where it can be).")
    ] = None,
    budgets: Annotated[str | None, typer.Option(help="Shares to try, with commas (default: 1/2 to 1/90).")] = None,
    count: Annotated[int, typer.Option(help="Contexts to train on, at most.")] = 160,
    tokens: Annotated[int | None, typer.Option(help="Length of a text's windows (default: 512).")] = None,
    continuation_tokens: Annotated[int | None, typer.Option(help="What follows each of them (default: 64).")] = None,
    seed: Annotated[int, typer.Option(help="Of the policy, and of the reference task's contexts.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    setting: Setting = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    progress: Progress = True,
) -> None:
    """Fit an evicting cache to a model and a file of prompts: policy, smallest budget, and a card."""
    from kv_gym.fit import BUDGETS
    from kv_gym.fit import fit as run

    loaded, tokenizer = named_model(model, device, dtype)
    done = run(
        loaded, data, out, tokenizer=tokenizer, tolerance=tolerance, agent=agent, allocation=allocation,
        budgets=BUDGETS if budgets is None else budgets.split(","), count=count, tokens=tokens,
        continuation_tokens=continuation_tokens, seed=seed, progress=progress, **settings_from(setting, steps=steps),
    )  # fmt: skip
    for sentence in done["verdict"]:
        typer.echo(sentence)
    spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in done["seconds"].items())
    typer.echo(f"{out}: card in README.md, figures in fit.json, the policy in policy/ ({spent})")
