"""The page of findings: what every benchmark beside the headline and the leaderboard found, made of its results.

``publish.py`` writes it to ``benchmarks/RESULTS.md``. A benchmark that has not been run has no section.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ablation
import hardening
import novels
import rl_gain
import transfer

from kv_gym.evaluation.leaderboard import accuracy_table, read_rows

WHY = """`joint` ranks list-wise by `layers` where it is given the model, and by `mean` where it is not: nothing that
is learned from attention answers more from the smallest caches, `output_layers` alone as much. Attention kept is a
proxy of answers, and the smaller the cache, the worse a one. Hidden states as the only input answer more still
(`kv-gym record --hidden`, then `--set inputs=[hidden]`), but vary more between seeds, and a policy of theirs scores a
token when it comes and never again: it cannot cut a cache that was filled without it, and so they are no default.
Training through the model, `end_to_end`, holds the most of all, and is what `kv-gym fit` trains.
"""


def read(file: Path) -> dict[str, Any]:
    """What a benchmark wrote."""
    return json.loads(file.read_text(encoding="utf-8"))


def of_ablation(results: Path) -> str:
    """What makes a ranking good."""
    data = read(results / "ablation.json")
    tables = ablation.table([*data["rows"], *data["means"]]).rstrip()
    return f"{ablation.introduction(data)}\n{WHY}\n{tables}"


def of_rl_gain(results: Path) -> str:
    """What reinforcement learning adds."""
    data = read(results / "rl_gain.json")
    introduction = (
        f"What KVEvict-v0 pays in eviction mode at 1/4 on unseen dialogues, mean over {data['seeds']} training seeds, "
        "with half a 95 % interval; differences are paired by seed."
    )
    return f"{introduction}\n\n{rl_gain.markdown(data['rows'], data['differences'])}"


def of_transfer(results: Path) -> str:
    """Used on longer contexts than trained on."""
    data = read(results / "transfer.json")
    introduction = (
        f"Percent right, one threshold over all slots, means over {data['seeds']} training seeds; the difference, in "
        "points, is that of the policy trained on 512 words to the one trained on 1,024, paired by seed, with half a "
        "95 % interval. The model itself was trained on up to 1,024 words."
    )
    return f"{introduction}\n\n{transfer.markdown(data['differences'])}"


def of_novels(results: Path) -> str:
    """Perplexity of a text."""
    introduction = (
        "Nats per token of four held-out novels, read in blocks of 32 tokens with the cache cut after each, by a "
        "pretrained model of 260,000 parameters (stories, not novels, taught it: it makes little of a far context). "
        "Learned policies are means over training seeds on other novels, with the settings of their files; heuristics "
        "have what did best on another novel. Last: what the smallest cache costs against the full one, in nats, "
        "paired over stretches, with half a 95 % interval."
    )
    return f"{introduction}\n\n{novels.markdown(read_rows(results / 'novels'))}"


def of_both_decisions(results: Path) -> str:
    """One policy for prefill and decode."""
    rows = read_rows(results / "both_decisions")
    tables = [f"**{task}**\n\n{accuracy_table(rows, task)}" for task in sorted({row["task"] for row in rows})]
    introduction = (
        "Percent right of `end_to_end` trained on decisions at the end of a prompt, in the midst of a text, and on "
        "half of each; means over three training seeds. Recall is cut once, the others as the text goes on."
    )
    return "\n\n".join([introduction, *tables])


def of_hardening(results: Path) -> str:
    """Damaged files and disturbed commands."""
    data = read(results / "hardening.json")
    introduction = (
        "Every file format that is read was damaged at random, and every command that runs long was killed at random "
        "moments, started on a disk too small and without rights, sent signals, and run twice in one folder at once "
        f"(`hardening.py`, seed {data['seed']}, which says what each column counts). *Accepted*: other data was read "
        "by right, because no hash covers a file that people write, or all of its hashes were forged with it. "
        "*Memory*: more than ten times the file above what reading the sample takes, and 16 MiB; for texts, of which "
        "tokens are made, 500 times. *Equal afterwards*: kills after which the same command ended with the result of "
        "an undisturbed run. *As expected*: one sentence and exit code 2 with the earlier output as it was, or after "
        "a signal the undisturbed result."
    )
    return f"{introduction}\n\n{hardening.markdown(data)}"


SECTIONS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "ablation.json": ("What makes one ranking over all slots good", of_ablation),
    "rl_gain.json": ("What reinforcement learning adds to a supervised start", of_rl_gain),
    "both_decisions": ("One policy for prefill and decode", of_both_decisions),
    "transfer.json": ("Longer contexts than trained on", of_transfer),
    "novels": ("Perplexity of novels", of_novels),
    "hardening.json": ("How hard it was tried", of_hardening),
}


def findings(results: Path) -> str:
    """The page, of what lies in a folder of results; "" where that is nothing."""
    sections = [f"## {title}\n\n{of(results)}" for name, (title, of) in SECTIONS.items() if (results / name).exists()]
    if not sections:
        return ""
    head = (
        "# Findings\n\nOn the bundled model, whose main table is in [results.md](../docs/results.md); all policies are "
        "in [BENCHMARK.md](../BENCHMARK.md). This page is written by `python benchmarks/publish.py` from `results/`; "
        "the commands are in [README.md](README.md)."
    )
    return "\n\n".join([head, *sections]) + "\n"
