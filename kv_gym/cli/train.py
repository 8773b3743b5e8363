"""`kv-gym train`: a policy from traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kv_gym.cli.options import Device, Dtype, Progress, Setting, named_model, settings_from


def train(
    agent: Annotated[
        str,
        typer.Argument(
            help="end_to_end, joint, expected, rloo, grpo, ppo, distill, foresight or kvzap; "
            "settings in agents/<agent>.yml."
        ),
    ],
    traces: Annotated[Path, typer.Option(help="Trace set; its split `train` is used.")],
    out: Annotated[Path, typer.Option(help="Folder of the exported policy; run again to resume.")],
    seed: Annotated[int, typer.Option(help="Of weights and draws.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the networks.")] = None,
    rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    setting: Setting = None,
    init: Annotated[Path | None, typer.Option(help="Exported policy to start from.")] = None,
    model: Annotated[str | None, typer.Option(help="Of the traces; `end_to_end` trains through it.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    resume: Annotated[
        bool | None, typer.Option(help="Go on or refuse, or start anew (default: go on where it can).")
    ] = None,
    progress: Progress = True,
) -> None:
    """Train an eviction policy and export its best checkpoint."""
    from kv_gym.training import train as train_agent
    from kv_gym.training.registry import load_settings

    settings = settings_from(setting, steps=steps, hidden=hidden, rate=rate)
    load_settings(agent, **settings)  # refuses names that are no settings, such as seed
    policy = train_agent(
        agent, traces, out, seed=seed, init=init, resume=resume, progress=progress,
        model=None if model is None else named_model(model, device, dtype)[0],
        **settings,
    )  # fmt: skip
    typer.echo(f"{out}: held-out reward {policy.training['held_out_reward']:.4f}, {policy.nbytes():,} bytes of weights")
