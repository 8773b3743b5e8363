"""The command line: kv-gym record | train | evaluate | export | generate | report | trace | policies | demo."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from kv_gym import __version__
from kv_gym.errors import UserError

app = typer.Typer(
    help="The gym for KV-cache eviction: record, replay, train, compare, export, decode.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
trace_app = typer.Typer(help="Look at recorded traces.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(trace_app, name="trace")

Model = Annotated[str, typer.Option("--model", help="Folder or hub id of a transformers decoder, or `reference`.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on CPU), float32, bfloat16 or float16.")]
Progress = Annotated[bool, typer.Option(help="Show progress bars.")]
Sinks = Annotated[int | None, typer.Option(help="First tokens always kept (default: the policy's own).")]
Recent = Annotated[int | None, typer.Option(help="Last tokens always kept (default: the policy's own).")]
Evicted = Annotated[
    str, typer.Option(help="Evicted pairs: drop, merge, merge:values, bits:2, bits:4 ... (`evaluate`: with commas).")
]
ReferenceTask = Annotated[str, typer.Option("--task", help="With --tasks reference: which task.")]
ReferenceTokens = Annotated[int, typer.Option("--tokens", help="Length of a reference context, in words.")]


def _model(name: str, device: str, dtype: str):
    from kv_gym.reference import MODEL
    from kv_gym.traces import load_model

    return load_model(MODEL if name == "reference" else name, device=device, dtype=dtype)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kv-gym {__version__}")
        raise typer.Exit


@app.callback()
def options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """The gym for KV-cache eviction: record, replay, train, compare, export, decode."""


@app.command()
def record(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the trace set; run again to resume.")],
    prompts: Annotated[Path | None, typer.Option(help="JSON lines with context and continuations.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file, cut into contexts and continuations.")] = None,
    tasks: Annotated[str | None, typer.Option(help="`reference`: the bundled task generator.")] = None,
    task: ReferenceTask = "multi_key",
    tokens: Annotated[int, typer.Option(help="With --text or --tasks: tokens per context.")] = 512,
    continuation_tokens: Annotated[int, typer.Option(help="With --text: tokens per continuation.")] = 128,
    continuations: Annotated[int, typer.Option(min=1, help="With --tasks: questions per context.")] = 8,
    count: Annotated[int, typer.Option(help="How many contexts.")] = 64,
    split: Annotated[
        str, typer.Option(help="With --text or --tasks: train or test (of --tasks: the pinned ones).")
    ] = "train",
    seed: Annotated[int, typer.Option(help="With --tasks: names the training contexts.")] = 0,
    window: Annotated[int, typer.Option(help="How many of the last context queries to keep.")] = 32,
    stats: Annotated[str, typer.Option(help="Policies whose statistics to record, with commas; '' for none.")] = "h2o",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    progress: Progress = True,
) -> None:
    """Record what a model's later queries attended to."""
    if sum(source is not None for source in (prompts, text, tasks)) != 1:
        raise UserError("record needs exactly one of --prompts FILE.jsonl, --text FILE or --tasks reference")
    from kv_gym.traces import prompts_from_jsonl, prompts_from_text
    from kv_gym.traces import record as record_traces

    if tasks is not None and tasks != "reference":
        raise UserError(f"unknown --tasks {tasks!r}; expected `reference` (or use --prompts FILE.jsonl)")
    loaded, tokenizer = _model(model, device, dtype)
    recipe: dict[str, object]
    if prompts is not None:
        source, recipe = prompts_from_jsonl(prompts, tokenizer), {"source": "prompts"}
    elif text is not None:
        source = prompts_from_text(text, tokenizer, tokens, continuation_tokens, count, split)
        recipe = {"source": "text", "file": text.name, "tokens": tokens, "continuation_tokens": continuation_tokens}
    else:
        from kv_gym.reference.prompts import reference_prompts, reference_recipe

        source = list(reference_prompts(task, tokens, count, continuations, split, seed))
        recipe = reference_recipe(task, tokens, continuations, split, seed)
    names = tuple(name for name in stats.split(",") if name)
    done = record_traces(
        loaded, source, out, tokenizer=tokenizer, window=window, stats=names, recipe=recipe, progress=progress
    )
    typer.echo(f"{len(done)} contexts in {out}")


@app.command()
def train(
    agent: Annotated[
        str,
        typer.Argument(
            help="end_to_end, joint, expected, rloo, grpo, ppo, distill or foresight; settings in agents/<agent>.yml."
        ),
    ],
    traces: Annotated[Path, typer.Option(help="Trace set; its split `train` is used.")],
    out: Annotated[Path, typer.Option(help="Folder of the exported policy; run again to resume.")],
    seed: Annotated[int, typer.Option(help="Of weights and draws.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the networks.")] = None,
    rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
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

    policy = train_agent(
        agent, traces, out, seed=seed, init=init, resume=resume, progress=progress,
        model=None if model is None else _model(model, device, dtype)[0],
        steps=steps, hidden=hidden, rate=rate,
    )  # fmt: skip
    typer.echo(f"{out}: held-out reward {policy.training['held_out_reward']:.4f}, {policy.nbytes():,} bytes of weights")


@app.command()
def evaluate(
    policies: Annotated[str, typer.Option(help="Names, class paths or folders, with commas.")],
    budgets: Annotated[
        str, typer.Option(help="Slots per head or shares, with commas: 64,0.25,1/8.")
    ] = "0.5,0.25,0.125",
    traces: Annotated[Path | None, typer.Option(help="Replay on this trace set.")] = None,
    model: Annotated[str | None, typer.Option(help="Decode with this model (or `reference`).")] = None,
    tasks: Annotated[str | None, typer.Option(help="Task file (JSON lines), or `reference`.")] = None,
    task: ReferenceTask = "multi_key",
    tokens: ReferenceTokens = 512,
    count: Annotated[int | None, typer.Option(help="With --tasks reference: how many contexts (default: all).")] = None,
    split: Annotated[str, typer.Option(help="Of the traces; `all` takes every context.")] = "test",
    sinks: Sinks = None,
    recent: Recent = None,
    allocation: Annotated[str, typer.Option(help="uniform, global, global:NORMALISATION ...; several with commas.")] = (
        "uniform"
    ),
    evicted: Evicted = "drop",
    json: Annotated[Path | None, typer.Option(help="File to write the result to.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    progress: Progress = True,
) -> None:
    """Compare policies on traces (replay) or on a decoding model (live)."""
    from kv_gym.budgets import parse_budget
    from kv_gym.evaluation import evaluate as compare
    from kv_gym.evaluation.report import markdown, merged
    from kv_gym.evaluation.tasks import read_tasks, reference_tasks

    chosen = [parse_budget(budget) for budget in budgets.split(",")]
    loaded = asked = None
    if model is not None:
        if tasks is None:
            raise UserError("evaluate --model needs --tasks FILE.jsonl or --tasks reference")
        loaded, tokenizer = _model(model, device, dtype)
        asked = reference_tasks(task, tokens, count) if tasks == "reference" else read_tasks(tasks, tokenizer)
    data = compare(
        [name.strip() for name in policies.split(",") if name.strip()], chosen, traces=traces, model=loaded,
        tasks=asked, split=None if split == "all" else split, sinks=sinks, recent=recent,
        allocations=[name.strip() for name in allocation.split(",")], json=json, progress=progress,
        evicted=[name.strip() for name in evicted.split(",")],
    )  # fmt: skip
    typer.echo(markdown(merged(data)))


@app.command()
def calibrate(
    policy: Annotated[str, typer.Argument(help="Name, class path or folder.")],
    traces: Annotated[Path, typer.Option(help="Trace set.")],
    out: Annotated[Path, typer.Option(help="File to write, for `--allocation calibrated:FILE`.")],
    budgets: Annotated[str, typer.Option(help="Shares of the tokens, with commas.")] = "1/2,1/4,1/8,1/16,1/32",
    split: Annotated[str, typer.Option(help="Of the traces; `all` takes every context.")] = "train",
    sinks: Sinks = None,
    recent: Recent = None,
    progress: Progress = True,
) -> None:
    """Find thresholds for budgets on traces, so that a long prompt can be cut layer by layer."""
    import json

    from kv_gym.budgets import format_budget
    from kv_gym.evaluation import calibrate as find

    rule = find(
        policy, traces, budgets.split(","), out, split=None if split == "all" else split, sinks=sinks, recent=recent,
        progress=progress,
    )  # fmt: skip
    about = json.loads(rule.about)
    for row in zip(rule.shares, rule.thresholds, about["kept_mean"], about["kept_deviation"], strict=True):
        share, threshold, mean, deviation = row
        typer.echo(f"{format_budget(share):>8}  score from {threshold:.4g}  kept {mean:.4f} +- {deviation:.4f}")
    typer.echo(f"{out}: {about['contexts']} contexts of {about['lengths'][0]} to {about['lengths'][1]} tokens")


@app.command()
def export(
    policy: Annotated[str, typer.Argument(help="A trained policy's folder or hub id.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write: weights, description and card.")] = None,
    tensors: Annotated[Path | None, typer.Option(help="File to write: plain tensors for a port (safetensors).")] = None,
) -> None:
    """Write a trained policy into a folder of its own, or as plain tensors for other engines."""
    if out is None and tensors is None:
        raise UserError("export needs something to write: --out FOLDER or --tensors FILE")
    if out is not None:
        from kv_gym.training import export as write_policy

        typer.echo(f"exported to {write_policy(policy, out)}")
    if tensors is not None:
        from kv_gym.interop import export_tensors

        typer.echo(f"tensors in {export_tensors(policy, tensors)}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on with.")],
    policy: Annotated[str, typer.Option(help="Name, class path or folder.")] = "keydiff",
    budget: Annotated[str, typer.Option(help="Slots per head or a share.")] = "0.25",
    trigger: Annotated[str, typer.Option(help="prefill, every:K, block:K or lagged:K.")] = "prefill",
    allocation: Annotated[str, typer.Option(help="uniform, global or global:NORMALISATION.")] = "uniform",
    evicted: Evicted = "drop",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to generate.")] = 64,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Generate text with an evicting cache and show what the cache held."""
    from kv_gym.budgets import parse_budget
    from kv_gym.live.generate import generate as decode

    share = parse_budget(budget)
    loaded, tokenizer = _model(model, device, dtype)
    if tokenizer is None:
        raise UserError(f"model {model} has no tokenizer, so text cannot be read; use kv_gym.EvictingCache in Python")
    held = decode(loaded, tokenizer, prompt, policy, share, trigger, allocation, max_new_tokens, _stream, evicted)
    fewest, most = held.spread
    heads = "each head" if fewest == most else f"a head on average ({fewest:,} to {most:,})"
    typer.echo(f"\n[cache: {held.kept:,.6g} of {held.seen:,} tokens in {heads}, {held.nbytes:,} bytes]", err=True)


def _stream(text: str) -> None:
    typer.echo(text, nl=False)  # flushes, so that words appear as they come


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="JSON files that `kv-gym evaluate --json` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md and report.png.")],
) -> None:
    """Write result files as a table and a picture."""
    from kv_gym.evaluation.report import report as write_report
    from kv_gym.evaluation.result import read_json

    typer.echo(f"wrote {write_report([read_json(file) for file in results], out)}")


@app.command()
def policies() -> None:
    """List the bundled policies, each with the first sentence of its file."""
    from importlib import import_module

    from kv_gym.policies import list_policies

    for name in list_policies():
        about = import_module(f"kv_gym.policies.{name}").__doc__ or ""
        typer.echo(f"{name:20} {' '.join(about.split(chr(10) * 2)[0].split())}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the training contexts and of the policy.")] = 0,
    progress: Progress = True,
) -> None:
    """The main job on the bundled reference model: record, train, compare, export, decode."""
    from kv_gym.demo import demo as run

    run(out, seed, progress)


@trace_app.command("info")
def trace_info(path: Annotated[Path, typer.Argument(help="Folder or file.")]) -> None:
    """What a trace set holds."""
    from kv_gym.traces import info

    for name, value in info(path).items():
        typer.echo(f"{name}: {value}")


@trace_app.command("validate")
def trace_validate(path: Annotated[Path, typer.Argument(help="Folder or file.")]) -> None:
    """Read everything and check it."""
    from kv_gym.traces import validate

    for name, value in validate(path).items():
        typer.echo(f"{name}: {value}")


@trace_app.command("show")
def trace_show(
    path: Annotated[Path, typer.Argument(help="Folder or file.")],
    sequence: Annotated[str, typer.Option(help="Id or number of the context.")] = "0",
) -> None:
    """Show one context and what its future kept."""
    from rich.console import Console

    from kv_gym.traces import show

    Console().print(show(path, sequence))


def main() -> None:
    """Entry point: a user's mistake is one sentence on stderr and exit code 2."""
    sys.path.append(os.getcwd())  # a policy of one's own, my_policy:MyPolicy, lies where the command is typed
    warnings.formatwarning = lambda message, *_: f"kv-gym: note: {message}\n"  # type: ignore[assignment]
    try:
        app()
    except UserError as error:
        typer.echo(f"kv-gym: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"kv-gym: cannot use {error.filename}: {error.strerror}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:
            typer.echo("kv-gym: interrupted; run the same command again to go on", err=True)
        raise


if __name__ == "__main__":
    main()
