"""`kv-gym demo`: the main job from end to end on the bundled reference model, offline, in minutes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kv_gym.errors import UserError

POLICIES = ("random", "recency", "streaming_llm", "h2o", "snapkv", "tova", "knorm", "keydiff")
BUDGETS = (1 / 4, 1 / 8, 1 / 16)
TASK, TOKENS = "multi_key", 512
TRAINING_CONTEXTS, HELD_OUT_CONTEXTS = 160, 32
CONTINUATIONS = 8
STEPS = 300


def demo(out: str | Path = "runs/demo", seed: int = 0, progress: bool = True) -> Path:
    """Run the main job on the bundled reference model.

    Record, train, compare, export, decode; writes report, TensorBoard log and policy into `out`.

    Args:
        out: folder to write.
        seed: of the training contexts and of the policy.
        progress: show progress bars.

    Returns:
        The report's Markdown file.
    """
    from kv_gym.evaluation import evaluate, report
    from kv_gym.evaluation.report import COLUMNS, merged, table
    from kv_gym.evaluation.report.charts import altair
    from kv_gym.evaluation.tasks import reference_tasks
    from kv_gym.models import load_model
    from kv_gym.reference import MODEL
    from kv_gym.reference.prompts import reference_prompts, reference_recipe
    from kv_gym.traces import record
    from kv_gym.training import train

    out, console, began = Path(out), Console(), time.monotonic()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "traces").is_dir())):
        raise UserError(f"{out} holds other things than an earlier demo; name a new folder with --out")
    altair()  # what the report needs, asked for before the work
    model, tokenizer = load_model(MODEL)

    console.print(f"[bold]1. Record[/] what later questions attend to ({TRAINING_CONTEXTS} contexts of {TOKENS} words)")
    recorded = {}
    for split, count in (("train", TRAINING_CONTEXTS), ("test", HELD_OUT_CONTEXTS)):
        settings = (CONTINUATIONS, split, seed)
        folder = out / "traces" / (f"train-{seed}" if split == "train" else "test")
        prompts = list(reference_prompts(TASK, TOKENS, count, *settings))
        recipe = reference_recipe(TASK, TOKENS, *settings)
        recorded[split] = record(model, prompts, folder, tokenizer=tokenizer, recipe=recipe, progress=progress)

    console.print("[bold]2. Train[/] one scorer per KV head, all of them against one another")
    if (out / "training" / "policy.json").exists():  # an earlier demo's: this run trains its own
        shutil.rmtree(out / "training")
    policy = train("joint", recorded["train"], out / "training", seed=seed, steps=STEPS, progress=progress)
    exported = policy.save_pretrained(out / "policy")
    console.print(f"   exported to {exported}, {policy.nbytes():,} bytes; log: tensorboard --logdir {out}/training")

    console.print("[bold]3. Compare[/] on held-out contexts: replayed, and live with the question unseen")
    arms = {"learned": exported} | {name: name for name in POLICIES}
    replayed = evaluate(
        arms | {"oracle": "oracle"}, BUDGETS, traces=recorded["test"], json=out / "replay.json", progress=progress
    )
    tasks = reference_tasks(TASK, TOKENS, HELD_OUT_CONTEXTS)
    live = evaluate(arms, BUDGETS, model=model, tasks=tasks, json=out / "live.json", progress=progress)

    console.print("[bold]4. Answer[/] live from an eighth of the cache")
    _converse(console, model, tokenizer, exported, tasks[0])

    rows = Table(*COLUMNS, title=f"{TASK}, {TOKENS} words, {HELD_OUT_CONTEXTS * CONTINUATIONS} questions, seed {seed}")
    for line in table(merged(replayed, live)):
        rows.add_row(*line, style="bold green" if line[0] == "learned" else None)
    console.print(rows)
    written = report([replayed, live], out, title="kv_gym demo", notes=f"Task {TASK}, seed {seed}.")
    console.print(f"{written}, report.html and pictures written after {time.monotonic() - began:.0f} s")
    return written


def _converse(console: Console, model, tokenizer, policy: Path, task) -> None:
    """Ask the questions of one context of its compressed cache, with plain `generate` calls."""
    import torch

    from kv_gym.live import EvictingCache

    context = torch.tensor([task.context_ids])
    with EvictingCache(model, policy=policy, budget="1/8") as cache, torch.no_grad():
        model(input_ids=context, past_key_values=cache, logits_to_keep=1)
        console.print(f"   {cache.nbytes():,} bytes hold what is left of {context.shape[1]} tokens")
        for question in task.questions[:4]:
            with cache.fork() as fork:
                ids = torch.cat([context, torch.tensor([question.question_ids])], 1)
                size = len(question.answer_ids)
                answered = model.generate(
                    ids, past_key_values=fork, max_new_tokens=size, do_sample=False, pad_token_id=0
                )
            got, expected = answered[0, -size:].tolist(), list(question.answer_ids)
            asked, said = tokenizer.decode(question.question_ids), tokenizer.decode(got)
            verdict = "[green]right[/]" if got == expected else f"[red]wrong[/], expected {tokenizer.decode(expected)}"
            console.print(f"   {asked} -> {said}   {verdict}")
