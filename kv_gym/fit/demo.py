"""`kv-gym demo`: `fit` on the bundled reference task, then the learned policy against KVP and the heuristics."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from kv_gym.budgets import format_budget, parse_allocation, parse_budget
from kv_gym.errors import UserError
from kv_gym.evaluation.configurations import FULL, Configuration
from kv_gym.evaluation.report import picture, report
from kv_gym.evaluation.report.charts import altair
from kv_gym.evaluation.rows import result, write_json
from kv_gym.evaluation.statistics import smallest_sufficient_budget
from kv_gym.evaluation.tasks import TaskContext
from kv_gym.files import refuse_address
from kv_gym.fit.card import LEARNED
from kv_gym.fit.data import read_data
from kv_gym.fit.folder import load_fit
from kv_gym.fit.loss import measure_losses
from kv_gym.fit.run import fit
from kv_gym.models import load_model
from kv_gym.models.cache_name import with_cache
from kv_gym.policies import make_policy
from kv_gym.reference import MODEL
from kv_gym.training import train

KVP = "kvp"  # the name that rows of the agent `rloo` carry
AGENT_STEPS, KVP_STEPS = 600, 200  # a half and a third of what the agents' files say, for a demo of five minutes
BUDGETS = ("1/4", "1/8", "1/16", "1/22", "1/32", "1/45")
TRAINING_CONTEXTS = 128  # half as many choose the budget, and half as many are tested on
TOKENS = 512
TOLERANCE = 0.02  # two points of accuracy; 512 questions are too few to confirm one point after losing two of them


def demo(out: str | Path = "runs/demo", seed: int = 0, progress: bool = True) -> Path:
    """Fit the bundled model and compare with KVP and heuristics.

    Trains ``end_to_end`` through the model and chooses its budget with :func:`kv_gym.fit.fit`, trains KVP on the same
    traces, measures both and the heuristics on test contexts at every budget, and reports the smallest budget of each
    that loses at most two points of accuracy (upper end of the 95 % interval). Takes about five minutes on two CPU
    cores.

    Args:
        out: folder for the report, the picture, traces, policies and TensorBoard logs. The same command continues an
            interrupted demo.
        seed: seed of the training contexts and of the policies.
        progress: show progress bars.

    Returns:
        The report's Markdown file; ``accuracy.png`` in the same folder shows accuracy over budget.

    Raises:
        UserError: the folder holds other files, or the extra ``report`` is not installed.
    """
    refuse_address(out)
    out, console, start = Path(out), Console(highlight=False), time.monotonic()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not any(out.glob("fit-*")))):
        raise UserError(f"{out} holds other files than those of an earlier demo; name a new folder with --out")
    altair()  # raises before the work if the extra is missing
    model, tokenizer = load_model(MODEL)
    settings: dict[str, Any] = {"count": TRAINING_CONTEXTS, "tokens": TOKENS, "seed": seed}
    test = read_data("reference", **settings).test

    console.print("[bold]1. Fit[/]: record, train end_to_end through the model, choose the budget, test it")
    folder = out / f"fit-{seed}"
    fitted = fit(
        model, "reference", folder, tokenizer=tokenizer, tolerance=TOLERANCE, budgets=BUDGETS, progress=progress,
        steps=AGENT_STEPS, **settings,
    )  # fmt: skip
    console.print("[bold]2. Train KVP[/] (the agent rloo) on the same traces")
    kvp = train(
        "rloo", folder / "traces", out / f"kvp-{seed}", seed=seed, steps=KVP_STEPS, progress=progress,
        device=str(model.device),
    )  # fmt: skip

    console.print(f"[bold]3. Compare[/] on {len(test)} test contexts; the question is not seen while the cache is cut")
    policies = [(LEARNED, make_policy(folder / "policy"), fitted["allocation"]), (KVP, kvp, "uniform")]
    policies += [  # each heuristic with the allocation that was best on validation contexts
        (row["policy"], make_policy(row["policy"]), row["allocation"])
        for row in fitted["rows"]
        if row["task"] == "test" and row["policy"] not in (FULL, LEARNED)
    ]
    policies.append(("kvzip", make_policy("kvzip"), "global"))
    configurations = [
        Configuration(name, policy, parse_budget(budget), parse_allocation(allocation))
        for name, policy, allocation in policies
        for budget in BUDGETS
    ]
    rows = measure_losses(model, test, f"multi_key {TOKENS}", "accuracy", configurations, progress)
    smallest = {name: _smallest_budget(rows, name) for name, _, _ in policies}
    results = result(rows, smallest_sufficient_budget=smallest)
    write_json(out / "rows.json", results)

    console.print("[bold]4. Answer[/] from the cache that was chosen")
    _answer_questions(console, model, tokenizer, folder, test[0])
    console.print(_table(rows, smallest))
    sentence = _conclusion(smallest)
    notes = f"{sentence}\n\n![accuracy over budget](accuracy.png)\n\nSeed {seed}."
    written = report([results], out, title="kv_gym demo", notes=notes)
    picture(rows, out / "accuracy.png", ["accuracy"])
    seconds = time.monotonic() - start
    console.print(f"[bold green]{sentence}[/]\nPicture: {out / 'accuracy.png'}; report: {written} ({seconds:.0f} s)")
    return written


def _smallest_budget(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    return smallest_sufficient_budget(
        (row["budget"], row["loss_upper"] <= TOLERANCE) for row in rows if row["policy"] == name
    )


def _conclusion(smallest: Mapping[str, Any]) -> str:
    """The smallest sufficient budgets of the learned policy, the best heuristic and KVP, in one sentence."""
    heuristics = {name: budget for name, budget in smallest.items() if name not in (LEARNED, KVP)}
    best = min(heuristics, key=lambda name: heuristics[name] or 1.0)
    named = {"the learned policy": LEARNED, f"the best heuristic ({best})": best, "KVP": KVP}
    parts = [f"{format_budget(smallest[name] or 1.0)} for {title}" for title, name in named.items()]
    return f"Smallest cache within {100 * TOLERANCE:.0f} points of the full cache's accuracy: {', '.join(parts)}."


def _table(rows: Sequence[Mapping[str, Any]], smallest: Mapping[str, Any]) -> Table:
    """Accuracy over budget, a line per policy, and its smallest sufficient budget."""
    title = f"Accuracy in percent (full cache {100 * rows[0]['accuracy']:.1f}) and smallest sufficient budget"
    table = Table("policy", "allocation", *BUDGETS, "smallest", title=title, box=box.SIMPLE)
    for name, budget in sorted(smallest.items(), key=lambda item: item[1] or 1.0):
        own = [row for row in rows if row["policy"] == name]
        cells = [f"{100 * row['accuracy']:.1f}" for row in own]
        table.add_row(
            name, own[0]["allocation"], *cells, format_budget(budget) if budget else "-",
            style="bold green" if name == LEARNED else None,
        )  # fmt: skip
    return table


def _answer_questions(console: Console, model: Any, tokenizer: Any, folder: Path, task: TaskContext) -> None:
    """Ask the questions of one context with plain `generate` calls, each on a fork of the compressed cache."""
    context = torch.tensor([task.context_ids])
    with load_fit(model, folder) as cache, torch.no_grad():
        model(input_ids=context, **with_cache(cache), logits_to_keep=1)
        console.print(f"   {cache.nbytes():,} bytes hold what is left of {context.shape[1]} tokens")
        for question in task.questions[:4]:
            ids = torch.cat([context, torch.tensor([question.question_ids])], 1)
            expected = list(question.answer_ids)
            with cache.fork() as fork:
                output = model.generate(
                    ids, **with_cache(fork), max_new_tokens=len(expected), do_sample=False, pad_token_id=0
                )
            answer = output[0, -len(expected) :].tolist()
            mark = "[green]correct[/]" if answer == expected else f"[red]expected {tokenizer.decode(expected)}[/]"
            console.print(f"   {tokenizer.decode(question.question_ids)} -> {tokenizer.decode(answer)}   {mark}")
