"""Episodes of a dialogue (EpiCache) against one cache of as many slots, and against SnapKV.

    python benchmarks/episodes.py --json benchmarks/results/episodes.json   # measures, then writes docs/episodes.md
    python benchmarks/episodes.py --page                                    # writes docs/episodes.md from the results

Dialogues of four topics, of which questions name one by its people; no compression sees a question. Each episode has a
cache of the budget, so that a question meets as many slots whichever way the cache is held. Settings are those of the
published code, smaller where the dialogue is: blocks of 64 tokens. Nothing is tuned on the dialogues. A configuration
that is in the file already is not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measured_page import measure_or_write

from kv_gym import make_policy
from kv_gym.budgets import format_budget
from kv_gym.evaluation.configurations import Configuration, full_cache
from kv_gym.evaluation.measure import measure
from kv_gym.evaluation.rows import FULL, read_result, result, write_json
from kv_gym.evaluation.statistics import paired_difference
from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.evaluation.tasks.scripted import TaskScript
from kv_gym.live.episodic_cache import EpisodeSettings, parse_episodes
from kv_gym.markdown import pipe_table
from kv_gym.models import load_model
from kv_gym.reference import MODEL

RESULTS, PAGE = Path("benchmarks/results/episodes.json"), Path("docs/episodes.md")
TASK, BUDGETS = "dialogue:512:topics=4", (1 / 8,)
PAPER = "[2509.17396](https://arxiv.org/abs/2509.17396)"
ONE, WRONG, CHOSEN = "1", "4:match=worst", "4"
DIVISIONS = {
    ("epicache", CHOSEN): "four episodes, chosen by the question (dot)",
    ("epicache", "4:match=cosine"): "four episodes, chosen by the question (cosine)",
    ("epicache", WRONG): "four episodes, the wrong one on purpose",
    ("epicache", ONE): "one cache, same blocks, a probe as long",
    ("snapkv", "none"): "SnapKV, the last 32 queries, dialogue read at once",
    ("keydiff", "none"): "KeyDiff, dialogue read at once",
    ("epicache", "1:medoids=32"): "one cache, same blocks, all windows as probe",
}
CLAIMS = (
    ("four episodes answer more than one cache", ("epicache", CHOSEN), ("epicache", ONE)),
    ("four episodes answer more than one cache whose probe is all windows", ("epicache", CHOSEN),
     ("epicache", "1:medoids=32")),
    ("one cache answers more than SnapKV", ("epicache", ONE), ("snapkv", "none")),
    ("the wrong episode answers less than one cache", ("epicache", ONE), ("epicache", WRONG)),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=24, help="dialogues")
    measure_or_write(parser, RESULTS, PAGE, run, page)


def run(file: Path, contexts: int) -> None:
    """Measure what the file does not hold yet, one configuration after the other."""
    rows = read_result(file)["rows"] if file.is_file() else []
    model, tokenizer = load_model(MODEL)
    tasks = parse_tasks(TASK, tokenizer, contexts)
    wanted = [full_cache()]
    wanted += [
        Configuration(policy, make_policy(policy), budget, episodes=parse_episodes(episodes))
        for budget in BUDGETS
        for policy, episodes in DIVISIONS
    ]
    found = found_episodes(model, tasks[0].scripts)
    for configuration in wanted:
        about = configuration.fields()
        if any(all(row[name] == about[name] for name in ("policy", "budget", "episodes")) for row in rows):
            continue
        rows += measure(model, tasks, [configuration])
        write_json(file, result(rows, model="reference", found=found))


def found_episodes(model, scripts: Sequence[TaskScript]) -> dict[str, float]:
    """Share of the questions whose fact lies in a window of the episode that they choose, by the rule of matching."""
    shares = {}
    for match in ("dot", "cosine"):
        right = []
        for script in scripts:
            ids, settings = script.segments[0].ids, EpisodeSettings(match=match)
            episodes = settings.find(model, ids, script.utterances)
            ends = [*script.utterances[settings.window - 1 :: settings.window], len(ids)]
            for question in script.questions:
                fact = (*question.question_ids[1:], *question.answer_ids)
                place = next(start for start in range(len(ids)) if ids[start : start + len(fact)] == fact)
                window = next(number for number, end in enumerate(ends) if place < end)
                right.append(window in episodes.members[episodes.choose(question.question_ids)])
        shares[match] = sum(right) / len(right)
    return shares


def page(data: Mapping[str, Any]) -> str:
    """The page, of committed results alone."""
    rows = {(row["policy"], row["episodes"], row["budget"]): row for row in data["rows"]}
    full = rows[FULL, "none", 1.0]
    lines, claims = [], []
    for budget in BUDGETS:
        for (policy, episodes), what in DIVISIONS.items():
            row = rows[policy, episodes, budget]
            read = "shared" if row["tokens_read"] is None else f"{row['tokens_read']:,.0f}"
            slots = sum(map(sum, row["slots"])) / sum(map(len, row["slots"]))
            accuracy, size = f"{100 * row['accuracy']:.1f}", f"{row['cache_bytes'] / 1000:,.0f}"
            lines.append((what, format_budget(budget), accuracy, f"{slots:.0f}", size, read))
        for sentence, ours, theirs in CLAIMS:
            found = paired_difference([rows[*ours, budget]], [rows[*theirs, budget]])
            assert found is not None
            interval = f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
            verdict = "yes" if found.low > 0 else "no" if found.high < 0 else "open"
            claims.append((sentence, format_budget(budget), interval, verdict))
    parts = [
        "# Episodes of a dialogue",
        f"Made by `python benchmarks/episodes.py --json {RESULTS}`: the bundled model on {full['n']} held-out "
        f"dialogues (`{TASK}`), {full['questions']} questions, none of them seen by a compression. Full cache: "
        f"{100 * full['accuracy']:.1f} %. *Slots* are those of each KV head that a question meets; *kilobytes* are of "
        "all caches of a dialogue, of which a question needs one; *tokens read* are those that the model reads before "
        "the questions, probes included: a dialogue has 513, and configurations without episodes share one reading.",
        pipe_table(("cache", "budget", "accuracy, %", "slots", "kilobytes", "tokens read"), lines, None),
        "Differences with their 95 % intervals, paired over dialogues: a sentence holds (*yes*) where the whole "
        "interval is above zero, does not (*no*) where all of it is below, and is *open* otherwise.",
        pipe_table((f"EpiCache ({PAPER})", "budget", "difference, points", "holds"), claims, None),
        f"{100 * data['found']['dot']:.0f} % of the questions choose an episode that their fact's window is in "
        f"({100 * data['found']['cosine']:.0f} % by cosines): input embeddings know words, and not what a conversation "
        "is about. The published code says the same of them and prefers a model of sentences. SnapKV and KeyDiff read "
        "the whole dialogue at once here, and their peak is the full cache; that of reading in blocks is the budget "
        "and a block.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
