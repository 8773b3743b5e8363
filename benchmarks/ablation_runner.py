"""Training and judging the rows of ``ablation.py``, each variant and seed in a folder of its own."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from ablation_rows import NAMED, Variant, reads_hidden
from zoo import training_contexts

from kv_gym.errors import UserError
from kv_gym.evaluation import evaluate
from kv_gym.evaluation.rows import read_result, result, write_json
from kv_gym.evaluation.tasks import TaskContext, reference_tasks, tasks_hash
from kv_gym.policies import Policy, make_policy
from kv_gym.policies.scorer import Scorer
from kv_gym.reference import MODEL
from kv_gym.reference.prompts import reference_prompts
from kv_gym.traces import Prompt, Sequence, TraceSet, load_model, open_traces, record
from kv_gym.training import train

TOTALS = (1 / 8, 1 / 16, 1 / 32, 1 / 64)
VALIDATION_SEED = 899  # of contexts that are neither trained on nor held out
# scores of one head say nothing of another's: normalised, and as they are where a policy says that they compare
HEURISTIC_RULES = ("uniform", "ada:softmax", "ada:zscore", "pyramid", "global:softmax", "global:zscore")


class Loaded(TraceSet):
    """Training contexts that are read once for all trainings on them."""

    @cached_property
    def _read(self) -> list[Sequence]:
        return super().load()

    def select(self, split: str | None = None, task: str | None = None) -> TraceSet:
        """Itself: all of it is for training."""
        return self

    def load(self) -> list[Sequence]:
        """All sequences, in memory."""
        return self._read


def validation_tasks(count: int) -> list[TaskContext]:
    """Questions about contexts of :data:`VALIDATION_SEED`."""
    return reference_tasks("multi_key", 512, count, VALIDATION_SEED)


class Runner:
    """What all variants share, in one process."""

    def __init__(self, arguments: argparse.Namespace):
        """Load the model and the questions."""
        torch.set_num_threads(1)
        self.arguments, self.out = arguments, arguments.out
        self.model, self.tokenizer = load_model(MODEL)
        self.tasks = validation_tasks(arguments.contexts)
        self._hashes: dict[Path, str] = {}
        self._folder, self._training = Path(), Loaded([], {})

    def record_all(self, variants: list[Variant]) -> None:
        """Record what is missing, before workers share it: training contexts, again with hidden states if asked."""
        _ = self.validation
        for seed in range(self.arguments.seeds):
            plain = training_contexts(self.model, self.tokenizer, self.folder(seed, False), ["multi_key"], seed)
            folder = self.folder(seed, True)
            there = len(open_traces(folder)) if any(folder.glob("*.h5")) else 0
            if any(reads_hidden(variant) for variant in variants) and there < len(plain):
                record(self.model, map(prompt_of, plain), folder, tokenizer=self.tokenizer, hidden=True)

    def folder(self, seed: int, hidden: bool) -> Path:
        """Where the training contexts of a seed are."""
        return self.out / f"train-hidden-{seed}" if hidden else self.arguments.traces / f"train-{seed}"

    @cached_property
    def validation(self) -> TraceSet:
        """The validation contexts, recorded."""
        prompts = list(reference_prompts("multi_key", 512, self.arguments.contexts, 8, "train", VALIDATION_SEED))
        if [tuple(prompt.context_ids) for prompt in prompts] != [context.context_ids for context in self.tasks]:
            raise UserError(f"prompts of seed {VALIDATION_SEED} are not the contexts that validation asks about")
        folder = self.out / f"validation-{self.arguments.contexts}"
        return record(self.model, prompts, folder, tokenizer=self.tokenizer, hidden=True, progress=False)

    def training(self, seed: int, hidden: bool) -> Loaded:
        """Training contexts; those used last stay in memory."""
        folder = self.folder(seed, hidden)
        if folder != self._folder:
            there = open_traces(folder)
            self._folder, self._training = folder, Loaded(there.entries, there.manifest)
        return self._training

    def hash(self, folder: Path) -> str:
        """Of training contexts, read once."""
        if folder not in self._hashes:
            self._hashes[folder] = open_traces(folder).hash
        return self._hashes[folder]

    def place(self, variant: Variant, seed: int) -> Path:
        """The folder of a variant and seed, named by all that its result depends on."""
        start = self.place(NAMED[variant.init], seed).name if variant.init else ""
        traces = self.hash(self.folder(seed, reads_hidden(variant)))
        content = [
            variant.agent,
            variant.chosen(self.arguments.steps),
            start,
            traces,
            tasks_hash(self.tasks),
            variant.rules,
        ]
        digest = hashlib.sha256(json.dumps([*content, TOTALS]).encode()).hexdigest()[:10]
        return self.out / f"{variant.name.replace(' ', '_').replace(',', '')}-{seed}-{digest}"

    def policy(self, variant: Variant, seed: int) -> Scorer:
        """The trained policy: the zoo's where that is the same, else one of its own."""
        own = self.place(variant, seed) / "policy"
        zoo = self.arguments.traces / f"{variant.agent}-{seed}"
        # what `joint` chooses its checkpoint by is no setting, so that an older one of the zoo would pass for the same
        reuse = variant == NAMED["end_to_end"] and (zoo / "policy.json").is_file()
        for folder in ([zoo] if reuse else []) + [own]:
            try:
                return train(
                    variant.agent, self.training(seed, reads_hidden(variant)), folder, seed=seed, model=self.model,
                    init=self.place(NAMED[variant.init], seed) / "policy" if variant.init else None, progress=False,
                    **variant.chosen(self.arguments.steps),
                )  # fmt: skip
            except UserError:
                if folder == own:
                    raise
        raise AssertionError

    def measure(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Train and judge a variant, unless that was done."""
        file = self.place(variant, seed) / "rows.json"
        if not file.is_file():
            policy = self.policy(variant, seed)
            rows = self.judge(policy, variant.rules)
            write_json(file, result(rows, seconds=policy.training["seconds"], settings=policy.training["settings"]))
        return read_result(file)

    def heuristic(self, name: str) -> dict[str, Any]:
        """Judge a heuristic, unless that was done."""
        text = json.dumps([tasks_hash(self.tasks), TOTALS, HEURISTIC_RULES])
        file = self.out / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"
        if not file.is_file():
            rules = (*HEURISTIC_RULES, *(("ada", "global") if make_policy(name).comparable else ()))
            write_json(file, result(self.judge(make_policy(name), rules)))
        return read_result(file)

    def judge(self, policy: Policy, rules: tuple[str, ...]) -> list[dict]:
        """Rows of total, rule, accuracy and utility kept."""
        settings = {"allocations": rules, "progress": False}
        live = evaluate({"": policy}, TOTALS, model=self.model, tasks=self.tasks, **settings)["rows"]
        kept = evaluate({"": policy}, TOTALS, traces=self.validation, split=None, **settings)["rows"]
        utility = {(row["budget"], row["allocation"]): row["utility_kept"] for row in kept}
        return [
            {name: row[name] for name in ("policy", "budget", "allocation", "accuracy", "nll", "n")}
            | {"utility_kept": utility.get((row["budget"], row["allocation"]))}
            for row in live
        ]


def prompt_of(sequence: Sequence) -> Prompt:
    """The prompt that a context was recorded of."""
    asked = [continuation.tokens.tolist() for continuation in sequence.continuations]
    return Prompt(sequence.id, sequence.tokens.tolist(), asked, sequence.task, sequence.split, sequence.text_hash)


@cache
def runner_of(arguments: str) -> Runner:
    """One for each process, since a model is loaded with it."""
    names = json.loads(arguments)
    return Runner(argparse.Namespace(**names | {name: Path(names[name]) for name in ("out", "traces")}))


def work(job: tuple[str, str, int, float]) -> str:
    """Do one job, of the arguments, a row's or a heuristic's name, a seed and when to start no more: what to print."""
    arguments, name, seed, until = job
    runner, began = runner_of(arguments), time.time()
    if began > until:
        return ""
    if name in NAMED:
        runner.measure(NAMED[name], seed)
    else:
        runner.heuristic(name)
    return f"{name}, seed {seed}: {time.time() - began:.0f} s"
