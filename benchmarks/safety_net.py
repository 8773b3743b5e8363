"""Does a signal tell the answers that eviction spoilt? Judged against output entropy alone, on recall tasks.

    OMP_NUM_THREADS=1 python benchmarks/safety_net.py

The bundled reference model reads contexts of 512 words (tasks `multi_key` and `single`), a policy compresses them,
and questions are answered greedily. An event is an answer that is wrong though the full cache's is right. Signals are
judged on the pinned held-out contexts by AUROC and by recall at 5 % false alarms. Thresholds, the one layer of
"missing, one layer", and the means and deviations (of answers that were right) in which that is added to entropy,
come from training contexts, of five seeds. Mean and 95 % interval over 1,000 resamplings of the
held-out contexts, each with the calibration of one of the seeds. `restore` puts the host's copy back where there is
an alarm, and the question is asked anew. Writes ``results/safety_net.json`` and prints tables.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch

from kv_gym.budgets import format_budget
from kv_gym.evaluation.guard_metrics import auroc, guarded_answers, recall_at, threshold_at
from kv_gym.evaluation.rows import result, write_json
from kv_gym.evaluation.tasks import TaskContext, TaskQuestion, reference_tasks
from kv_gym.live import EvictingCache, Guard, PolicyGroup
from kv_gym.models import load_model
from kv_gym.policies import make_policy
from kv_gym.reference import MODEL
from kv_gym.reference.generator import make_context
from kv_gym.reference.tokenizer import encode, word_ids

TASKS = ("multi_key", "single")
CONFIGURATIONS = (  # policy, budget, evicted: a good share of answers is wrong
    ("snapkv", 1 / 4, "drop"),
    ("h2o", 1 / 4, "drop"),
    ("streaming_llm", 1 / 4, "drop"),
    ("keydiff", 1 / 16, "drop"),
    ("streaming_llm", 1 / 64, "bits:2"),
)
OUTPUT = ("entropy", "entropy_rise", "margin")
SIGNALS = {"drop": (*OUTPUT, "missing", "unmatched", "new"), "bits:2": (*OUTPUT, "missing", "tier", "unmatched", "new")}
ONE_LAYER = "missing, one layer"
BOTH = "missing, one layer, and entropy"
FALSE_ALARMS = 0.05
RESAMPLINGS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results") / "safety_net.json")
    parser.add_argument("--contexts", type=int, default=32, help="held-out contexts of each task, 8 questions each")
    parser.add_argument("--training", type=int, default=8, help="calibration contexts of each task and seed")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    began = time.monotonic()
    model, _ = load_model(MODEL)
    judged = measure(model, {task: reference_tasks(task, 512, arguments.contexts) for task in TASKS}, restoring=True)
    calibration = [
        measure(model, {task: training_tasks(task, 900 + seed, arguments.training) for task in TASKS})
        for seed in range(arguments.seeds)
    ]
    rows, safety = [], []
    for config in CONFIGURATIONS:
        rows += signal_rows(config, judged[config], [each[config] for each in calibration])
        safety.append(restoring_row(config, judged[config], [each[config] for each in calibration]))
    overhead = step_overhead(model)
    data = result(
        rows, restore=safety, guarded_step_over_plain_step=overhead, seeds=arguments.seeds,
        contexts=arguments.contexts, false_alarms=FALSE_ALARMS, seconds=round(time.monotonic() - began, 1),
    )  # fmt: skip
    write_json(arguments.json, data)
    print(tables(data))


def training_tasks(task: str, seed: int, count: int) -> list[TaskContext]:
    """Contexts that are neither held out nor of another seed."""
    made = (make_context(task, 512, seed * 1_000_000 + i, 8) for i in range(count))
    return [
        TaskContext(
            (word_ids()["<bos>"], *encode(context.words)),
            tuple(TaskQuestion(tuple(encode(q.question)), tuple(encode(q.answer))) for q in context.questions),
            task,
        )
        for context in made
    ]


class Measured:
    """What was measured of one configuration: every entry of the lists is a tensor over the questions of one batch."""

    def __init__(self) -> None:
        self.right, self.full, self.restored = [], [], []
        self.context: list[torch.Tensor] = []
        self.signal: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.layers: list[torch.Tensor] = []
        self.bytes: dict[str, list[float]] = defaultdict(list)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def events(self) -> torch.Tensor:
        """Wrong with the evicted cache though the full one is right."""
        return torch.cat(self.full) & ~torch.cat(self.right)


@torch.no_grad()
def measure(model, tasks: dict[str, list[TaskContext]], restoring: bool = False, at_once: int = 8) -> dict:
    """Arm -> what all signals of it say; with `restoring`, also what is right when everything is put back."""
    policies = {name: make_policy(name) for name, _, _ in CONFIGURATIONS}
    everything = make_policy("recency")
    panel = PolicyGroup((everything, *policies.values()))
    measured = {config: Measured() for config in CONFIGURATIONS}
    first = 0
    for contexts in tasks.values():
        for start in range(0, len(contexts), at_once):
            batch = contexts[start : start + at_once]
            ids = torch.tensor([context.context_ids for context in batch])
            with EvictingCache(model, panel, 1.0, guard=Guard("new"), offload=True) as cache:
                model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
                with cache.fork(everything) as full:
                    right = guarded_answers(model, full, batch).correct
                for config in CONFIGURATIONS:
                    _measure_configuration(
                        model,
                        cache,
                        policies[config[0]],
                        config,
                        batch,
                        measured[config],
                        first,
                        restoring,
                    )
                    measured[config].full.append(right)
            first += len(batch)
    return measured


def _measure_configuration(model, cache, policy, config, batch, out: Measured, first: int, restoring: bool) -> None:
    with cache.fork(policy, config[1], evicted=config[2], guard=Guard("missing")) as fork:
        fork.compress()
        out.bytes["guarded"].append(fork.nbytes() / len(batch))
        out.bytes["host"].append(fork.host_nbytes() / len(batch))
        for signal in SIGNALS[config[2]]:
            with fork.fork(guard=Guard(signal)) as twin:
                if signal == "entropy":
                    out.bytes["plain"].append(twin.nbytes() / len(batch))
                seen = guarded_answers(model, twin, batch)
            out.signal[signal].append(seen.signal)
            if signal == "missing":
                out.layers.append(seen.layers)
                out.right.append(seen.correct)
                out.context.append(first + seen.row)
        if restoring:
            began = time.perf_counter()
            fork.restore()
            asked = time.perf_counter()
            out.restored.append(guarded_answers(model, fork, batch).correct)
            out.seconds["restore"].append((asked - began) / len(batch))
            out.seconds["ask"].append((time.perf_counter() - asked) / len(out.restored[-1]))
            out.bytes["restored"].append(fork.nbytes() / len(batch))


def values_of(name: str, measured: Measured, known: Measured) -> torch.Tensor:
    """A signal of all questions, or one that is made of several by what is `known` of calibration contexts."""
    if name == BOTH:
        total = torch.zeros(1, dtype=torch.float64)
        for part in (ONE_LAYER, "entropy"):
            fine = values_of(part, known, known)[~known.events()]
            total = total + (values_of(part, measured, known) - fine.mean()) / fine.std()
        return total
    if name == ONE_LAYER:
        return torch.cat(measured.layers, 1)[best_layer(known)]
    return torch.cat(measured.signal[name])


def best_layer(measured: Measured) -> int:
    """The layer whose signal tells events best."""
    of_layers, events = torch.cat(measured.layers, 1), measured.events()
    return max(range(len(of_layers)), key=lambda layer: auroc(of_layers[layer], events))


def calibrated(name: str, known: Measured) -> float:
    """The threshold that calibration contexts give."""
    return threshold_at(values_of(name, known, known)[~known.events()], FALSE_ALARMS)


def resamplings(measured: Measured):
    """Questions of contexts drawn with replacement, as indices."""
    context = torch.cat(measured.context)
    places = [(context == c).nonzero()[:, 0] for c in context.unique()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(RESAMPLINGS):
        drawn = torch.randint(0, len(places), (len(places),), generator=generator)
        yield torch.cat([places[i] for i in drawn.tolist()])


def signal_rows(config, judged: Measured, calibration: list[Measured]) -> list[dict]:
    """How well each signal tells the events of a configuration: means with 95 % intervals."""
    names = (*SIGNALS[config[2]], ONE_LAYER, BOTH)
    made = [{name: values_of(name, judged, known) for name in names} for known in calibration]
    thresholds = [{name: calibrated(name, known) for name in names} for known in calibration]
    events, samples = judged.events(), list(resamplings(judged))
    found = {name: defaultdict(list) for name in names}
    for number, sample in enumerate(samples):
        if not bool(events[sample].any()):
            continue  # where there are few events
        seed, above_entropy = number % len(calibration), None
        for name in names:
            values, hurt, threshold = made[seed][name][sample], events[sample], thresholds[seed][name]
            scored = {"auroc": auroc(values, hurt), "recall": recall_at(values, hurt, FALSE_ALARMS)}
            above_entropy = scored if name == "entropy" else above_entropy
            scored["auroc_above_entropy"] = scored["auroc"] - above_entropy["auroc"]
            scored["calibrated_recall"] = float((values[hurt] > threshold).double().mean())
            scored["calibrated_false_alarms"] = float((values[~hurt] > threshold).double().mean())
            for measure_name, value in scored.items():
                found[name][measure_name].append(value)
    return [
        {"policy": config[0], "budget": config[1], "evicted": config[2], "signal": name, "questions": len(events),
         "events": int(events.sum())} | {k: interval(v) for k, v in found[name].items()}
        for name in names
    ]  # fmt: skip


def interval(values: list[float]) -> dict[str, float]:
    """Mean, and the middle 95 % of resamplings."""
    low, high = torch.tensor(values).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"mean": statistics.fmean(values), "low": low, "high": high}


def restoring_row(config, judged: Measured, calibration: list[Measured]) -> dict:
    """Accuracy when alarms of `missing` restore the context and the question is asked anew, mean over seeds."""
    right, restored = torch.cat(judged.right), torch.cat(judged.restored)
    row = {"policy": config[0], "budget": config[1], "evicted": config[2], "accuracy": float(right.double().mean()),
           "full_cache": float(torch.cat(judged.full).double().mean()),
           "restored_as_full_cache": float((restored == torch.cat(judged.full)).double().mean())}  # fmt: skip
    for name in ("entropy", "missing"):
        alarmed = []
        for known in calibration:
            alarmed.append(values_of(name, judged, known) > calibrated(name, known))
        row[name] = {
            "alarms": statistics.fmean(float(each.double().mean()) for each in alarmed),
            "accuracy": statistics.fmean(float(torch.where(each, restored, right).double().mean()) for each in alarmed),
        }
    return row | {
        "cache_bytes": {name: statistics.fmean(values) for name, values in judged.bytes.items()},
        "seconds": {name: statistics.median(values) for name, values in judged.seconds.items()},
    }


def step_overhead(model, steps: int = 40) -> float:
    """Time of a decoding step with the guard `missing`, divided by that of one without, at 512 words kept at 1/16."""
    context = reference_tasks("multi_key", 512, 1)[0]
    times = {}
    guards = (("plain", None), ("guarded", Guard("missing")))
    caches = {name: EvictingCache(model, "keydiff", 1 / 16, guard=guard) for name, guard in guards}
    with torch.no_grad():
        for name, cache in caches.items():
            model(input_ids=torch.tensor([context.context_ids]), past_key_values=cache, logits_to_keep=1)
            times[name] = []
        token = torch.tensor([context.questions[0].question_ids[:1]])
        for _ in range(steps):
            for name, cache in caches.items():  # in turn, so that a busy machine is busy for both
                began = time.perf_counter()
                model(input_ids=token, past_key_values=cache)
                times[name].append(time.perf_counter() - began)
    return statistics.median(times["guarded"]) / statistics.median(times["plain"])


def tables(data: dict) -> str:
    """Everything in Markdown."""

    def cell(value: dict) -> str:
        return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"

    def label(row: dict) -> str:
        return f"{row['policy']} {format_budget(row['budget'])} {row['evicted']}"

    lines = [
        "| policy, budget, evicted | events | signal | AUROC | above entropy | recall at 5 % "
        "| calibrated: recall, false |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in data["rows"]:
        better = row["auroc_above_entropy"]
        verdict = f"{better['mean']:+.3f}" + (
            "" if row["signal"] == "entropy" else " better" if better["low"] > 0 else " worse" if better["high"] < 0
            else " no difference"
        )  # fmt: skip
        lines.append(
            f"| {label(row)} | {row['events']} of {row['questions']} | {row['signal']} | {cell(row['auroc'])} "
            f"| {verdict} | {cell(row['recall'])} "
            f"| {row['calibrated_recall']['mean']:.2f}, {row['calibrated_false_alarms']['mean']:.3f} |"
        )
    lines += [
        "",
        "| policy, budget, evicted | accuracy | restored by entropy | by missing | full cache | asked anew "
        "| bytes: cache, sketch, host, restored | ms: restore, question |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in data["restore"]:
        held, seconds = row["cache_bytes"], row["seconds"]
        lines.append(
            f"| {label(row)} | {row['accuracy']:.1%} "
            f"| {row['entropy']['accuracy']:.1%} | {row['missing']['accuracy']:.1%} | {row['full_cache']:.1%} "
            f"| {row['entropy']['alarms']:.0%}, {row['missing']['alarms']:.0%} "
            f"| {held['plain']:,.0f}, {held['guarded'] - held['plain']:,.0f}, {held['host']:,.0f}, "
            f"{held['restored']:,.0f} | {1000 * seconds['restore']:.1f}, {1000 * seconds['ask']:.1f} |"
        )
    lines.append(
        f"\nA decoding step with the guard takes {data['guarded_step_over_plain_step']:.2f} times one without "
        f"(512 words, 1/16 kept). {data['seconds']:.0f} s in all."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
