"""The verbs of `kv-gym`, in the order of the work: each calls its Python twin and prints what came of it.

Options, defaults and help texts come from the twin (:mod:`kv_gym.cli.from_signature`). What stands here is what only
a command line needs: files and names instead of objects.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kv_gym.cli.from_signature import Call, Device, Dtype, load_named_model, verb
from kv_gym.errors import UserError, printable
from kv_gym.files import atomic_write, parse_yaml

app = typer.Typer(
    help="The gym for KV-cache eviction: record, replay, train, compare, export, decode.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
pages = typer.Typer(
    help="Eviction of whole pages: prompt blocks and web objects.", no_args_is_help=True, rich_markup_mode=None
)
trace = typer.Typer(help="Look at recorded traces.", no_args_is_help=True, rich_markup_mode=None)

ReferenceTask = Annotated[str, typer.Option("--task", help="With --tasks reference: which task.")]
ReferenceTokens = Annotated[int, typer.Option("--tokens", help="Length of a reference context, in words.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of the agent, as in its file; repeatable."),
]
Chat = Annotated[bool, typer.Option("--chat", help="Render questions and messages by the model's chat template.")]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps.")]


def _say(text: object, *, err: bool = False, nl: bool = True) -> None:
    """Print a text in which names and words may be anybody's."""
    typer.echo(printable(str(text), kept="\n\t"), err=err, nl=nl)


@verb(app, "kv_gym.traces.record")
def _record(
    call: Call,
    prompts: Annotated[
        Path | None,
        typer.Option(readable=False, help="JSON lines, or a data set's file, with context and continuations."),
    ] = None,
    chat: Chat = False,
    text: Annotated[
        Path | None, typer.Option(readable=False, help="A text file, cut into contexts and continuations.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="`reference`, the bundled task generator; or tasks by name, such as needle:640:keys=4:split=train, or "
            "a file of questions."
        ),
    ] = None,
    task: ReferenceTask = "multi_key",
    tokens: Annotated[int, typer.Option(help="With --text or reference: tokens per context.")] = 512,
    continuation_tokens: Annotated[int, typer.Option(help="With --text: tokens per continuation.")] = 128,
    continuations: Annotated[int, typer.Option(min=1, help="With reference: questions per context.")] = 8,
    count: Annotated[int, typer.Option(min=1, help="How many contexts.")] = 64,
    split: Annotated[
        str, typer.Option(help="Of the traces: train or test (of reference: the pinned contexts).")
    ] = "train",
    seed: Annotated[int, typer.Option(help="With reference: names the training contexts.")] = 0,
) -> None:
    if sum(source is not None for source in (prompts, text, tasks)) != 1:
        raise UserError("record needs exactly one of --prompts FILE.jsonl, --text FILE or --tasks TASKS")
    if chat and (text is not None or tasks == "reference"):
        raise UserError("--chat renders what --prompts or --tasks name; leave it out")
    from kv_gym.traces import prompts_from_text, read_prompts

    _, tokenizer = call.model
    recipe: dict[str, object]
    if prompts is not None:
        listed, recipe = read_prompts(prompts, tokenizer, chat), {"source": "prompts"}
    elif text is not None:
        listed = prompts_from_text(text, tokenizer, tokens, continuation_tokens, count, split)
        recipe = {"source": "text", "file": text.name, "tokens": tokens, "continuation_tokens": continuation_tokens}
    elif tasks is not None and tasks != "reference":
        from kv_gym.evaluation.tasks import parse_tasks
        from kv_gym.evaluation.tasks.prompts import prompts_of_tasks

        listed = prompts_of_tasks(parse_tasks(tasks, tokenizer, count, chat), split)
        recipe = {"source": "tasks", "tasks": tasks}
    else:
        from kv_gym.reference.prompts import reference_prompts, reference_recipe

        listed = list(reference_prompts(task, tokens, count, continuations, split, seed))
        recipe = reference_recipe(task, tokens, continuations, split, seed)
    recipe |= {"chat": True} if chat else {}
    _say(f"{len(call(prompts=listed, recipe=recipe))} contexts in {call['out']}")


@verb(app, "kv_gym.training.train", arguments=("agent",))
def _train(
    call: Call,
    traces: Annotated[
        str | None,
        typer.Option(
            help="Trace set, of which the split `train` is used; several with commas, or a folder of them, are read as "
            "one.",
            metavar="A,B,...",
            show_default=False,
        ),
    ] = None,
    stream: Annotated[
        Path | None,
        typer.Option(
            help="In place of --traces: prompts as for `record --prompts`. --model records each context when it is "
            "drawn, and again where --memory had no room for it. No traces are written.",
        ),
    ] = None,
    slots: Annotated[int | None, typer.Option(help="With --stream: as for `record`.")] = None,
    chat: Chat = False,
    steps: Steps = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the networks.")] = None,
    rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    setting: Setting = None,
) -> None:
    from kv_gym.training.registry import agent_settings, learner_class

    settings = _settings(setting, steps=steps, hidden=hidden, rate=rate)
    resolved = agent_settings(call["agent"], **settings)  # refuses unknown names before the model loads
    if (traces is None) == (stream is None):
        raise UserError("train needs either --traces SET or --stream FILE.jsonl with --model")
    source: Any = None if traces is None else [part.strip() for part in traces.split(",") if part.strip()]
    if stream is not None:
        if call.model_name is None:
            raise UserError("--stream records contexts while it trains: name the model to record (--model)")
        from kv_gym.traces import StreamedTraces, read_prompts

        model, tokenizer = call.model
        listed = read_prompts(stream, tokenizer, chat)
        stats = learner_class(call["agent"]).statistics(resolved)
        hidden_states = "hidden" in resolved.inputs
        source = StreamedTraces(model, listed, tokenizer, slots=slots, hidden=hidden_states, stats=stats)
    elif chat or slots is not None:
        raise UserError("--chat and --slots are for --stream; leave them out")
    policy = call(traces=source, **settings)
    if int(os.environ.get("RANK", 0)):  # of the processes that torchrun started the first one speaks
        return
    reward, size = policy.training["held_out_reward"], policy.nbytes()
    _say(f"{call['out']}: held-out reward {reward:.4f}, {size:,} bytes of weights")


@verb(
    app, "kv_gym.training.less.train_less", rename={"texts": "text"}, kinds={"texts": list}, command_name="train-less"
)
def _train_less(call: Call, steps: Steps = None, setting: Setting = None) -> None:
    from kv_gym.files import read_text
    from kv_gym.models.loading import text_ids

    settings = _settings(setting, steps=steps)
    contents = [read_text(file) for file in call["texts"]]  # before the model loads
    _, tokenizer = call.model
    if tokenizer is None:
        raise UserError(f"model {call.model_name} came without a tokenizer, so text cannot be read: train in Python")
    state = call(texts=[text_ids(tokenizer, text) for text in contents], **settings)
    error, size = state.training["error"], state.weight_bytes
    typer.echo(f"{call['out']}: held-out error {error:.3f} times that of dropping, {size:,} bytes of weights")


@verb(
    app,
    "kv_gym.evaluation.evaluate",
    rename={"allocations": "allocation"},
    defaults={"budgets": ["0.5", "0.25", "0.125"]},
    kinds={"policies": list},
)
def _evaluate(
    call: Call,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="What to ask a --model, with commas: FILE.jsonl, multi_key:512, multi_key:512:seen, dialogue:512, "
            "copy:128, fact:1024, text:FILE, ruler:FILE, longbench:FILE; or `reference` with --task and --tokens."
        ),
    ] = None,
    task: ReferenceTask = "multi_key",
    tokens: ReferenceTokens = 512,
    count: Annotated[int | None, typer.Option(help="Contexts of each task (default: all).")] = None,
    decision_value: Annotated[
        str | None, typer.Option(help="With --traces: what each policy's cuts are worth against this baseline's.")
    ] = None,
) -> None:
    with_model = call.model_name is not None
    if decision_value is not None:
        if call["traces"] is None or with_model or "evicted" in call.given:
            raise UserError("--decision-value replays traces: give --traces, and neither --model nor --evicted")
        from kv_gym.evaluation.decision_value import decision_table

        data = call.other("kv_gym.evaluation.decision_value", baseline=decision_value)
        _say(decision_table(data["rows"]))
        return
    if (call["traces"] is None) == (not with_model):
        raise UserError("evaluate compares either on --traces or on a --model with --tasks; give exactly one of them")
    questions: list | None = None
    if with_model:
        if tasks is None:
            raise UserError("evaluate --model needs --tasks: a name such as multi_key:512, or FILE.jsonl")
        from kv_gym.evaluation.tasks import parse_tasks, reference_tasks

        _, tokenizer = call.model
        if tasks == "reference":
            questions = reference_tasks(task, tokens, count, tokenizer=tokenizer)
        else:
            questions = parse_tasks(tasks, tokenizer, count, call["chat"])
    from kv_gym.evaluation.report import markdown, merged

    data = call(tasks=questions)
    _say(markdown(merged(data)))
    for sentence in data["left_out"]:
        _say(f"left out: {sentence}", err=True)


@verb(app, "kv_gym.evaluation.leaderboard.leaderboard", arguments=("spec",))
def _leaderboard(
    call: Call,
    publish: Annotated[Path | None, typer.Option(help="Folder to write compact rows into, a file per task.")] = None,
    page: Annotated[Path | None, typer.Option(help="Markdown file to write the tables into.")] = None,
) -> None:
    from kv_gym.evaluation import leaderboard
    from kv_gym.evaluation.rows import refuse_unwritable

    for file in (page, None if publish is None else publish / "task.jsonl"):
        if file is not None:
            refuse_unwritable(file)
    alone = call["workers"] is None and call["ray"] is None
    rows = call(**({"workers": 2} if alone else {}))
    refused = sum(bool(row.get("refused")) for row in rows)
    out = str(call["out"]).rstrip("/")
    _say(f"{len(rows)} rows in {out}/rows.jsonl" + (f", {refused} of them refused" if refused else ""))
    if publish is not None:
        for file in leaderboard.publish(rows, publish):
            _say(f"{file}: {file.stat().st_size:,} bytes")
    if page is not None:
        with atomic_write(page) as part:
            part.write_text(leaderboard.page(leaderboard.compact(rows)), encoding="utf-8")
        _say(f"wrote {page}")


@verb(
    app,
    "kv_gym.evaluation.calibrate",
    arguments=("policy",),
    rename={"shares": "budgets"},
    defaults={"shares": ["1/2", "1/4", "1/8", "1/16", "1/32"]},
)
def _calibrate(call: Call) -> None:
    from kv_gym.budgets import format_budget

    rule = call()
    about = json.loads(rule.about)
    for row in zip(rule.shares, rule.thresholds, about["kept_mean"], about["kept_deviation"], strict=True):
        share, threshold, mean, deviation = row
        _say(f"{format_budget(share):>8}  score from {threshold:.4g}  kept {mean:.4f} +- {deviation:.4f}")
    shortest, longest = about["lengths"]
    _say(f"{call['out'] or 'measured on'}: {about['contexts']} contexts of {shortest} to {longest} tokens")


@verb(app, "kv_gym.training.export", arguments=("policy",), defaults={"out": None})
def _export(
    call: Call,
    tensors: Annotated[Path | None, typer.Option(help="File to write: plain tensors for a port (safetensors).")] = None,
) -> None:
    if call["out"] is None and tensors is None:
        raise UserError("export needs something to write: --out FOLDER or --tensors FILE")
    if call["out"] is not None:
        _say(f"exported to {call()}")
    if tensors is not None:
        from kv_gym.interop import export_tensors

        _say(f"tensors in {export_tensors(call['policy'], tensors)}")


@verb(app, "kv_gym.publishing.push_to_hub", arguments=("path", "repo_id"), command_name="push")
def _push(call: Call) -> None:
    typer.echo(call())


@verb(app, "kv_gym.live.generate")
def _generate(call: Call) -> None:
    from kv_gym.budgets import parse_budget

    parse_budget(call["budget"])  # before the model loads
    if call.model[1] is None:
        raise UserError(
            f"model {call.model_name} has no tokenizer, so text cannot be read; use kv_gym.EvictingCache in Python"
        )
    done = call(write=lambda text: _say(text, nl=False))  # it flushes, so that words appear as they come
    _say(f"\n[cache: {done.cache_held}]", err=True)


@verb(app, "kv_gym.live.chat", kinds={"lines": None})
def _chat(call: Call) -> None:
    from kv_gym.budgets import parse_budget

    parse_budget(call["budget"])  # before the model loads
    call()


@verb(app, "kv_gym.serving.make_server", kinds={"api_key": None}, command_name="serve")
def _serve(call: Call) -> None:
    from kv_gym.budgets import parse_budget
    from kv_gym.serving import make_server  # noqa: F401 (packages that are missing are named before the model loads)
    from kv_gym.serving.server import KEY_VARIABLE

    parse_budget(call["budget"])
    name = call["name"] or Path(call.model_name or "").name
    call(name=name, api_key=os.environ.get(KEY_VARIABLE) or None).run()


@verb(
    app,
    "kv_gym.evaluation.report.report",
    arguments=("results",),
    defaults={"results": None},
    kinds={"results": list, "tokens": None},
)
def _report(
    call: Call,
    model: Annotated[
        str | None, typer.Option(help="Show which tokens stay: folder, GGUF file or hub id of a model, or `reference`.")
    ] = None,
    policies: Annotated[str, typer.Option(help="With --model: names, class paths or folders, with commas.")] = "",
    tasks: Annotated[str, typer.Option(help="With --model: task file (JSON lines), or `reference`.")] = "reference",
    task: ReferenceTask = "multi_key",
    tokens: ReferenceTokens = 512,
    context: Annotated[int, typer.Option(min=0, help="With --model: which context, from 0.")] = 0,
    chat: Chat = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    from kv_gym.evaluation.report import read_results
    from kv_gym.evaluation.report.charts import altair

    altair()
    if not call["results"] and model is None:
        raise UserError("report needs something to show: files of results, or --model and --policies")
    if (model is None) != (not policies):
        raise UserError("the token view needs both --model and --policies; give both or neither")
    read = read_results(call["results"] or ())
    view = None
    if model is not None:
        view = _token_view(load_named_model(model, device, dtype), policies, tasks, task, tokens, context, chat)
    _say(f"wrote {call(results=read, tokens=view)}")


def _token_view(
    loaded: tuple[Any, Any], policies: str, tasks: str, task: str, tokens: int, number: int, chat: bool
) -> dict:
    from itertools import islice

    from kv_gym.evaluation.report.token_view import token_view
    from kv_gym.evaluation.tasks import read_tasks, reference_tasks
    from kv_gym.policies import make_policy
    from kv_gym.reference.heldout import held_out

    model, tokenizer = loaded
    names = [name.strip() for name in policies.split(",") if name.strip()]
    by_name = {Path(name).name if Path(name).is_dir() else name: make_policy(name) for name in names}
    marked = None
    if tasks == "reference":
        contexts = reference_tasks(task, tokens, number + 1)
        sample = next(islice(held_out(task, tokens).make(), number, None), None)
        marked = None if sample is None else [i + 1 for i in sample.fact_values]  # <bos> stands before the words
    else:
        contexts = read_tasks(tasks, tokenizer, chat)
    if number >= len(contexts):
        raise UserError(f"there is no context {number}; the tasks hold {len(contexts)}, counted from 0")
    decode = tokenizer.decode if tokenizer is not None else lambda ids: " ".join(map(str, ids))
    return token_view(model, contexts[number], by_name, decode, marked)


@app.command("policies")
def _policies(
    table: Annotated[
        bool, typer.Option("--table", help="All methods with papers and needs, as a Markdown page (docs/methods.md).")
    ] = False,
) -> None:
    """List the bundled policies, each with the first sentence of its file."""
    from kv_gym.policies import list_policies, policy_class

    if table:
        from kv_gym.method_table import method_tables

        _say(method_tables(), nl=False)
        return
    from importlib import import_module

    for name in list_policies():
        about = import_module(policy_class(name).__module__).__doc__ or ""
        _say(f"{name:24} {' '.join(about.split(chr(10) * 2)[0].split())}")


@verb(app, "kv_gym.fit.fit", kinds={"data": Path})
def _fit(call: Call, steps: Steps = None, setting: Setting = None) -> None:
    done = call(**_settings(setting, steps=steps))
    for sentence in done["verdict"]:
        _say(sentence)
    spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in done["seconds"].items())
    _say(f"{call['out']}: card in README.md, figures in fit.json, the policy in policy/ ({spent})")


@verb(app, "kv_gym.fit.demo.demo")
def _demo(call: Call) -> None:
    call()


@verb(trace, "kv_gym.traces.info", arguments=("path",))
@verb(trace, "kv_gym.traces.validate", arguments=("path",))
def _trace_facts(call: Call) -> None:
    for name, value in call().items():
        _say(f"{name}: {value}")


@verb(trace, "kv_gym.traces.show", arguments=("path",))
def _trace_show(call: Call) -> None:
    from rich.console import Console

    Console().print(call())


@verb(pages, "kv_gym.pages.summarise_requests", arguments=("path",), command_name="info")
def _pages_info(call: Call) -> None:
    for name, value in call().items():
        _say(f"{name}: {'-' if value is None else value}")


@verb(
    pages,
    "kv_gym.pages.compare_page_policies",
    arguments=("requests",),
    rename={"capacities": "capacity"},
    kinds={"requests": Path, "policies": list},
    command_name="simulate",
)
def _pages_simulate(
    call: Call, json_file: Annotated[Path | None, typer.Option("--json", help="File to write the rows to.")] = None
) -> None:
    from kv_gym.evaluation.rows import refuse_unwritable, write_json
    from kv_gym.markdown import pipe_table

    if json_file is not None:
        refuse_unwritable(json_file)
    rows = call()
    head = ["policy", "seed", "capacity", "hit rate", "byte hit rate"]
    _say(pipe_table(head, [_page_cells(row) for row in rows], left=2))
    if json_file is not None:
        write_json(json_file, {"rows": rows})


def _page_cells(row: dict) -> list[str]:
    seed = "" if row["seed"] is None else str(row["seed"])
    bytes_found = "-" if row["byte_hit_rate"] is None else f"{row['byte_hit_rate']:.4f}"
    return [row["policy"], seed, f"{row['capacity']:,}", f"{row['hit_rate']:.4f}", bytes_found]


@verb(
    pages, "kv_gym.pages.train_pages", arguments=("agent", "requests"), kinds={"requests": Path}, command_name="train"
)
def _pages_train(call: Call) -> None:
    card = call().card
    rates = ", ".join(f"{name} {rate:.4f}" for name, rate in card.validation.items())
    stands_in = "; it is worse than LRU there, so LRU stands in" if card.fallback else ""
    _say(f"{call['out']}: hit rate on the validation part: {rates}{stands_in}")


@verb(pages, "kv_gym.pages.export_page_policy", arguments=("policy",), kinds={"policy": Path}, command_name="export")
def _pages_export(call: Call) -> None:
    _say(call())


app.add_typer(trace, name="trace")
app.add_typer(pages, name="pages")


def _settings(written: list[str] | None, **options: Any) -> dict[str, Any]:
    """Settings of an agent: ``NAME=VALUE`` with values as YAML, and those that have an option of their own."""
    settings = {name: value for name, value in options.items() if value is not None}
    for text in written or ():
        name, equals, value = text.partition("=")
        if not equals or not name or name in settings:
            raise UserError(f"--set got {text!r}; expected NAME=VALUE, each name once, such as --set contexts=4")
        settings[name] = parse_yaml(value, f"--set {name}", "expected a value as in agents/*.yml, such as 4 or [0, 0]")
    return settings
