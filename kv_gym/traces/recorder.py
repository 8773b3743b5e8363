"""Record what a model caches of a context, and what the queries of its continuations attend to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from kv_gym import __version__
from kv_gym.devices import to_device
from kv_gym.errors import UserError
from kv_gym.models.attention import attach, detach, refuse_unsupported
from kv_gym.models.cache_name import with_cache
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.models.hidden_states import attach_hidden_state_hooks, remove_hidden_state_hooks
from kv_gym.models.loading import refuse_too_long, token_rows, tokenizer_hash, usable_device
from kv_gym.models.model_source import ModelSource
from kv_gym.models.wrapped_model import transformers_model
from kv_gym.policies.base import Policy, StatefulPolicy
from kv_gym.policies.registry import make_policy
from kv_gym.progress import ProgressBar
from kv_gym.remote import RemoteFolder, local_path, remote_folder
from kv_gym.traces.prompts import Prompt
from kv_gym.traces.reader import MANIFEST, TRACE_FILES, TraceSet, open_traces
from kv_gym.traces.recording_cache import RecordingCache
from kv_gym.traces.schema import FORMAT, SAMPLED_VERSION, VERSION, prompt_hash
from kv_gym.traces.sequence import Continuation, Sequence
from kv_gym.traces.writer import ShardWriter, TraceWriter, shard_name
from kv_gym.workers import WorkerPool

SAMPLED_ENDS = 4  # first and last tokens of a context that every sample of its slots holds
LEAST_SLOTS = 16
_BATCHED_TOKENS = 8192  # continuations of one length run together while their caches hold no more tokens than this


def record(
    model,
    prompts: Iterable[Prompt],
    out: str | Path,
    *,
    tokenizer=None,
    window: int = 32,
    stats: Iterable[str | Policy] | None = None,
    blocks: int = 32,
    slots: int | None = None,
    slot_seed: int = 0,
    shard_size: int = 16,
    storage: str = "auto",
    device: str | None = None,
    progress: bool = True,
    recipe: Mapping[str, Any] | None = None,
    hidden: bool = False,
    workers: int | None = None,
    ray: str | None = None,
) -> TraceSet:
    """Record what a model's later queries attend to.

    Run again after an interruption, it records what is missing.

    Args:
        model: transformers decoder to record.
        prompts: contexts with continuations.
        out: folder of the trace set: new, empty, or begun by the same recording; or its address, such as
            ``s3://bucket/folder``.
        tokenizer: whose hash the manifest is to carry, or None.
        window: how many of the last queries of each context to keep; none of a context whose slots are sampled.
        stats: policies with memory whose statistics over the context's queries to record. By default h2o, and none
            with `slots`, because statistics need the attention of every context query.
        blocks: blocks of queries per continuation, at most.
        slots: record so many random tokens of a longer context, the same in all heads, its first and last 4 among
            them. Attention is normalised over all tokens. Takes fewer bytes, and less time beside the model's own.
        slot_seed: of the random tokens; a context's also depend on its text.
        shard_size: contexts per file; as many are lost, at most, when a run is killed.
        storage: ``auto`` keeps keys, values and queries in the type the model computes in, ``float32`` widens them,
            ``bfloat16`` rounds them to 8 significant bits, in half the bytes of float32; futures stay float32.
        device: where to move the model first, such as ``cuda``; None leaves it where it is.
        progress: show a progress bar on stderr.
        recipe: plain JSON data that says how the prompts were made; a resumed recording must have the same.
        hidden: keep hidden states too, ``[layers, tokens, width]``, for agents that learn from them such as ``kvzap``:
            often more bytes than keys and values together.
        workers: processes that share the shards, each with one thread for tensors; they load the model from where it
            was loaded, and the result is the same for any number of them. By default this process with all its threads.
        ray: address of a Ray cluster whose machines record in place of processes here, such as ``auto``;
            ``auto:gpus=0.25`` lets four workers share a GPU. All find `out` and the model's folder under the same name.

    Returns:
        The whole set, with what the folder already held.

    Raises:
        UserError: a model that is not supported, settings or prompts that are not usable, or a folder that holds
            something else; nothing half-written stays behind.
    """
    model = transformers_model(model)
    refuse_unsupported(model)
    prompts = list(prompts)
    if not prompts:
        raise UserError("there are no prompts to record; expected at least one")
    if not all(isinstance(prompt, Prompt) for prompt in prompts):
        kinds = ", ".join(sorted({type(prompt).__name__ for prompt in prompts}))
        raise UserError(f"the prompts hold {kinds}; expected Prompt objects, which read_prompts makes of records")
    numbers = {"window": (window, 0), "blocks": (blocks, 1), "shard_size": (shard_size, 1)}
    for name, (number, least) in (numbers | ({} if slots is None else {"slots": (slots, 0)})).items():
        if not isinstance(number, int) or number < least:
            raise UserError(f"{name} is {number!r}; expected a whole number from {least}")
    if device is not None:
        model.to(usable_device(device))
    policies = _stateful_policies(stats, slots)
    longest = max(prompts, key=lambda prompt: prompt.tokens)
    refuse_too_long(model, longest.tokens, f"prompt {longest.id} with its longest continuation")
    settings: dict[str, Any] = {"window": window, "stats": list(policies), "blocks": blocks}
    settings |= {"hidden": True} if hidden else {}
    settings |= {} if slots is None else {"slots": slots, "slot_seed": slot_seed}
    manifest = make_manifest(model, tokenizer, storage, settings, recipe)
    remote, folder = remote_folder(out), local_path(out)
    writer = TraceWriter(folder if remote is None else remote.fetch(TRACE_FILES), manifest)
    missing = writer.missing(prompts)
    groups = [missing[start : start + shard_size] for start in range(0, len(missing), shard_size)]
    plan = RecordingPlan(window, policies, blocks, hidden, slots, slot_seed)
    bar = ProgressBar("record", len(prompts), len(prompts) - len(missing), progress)
    target = remote or folder.resolve()
    here = _ShardRecorder(model, target, manifest, plan, bar.advance)
    pool = WorkerPool(
        shard_recorder, lambda: (ModelSource.of(model), target, manifest, plan), workers, ray, here, len(groups)
    )
    with ExitStack() as stack, pool:
        if not pool.elsewhere:
            stack.enter_context(_attached(model, hidden))
        stack.enter_context(bar)
        for group, name in pool.run(groups):
            if pool.elsewhere:
                bar.advance(len(group))
                if remote is None and not (folder / name).is_file():
                    raise UserError(
                        f"a worker wrote {name} into {out} of another machine: name a folder that all of them share, "
                        "or an address such as s3://bucket/folder"
                    )
    return open_traces(out)


@dataclass(frozen=True)
class RecordingPlan:
    """How each prompt is recorded; see :func:`record`."""

    window: int
    policies: Mapping[str, StatefulPolicy]
    blocks: int
    hidden: bool
    slots: int | None
    slot_seed: int


class _ShardRecorder:
    """Records a group of prompts into a shard and returns the shard's name; the model is attached.

    Args:
        model: to record.
        target: folder of the trace set.
        manifest: of the set.
        plan: how.
        advance: called after every prompt (progress).
    """

    def __init__(
        self,
        model,
        target: Path | RemoteFolder,
        manifest: dict[str, Any],
        plan: RecordingPlan,
        advance: Callable[[], object] = lambda: None,
    ):
        self._model, self._target, self._manifest = model, target, manifest
        self._plan, self._advance = plan, advance

    def __call__(self, group: Seq[tuple[int, Prompt]]) -> str:
        name = shard_name(group[0][0], [prompt.id for _, prompt in group])
        if isinstance(self._target, Path):
            self._write(group, self._target)
            return name
        with TemporaryDirectory() as folder:
            self._write(group, Path(folder))
            for file in (name,) if self._target.has(MANIFEST) else (MANIFEST, name):
                self._target.put(Path(folder) / file, file)
        return name

    def _write(self, group: Seq[tuple[int, Prompt]], folder: Path) -> None:
        plan = self._plan
        writer = ShardWriter(folder, self._manifest)
        with writer.shard(group[0][0], [prompt.id for _, prompt in group]) as shard:
            for ordinal, prompt in group:
                positions = sampled_positions(prompt.context_ids, plan.slots, plan.slot_seed)
                recorded = _record_prompt(
                    self._model, prompt, plan.window, plan.policies, plan.blocks, plan.hidden, positions
                )
                shard.add(recorded, ordinal)
                self._advance()


def shard_recorder(
    source: ModelSource, target: Path | RemoteFolder, manifest: dict[str, Any], plan: RecordingPlan
) -> Callable[[Seq[tuple[int, Prompt]]], str]:
    """The recorder of a worker process, whose model stays attached."""
    model = source.load()
    attach(model)
    if plan.hidden:
        attach_hidden_state_hooks(model)
    return _ShardRecorder(model, target, manifest, plan)


def record_sequence(
    model,
    prompt: Prompt,
    window: int = 32,
    stats: Iterable[str | Policy] | None = None,
    blocks: int = 32,
    hidden: bool = False,
    slots: int | None = None,
    slot_seed: int = 0,
) -> Sequence:
    """Record one prompt into memory.

    Args:
        model: as for :func:`record`.
        prompt: the context and its continuations.
        window: last queries of the context to keep.
        stats: policies with memory, names or objects; None: h2o, and none with `slots`.
        blocks: at most so many blocks of queries per continuation.
        hidden: keep hidden states too.
        slots, slot_seed: as for :func:`record`.

    Raises:
        UserError: a model or settings that are not usable.
    """
    model = transformers_model(model)
    refuse_unsupported(model)
    with _attached(model, hidden):
        positions = sampled_positions(prompt.context_ids, slots, slot_seed)
        return _record_prompt(model, prompt, window, _stateful_policies(stats, slots), blocks, hidden, positions)


def sampled_positions(tokens: Seq[int], slots: int | None, seed: int = 0) -> np.ndarray | None:
    """Random positions of a context, `[slots]` int64, ascending; None where it is not longer than `slots`.

    The first and the last 4 are always among them: most policies protect them, and attention sinks lie there.

    Args:
        tokens: token ids of the context; together with `seed` they decide the draw.
        slots: how many, or None for all.
        seed: of the draw.

    Raises:
        UserError: fewer than 16 slots, or a negative seed.
    """
    if slots is None:
        return None
    if slots < LEAST_SLOTS or seed < 0:
        raise UserError(f"slots and slot_seed are {slots} and {seed}; expected at least {LEAST_SLOTS} and 0")
    if len(tokens) <= slots:
        return None
    random = np.random.default_rng([seed, int(prompt_hash(tokens, ()), 16)])
    between = random.choice(len(tokens) - 2 * SAMPLED_ENDS, slots - 2 * SAMPLED_ENDS, replace=False) + SAMPLED_ENDS
    ends = np.arange(SAMPLED_ENDS)
    return np.sort(np.concatenate((ends, between, len(tokens) - 1 - ends)))


def make_manifest(
    model, tokenizer, storage: str, settings: Mapping[str, Any], recipe: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How a trace set is recorded, as plain JSON data.

    Args:
        model: the recorded model.
        tokenizer: or None.
        storage: ``auto``, ``float32``, ``float16`` or ``bfloat16``.
        settings: of the recorder.
        recipe: how the prompts are made.

    Raises:
        UserError: an unknown storage, float16 for what may exceed its range, or a recipe that is no JSON.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    exact = "float32" if dtype == "float64" else dtype
    if storage not in ("auto", "float32", "bfloat16", exact):
        raise UserError(
            f"storage {storage!r} is not usable for a model that computes in {dtype}; choose auto, float32 or bfloat16"
        )
    try:
        plain = json.loads(json.dumps({"settings": dict(settings), "recipe": dict(recipe or {})}))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the recipe is no plain JSON data ({error}); expected texts, numbers, lists and objects"
        ) from None
    name = str(getattr(model.config, "name_or_path", "") or "")
    return {
        "format": FORMAT,
        "version": SAMPLED_VERSION if "slots" in settings else VERSION,
        "model": Path(name).name if Path(name).is_dir() else name,  # a folder of this machine means nothing elsewhere
        "fingerprint": Fingerprint.of(model).to_json(),
        "tokenizer": tokenizer_hash(tokenizer),
        "dtype": dtype,
        "storage": exact if storage == "auto" else storage,
        **plain,
        "versions": {"kv_gym": __version__, **{name: version(name) for name in ("torch", "transformers", "h5py")}},
    }


def _record_prompt(
    model,
    prompt: Prompt,
    window: int,
    policies: Mapping[str, StatefulPolicy],
    blocks: int,
    hidden: bool,
    positions: np.ndarray | None,
) -> Sequence:
    sample = None if positions is None else to_device(torch.from_numpy(positions), model.device)
    # queries without all of the keys that they attend to would be of no use
    cache = RecordingCache(model, window if sample is None else 0, policies, hidden, sample)
    _forward(model, [prompt.context_ids], cache)
    cache.run_second_readings(model, token_rows(model, [prompt.context_ids]))
    layers = cache.recorded
    tensors = {
        name: torch.stack([layer.of_slots(getattr(layer, name))[0] for layer in layers]) for name in ("keys", "values")
    }
    for name in ("queries", *["hidden"] * hidden):
        tensors[name] = torch.stack([getattr(layer, name)[0] for layer in layers])
    stats = {
        policy: {
            state: torch.stack([layer.of_slots(layer.stats[policy][state])[0] for layer in layers]).cpu().numpy()
            for state in layers[0].stats[policy]
        }
        for policy in policies
    }
    if positions is None:  # as large as the cache: no second copy beside it on an accelerator
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    # a small sample is fetched afterwards, so that the host issues continuations while an accelerator reads the context
    continuations = _continuations(model, prompt, cache, blocks)
    return Sequence(
        id=prompt.id,
        tokens=_tokens(prompt.context_ids),
        **{name: tensor.cpu().float().numpy() for name, tensor in tensors.items()},
        continuations=continuations,
        layers=tuple(layer.layer for layer in layers),
        scaling=tuple(float(layer.scaling) for layer in layers),
        stats=stats,
        task=prompt.task,
        split=prompt.split,
        text_hash=prompt.text_hash,
        dtype=str(model.dtype).removeprefix("torch."),
        positions=positions,
    )


def _continuations(model, prompt: Prompt, cache: RecordingCache, blocks: int) -> tuple[Continuation, ...]:
    """Every continuation on top of the context's full cache; those of one length run as one batch."""
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(prompt.continuation_ids):
        by_length.setdefault(len(ids), []).append(i)
    recorded: dict[int, Continuation] = {}
    for length, members in by_length.items():
        at_once = max(1, _BATCHED_TOKENS // (len(prompt.context_ids) + length))
        block = -(-length // min(blocks, -(-length // 16)))  # 16 queries a block, or as many as `blocks` allow
        for start in range(0, len(members), at_once):
            batch = members[start : start + at_once]
            rows = [prompt.continuation_ids[i] for i in batch]
            with cache.continuation(len(batch), block):
                _forward(model, rows, cache)
                futures = torch.stack(cache.futures, 1).cpu().numpy()
            for row, i in enumerate(batch):
                recorded[i] = Continuation(_tokens(prompt.continuation_ids[i]), futures[row], block)
    return tuple(recorded[i] for i in range(len(recorded)))


def _tokens(ids: list[int]):
    return torch.tensor(ids, dtype=torch.int64).numpy()


@torch.inference_mode()
def _forward(model, ids: list[list[int]], cache: RecordingCache) -> None:
    # the decoder without its output layer, whose logits nobody reads
    model.base_model(token_rows(model, ids), **with_cache(cache), use_cache=True)


@contextmanager
def _attached(model, hidden: bool = False) -> Iterator[None]:
    was_training = model.training
    attach(model)
    if hidden:
        attach_hidden_state_hooks(model)
    try:
        model.eval()
        yield
    finally:
        model.train(was_training)
        if hidden:
            remove_hidden_state_hooks(model)
        detach(model)


def _stateful_policies(stats: Iterable[str | Policy] | None, slots: int | None) -> dict[str, StatefulPolicy]:
    policies: dict[str, StatefulPolicy] = {}
    for given in stats if stats is not None else ("h2o",) if slots is None else ():
        policy = make_policy(given)
        if not isinstance(policy, StatefulPolicy) or not policy.statistics:
            raise UserError(f"policy {policy.name!r} keeps no statistics, so there is nothing to record for it")
        policies[policy.statistics] = policy
    return dict(sorted(policies.items()))
