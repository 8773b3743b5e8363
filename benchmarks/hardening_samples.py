"""A small sample of every file format that kv_gym reads, and how each is read, for `hardening.py`."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kv_gym import EvictingCache, calibrate, record, train
from kv_gym.budgets import parse_allocation
from kv_gym.budgets.calibrated import Calibrated
from kv_gym.errors import UserError
from kv_gym.evaluation.leaderboard import leaderboard
from kv_gym.evaluation.leaderboard.results import ResultFolder
from kv_gym.evaluation.leaderboard.spec import read_spec
from kv_gym.evaluation.report import read_results
from kv_gym.evaluation.rows import read_result
from kv_gym.evaluation.tasks import parse_tasks, read_tasks
from kv_gym.fit import fit, load_fit
from kv_gym.fit.data import read_data
from kv_gym.models import load_model
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.pages import RequestTrace, train_pages
from kv_gym.pages.policies.learned import Learned
from kv_gym.pages.readers import read_requests
from kv_gym.policies.scorer import Scorer
from kv_gym.traces import open_traces, prompts_from_jsonl, prompts_from_text, validate
from kv_gym.training.registry import agent_settings
from kv_gym.training.trainer import Trainer
from kv_gym.weights_folder import CHECKPOINT

LETTERS = "abcdefghijklmnopqrstuvwxyz .,?\n"
WORDS = "the old lamp boat river key house under sold lost found by alice bob carol and then again".split()
TEXT = "a text that people write and edit, which no hash covers"
RESULT = "measured numbers as text, which people merge and edit; no hash covers them"
RECIPE = "a field that describes and is no data"
TRAINING = {"steps": 4, "hidden": 4, "every": 2}
QUICK_FIT = {"agent": "joint", "steps": 2, "hidden": 4, "every": 2, "budgets": ("1/2",), "tolerance": 0.9}


@dataclass(frozen=True)
class Format:
    """A file format with the way it is read.

    Attributes:
        name: shown in the table.
        file: the sample that is mutated, relative to the folder of samples.
        kind: of content, which decides the mutations: json, lines (of JSON), yaml, text, safetensors, hdf5 or bytes.
        read: reads the format in a copy of the folder of samples and returns its data.
        right: by which right a changed file may be read as other data; "" where a hash covers all data, so that none
            may.
        needs: other files and folders of the samples that reading takes.
    """

    name: str
    file: str
    kind: str
    read: Callable[[Path], Any]
    right: str = ""
    needs: tuple[str, ...] = ()

    @property
    def bytes_for_each(self) -> int:
        """Bytes of memory for each byte of the file: ten; more where tokens or keys are made of a text, objects all."""
        return 500 if self.right == TEXT and self.kind in ("lines", "text") else 10


def digest(data: Any) -> str:
    """SHA-256 of data: numbers, texts, arrays, tensors, and what is made of them."""
    return hashlib.sha256(repr(_plain(data)).encode("utf-8", "backslashreplace")).hexdigest()


def _plain(data: Any) -> Any:
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().contiguous()
        return str(data.dtype), tuple(data.shape), hashlib.sha256(data.flatten().view(torch.uint8).numpy()).hexdigest()
    if isinstance(data, np.ndarray):
        return data.dtype.str, data.shape, hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()
    if isinstance(data, torch.nn.Module):
        return _plain(data.state_dict())
    if is_dataclass(data) and not isinstance(data, type):
        return type(data).__name__, [(field.name, _plain(getattr(data, field.name))) for field in fields(data)]
    if isinstance(data, Mapping):
        return sorted((str(key), repr(_plain(value))) for key, value in data.items())
    if isinstance(data, list | tuple):
        return [_plain(item) for item in data]
    if isinstance(data, bool | int | float | str | bytes) or data is None:
        return data
    if hasattr(data, "model_dump"):
        return _plain(data.model_dump())
    return type(data).__name__


# how each format is read


@cache
def _model(folder: Path) -> tuple[Any, Any]:
    """The sample model of the folder of samples, which is not mutated here, and its tokenizer."""
    return load_model(folder / "model", device="cpu")


class Readers:
    """Readers of a folder of samples, or of a copy that holds one format.

    Args:
        samples: the unchanged samples, for what reading needs beside the mutated file.
    """

    def __init__(self, samples: Path):
        self.samples = samples

    @property
    def _tokenizer(self) -> Any:
        return _model(self.samples)[1]

    def traces(self, folder: Path) -> Any:
        """All that a trace set holds."""
        traces = open_traces(folder / "traces")
        return [(entry.id, entry.ordinal, entry.split) for entry in traces.entries], traces.load()

    def validated_traces(self, folder: Path) -> Any:
        """The same, after `kv-gym trace validate`."""
        validate(folder / "traces")
        return self.traces(folder)

    def policy(self, folder: Path) -> Any:
        """A trained policy, without the report of its training."""
        policy = Scorer.from_pretrained(folder / "policy")
        return policy.network, policy.inputs, policy.fingerprint, policy.lengths, policy.protect, policy.calibrated

    def cache(self, folder: Path) -> Any:
        """A saved cache, and what it attends to next."""
        model, _ = _model(self.samples)
        loaded = EvictingCache.load(folder / "cache.safetensors", model)
        with torch.no_grad():
            logits = model(torch.tensor([[3]]), past_key_values=loaded).logits
        kept = [loaded.kept_positions(layer) for layer in loaded.evicting_layers]
        return kept, logits, loaded.config.budget, loaded.config.trigger.name, loaded.config.policy.name

    def checkpoint(self, folder: Path) -> Any:
        """A training run that goes on from its checkpoint."""
        if not (folder / CHECKPOINT).is_file():
            raise UserError("there is no checkpoint: the run begins anew")
        trainer = _trainer(self.samples)
        trainer.step = 0
        trainer._resume(folder / CHECKPOINT, None)
        return trainer.step, trainer.samples, trainer.best_reward, trainer.best, trainer.learner.network

    def page_policy(self, folder: Path) -> Any:
        """A trained page policy, without the report of its training."""
        policy = Learned.load(folder / "pages")
        card = policy.card
        return policy.weights, card.features, card.hidden, card.candidates, card.fallback

    def model(self, folder: Path) -> Any:
        """A model by its fingerprint, and its tokenizer."""
        model, tokenizer = load_model(folder / "model", device="cpu")
        return Fingerprint.of(model), tokenizer and tokenizer("the old lamp")["input_ids"]

    def tasks(self, name: str) -> Callable[[Path], Any]:
        """Reader of a task by its name, in which FILE stands for the folder of the file."""

        def read(folder: Path) -> Any:
            tasks = parse_tasks(name.replace("FILE", str(folder)), self._tokenizer)
            return [[(field, getattr(task, field)) for field in vars(task) if field != "tokenizer"] for task in tasks]

        return read

    def results(self, folder: Path) -> Any:
        """Result rows as `kv-gym report` reads them."""
        read = read_results([folder / "results.json"])
        return read.rows, read.ablations

    def rows(self, folder: Path) -> Any:
        """Rows of a leaderboard as other commands read them."""
        return read_result(folder / "leaderboard" / "rows.jsonl")

    def leaderboard(self, folder: Path) -> Any:
        """A leaderboard's folder, with the batches that are no rows yet."""
        found = ResultFolder(folder / "leaderboard")
        return found.rows, [found.measured(cell, 1) for cell in found.batches]

    def agent(self, folder: Path) -> Any:
        """Settings of an agent."""
        with patch("kv_gym.training.registry.bundled", lambda kind: folder):
            return agent_settings("joint")

    def fit(self, folder: Path) -> Any:
        """The cache that a fit chose."""
        config = load_fit(_model(self.samples)[0], folder / "fit").config
        return config.budget, config.allocation.name, config.policy.network


def formats(samples: Path) -> list[Format]:
    """All formats; `samples` is the folder that :func:`make_samples` filled."""
    read = Readers(samples)
    tokenizer = lambda: _model(samples)[1]  # noqa: E731
    shard = next((samples / "traces").glob("*.h5")).name if (samples / "traces").is_dir() else "shard.h5"
    batch = next((samples / "leaderboard" / "state" / "batches").glob("*.jsonl")).relative_to(samples)
    requests = {
        "mooncake": "json", "keys": "text", "times": "text", "csv": "text", "nginx": "text", "cache2k": "bytes",
    }  # fmt: skip
    tasks = {
        "questions.jsonl": "FILE/questions.jsonl", "token_ids.jsonl": "FILE/token_ids.jsonl",
        "ruler.jsonl": "ruler:FILE/ruler.jsonl", "longbench.jsonl": "longbench:FILE/longbench.jsonl",
        "longbench_v2.jsonl": "longbench:FILE/longbench_v2.jsonl", "text.txt": "text:FILE/text.txt:block=16",
        "template.txt": "longbench:FILE/longbench.jsonl:template=FILE/template.txt",
    }  # fmt: skip
    return [
        Format("trace shard", f"traces/{shard}", "hdf5", read.traces, "", ("traces",)),
        Format("trace shard, validated", f"traces/{shard}", "hdf5", read.validated_traces, "", ("traces",)),
        Format("trace manifest", "traces/manifest.json", "json", read.validated_traces, "", ("traces",)),
        Format("policy.json", "policy/policy.json", "json", read.policy, "", ("policy",)),
        Format("policy.safetensors", "policy/policy.safetensors", "safetensors", read.policy, "", ("policy",)),
        Format("saved cache", "cache.safetensors", "safetensors", read.cache),
        Format("training checkpoint", CHECKPOINT, "bytes", read.checkpoint),
        Format("page policy, card", "pages/policy.json", "json", read.page_policy, RECIPE, ("pages",)),
        Format("page policy, weights", "pages/weights.safetensors", "safetensors", read.page_policy, "", ("pages",)),
        Format("model config", "model/config.json", "json", read.model, "another model, with another fingerprint",
               ("model",)),
        Format("model weights", "model/model.safetensors", "safetensors", read.model,
               "another model, with another fingerprint", ("model",)),
        Format("tokenizer", "model/tokenizer.json", "json", read.model, "another tokenizer, with another hash",
               ("model",)),
        *(
            Format(f"task {file}", file, "lines" if file.endswith("jsonl") else "text", read.tasks(name), TEXT,
                   ("longbench.jsonl",))
            for file, name in tasks.items()
        ),
        Format("task lines", "questions.jsonl", "lines",
               lambda folder: read_tasks(folder / "questions.jsonl", tokenizer()), TEXT),
        Format("prompts", "prompts.jsonl", "lines",
               lambda folder: list(prompts_from_jsonl(folder / "prompts.jsonl", tokenizer())), TEXT),
        Format("prompts of token ids", "prompt_ids.jsonl", "lines",
               lambda folder: list(prompts_from_jsonl(folder / "prompt_ids.jsonl")), TEXT),
        Format("prompts from text", "text.txt", "text",
               lambda folder: list(prompts_from_text(folder / "text.txt", tokenizer(), 32, 8)), TEXT),
        Format("data of a fit", "questions.jsonl", "lines",
               lambda folder: _fit_parts(read_data(folder / "questions.jsonl", tokenizer())), TEXT),
        Format("leaderboard.yml", "leaderboard.yml", "yaml", lambda folder: read_spec(folder / "leaderboard.yml"),
               TEXT),
        Format("agent.yml", "joint.yml", "yaml", read.agent, TEXT),
        Format("results.json", "results.json", "json", read.results, RESULT),
        Format("rows.jsonl", "leaderboard/rows.jsonl", "lines", read.rows, RESULT, ("leaderboard",)),
        Format("leaderboard's rows", "leaderboard/rows.jsonl", "lines", read.leaderboard, RESULT, ("leaderboard",)),
        Format("leaderboard's batch", str(batch), "lines", read.leaderboard, RESULT, ("leaderboard",)),
        Format("thresholds", "thresholds.json", "json",
               lambda folder: Calibrated.read(folder / "thresholds.json"), TEXT),
        Format("thresholds, as allocation", "thresholds.json", "json",
               lambda folder: parse_allocation(f"calibrated:{folder / 'thresholds.json'}"), TEXT),
        Format("shares", "shares.json", "json", lambda folder: parse_allocation(f"shares:{folder / 'shares.json'}"),
               TEXT),
        Format("fit.json", "fit/fit.json", "json", read.fit, RESULT, ("fit",)),
        *(
            Format(f"requests, {name}", f"requests.{name}", "lines" if kind == "json" else kind,
                   lambda folder, name=name: read_requests(folder / f"requests.{name}", name), TEXT)
            for name, kind in requests.items()
        ),
        *(
            Format(f"requests, {ending}", f"log.{ending}", "bytes",
                   lambda folder, ending=ending: read_requests(folder / f"log.{ending}"), TEXT)
            for ending in ("gz", "xz")
        ),
    ]  # fmt: skip


def _fit_parts(data: Any) -> Any:
    return data.measure, data.train, data.validation, data.test


_TRAINERS: dict[Path, Trainer] = {}


def _trainer(samples: Path) -> Trainer:
    """A training run on the sample traces, at its beginning; one for each process."""
    if samples not in _TRAINERS:
        _TRAINERS[samples] = Trainer("joint", agent_settings("joint", **TRAINING), 0, open_traces(samples / "traces"))
        _TRAINERS[samples].setup()
    return _TRAINERS[samples]


# making the samples


def make_samples(folder: Path) -> None:
    """Write a valid sample of every format into a folder."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = _tiny_model(), _tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    model, tokenizer = load_model(folder / "model", device="cpu")
    _write_texts(folder, draw)
    prompts = list(prompts_from_jsonl(folder / "prompt_ids.jsonl"))
    record(model, prompts, folder / "traces", window=2, blocks=2, tokenizer=tokenizer, progress=False)
    train("joint", folder / "traces", folder / "policy", progress=False, **TRAINING)
    cache = EvictingCache(model, "h2o", 6, trigger="every:2", sinks=1, recent=2)
    with torch.no_grad():
        model(torch.tensor([prompts[0].context_ids]), past_key_values=cache)
    cache.save(folder / "cache.safetensors")
    trainer = _trainer(folder)
    trainer.train_step()
    trainer.best = {name: tensor.clone() for name, tensor in trainer.learner.network.state_dict().items()}
    trainer.best_reward = 0.5
    trainer._save(folder / CHECKPOINT)
    calibrate("h2o", folder / "traces", ["1/2", "1/4"], folder / "thresholds.json", progress=False)
    fit(model, folder / "continuations.jsonl", folder / "fit", tokenizer=tokenizer, progress=False, **QUICK_FIT)
    _write_requests(folder, draw)
    trace = RequestTrace.from_keys([draw.randrange(30) for _ in range(600)], "sample")
    train_pages("clone", trace, folder / "pages", 10, rounds=1, steps=2, decisions=50, hidden=4)
    spec = yaml.safe_load((folder / "leaderboard.yml").read_text())
    with patch.object(ResultFolder, "remove_finished_batches", lambda self: None):
        rows = leaderboard(spec, folder / "leaderboard", progress=False)
    (folder / "results.json").write_text(json.dumps({"rows": rows, "command": "kv-gym leaderboard"}))


def _tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS) + 2, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, initializer_range=0.3, bos_token_id=1,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = {text: number for number, text in enumerate(["<unk>", "<s>", *LETTERS])}
    core = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


def _write_texts(folder: Path, draw: random.Random) -> None:
    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    def ids(count: int) -> list[int]:
        return [draw.randrange(2, len(LETTERS) + 2) for _ in range(count)]

    def lines(name: str, documents: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(document) + "\n" for document in documents))

    asked = [{"context": text(5), "question": f" who, {text(1)}?", "answer": "bob"} for _ in range(24)]
    lines("questions.jsonl", [line | {"task": "who", "id": f"q{n}"} for n, line in enumerate(asked)])
    lines("token_ids.jsonl", [{"context_ids": ids(12), "question_ids": ids(2), "answer_ids": ids(1)} for _ in range(3)])
    lines("ruler.jsonl", [{"input": f"{text(9)}\nwhat is it?", "outputs": ["key"], "answer_prefix": " it is"}] * 2)
    old = {"input": "who?", "answers": ["bob"], "dataset": "hotpotqa", "all_classes": None, "language": "en"}
    lines("longbench.jsonl", [old | {"context": text(9), "_id": f"{n}"} for n in range(2)])
    choices = {f"choice_{letter}": text(1) for letter in "ABCD"}
    lines("longbench_v2.jsonl", [{"context": text(9), "question": "who?", "answer": "A"} | choices])
    lines("prompts.jsonl", [{"context": text(4), "continuations": [text(1), text(2)], "id": f"p{n}"} for n in range(3)])
    lines("continuations.jsonl", [{"context_ids": ids(12), "continuation_ids": [ids(3), ids(3)]} for _ in range(20)])
    lines("prompt_ids.jsonl", [
        {"context_ids": ids(12), "continuation_ids": [ids(2), ids(3)], "id": f"p{n}", "split": split, "task": "noise"}
        for n, split in enumerate(["train"] * 5 + ["test"])
    ])  # fmt: skip
    lines("long_prompts.jsonl", [
        {"context_ids": ids(96), "continuation_ids": [ids(8)] * 4, "id": f"p{n}"} for n in range(16)
    ])  # fmt: skip
    (folder / "text.txt").write_text(text(400))
    (folder / "template.txt").write_text("read this.\n{context}\n\nquestion: {input}\nanswer:")
    (folder / "shares.json").write_text(json.dumps([[0.5, 0.75], [0.25, 0.5]]))
    (folder / "joint.yml").write_text(yaml.safe_dump(agent_settings("joint").model_dump(mode="json")))
    spec = {
        "model": str(folder / "model"), "tasks": [{"task": str(folder / "token_ids.jsonl"), "contexts": 2}],
        "budgets": ["1/2", 4], "policies": ["recency", "h2o"], "allocations": ["uniform"],
        "utility": {"traces": str(folder / "traces"), "split": "all", "oracles": ["oracle"]},
    }  # fmt: skip
    (folder / "leaderboard.yml").write_text(yaml.safe_dump(spec))


def _write_requests(folder: Path, draw: random.Random) -> None:
    keys = [draw.randrange(8) for _ in range(24)]
    chains = [json.dumps({"timestamp": 100 * n, "hash_ids": [1, 2, key]}) for n, key in enumerate(keys)]
    line = (
        '10.0.0.1 - - [01/Nov/2026:10:00:{0:02d} +0000] "GET /{1} HTTP/1.1" 200 {2} "-" "curl" "HIT" "k{1}" "0.1" "60"'
    )
    logs = {
        "mooncake": chains,
        "keys": [f"key{key}" for key in keys],
        "times": [f"{n}.5 {key} {100 + key}" for n, key in enumerate(keys)],
        "csv": ["time,id,size,ttl", *(f"{n},{key},{100 + key},60" for n, key in enumerate(keys))],
        "nginx": [line.format(n, key, 100 + key) for n, key in enumerate(keys)],
    }
    for name, text in logs.items():
        (folder / f"requests.{name}").write_text("\n".join(text) + "\n")
    (folder / "requests.cache2k").write_bytes(struct.pack(f">{len(keys)}I", *keys))
    compressed = "\n".join(chains).encode()
    (folder / "log.gz").write_bytes(gzip.compress(compressed, mtime=0))
    (folder / "log.xz").write_bytes(lzma.compress(compressed))
