"""What the published methods claim, as far as the bundled model can check it.

    python benchmarks/seeds.py --json benchmarks/results/seeds.json   # measures, then writes docs/seeds.md
    python benchmarks/seeds.py --page                                 # writes docs/seeds.md from the committed results

Each claim is a comparison of two ways to hold a cache on the same pinned held-out contexts, question unseen, with
nothing tuned: policies and settings are their defaults, or the paper's. Claims that need no model, or stand in another
benchmark's results, are computed or read. What is in the file already is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import attention_gate
import less
import torch

from kv_gym import EvictingCache, make_policy
from kv_gym.budgets import Budget, format_budget, parse_allocation
from kv_gym.cache_view import CacheView
from kv_gym.evaluation.configurations import Configuration, full_cache
from kv_gym.evaluation.measure import measure
from kv_gym.evaluation.rows import read_result, result, write_json
from kv_gym.evaluation.statistics import paired_difference
from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.files import atomic_write
from kv_gym.live.selection import parse_selection
from kv_gym.live.tiers import parse_tier
from kv_gym.markdown import pipe_table
from kv_gym.models import load_model
from kv_gym.reference import MODEL
from kv_gym.reference.heldout import held_out
from kv_gym.reference.tokenizer import encode, word_ids

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = Path("benchmarks/results"), Path("docs/seeds.md")
RECALL, DIALOGUE, COPY = "multi_key:512", "dialogue:512", "copy:128"
TASKS = {RECALL: "multi_key 512", DIALOGUE: "dialogue turns 512", COPY: "copy 128"}


@dataclass(frozen=True)
class Cache:
    """One way to hold a cache, by name: what `Configuration` takes, with `over` for a policy over another score."""

    policy: str
    budget: Budget
    over: str | None = None
    allocation: str = "uniform"
    evicted: str = "drop"
    select: str = "all"
    recent: int | None = None

    @property
    def name(self) -> str:
        """What rows and the table call it."""
        extra = [self.allocation] * (self.allocation != "uniform") + [self.evicted] * (self.evicted != "drop")
        extra += [self.select] * (self.select != "all")
        extra += [f"newest {self.recent} kept"] * (self.recent is not None)
        policy = self.policy if self.over is None else f"{self.policy} over {self.over}"
        return ", ".join([policy, f"budget {format_budget(self.budget)}", *extra])

    def configuration(self) -> Configuration:
        """What is measured."""
        policy = make_policy(self.policy, **({} if self.over is None else {"over": make_policy(self.over)}))
        sinks = None if self.recent is None else 0
        return Configuration(
            self.name, policy, self.budget, parse_allocation(self.allocation), parse_tier(self.evicted), sinks,
            self.recent, select=parse_selection(self.select),
        )  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper as a comparison: `ours` answers more than `theirs`, by more than `margin`.

    Attributes:
        paper: arXiv number.
        sentence: what is claimed.
        task: as :func:`kv_gym.evaluation.tasks.parse_tasks` reads it.
        ours, theirs: what is compared.
        margin: difference in accuracy that the claim allows; below zero where it says how little is lost.
    """

    paper: str
    sentence: str
    task: str
    ours: Cache
    theirs: Cache
    margin: float = 0.0


def claims() -> list[Claim]:
    """All that are measured here."""
    quarter = 0.25
    snapkv, h2o = Cache("snapkv", quarter), Cache("h2o", quarter, recent=0)
    half_recent = Cache("h2o", quarter, recent=64)
    found = [
        Claim(
            "2306.14048",
            "H2O: heavy and recent tokens, half each, keep more than heavy ones alone",
            task,
            half_recent,
            h2o,
        )
        for task in (RECALL, DIALOGUE)
    ]
    found += [
        Claim("2306.14048", "H2O: and more than recent ones alone", task, half_recent, Cache("recency", quarter))
        for task in (RECALL, DIALOGUE)
    ]
    found += [
        Claim("2402.06262", "RoCo: mean attention with protected deviations is more robust than H2O's sum", task,
              Cache("roco", quarter, recent=0), h2o)
        for task in (RECALL, DIALOGUE)
    ]  # fmt: skip
    for wrapper in ("caote", "fast_caote"):
        found += [
            Claim("2504.14051", f"CAOTE: `{wrapper}` improves the score it is put over", RECALL,
                  Cache(wrapper, quarter, over=base), Cache(base, quarter))
            for base in ("snapkv", "h2o", "tova")
        ]  # fmt: skip
    found += [
        Claim("2503.12491", "CAKE: budgets cascaded over layers keep more than equal ones", RECALL,
              Cache("cake", quarter, allocation="cake"), Cache("cake", quarter)),
        Claim("2406.13035", "D2O: merging recalls what dropping loses", RECALL,
              Cache("d2o", quarter, evicted="merge"), Cache("d2o", quarter)),
        Claim("2402.18096", "MiKV: evicted pairs in 2 bits answer more than dropping with more bytes", RECALL,
              Cache("h2o", 1 / 8, evicted="bits:2"), Cache("h2o", quarter)),
        *(Claim("2402.18096", f"MiKV: evicted pairs in {bits} bits answer more than as many bytes of slots", RECALL,
                Cache(policy, slots, evicted=f"bits:{bits}"), Cache(policy, quarter))
          for policy, bits, slots in (("h2o", 2, 90), ("h2o", 4, 60), ("keydiff", 2, 89))),
        Claim("2503.08879", "SAGE-KV: one selection by the last token is better than sinks and a window", RECALL,
              Cache("sage_kv", quarter), Cache("streaming_llm", quarter)),
        Claim("2509.00388", "GraphKV: propagation improves the score it starts from", RECALL,
              Cache("graph_kv", quarter, over="snapkv"), snapkv),
    ]  # fmt: skip
    for budget in (1.0, 0.5):
        held = Cache("keydiff", budget)
        read = {name: Cache("keydiff", budget, select=f"{name}:0.2") for name in ("mpcache", "quest", "random")}
        paired = Cache("keydiff", budget, select="mpcache:0.2:paired")
        found += [
            Claim("2501.06807", "MPCache: a fifth of the groups is within 2 points of all", RECALL,
                  read["mpcache"], held, -0.02),
            Claim("2501.06807", "MPCache: its groups are far better than random ones (10 points)", RECALL,
                  read["mpcache"], read["random"], 0.1),
            Claim("2501.06807", "MPCache: sharing between layers loses at most 2 points more", RECALL,
                  paired, read["mpcache"], -0.02),
            Claim("2406.10774", "Quest: its bound is within 2 points of reading all", RECALL,
                  read["quest"], held, -0.02),
        ]  # fmt: skip
    found += [
        Claim("2401.04881", f"Attendre: judging tokens {delay} later keeps more than judging them at once (`{name}`)",
              task, Cache(name, 0.5, recent=delay), Cache(name, 0.5, recent=0))
        for task in (DIALOGUE, COPY) for name in ("lra", "lfa") for delay in (16, 64)
    ]  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=12, help="of each task")
    parser.add_argument("--json", type=Path, help="measure, and write the rows to this file")
    parser.add_argument("--page", action="store_true", help="write docs/seeds.md from the committed results alone")
    arguments = parser.parse_args()
    if arguments.json is not None:
        run(arguments.json, arguments.contexts)
    if arguments.page or arguments.json == RESULTS / "seeds.json":
        with atomic_write(ROOT / PAGE) as part:
            part.write_text(page(ROOT / RESULTS), encoding="utf-8")
    elif arguments.json is None:
        print(page(ROOT / RESULTS))


def run(file: Path, contexts: int) -> None:
    """Measure what the file does not hold yet, task by task."""
    before = read_result(file) if file.is_file() else {"rows": []}
    rows, facts = [row for row in before["rows"] if row["n"] == contexts], before.get("facts")
    model, tokenizer = load_model(MODEL)
    for text, name in TASKS.items():
        caches = [cache for claim in claims() if claim.task == text for cache in (claim.ours, claim.theirs)]
        wanted = {configuration.name: configuration for configuration in map(Cache.configuration, caches)}
        wanted = {full_cache().name: full_cache()} | wanted
        for row in rows:
            if row["task"] == name:
                wanted.pop(row["policy"], None)
        if wanted:
            rows += measure(model, parse_tasks(text, tokenizer, contexts), list(wanted.values()))
            write_json(file, result(rows, facts=facts, cascade=before.get("cascade")))
    if facts is None:
        facts = facts_kept(model, tokenizer, contexts)
    cascade = before.get("cascade") or cake_cascade(model, contexts)
    write_json(file, result(rows, keydiff=keydiff_on_small_sets(), facts=facts, cascade=cascade))


@torch.no_grad()
def cake_cascade(model, contexts: int, budget: float = 0.25) -> dict[str, Any]:
    """CAKE's cascade against one cut of all layers: what layers hold while a context is read, and what stays.

    Returns:
        The `budget`, and by allocation the `peak`, both as shares of all slots, the largest of the contexts; and the
        `contexts`, of which so many have the `same` slots left.
    """
    peak, same = dict.fromkeys(("cake", "cake:cascade"), 0.0), 0
    for context in held_out("multi_key", 512, contexts).make(contexts):
        ids = torch.tensor([[word_ids()["<bos>"], *encode(context.words)]])
        left = []
        for allocation in peak:
            with EvictingCache(model, "cake", budget, allocation) as cache:
                every = ids.shape[1] * model.config.num_key_value_heads * len(cache.evicting_layers)

                def look(*_, cache=cache, allocation=allocation, every=every):
                    held = sum(int(state.slots.counts().sum()) for state in cache._states if state.tokens_seen)
                    peak[allocation] = max(peak[allocation], held / every)

                hooks = [layer.self_attn.register_forward_hook(look) for layer in model.model.layers]
                model(ids, past_key_values=cache)
                left.append([cache.kept_positions(layer).tolist() for layer in cache.evicting_layers])
            for hook in hooks:
                hook.remove()
        same += left[0] == left[1]
    return {"budget": budget, "peak": peak, "contexts": contexts, "same": same}


def facts_kept(model, tokenizer, contexts: int) -> dict[str, int]:
    """MiKV fact by fact, each asked alone: which are answered with evicted pairs in 2 bits, and with them dropped.

    The dropping cache has more bytes (128 slots of 512 against 64).
    """
    (task,) = parse_tasks(RECALL, tokenizer, contexts)
    compared = [Cache("h2o", 1 / 8, evicted="bits:2"), Cache("h2o", 1 / 4)]
    rows = measure(model, [replace(task, list_answers=True)], [cache.configuration() for cache in compared])
    right = [[grade == 2 for answers in row["answers"].values() for grade, _ in answers] for row in rows]
    pairs = list(zip(*right, strict=True))
    return {
        "facts": len(pairs), "lost": sum(not dropped for _, dropped in pairs),
        "kept": sum(tier and not dropped for tier, dropped in pairs),
        "lost_by_tier_alone": sum(dropped and not tier for tier, dropped in pairs),
    }  # fmt: skip


def keydiff_on_small_sets(sets: int = 200, keys: int = 10, kept: int = 5) -> dict[str, float]:
    """KeyDiff's diversity against brute force: the mean cosine similarity of the keys that stay.

    Args:
        sets: random sets; keys are normal around a common mean, as those of models are.
        keys: of each set.
        kept: how many stay.

    Returns:
        Means over the sets for `keydiff`, the `best` and the `mean` subset, and the share of sets in which KeyDiff's
        is the best (`optimal`) and better than the mean (`above_mean`).
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(sets, 1, keys, 16, generator=generator) + torch.randn(sets, 1, 1, 16, generator=generator)
    positions = torch.arange(keys).expand(sets, 1, keys)
    view = CacheView(
        drawn, drawn, positions, torch.ones_like(positions, dtype=torch.bool), torch.full((sets,), keys),
        torch.full((sets, 1), kept), 0,
    )  # fmt: skip
    chosen = make_policy("keydiff").score(view).topk(kept).indices[:, 0].sort(-1).values
    subsets = torch.tensor(list(combinations(range(keys), kept)))
    unit = torch.nn.functional.normalize(drawn[:, 0].double(), dim=-1)
    cosine = unit @ unit.mT
    similarity = cosine[:, subsets[:, :, None], subsets[:, None]].sum((2, 3)) - kept
    similarity /= kept * (kept - 1)
    own = similarity[(chosen[:, None] == subsets).all(-1)]
    return {
        "keydiff": float(own.mean()), "best": float(similarity.amin(1).mean()), "mean": float(similarity.mean()),
        "optimal": float((own <= similarity.amin(1) + 1e-9).double().mean()),
        "above_mean": float((own < similarity.mean(1)).double().mean()),
    }  # fmt: skip


def page(results: Path) -> str:
    """The page, of committed results alone."""
    data = read_result(results / "seeds.json")
    rows = {(row["task"], row["policy"]): row for row in data["rows"]}
    lines = [_line(claim, rows) for claim in claims()]
    head = ("claim", "task", "compared", "accuracy, %", "kilobytes", "difference, points", "holds")
    full = [f"{name} {100 * rows[name, 'full_cache']['accuracy']:.1f} %" for name in TASKS.values()]
    first = next(iter(rows.values()))
    parts = [
        "# What the methods' papers claim, checked here",
        "Made by `python benchmarks/seeds.py --json benchmarks/results/seeds.json`. Each row compares two ways to hold "
        f"a cache of the bundled model on the same {first['n']} held-out contexts, with the question unseen and "
        "nothing tuned. *Accuracy* and *kilobytes* (of a context's cache) are of the one to be better, then of "
        "the other. *Difference* has its 95 % interval, paired over contexts. A claim holds (*yes*) where the whole "
        "interval lies above what the claim allows, does not (*no*) where all of it lies below, and is *open* "
        "otherwise. The sentences are short forms of what the papers say. The bundled model is small (4 layers, of "
        "which one reads what another chose) and its tasks are exact recall; with the question unseen, methods that "
        "select by the last tokens (SnapKV, TOVA, SAGE-KV) do not see what their papers show them. A claim that fails "
        "here may hold on other models and tasks, and the other way round.",
        f"Full cache: {', '.join(full)}.",
        pipe_table(head, lines, None),
        "## Claims without a comparison of caches",
        pipe_table(
            ("claim", "what was run", "result", "holds"),
            [_facts(data["facts"]), *_cascade(data["cascade"]), *_keydiff(data["keydiff"]), *_foresight(results)],
            None,
        ),
        "## LESS: a state beside as many bytes of slots",
        *_less(results),
        "## Slots read and held",
        "What the queries of a question read of the slots that are held, question and answer included: mean over "
        "layers, heads and questions. The bytes are counted before the first question, when no bounds are made yet: "
        "these take two keys for every 16 slots.",
        pipe_table(("cache", "accuracy", "slots held", "slots read", "bytes"), _reading(rows), None),
        attention_gate.section(results / "attention_gate.json"),
    ]
    return "\n\n".join(parts) + "\n"


def _line(claim: Claim, rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> Sequence[str]:
    ours, theirs = (rows[TASKS[claim.task], cache.name] for cache in (claim.ours, claim.theirs))
    found = paired_difference([ours], [theirs])
    assert found is not None
    link = f"[{claim.paper}](https://arxiv.org/abs/{claim.paper})"
    compared = f"{claim.ours.name} / {claim.theirs.name}"
    accuracy = f"{100 * ours['accuracy']:.1f} / {100 * theirs['accuracy']:.1f}"
    interval = f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    size = f"{ours['cache_bytes'] / 1000:,.0f} / {theirs['cache_bytes'] / 1000:,.0f}"
    verdict = _verdict(found.low, found.high, claim.margin)
    return f"{claim.sentence} ({link})", TASKS[claim.task], compared, accuracy, size, interval, verdict


def _verdict(low: float, high: float, margin: float = 0.0) -> str:
    if low > margin:
        return "yes"
    return "no" if high < margin else "open"


def _facts(found: Mapping[str, int]) -> Sequence[str]:
    kept = f"dropping loses {found['lost']} of {found['facts']} facts, and the tier answers {found['kept']} of these"
    return (
        "MiKV: single facts that eviction loses stay in 2 bits ([2402.18096](https://arxiv.org/abs/2402.18096))",
        "multi_key 512, each fact asked alone: h2o at 1/8 with `bits:2` beside h2o at 1/4",
        f"{kept}; the other way round {found['lost_by_tier_alone']}",
        "yes" if found["kept"] > found["lost_by_tier_alone"] else "no",
    )


def _cascade(found: Mapping[str, Any]) -> list[Sequence[str]]:
    link = "([2503.12491](https://arxiv.org/abs/2503.12491))"
    what = (
        f"`cake:cascade` and `cake`, budget {format_budget(found['budget'])}, {found['contexts']} contexts of multi_key"
    )
    peaks = ", ".join(f"`{name}` {100 * peak:.1f} %" for name, peak in found["peak"].items())
    within = found["peak"]["cake:cascade"] <= found["budget"] + 0.01
    return [
        (f"CAKE: the cascade holds the memory limit while layers are read {link}", what,
         f"most slots held after a layer was cut: {peaks} of all", "yes" if within else "no"),
        (f"CAKE: and leaves what one cut of all layers leaves {link}", what,
         f"the same slots in {found['same']} of {found['contexts']}",
         "yes" if found["same"] == found["contexts"] else "no"),
    ]  # fmt: skip


def _keydiff(found: Mapping[str, float]) -> list[Sequence[str]]:
    link = "([2504.15364](https://arxiv.org/abs/2504.15364))"
    what = "all subsets of 5 of 10 random keys, 200 sets: mean cosine similarity of the keys that stay"
    means = f"{found['keydiff']:.4f}, all subsets {found['mean']:.4f}, the best {found['best']:.4f}"
    return [
        (f"KeyDiff: keeps more diverse keys than chance {link}", what,
         f"{means}; below the mean in {100 * found['above_mean']:.0f} % of the sets",
         "yes" if found["above_mean"] == 1 else "no"),
        (f"KeyDiff: keeps the most diverse keys {link}", what,
         f"the best in {100 * found['optimal']:.0f} % of the sets",
         "yes" if found["optimal"] == 1 else "no"),
    ]  # fmt: skip


def _foresight(results: Path) -> list[Sequence[str]]:
    """ForesightKV's gain, of another benchmark's results."""
    rows = json.loads((results / "rl_gain.json").read_text(encoding="utf-8"))["rows"]
    rewards = {row["configuration"]: row for row in rows if row["budget"] == 0.25}
    both, lines = rewards["golden order, then RL"], []
    for name, alone in (("golden order", "supervised learning alone"), ("RL from scratch", "RL alone")):
        other = rewards[name]
        gap, spread = both["reward"] - other["reward"], both["interval"] + other["interval"]
        said = " / ".join(f"{row['reward']:.3f} ± {row['interval']:.3f}" for row in (both, other))
        lines.append(
            (f"ForesightKV: supervised learning, then RL, is better than {alone} "
             "([2602.03203](https://arxiv.org/abs/2602.03203))",
             "`benchmarks/rl_gain.py`, budget 1/4, 5 seeds", f"reward {said}", _verdict(gap - spread, gap + spread))
        )  # fmt: skip
    return lines


def _less(results: Path) -> list[str]:
    """What another benchmark measured of LESS."""
    data = read_result(results / "less.json")
    parts = [
        "[2402.09398](https://arxiv.org/abs/2402.09398) claims, in nats per token: dropping > dropping with as many "
        "slots more as the state has bytes > LESS > the full cache. Made by `python benchmarks/less.py` with "
        "stories260K, paired by stretch, with means over training runs, on texts that no test saw. *Gain* is over the "
        "line above, and the claim holds where its whole interval is above 0. The model was trained on "
        "short stories, and on novels its full cache predicts worse than a cut one: there a state that comes nearer to "
        "the full cache loses by that, and *lost to the full cache* says how near it comes."
    ]
    for corpus, trained in data["training"].items():
        rows = less.of_corpus(data["rows"], corpus)
        stretches = sum(row["n"] for row in rows if row["policy"] == "full_cache")
        left = {policy: about.get("errors", [about["error"]]) for policy, about in trained.items()}
        errors = ", ".join(f"{policy} {100 * (1 - fmean(shares)):.0f} %" for policy, shares in left.items())
        runs, size = max(map(len, left.values())), next(iter(trained.values()))["weight_bytes"]
        parts += [
            f"{corpus.capitalize()}, {stretches} stretches; training runs of each policy's kernels: {runs}. Of the "
            "squared error that dropping makes in the layers' outputs on held-out text, training removed: "
            f"{errors}; the weights take {size:,} bytes.",
            less.markdown(rows, trained),
        ]
    return parts


def _reading(rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[Sequence[str]]:
    lines = []
    compared = {cache.name for claim in claims() if claim.ours.select != "all" for cache in (claim.ours, claim.theirs)}
    for (task, name), row in rows.items():
        if task == TASKS[RECALL] and name in compared:
            layers = row["slots"]
            held = sum(map(sum, layers)) / sum(map(len, layers))
            accuracy, size = f"{100 * row['accuracy']:.1f}", f"{row['cache_bytes']:,.0f}"
            lines.append((name, accuracy, f"{held:.0f}", f"{row['slots_read']:.0f}", size))
    return lines


if __name__ == "__main__":
    main()
