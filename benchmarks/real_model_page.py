"""The page of the real model, and the README's first screen, made of the rows that `real_model.py` published.

`publish.py` writes both: docs/real-model.md between its markers, and README.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from kv_gym.budgets import format_budget
from kv_gym.evaluation.leaderboard import accuracy_table, read_rows
from kv_gym.evaluation.report import picture
from kv_gym.evaluation.statistics import paired_difference
from kv_gym.evaluation.summary import FULL, NULLS, regrade, smallest_budgets, summarise
from kv_gym.files import read_json
from kv_gym.markdown import pipe_table

FOLDER, PICTURE, TRIED, SPEED = "real_model", "real_model.png", "targets.json", "decode_step_smollm2.json"
FIRST = "4 needles 1024"  # the task of the README
SINGLE = "needle 1024"  # the task that the full cache always answers
CLOSE = 1 / 8  # the budget that is looked at closely
PEER = "kvpress "  # what the names of `real_model_kvpress.py` begin with


def rows_of(results: Path) -> list[dict]:
    """The published rows, the README's task first."""
    rows = read_rows(results / FOLDER)
    return sorted(rows, key=lambda row: (row["task"] != FIRST, row["task"]))


def draw(results: Path) -> None:
    """The picture of the README's task."""
    rows = [row for row in _without_peers(rows_of(results)) if row["task"] == FIRST]
    if rows:
        picture(rows, results / PICTURE, ["accuracy"])


def first_screen(rows: Sequence[Mapping]) -> str:
    """Picture, table and what they show."""
    rows = _without_peers(rows)
    # variants of a policy are on the page
    shown = [row for row in rows if ", " not in row["policy"] or row["policy"].startswith("kvzip")]
    return (
        f"![accuracy over budget](benchmarks/results/{PICTURE})\n\n"
        f"{accuracy_table(shown, FIRST)}\n\n"
        f"{about(rows, FIRST)} {enough(rows)}More tasks, likelihoods and intervals: "
        "[docs/real-model.md](docs/real-model.md). The bundled model of 1.8 M parameters serves tests, demo "
        "and ablations: [docs/results.md](docs/results.md).\n"
    )


def enough(rows: Sequence[Mapping]) -> str:
    """A sentence about the task with one needle: the smallest budget of the best policies of each kind."""
    found = smallest_budgets(summarise([row for row in rows if row["task"] == SINGLE]))
    least: dict[str, float] = {}
    for (_, policy, *_), budget in found.items():
        if budget is not None and policy != FULL:
            least[policy] = min(budget, least.get(policy, 1.0))
    if "end_to_end" not in least:
        return ""
    twice = next((name for name in least if name.startswith("kvzip")), None)
    learned = {row["policy"] for row in rows if row.get("seed") is not None}
    others = [budget for name, budget in least.items() if name not in learned and name != twice]
    once = f"{format_budget(min(others))} to the best" if others else "more than a half to every"
    return (
        f"Of one needle (`{SINGLE}`), {format_budget(least['end_to_end'])} is enough to `end_to_end`, "
        + (f"{format_budget(least[twice])} to KVzip, which reads twice, and " if twice else "and ")
        + f"{once} heuristic that reads once. "
    )


def about(rows: Sequence[Mapping], task: str) -> str:
    """What a table of a task shows, and on what."""
    full = next(row for row in rows if row["task"] == task and row["policy"] == FULL)
    seeds = {row["seed"] for row in rows if row["task"] == task and row.get("seed") is not None}
    trained = f"means over {len(seeds)} training runs" if len(seeds) > 1 else "one training run"
    fitted = (
        " but `joint, fitted`" if any(row["policy"] == "joint, fitted" for row in rows if row["task"] == task) else ""
    )
    return (
        f"Percent right on {full['questions']} questions about {full['n']} contexts (`{task}`), asked of a "
        f"{full['weights']} in wordings that no policy{fitted} was trained on; the full cache answers "
        f"{full['accuracy']:.1%}. {on_fewer(rows, task, full['n'])}"
        "The question is not seen while the cache is compressed. A budget is a share of all slots of the model. "
        f"Learned policies are bold ({trained}; `rloo` is KVP's agent). Heuristics have the allocation (who gets how "
        "many slots), protected ends (`ends 4 + 32`: the first 4 and last 32 tokens stay) and window (how many of the "
        "last queries they score by) that were best on validation contexts. "
        "`smallest` is the smallest budget at and above which "
        "the lower end of a 95 % interval over contexts stays within a point of the full cache. Such an interval has "
        f"no width where every answer is right: {full['n']} contexts exclude a loss of more than about "
        f"{300 / full['n']:.0f} points."
    )


def on_fewer(rows: Sequence[Mapping], task: str, contexts: int) -> str:
    """A sentence about the policies and budgets of a task that were measured on fewer contexts; "" without any."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        if row["task"] == task and row["policy"] != FULL:
            for name in (f"`{row['policy']}`", format_budget(row["budget"])):
                counts.setdefault(name, []).append(row["n"])
    fewer = {name: max(found) for name, found in counts.items() if max(found) < contexts}
    listed = " and ".join(f"{name} on the first {count}" for name, count in fewer.items())
    return f"Measured on fewer contexts: {listed}. " if fewer else ""


def page(rows: Sequence[Mapping], results: Path) -> str:
    """Every task: accuracy at every budget, other measures of the same answers at one budget; and the utilities."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in _without_peers(rows) if row["task"] == task]
        if any(row["policy"] == FULL for row in of_task):
            if any(row.get("answers") for row in of_task):
                parts += [f"## {task}", accuracy_table(of_task, task), about(of_task, task), close_look(of_task)]
            else:
                parts += [f"## {task}", likelihoods(of_task)]
        theirs = [row for row in rows if row["task"] == task and row["policy"].startswith(PEER)]
        if theirs:
            parts += [f"### The presses of kvpress, {task}", peers(theirs, of_task)]
    if (results / FOLDER / TRIED).is_file():
        parts += ["## Which utility `joint` learns", utilities(read_rows(results / FOLDER / TRIED), rows[0]["target"])]
    if (results / SPEED).is_file():
        parts += ["## Speed of a decoding step", speed(read_json(results / SPEED)["rows"])]
    return "\n\n".join(parts) + "\n"


def speed(rows: Sequence[Mapping]) -> str:
    """Tokens per second and bytes of every configuration of `decode_step.py`, compared with the full cache's."""
    full = {row["context"]: row for row in rows if row["configuration"] == "full cache"}
    body = []
    for row in rows:
        whole = full[row["context"]]
        body.append([
            f"{row['context']:,}", row["configuration"].replace("floor", "cache that only ever held 1/8"),
            f"{row['tokens_per_second']:.1f}", f"{row['tokens_per_second'] / whole['tokens_per_second']:.2f}",
            f"{whole['bound'] / row['bound']:.2f}", f"{row['cache_bytes'] / 2**20:.0f}",
            f"{row['ratio']:.2f} of the {row['to'].replace('floor', 'first row')}",
        ])  # fmt: skip
    head = ("context", "cache", "tokens/s", "to the full cache", "bound", "MiB", "time")
    return (
        f"{pipe_table(head, body, 2)}\n\n"
        "One thread of a CPU, all configurations in turns in one run (`benchmarks/decode_step.py`), float32. `bound`: "
        "how much faster than with the full cache a step could be if nothing counted but the bytes that it reads, "
        "weights and cache. A step gains more than that, because transformers copies keys and values for grouped "
        "queries. `every 1` evicts at every step, `every 16` every 16 steps. `scorer` is an untrained network of the "
        "learned policies' size: with inputs that change, so that all slots are scored anew at every eviction, or "
        "with key and value alone, which are scored once. The trained policy is `agents/trained/smollm2`; it reads the "
        "age of a token, which changes."
    )


def likelihoods(rows: Sequence[Mapping]) -> str:
    """Nats per token at every budget, of a task whose answers are single tokens."""
    lines = [line for line in summarise(rows, "nll") if line["policy"] != FULL]
    full = next(row for row in rows if row["policy"] == FULL)
    budgets = sorted({line["budget"] for line in lines}, reverse=True)
    found: dict[tuple, dict[float, float]] = {}
    for line in lines:
        if line["learned"] or line["chosen_on_validation"] or line["policy"] in NULLS:
            found.setdefault(_label(line, line["learned"]), {})[line["budget"]] = line["nll"]
    ordered = sorted(found.items(), key=lambda item: sum(item[1].values()))
    body = [[*key, *(f"{of[budget]:.3f}" for budget in budgets)] for key, of in ordered]
    return (
        f"{pipe_table(('policy', 'allocation', *map(format_budget, budgets)), body, 2)}\n\n"
        f"Nats per token, {full['questions']} tokens of {full['n']} contexts of a {full['weights']}; the full cache "
        f"has {full['nll']:.3f}. "
        + (
            "A part of the context is to be repeated word for word, which is what KVzip scores slots by."
            if full["task"].startswith("quote")
            else "What comes next in prose depends mostly on what stands last, and on the first tokens."
        )
    )


def peers(theirs: Sequence[Mapping], ours: Sequence[Mapping]) -> str:
    """The presses of kvpress and what competes with them, on the contexts that the presses were asked about."""
    contexts = set(theirs[0]["contexts"])
    budgets = sorted({row["budget"] for row in theirs}, reverse=True)
    found: dict[tuple, dict[float, list[float]]] = {}
    for row in [*theirs, *ours]:
        competes = row.get("seed") is not None or row.get("chosen_on_validation") or row["policy"] in (FULL, *NULLS)
        if contexts <= set(row["contexts"]) and competes and (row["budget"] in budgets or row["policy"] == FULL):
            counted = [row["contexts"][name] for name in contexts]
            share = sum(right for right, *_ in counted) / sum(questions for _, questions, _ in counted)
            label = _label(row, row.get("seed") is not None)
            found.setdefault(label, {}).setdefault(row["budget"], []).append(share)
    ((_, full),) = (found.pop(key).popitem() for key in list(found) if key[0] == FULL)
    ordered = sorted(found.items(), key=lambda item: -sum(map(fmean, item[1].values())) / len(item[1]))
    body = [[*key, *(f"{100 * fmean(of[b]):.1f}" if b in of else "-" for b in budgets)] for key, of in ordered]
    questions = sum(asked for _, asked, _ in theirs[0]["contexts"].values())
    return (
        f"{pipe_table(('policy', 'allocation', *map(format_budget, budgets)), body, 2)}\n\n"
        f"Percent right on the {questions} questions about the first {len(contexts)} contexts, of which the full cache "
        f"answers {100 * fmean(full):.1f}. Rows of `kvpress` were made by `benchmarks/real_model_kvpress.py` with "
        "its own presses and transformers' cache, of which it protects what each press protects; the others are those "
        "of the table above, on the same contexts."
    )


def utilities(rows: Sequence[Mapping], chosen: str) -> str:
    """What `joint` answers on validation wordings when it learns each utility."""
    full = next(row for row in rows if row["policy"] == FULL)
    budgets = sorted({row["budget"] for row in rows if row["policy"] != FULL}, reverse=True)
    body = []
    for name in dict.fromkeys(row["policy"] for row in rows if row["policy"] != FULL):
        found = {row["budget"]: row for row in rows if row["policy"] == name}
        numbers = [f"{100 * found[b]['accuracy']:.1f} ({found[b]['nll']:.3f})" for b in budgets]
        body.append([f"**{name}**" if name == chosen else name, *numbers])
    return (
        f"{pipe_table(('utility', *map(format_budget, budgets)), body, 1)}\n\n"
        f"Percent right on {full['questions']} questions of validation wordings (nats per token of the answer), one "
        f"training run, one threshold; the full cache has {100 * full['accuracy']:.1f} ({full['nll']:.3f}). The bold "
        "one was taken, by accuracy and then by likelihood; so few questions do not tell them apart. What they mean: "
        "`kv_gym/training/targets.py`."
    )


def close_look(rows: Sequence[Mapping]) -> str:
    """Other measures of the answers of one task at one budget, paired with the full cache's."""
    shown = [row for row in rows if row.get("answers") and (row["policy"] == FULL or row["budget"] == CLOSE)]
    firsts = _by_configuration(regrade(shown, first_token=True))
    known = _by_configuration(regrade(shown, where_full_is_right=True))
    plain = _by_configuration(regrade(shown))
    (full,) = (rows for key, rows in plain.items() if key[0] == FULL)
    body = []
    for key, found in sorted(plain.items(), key=lambda item: -summarise(item[1])[0]["accuracy"]):
        difference = None if key[0] == FULL else paired_difference(found, full)
        to_full = "" if difference is None else (
            f"{100 * difference.mean:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
        )  # fmt: skip
        means = [summarise(graded[key])[0] for graded in (plain, known, firsts)]
        percent = [f"{100 * line['accuracy']:.1f}" for line in means]
        body.append([key[0], key[1], *percent, f"{means[0]['nll']:.2f}", to_full])
    head = (
        "policy",
        "allocation",
        "right",
        "of those the full cache answers",
        "first token",
        "nats per answer",
        "against full",
    )
    return (
        f"The same at {format_budget(CLOSE)}: percent right of all questions and of those that the full cache answers, "
        "percent with the right first token, negative log-likelihood of a whole answer, and the difference to the full "
        f"cache in points, paired by question, with its 95 % interval over contexts.\n\n{pipe_table(head, body, 2)}"
    )


def _label(row: Mapping, learned: bool) -> tuple[str, str]:
    """Policy, bold where it was trained, and allocation with the protected ends that were chosen."""
    ends = "" if row["sinks"] is None else f", ends {row['sinks']} + {row['recent']}"
    return f"**{row['policy']}**" if learned else row["policy"], row["allocation"] + ends


def _without_peers(rows: Sequence[Mapping]) -> list[Mapping]:
    """Rows of the contexts that all policies were asked about."""
    return [row for row in rows if not row["policy"].startswith(PEER)]


def _by_configuration(rows: Sequence[Mapping]) -> dict[tuple, list[Mapping]]:
    """Rows of each configuration, one for each training run; of heuristics only those that compete list answers."""
    found: dict[tuple, list[Mapping]] = {}
    for row in rows:
        ends = f" {row['sinks']} + {row['recent']}" if row["policy"] in NULLS and row["sinks"] is not None else ""
        found.setdefault((row["policy"], row["allocation"] + ends), []).append(row)
    return found
