"""Which libraries work with kv_gym, what was run with each, and what is refused: docs/clients.md.

    python benchmarks/clients.py --json benchmarks/results/clients.json   # runs all, then writes docs/clients.md
    python benchmarks/clients.py --page                                   # the page alone, from the committed results
    make clients                                                          # all of it, in an environment made for it

Every row is run against the real library, on the bundled model or the bundled traces. A library that is not installed
leaves the row that FILE has.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import transformers

from kv_gym import EvictingCache
from kv_gym.errors import UserError, short_reason
from kv_gym.files import atomic_write
from kv_gym.markdown import pipe_table
from kv_gym.models import load_model
from kv_gym.reference import MODEL

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = Path("benchmarks/results/clients.json"), Path("docs/clients.md")
TEXT = "the lamp was old . code Alice 4 7 . Bob sold the boat . size Bob 81 5 . question code Alice"
MODELS, ENVIRONMENTS = "Models and generation", "Environments"
SECONDS = 2.0  # of CPU time, for the number of steps per second


@dataclass(frozen=True)
class Row:
    """One client and one way to use it.

    Attributes:
        part: of the page.
        client: name of the distribution on PyPI.
        run: what was run; in the part of environments, the line of code that works.
        function: runs it, and says what it found.
        instead: the way that works, where this one does not.
    """

    part: str
    client: str
    run: str
    function: Callable[[], str]
    instead: str


ROWS: list[Row] = []


def row(part: str, client: str, run: str, instead: str = "") -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Add a function as a row of the page."""

    def add(function: Callable[[], str]) -> Callable[[], str]:
        ROWS.append(Row(part, client, run, function, instead))
        return function

    return add


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="run, and write what was found to this file")
    parser.add_argument("--only", default="", help="run what begins so, such as 'ray,torchrl GymWrapper'")
    parser.add_argument("--page", action="store_true", help="write docs/clients.md from the committed results alone")
    arguments = parser.parse_args()
    if arguments.json is not None:
        run(arguments.json, arguments.only)
    if arguments.page or arguments.json == RESULTS:
        with atomic_write(ROOT / PAGE) as part:
            part.write_text(page(ROOT / RESULTS), encoding="utf-8")
    elif arguments.json is None:
        print(page(ROOT / RESULTS))


def run(file: Path, only: str = "") -> None:
    """Run every row whose library is there, and put what it found in place of what `file` says of it."""
    found = json.loads(file.read_text())["rows"] if file.is_file() else []
    known = {(each["client"], each["run"]): each for each in found}
    for each in ROWS:
        try:
            installed = version(each.client)
        except PackageNotFoundError:
            continue
        if not f"{each.client} {each.run.strip('`')}".startswith(tuple(only.split(","))):
            continue
        result, text = outcome(each.function)
        known[each.client, each.run] = {
            "client": each.client, "version": installed, "run": each.run, "result": result, "found": text,
        }  # fmt: skip
        print(f"{each.client} {installed}, {each.run}: {result}: {text}", file=sys.stderr, flush=True)
        rows = [known[key] for key in ((row.client, row.run) for row in ROWS) if key in known]
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as part:
            part.write_text(json.dumps({"command": "python benchmarks/clients.py", "rows": rows}, indent=1) + "\n")


def outcome(function: Callable[[], str]) -> tuple[str, str]:
    """``works``, ``refused`` (by kv_gym or by the library, in a sentence) or ``fails``, and what was found."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "works", function()
    except UserError as error:
        return "refused", str(error)
    except AssertionError as error:
        return "fails", short_reason(error)
    except Exception as error:  # whatever a library raises
        if os.environ.get("KV_GYM_TRACEBACK"):
            traceback.print_exc()
        return "refused by the library", f"{type(error).__name__}: {short_reason(error)}"


def page(file: Path) -> str:
    """The page of what was run with every client."""
    found = {(each["client"], each["run"]): each for each in json.loads(file.read_text())["rows"]}
    out = [
        "# Clients", "",
        "What was run with other libraries, and what came out. A sentence in quotes is the error that a user sees.",
        "This page is written by `python benchmarks/clients.py --json benchmarks/results/clients.json`; `make clients`",
        "makes an environment with all of these libraries, and runs it there.", "",
        f"## {MODELS}", "",
        "On the bundled model, an `EvictingCache` with policy `keydiff` and half of 24 tokens.", "",
    ]  # fmt: skip
    out += [pipe_table(("library", "what was run", "result"), _cells(MODELS, found), None), ""]
    out += [
        f"## {ENVIRONMENTS}", "",
        "`KVEvict-v0` on the bundled traces, or `KVPage-v0` where it is named. Steps per second of CPU time, of all",
        "environments together, on one thread and with random actions; where an agent learns, with its updates.",
        "They compare libraries, not machines.", "",
        pipe_table(("library", "line that works", "result"), _cells(ENVIRONMENTS, found), None), "",
    ]  # fmt: skip
    return "\n".join(out)


def _cells(part: str, found: Mapping[tuple[str, str], Mapping[str, str]]) -> list[tuple[str, str, str]]:
    cells = []
    for each in ROWS:
        if each.part != part:
            continue
        result = found.get((each.client, each.run))
        if result is None:
            cells.append((each.client, each.run, "not run: could not be installed beside the others"))
            continue
        text = f"{result['result']}: {result['found']}"
        if result["result"] != "works":
            instead = f" Instead: {each.instead}" if each.instead else ""
            text = f'{result["result"]}: "{result["found"]}"{instead}'
        cells.append((f"{each.client} {result['version']}", each.run, text))
    return cells


# -- models and generation ---------------------------------------------------------------------------------------------


_LOADED: list[Any] = []


def plain() -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A copy of the bundled model, its tokenizer, and the text as its inputs."""
    if not _LOADED:
        _LOADED.extend(load_model(MODEL, "cpu"))
    model, tokenizer = copy.deepcopy(_LOADED[0]), _LOADED[1]
    return model, tokenizer, tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False)


def cache_of(model: Any, **settings: Any) -> EvictingCache:
    return EvictingCache(model, **{"policy": "keydiff", "budget": 0.5} | settings)


def generated(model: Any, inputs: Mapping[str, torch.Tensor], **settings: Any) -> tuple[list[int], list[torch.Tensor]]:
    """Four new tokens, and the positions that every layer kept."""
    with cache_of(model) as cache:
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False, **settings)
        kept = [cache.kept_positions(layer) for layer in cache.evicting_layers]
    return output[0, inputs["input_ids"].shape[1] :].tolist(), kept


def as_the_plain_model(model: Any, **settings: Any) -> str:
    """What a changed model or way of generating gives, compared with the plain one."""
    other, _, inputs = plain()
    expected, kept = generated(other, inputs)
    tokens, own = generated(model, inputs, **settings)
    assert tokens == expected, f"it generates {tokens}, and the plain model {expected}"
    assert all(torch.equal(*pair) for pair in zip(kept, own, strict=True)), "it keeps other tokens than the plain model"
    return f"the same text and the same kept tokens ({own[0].shape[-1]} per head) as with the unchanged model"


def as_masked(model: Any) -> str:
    """What a quantised model keeps: as many slots as the budget says, and the text of its own full cache at 1.0."""
    _, _, inputs = plain()
    new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    with cache_of(model, budget=1.0) as cache:
        full = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert full[0, inputs["input_ids"].shape[1] :].tolist() == new, "at budget 1.0 it generates another text"
    _, kept = generated(model, inputs)
    count = {layer.shape[-1] for layer in kept}
    assert count == {15}, f"it keeps {count} slots per head"  # half of 24, and three new ones
    return "at budget 1.0 the same text as with the default cache; at 1/2, 12 of 24 tokens and the new ones are kept"


def pipe(**settings: Any) -> Any:
    model, tokenizer, _ = plain()
    return model, transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, **settings)


@row(MODELS, "transformers", "`pipeline(..., past_key_values=cache)`, one prompt")
def _pipeline() -> str:
    model, generator = pipe()
    with cache_of(model) as cache:
        text = generator(TEXT, past_key_values=cache, max_new_tokens=4, do_sample=False, return_full_text=False)
    other, tokenizer, inputs = plain()
    expected = tokenizer.decode(generated(other, inputs)[0])
    assert text[0]["generated_text"].split() == expected.split(), text
    return "the same text as `generate()`"


@row(
    MODELS, "transformers", "`pipeline([one, two], past_key_values=cache)`",
    "a new cache for each prompt, or `batch_size=2`, which reads both in one call",
)  # fmt: skip
def _pipeline_of_several() -> str:
    model, generator = pipe()
    with cache_of(model) as cache:
        generator([TEXT, f"{TEXT} 4"], past_key_values=cache, max_new_tokens=4, do_sample=False)
    return "both prompts"


@row(MODELS, "transformers", "`pipeline([one, two], past_key_values=cache, batch_size=2)`")
def _pipeline_of_a_batch() -> str:
    model, generator = pipe()
    texts = [TEXT, f"old {TEXT}"]
    with cache_of(model) as cache:
        options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False, "batch_size": 2}
        found = [each[0]["generated_text"] for each in generator(texts, past_key_values=cache, **options)]
    alone = []
    for text in texts:
        with cache_of(model) as cache:
            options["batch_size"] = 1
            alone.append(generator(text, past_key_values=cache, **options)[0]["generated_text"])
    assert found == alone, f"{found} and alone {alone}"
    return "every row has the text that it has alone"


@row(MODELS, "transformers", "`TextIteratorStreamer`")
def _streamer() -> str:
    model, tokenizer, inputs = plain()
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    with cache_of(model) as cache:
        options = {"past_key_values": cache, "max_new_tokens": 4, "do_sample": False, "streamer": streamer}
        thread = Thread(target=model.generate, kwargs=dict(inputs) | options)
        thread.start()
        text = "".join(streamer)
        thread.join()
    expected = tokenizer.decode(generated(model, inputs)[0])
    assert text.split() == expected.split(), text
    return "the same text as `generate()`, word by word"


@row(MODELS, "transformers", "`generate(prefill_chunk_size=8)`")
def _chunks() -> str:
    return as_the_plain_model(plain()[0], prefill_chunk_size=8)


@row(MODELS, "transformers", "`generate(num_beams=3)`, `num_return_sequences=2`")
def _beams() -> str:
    model, _, inputs = plain()
    with cache_of(model) as cache:
        options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
        rows = model.generate(**inputs, past_key_values=cache, **options)
        counts = cache.kept().unique().tolist()
    assert len(rows) == 2 and counts == [15], counts
    return "all beams go on from one compressed context, and the cache follows when they are reordered"


@row(
    MODELS, "transformers", "`generate(assistant_model=...)` or `prompt_lookup_num_tokens=2`",
    "generate without drafts; or with drafts into an empty cache of budget 1.0, then `cache.fork(budget=...)`",
)  # fmt: skip
def _assistant() -> str:
    model = plain()[0]
    return as_the_plain_model(model, assistant_model=copy.deepcopy(model))


@row(MODELS, "transformers", "`generate(assistant_model=...)` into an empty cache of budget 1.0, then a fork")
def _assistant_in_full() -> str:
    model, _, inputs = plain()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **options)
    with cache_of(model, budget=1.0) as cache:
        found = model.generate(**inputs, past_key_values=cache, assistant_model=copy.deepcopy(model), **options)
        with cache.fork(budget=8) as fork:
            fork.compress()
            assert fork.kept().unique().tolist() == [8]
    assert torch.equal(found, expected)
    return "the same text as without a draft model; the fork keeps 8 slots per head"


@row(
    MODELS,
    "transformers",
    "`generate(cache_implementation='static')` beside a cache",
    "leave it out",
)
def _implementation() -> str:
    return as_the_plain_model(plain()[0], cache_implementation="static")


@row(MODELS, "transformers", "`generate(output_attentions=True)`", "call the model without the cache")
def _attentions() -> str:
    return as_the_plain_model(plain()[0], output_attentions=True, return_dict_in_generate=True)


@row(MODELS, "transformers", "`torch.compile(model)` (inductor)")
def _compiled() -> str:
    return as_the_plain_model(torch.compile(plain()[0]))


@row(MODELS, "transformers", "`generate()` without the cache while one is attached; a training step, too")
def _beside() -> str:
    model, _, inputs = plain()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected, loss = model.generate(**inputs, **options), model(**inputs, labels=inputs["input_ids"]).loss
    with cache_of(model):
        assert torch.equal(model.generate(**inputs, **options), expected)
        beside = model(**inputs, labels=inputs["input_ids"]).loss
        beside.backward()
    assert torch.allclose(loss, beside), (loss, beside)
    return "text and loss as without an attached cache"


def batched(model: Any, inputs: Mapping[str, torch.Tensor]) -> list[list[int]]:
    """Four new tokens by continuous batching."""
    settings = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=64)
    prompts = [inputs["input_ids"][0].tolist()]
    found = model.generate_batch(inputs=prompts, generation_config=settings, continuous_batching_config=small)
    return [each.generated_tokens for each in found.values()]


@row(
    MODELS, "transformers", "continuous batching (`model.generate_batch`) while a cache is attached",
    "call it after `cache.detach()` or after the `with` block",
)  # fmt: skip
def _continuous() -> str:
    model, _, inputs = plain()
    with cache_of(model):
        return f"generates {batched(model, inputs)}"


@row(MODELS, "transformers", "continuous batching after the `with` block of a cache")
def _continuous_afterwards() -> str:
    model, _, inputs = plain()
    expected = batched(model, inputs)
    tokens, _ = generated(model, inputs)
    found = batched(model, inputs)
    assert found == expected, f"{found} instead of {expected}"
    assert generated(model, inputs)[0] == tokens, "the next cache gives another text"
    return "the same text before and after a cache was attached, and the next cache gives the text of the first"


@row(MODELS, "peft", "a LoRA adapter around the model (`PeftModel.generate`)")
def _lora() -> str:
    import peft

    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return as_the_plain_model(peft.get_peft_model(plain()[0], settings).eval())


@row(MODELS, "peft", "a folder with an adapter alone (`load_model`, `--model`)")
def _adapter() -> str:
    import peft

    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(plain()[0], settings)
    adapted.peft_config["default"].base_model_name_or_path = str(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        return f"{as_the_plain_model(load_model(folder, 'cpu')[0])}; the adapter is merged"


@row(
    MODELS, "peft", "prefix tuning (`PrefixTuningConfig`)", "an adapter that changes weights, such as LoRA",
)  # fmt: skip
def _prefix() -> str:
    import peft

    settings = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    return as_the_plain_model(peft.get_peft_model(plain()[0], settings))


@row(MODELS, "accelerate", "`cpu_offload(model)`")
def _cpu_offload() -> str:
    from accelerate import cpu_offload

    return as_the_plain_model(cpu_offload(plain()[0], torch.device("cpu")))


@row(MODELS, "accelerate", "`disk_offload(model, folder)`")
def _disk_offload() -> str:
    from accelerate import disk_offload

    with tempfile.TemporaryDirectory() as folder:
        return as_the_plain_model(disk_offload(plain()[0], folder, torch.device("cpu")))


@row(MODELS, "optimum-quanto", "8-bit weights (`quantize(model, weights=qint8)`)")
def _quanto() -> str:
    from optimum.quanto import freeze, qint8, quantize

    model = plain()[0]
    quantize(model, weights=qint8)
    freeze(model)
    return as_masked(model)


def _bitsandbytes(**bits: bool) -> str:
    settings = transformers.BitsAndBytesConfig(**bits)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=settings, device_map="cpu")
    return as_masked(model.eval())


@row(MODELS, "bitsandbytes", "4-bit weights (`BitsAndBytesConfig(load_in_4bit=True)`)")
def _bitsandbytes_4() -> str:
    return _bitsandbytes(load_in_4bit=True)


@row(MODELS, "bitsandbytes", "8-bit weights (`BitsAndBytesConfig(load_in_8bit=True)`)")
def _bitsandbytes_8() -> str:
    return _bitsandbytes(load_in_8bit=True)


@row(MODELS, "torchao", "8-bit weights (`quantize_(model, Int8WeightOnlyConfig())`)")
def _torchao() -> str:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = plain()[0]
    quantize_(model, Int8WeightOnlyConfig())
    return as_masked(model)


@row(MODELS, "datasets", "`evaluate(tasks=Dataset)` with rows as SQuAD has them")
def _datasets() -> str:
    import datasets

    from kv_gym import evaluate

    model, tokenizer, _ = plain()
    rows = [
        {"context": TEXT.rpartition(" question")[0], "question": "question code Alice", "answers": {"text": ["4 7"]}}
    ]
    found = evaluate(["keydiff"], [0.5], model=model, tasks=datasets.Dataset.from_list(rows), tokenizer=tokenizer,
                     progress=False)["rows"]  # fmt: skip
    assert [each["policy"] for each in found] == ["full_cache", "keydiff"], found
    return "the first entry of `answers.text` is the expected answer"


@row(MODELS, "lm-eval", '`simple_evaluate("kv_gym", {"pretrained": ..., "budget": "1/8"}, ...)`')
def _harness() -> str:
    from lm_eval.api.instance import Instance

    from kv_gym.interop.lm_eval import KVGymLM

    lm = KVGymLM(MODEL, policy="keydiff", budget=0.5, device="cpu")
    context, found = "the lamp was old . code Alice 4 7 . question code Alice", []
    for text in (" 4 7", " 5 5"):
        found += lm.loglikelihood([Instance("loglikelihood", {}, (context, text), 0, ("t", 0, 1))], disable_tqdm=True)
    assert len(found) == 2 and lm.get_model_info()["kv_gym"]["contexts"] == 2
    return "tests/interop/test_lm_eval.py compares it with its model `hf` and with masked recomputation"


# -- environments ------------------------------------------------------------------------------------------------------


def speed(step: Callable[[], int]) -> str:
    """Steps per second of a function that says how many environments it stepped."""
    step()
    began, done = time.process_time(), 0
    while (elapsed := time.process_time() - began) < SECONDS:
        done += step()
    return f"{done / elapsed:,.0f} steps/s"


def stepping(env: Any) -> str:
    """Speed of a Gymnasium vector environment under random actions."""
    env.reset(seed=0)

    def step() -> int:
        env.step(env.action_space.sample())
        return env.num_envs

    found = speed(step)
    env.close()
    return found


@row(ENVIRONMENTS, "gymnasium", '`gym.make("KVEvict-v0")`')
def _scalar() -> str:
    env = gym.make("KVEvict-v0")

    def step() -> int:
        env.reset()
        env.step(env.action_space.sample())
        return 1

    return speed(step)


@row(ENVIRONMENTS, "gymnasium", '`gym.make_vec("KVEvict-v0", num_envs=64)`, the native batch')
def _native() -> str:
    return stepping(gym.make_vec("KVEvict-v0", num_envs=64))


@row(
    ENVIRONMENTS, "gymnasium",
    '`gym.make_vec("KVEvict-v0", num_envs=8, vectorization_mode="sync", '
    'vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})`',
)  # fmt: skip
def _sync() -> str:
    settings = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    return stepping(gym.make_vec("KVEvict-v0", num_envs=8, vectorization_mode="sync", vector_kwargs=settings))


@row(
    ENVIRONMENTS, "gymnasium", '`gym.wrappers.vector.FlattenObservation(gym.make_vec("KVEvict-v0", num_envs=8))`',
    '`gym.make_vec("KVEvict-v0", num_envs=8, flat=True)`, or `gym.wrappers.FlattenObservation` around the scalar one',
)  # fmt: skip
def _wrapped() -> str:
    return stepping(gym.wrappers.vector.FlattenObservation(gym.make_vec("KVEvict-v0", num_envs=8)))


@row(ENVIRONMENTS, "gymnasium", '`gym.make_vec("KVEvict-v0", num_envs=64, flat=True)`')
def _flat() -> str:
    return stepping(gym.make_vec("KVEvict-v0", num_envs=64, flat=True))


@row(
    ENVIRONMENTS, "gymnasium",
    '`gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("KVEvict-v0", num_envs=64))`, and others of rewards '
    "and actions",
)  # fmt: skip
def _statistics() -> str:
    return stepping(gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("KVEvict-v0", num_envs=64)))


@row(ENVIRONMENTS, "torch", "CleanRL-style single file: `python examples/single_file_ppo.py`")
def _single_file() -> str:
    sys.path.append(str(ROOT / "examples"))
    import single_file_ppo

    began = time.process_time()
    steps, before, after = single_file_ppo.train(updates=20)
    rate = steps / (time.process_time() - began)
    return f"{rate:,.0f} steps/s with learning, reward {before:.2f} to {after:.2f}"


def learning(algorithm: Any, env: Any, policy: Any, steps: int, **settings: Any) -> str:
    """Speed of `learn`, with its updates."""
    agent = algorithm(policy, env, device="cpu", seed=0, **settings)
    began = time.process_time()
    agent.learn(steps)
    return f"{agent.num_timesteps / (time.process_time() - began):,.0f} steps/s with learning"


@row(ENVIRONMENTS, "stable-baselines3", "`PPO(RankingPolicy, KVEvictVecEnv(16), gamma=0.0)`")
def _sb3() -> str:
    from stable_baselines3 import PPO

    from kv_gym.envs import KVEvictVecEnv
    from kv_gym.training.sb3_policy import RankingPolicy

    return learning(PPO, KVEvictVecEnv(16), RankingPolicy, 512, n_steps=8, batch_size=64, n_epochs=2, gamma=0.0)


@row(ENVIRONMENTS, "stable-baselines3", '`PPO("MlpPolicy", KVEvictVecEnv(16, flat=True), gamma=0.0)`')
def _sb3_flat() -> str:
    from stable_baselines3 import PPO

    from kv_gym.envs import KVEvictVecEnv

    env = KVEvictVecEnv(16, flat=True)
    return learning(PPO, env, "MlpPolicy", 256, n_steps=8, batch_size=64, n_epochs=1, gamma=0.0)


@row(ENVIRONMENTS, "sb3-contrib", "`TRPO(RankingPolicy, KVEvictVecEnv(16), gamma=0.0)`")
def _trpo() -> str:
    from sb3_contrib import TRPO

    from kv_gym.envs import KVEvictVecEnv
    from kv_gym.training.sb3_policy import RankingPolicy

    return learning(TRPO, KVEvictVecEnv(16), RankingPolicy, 256, n_steps=8, batch_size=64, gamma=0.0)


@row(
    ENVIRONMENTS, "sb3-contrib",
    '`MaskablePPO("MultiInputPolicy", KVPageVecEnv(8, capacity=200, action="index"))` (KVPage-v0)',
)  # fmt: skip
def _maskable() -> str:
    from sb3_contrib import MaskablePPO

    from kv_gym.envs import KVPageVecEnv

    env = KVPageVecEnv(8, capacity=200, action="index")
    return learning(MaskablePPO, env, "MultiInputPolicy", 512, n_steps=16, batch_size=64, n_epochs=2)


@row(
    ENVIRONMENTS, "rl_zoo3",
    "`python -m kv_gym.interop.rl_zoo3 train --algo ppo --env KVEvict-v0 --conf-file agents/rl_zoo3/ppo.yml`",
)  # fmt: skip
def _zoo() -> str:
    import subprocess

    from stable_baselines3 import PPO

    from kv_gym.training.sb3_policy import save_policy

    with tempfile.TemporaryDirectory() as folder:
        settings = ["--conf-file", str(ROOT / "agents/rl_zoo3/ppo.yml"), "--eval-freq", "-1", "--log-folder", folder]
        for name, more in (("train", settings), ("enjoy", ["--folder", folder, "--no-render"])):
            command = [sys.executable, "-m", "kv_gym.interop.rl_zoo3", name, "--algo", "ppo", "--env", "KVEvict-v0"]
            done = subprocess.run([*command, "-n", "512", *more], capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"{name}: {done.stderr.strip().splitlines()[-1:]}"
        agent = PPO.load(Path(folder) / "ppo/KVEvict-v0_1/KVEvict-v0.zip", device="cpu")
        save_policy(agent, Path(folder) / "policy")
    return "trained, saved, loaded by `enjoy`, and exported by `save_policy`"


@row(ENVIRONMENTS, "torchrl", '`GymEnv("KVEvict-v0")`')
def _torchrl() -> str:
    from torchrl.envs import GymEnv

    env = GymEnv("KVEvict-v0")
    env.set_seed(0)

    def step() -> int:
        return env.rollout(8, break_when_any_done=False).numel()

    return speed(step)


@row(ENVIRONMENTS, "torchrl", '`GymEnv("KVEvict-v0", num_envs=8)`')
def _torchrl_batch() -> str:
    from torchrl.envs import GymEnv

    env = GymEnv("KVEvict-v0", num_envs=8)

    def step() -> int:
        return env.rollout(8, break_when_any_done=False).numel()

    return f"{speed(step)}; Gymnasium's batch resets with a step of its own, so every second step decides nothing"


@row(ENVIRONMENTS, "torchrl", '`GymWrapper(gym.make_vec("KVEvict-v0", num_envs=64))`')
def _torchrl_native() -> str:
    from torchrl.envs import GymWrapper

    env = GymWrapper(gym.make_vec("KVEvict-v0", num_envs=64))

    def step() -> int:
        return env.rollout(8, break_when_any_done=False).numel()

    return f"{speed(step)}; TorchRL resets once more what the batch has reset, so only every second decision is seen"


@row(ENVIRONMENTS, "torchrl", '`GymEnv("kv_gym:KVPage-v0", num_envs=2)`')
def _torchrl_pages() -> str:
    from torchrl.envs import GymEnv

    env = GymEnv("kv_gym:KVPage-v0", num_envs=2)
    found = env.rollout(8, break_when_any_done=False)
    assert found.batch_size == (2, 8) and found["next", "total_hits"].shape == (2, 8)
    env.close()
    return "observations, rewards and infos of both; each environment is a process of its own"


@row(ENVIRONMENTS, "torchrl", '`GymWrapper(gym.make_vec("KVPage-v0", num_envs=16))`')
def _torchrl_pages_native() -> str:
    from torchrl.envs import GymWrapper

    env = GymWrapper(gym.make_vec("KVPage-v0", num_envs=16))

    def step() -> int:
        return env.rollout(8, break_when_any_done=False).numel()

    return speed(step)


@row(ENVIRONMENTS, "tianshou", '`DummyVectorEnv([lambda: gym.make("KVEvict-v0")] * 8)`')
def _tianshou() -> str:
    from tianshou.env import DummyVectorEnv

    env = DummyVectorEnv([lambda: gym.make("KVEvict-v0") for _ in range(8)])
    env.reset()

    def step() -> int:
        env.step(np.stack([space.sample() for space in env.action_space]))
        env.reset()
        return 8

    return speed(step)


@row(
    ENVIRONMENTS, "ray",
    '`PPOConfig().environment("KVEvict-v0", env_config={"flat": True})` after `register_env("KVEvict-v0", ...)`',
)  # fmt: skip
def _rllib() -> str:
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.tune.registry import register_env

    register_env("KVEvict-v0", lambda settings: gym.make("KVEvict-v0", **settings))
    config = (
        PPOConfig().environment("KVEvict-v0", env_config={"flat": True})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4).learners(num_learners=0)
        .training(train_batch_size_per_learner=256, minibatch_size=64, num_epochs=1, gamma=0.0)
    )  # fmt: skip
    agent = config.build_algo()
    began = time.process_time()
    result = agent.train()
    steps = result["env_runners"]["num_env_steps_sampled"]
    return f"{steps / (time.process_time() - began):,.0f} steps/s with learning"


if __name__ == "__main__":
    main()
