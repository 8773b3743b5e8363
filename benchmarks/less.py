"""LESS on running text: what a low-rank state of evicted pairs is worth beside as many bytes of slots.

    python benchmarks/less.py --data ../shared/data --out runs/less --json benchmarks/results/less.json

The model is stories260K (Llama architecture, pretrained, 512 tokens, heads of 8), as in `benchmarks/novels.py`. Two
kinds of text: novels, of which kernels are trained on some and tested on others, and stories that the model itself
wrote at temperature 1, of which the full cache is the best predictor there is. Kernels are trained for each policy that
evicts in training, on stories three times, and serve both budgets. Stretches of 512 tokens are read in blocks of 64 and
the cache is cut after each: by dropping, by dropping with as many slots more as the state has bytes, and with the
state. Needs the data folder; goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from kv_gym import make_policy
from kv_gym.errors import UserError
from kv_gym.evaluation.configurations import Configuration, full_cache
from kv_gym.evaluation.measure import measure
from kv_gym.evaluation.rows import read_result, result, write_json
from kv_gym.evaluation.statistics import mean_interval
from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.evaluation.tasks.perplexity import window_script
from kv_gym.evaluation.tasks.scripted import ScriptedTask
from kv_gym.files import read_json, read_text
from kv_gym.markdown import pipe_table
from kv_gym.models import load_model
from kv_gym.models.loading import text_ids
from kv_gym.training.less import train_less

HELD_OUT = ("Woolf_Lighthouse_1927", "Stevenson_Treasure_1883", "Hardy_Tess_1891", "Kipling_Kim_1901")
POLICIES = ("streaming_llm", "h2o")  # the paper's two
BUDGETS = (32, 64)
TOKENS = 512
STATE_SLOTS = 4  # a state of rank 8 takes 4 * 8 * (8 + 1) bytes per KV head, and 4 slots with positions take as many
SETTINGS = {"width": 64, "rows": 2, "block": 64, "queries": 32, "every": 50}
STEPS = {"novels": 500, "stories": 200}
RUNS = {"novels": 1, "stories": 3}  # of training
STATES = tuple(f"{corpus}/{policy}" for corpus in STEPS for policy in POLICIES)
CHARACTERS = 60_000  # of each novel that is trained on
STORIES = 96  # texts of 512 tokens that the model writes for training; as many as stretches of all novels for testing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/stories260K and corpora/novels")
    parser.add_argument("--out", type=Path, default=Path("runs/less"), help="for stories and trained states")
    parser.add_argument("--stretches", type=int, default=12, help="of each held-out novel")
    parser.add_argument("--states", default=",".join(STATES), help="kinds of text, each with a policy")
    parser.add_argument("--train-only", action="store_true", help="train the states, and measure nothing")
    parser.add_argument("--json", type=Path, help="write the rows to this file, beside those of other kinds of text")
    arguments = parser.parse_args()
    novels, folder = arguments.data / "corpora" / "novels", arguments.data / "models" / "stories260K"
    for needed in (novels, folder):
        if not needed.is_dir():
            raise UserError(f"{needed} is not there; give the folder that holds it with --data")
    torch.set_num_threads(1)
    model, tokenizer = load_model(folder)
    files = sorted(file for file in novels.glob("*.txt") if file.stem not in HELD_OUT)
    count = arguments.stretches * len(HELD_OUT)
    written = stories(model, tokenizer, arguments.out / "stories.json", STORIES + count)
    texts = {
        "novels": [text_ids(tokenizer, read_text(file)[:CHARACTERS]) for file in files],
        "stories": [[token for story in written[:STORIES] for token in story]],
    }
    form = f"tokens={TOKENS}:block={SETTINGS['block']}:count={arguments.stretches}"
    tasks = {
        "novels": [
            task
            for name in HELD_OUT
            for task in parse_tasks(f"text:{novels / name}.txt:{form}", tokenizer, arguments.stretches)
        ],
        "stories": [
            ScriptedTask(
                f"stories {TOKENS}", f"block:{SETTINGS['block']}",
                [window_script(tuple(ids), number, SETTINGS["block"]) for number, ids in enumerate(written[STORIES:])],
            )
        ],
    }  # fmt: skip
    training: dict[str, dict[str, Any]] = {}
    configurations: dict[str, list[Configuration]] = {}
    for corpus, _, policy in (name.partition("/") for name in arguments.states.split(",")):
        settings, place = SETTINGS | {"steps": STEPS[corpus]}, arguments.out / corpus
        states = [
            train_less(texts[corpus], place / f"{policy}-{seed}", model=model, policy=policy, seed=seed, **settings)
            for seed in range(RUNS[corpus])
        ]
        about = {"errors": [each.training["error"] for each in states], "weight_bytes": states[0].weight_bytes}
        training.setdefault(corpus, {})[policy] = states[0].training | about
        compared, score = configurations.setdefault(corpus, [full_cache()]), make_policy(policy)
        for budget in BUDGETS:
            compared += [
                Configuration(f"{policy}, drop", score, budget),
                Configuration(f"{policy}, drop, {STATE_SLOTS} slots more", score, budget + STATE_SLOTS),
                *(
                    Configuration(f"{policy}, less", score, budget, evicted=state, seed=seed)
                    for seed, state in enumerate(states)
                ),
            ]
    if arguments.train_only:
        return
    rows = [row for corpus, compared in configurations.items() for row in measure(model, tasks[corpus], compared)]
    if arguments.json is not None:
        before = read_result(arguments.json) if arguments.json.is_file() else {"rows": [], "training": {}}
        for corpus in before["training"].keys() - training.keys():
            training[corpus] = before["training"][corpus]
            rows += of_corpus(before["rows"], corpus)
        write_json(arguments.json, result(rows, training=training))
    for corpus, trained in training.items():
        print(f"{corpus}\n\n{markdown(of_corpus(rows, corpus), trained)}\n")


def stories(model, tokenizer, file: Path, count: int) -> list[list[int]]:
    """Texts of 512 tokens that the model writes at temperature 1, kept in a file."""
    if file.is_file():
        return read_json(file, "remove it to have them written again")
    torch.manual_seed(0)
    written: list[list[int]] = []
    with torch.no_grad():
        for rows in torch.full((count, 1), tokenizer.bos_token_id).split(48):
            written += model.generate(
                rows, attention_mask=torch.ones_like(rows), max_length=TOKENS, do_sample=True, top_k=0,
                suppress_tokens=[tokenizer.eos_token_id],
            ).tolist()  # fmt: skip
    write_json(file, written)
    return written


def of_corpus(rows: Sequence[Mapping[str, Any]], corpus: str) -> list[Mapping[str, Any]]:
    """The rows of novels or of stories."""
    return [row for row in rows if row["task"].startswith("stories") == (corpus == "stories")]


def markdown(rows: Sequence[Mapping[str, Any]], training: Mapping[str, Mapping[str, Any]]) -> str:
    """NLL in nats per token over all stretches, and differences paired by stretch, of the means over training runs."""
    losses = _losses(rows)
    full = losses["full_cache", 1.0]
    lines: list[Sequence[str]] = [("full cache", "", _bytes(rows, "full_cache", 1.0), _mean(full), "", "", "")]
    for policy in training:
        for budget in BUDGETS:
            before: Mapping[str, float] | None = None
            for name, slots in (
                ("drop", budget), (f"drop, {STATE_SLOTS} slots more", budget + STATE_SLOTS), ("less", budget),
            ):  # fmt: skip
                own, size = losses[f"{policy}, {name}", slots], _bytes(rows, f"{policy}, {name}", slots)
                gain = ("", "") if before is None else _gain(before, own)
                lines.append((f"{policy}, {budget} slots", name, size, _mean(own), _gap(full, own), *gain))
                before = own
    gains = "lost to the full cache", "gain on the line above", "holds"
    head = ("policy and budget", "evicted pairs", "bytes", "NLL", *gains)
    return pipe_table(head, lines, 2)


def _losses(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, float], dict[str, float]]:
    """Configuration and slots -> stretch -> nats per token, as a mean over training runs."""
    found: dict[tuple[str, float], dict[str, list[float]]] = {}
    for row in rows:
        own = found.setdefault((row["policy"], row["budget"]), {})
        for name, (_, asked, lost) in row["contexts"].items():
            own.setdefault(f"{row['task']} {name}", []).append(lost / asked)
    return {key: {name: fmean(losses) for name, losses in own.items()} for key, own in found.items()}


def _mean(losses: Mapping[str, float]) -> str:
    return f"{sum(losses.values()) / len(losses):.4f}"


def _gap(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    gap, half = mean_interval([after[name] - before[name] for name in after])
    return f"{gap:+.4f} ± {half:.4f}"


def _gain(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[str, str]:
    """By how much NLL falls, and whether the whole interval says that it does."""
    gap, half = mean_interval([before[name] - after[name] for name in after])
    return f"{gap:+.4f} ± {half:.4f}", "open" if abs(gap) <= half else "yes" if gap > 0 else "no"


def _bytes(rows: Sequence[Mapping[str, Any]], policy: str, budget: float) -> str:
    sizes = [row["cache_bytes"] for row in rows if (row["policy"], row["budget"]) == (policy, budget)]
    return f"{sum(sizes) / len(sizes):,.0f}"


if __name__ == "__main__":
    main()
