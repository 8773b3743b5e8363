"""The model `kv_gym` of lm-evaluation-harness: its tasks, answered from a compressed cache.

    python -m kv_gym.interop.lm_eval run --model kv_gym --model_args pretrained=MODEL,budget=1/8 --tasks boolq

The harness (github.com/EleutherAI/lm-evaluation-harness, extra `lm-eval`) makes one forward of prompt and answer
without a cache, so that no compression would ever show. Here a prompt is read up to a cut and compressed there, once
for all requests that share this beginning; every choice or generation goes on from a fork of the compressed cache.
Prompts are tokenised as the harness's model `hf` does, in one piece, so at budget 1.0 the results are that model's. A
token that straddles the cut is read behind it.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.live import EvictingCache
from kv_gym.models.cache_name import with_cache
from kv_gym.models.loading import load_model, token_rows
from kv_gym.policies import Policy, make_policy
from kv_gym.progress import ProgressBar

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError:
    raise UserError(
        "evaluating with lm-evaluation-harness needs the extra lm-eval: pip install 'kv-gym[lm-eval]'"
    ) from None

_LOGGER = logging.getLogger("lm_eval.models.kv_gym")


@register_model("kv_gym", "kv-gym")
class KVGymLM(HFLM):
    """A transformers decoder behind an :class:`~kv_gym.live.EvictingCache`, as a model of lm-evaluation-harness.

    Where the prompt is cut: behind the text of the document's field `context_field`, so that the question is not seen
    when its context is compressed; before the last occurrence of the text `context_end`; without either, before the
    prompt's last token, so that the question is seen and even an answer's first token comes from the compressed cache.
    Few-shot examples and a description stand before the context and are compressed with it.

    Args:
        pretrained: folder, GGUF file or name of a model, see :func:`kv_gym.models.load_model`, or the model itself.
        policy, budget, allocation, trigger, sinks, recent, evicted, positions, select, delay: see
            :class:`~kv_gym.live.EvictingCache`. A trigger such as ``every:64`` goes on evicting behind the cut.
        context_field: name of a field of a task's documents; or a mapping from a task's name, in which ``*`` stands for
            anything, to such a field (in Python, or as JSON on the command line).
        context_end: a text with which the part behind the context begins, such as ``Question:``; or a mapping.
        tokenizer: instead of the model's own.
        device, dtype: see :func:`kv_gym.models.load_model`.
        batch_size: contexts that are read together, and requests that are answered together.
        **options: of the harness's class `HFLM` that do not concern loading, such as `max_length`, `add_bos_token`,
            `prefix_token_id`, `chat_template_args` or `think_end_token`.

    Raises:
        UserError: whatever loading or the cache refuses, a batch size that is no number, or a cut that a document or
            its prompt does not have.
    """

    def __init__(
        self,
        pretrained: Any,
        policy: str | Path | Policy = "keydiff",
        budget: str | int | float = 0.25,
        allocation: str = "uniform",
        trigger: str = "prefill",
        sinks: int | None = None,
        recent: int | None = None,
        evicted: str = "drop",
        positions: str | None = None,
        select: str = "all",
        delay: int = 0,
        context_field: str | Mapping[str, str] | None = None,
        context_end: str | Mapping[str, str] | None = None,
        tokenizer: Any = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        if not str(batch_size).isdigit() or not int(batch_size):
            raise UserError(f"batch_size is {batch_size!r}; expected a number from 1, such as 8")
        if context_field is not None and context_end is not None:
            raise UserError("context_field and context_end both say where a prompt is cut: give one of the two")
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness names cuda:0 where nobody named a device
        name, model = str(pretrained), pretrained
        if isinstance(pretrained, str | Path):
            model, own = load_model(pretrained, device, dtype)
            tokenizer = own if tokenizer is None else tokenizer
        else:
            name = str(model.config.name_or_path)
        if tokenizer is None:
            raise UserError(f"model {name} comes without a tokenizer, which the harness's texts need: give tokenizer=")
        harness = logging.getLogger("lm_eval.models.huggingface")
        level = harness.level
        harness.setLevel(logging.ERROR)  # it warns of every model that it did not load itself
        try:
            super().__init__(
                pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=int(batch_size), **options
            )
        finally:
            harness.setLevel(level)
        self.pretrained = name
        self._settings: dict[str, Any] = {
            "budget": budget, "allocation": allocation, "trigger": trigger, "sinks": sinks, "recent": recent,
            "evicted": evicted, "positions": positions, "select": select, "delay": delay,
        }  # fmt: skip
        self._policy = make_policy(policy).with_tokenizer(self.tokenizer)
        self._policy_name = policy.name if isinstance(policy, Policy) else str(policy)
        self._fields, self._ends = _by_task(context_field), _by_task(context_end)
        self._read_tokens = self._kept_tokens = 0.0
        self._contexts = 0
        self._new_cache().detach()  # refuses what does not fit before anything is read

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See the harness: for each request, log p of the continuation and whether greedy decoding would give it."""
        readings: dict[tuple, dict] = defaultdict(lambda: defaultdict(list))
        for number, request in enumerate(requests):
            prompt, continuation = request.args
            ids, more = self._encode(prompt, continuation)
            cut = self._cut(request, prompt, ids)
            dropped = max(0, len(ids) + len(more) - (self.max_length + 1))
            self._warn_of_dropped(dropped, request)
            ids, cut = ids[dropped:], max(0, cut - dropped)
            readings[tuple(ids[:cut])][(*ids[cut:], *more[:-1])].append((number, more))
        results: list[Any] = [None] * len(requests)
        with ProgressBar("answer", len(requests), shown=not disable_tqdm, transient=True) as bar:
            for compressed, group in self._compressed_groups(readings):
                longest = max(len(more) for _, _, found in group for _, more in found)
                logits = compressed.read([row for row, _, _ in group], [rest for _, rest, _ in group], longest)
                likelihood = torch.log_softmax(logits, -1, dtype=self.softmax_dtype)
                for own, (_, _, found) in zip(likelihood, group, strict=True):
                    for number, more in found:
                        results[number] = _judged(own[len(own) - len(more) :], more)
                        self.cache_hook.add_partial("loglikelihood", requests[number].args, results[number])
                        bar.advance(1)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Refuse: such a task has no context that could be compressed before what is judged.

        Raises:
            UserError: always.
        """
        task = requests[0].task_name if requests else ""
        raise UserError(
            f"task {task!r} asks for rolling likelihoods of whole texts, in which nothing is read behind a compressed "
            "context: measure it with the model 'hf', or text in portions with kv-gym evaluate --tasks text:FILE"
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """See the harness: the text that follows each prompt, up to a stop sequence."""
        groups: dict[tuple[str, int], dict] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        copies: Counter[tuple] = Counter()
        for number, request in enumerate(requests):
            prompt, wanted = request.args
            ids = self.tok_encode(prompt)
            cut = self._cut(request, prompt, ids)
            options = normalize_gen_kwargs(wanted, self.max_gen_toks)
            room = self.max_length - int(options["max_gen_toks"])
            if room < 1:
                raise UserError(
                    f"task {request.task_name!r} generates up to {self.max_length - room} tokens and the model has "
                    f"{self.max_length} positions for prompt and answer: lower max_gen_toks with --gen_kwargs"
                )
            dropped = max(0, len(ids) - room)
            self._warn_of_dropped(dropped, request)
            ids, cut = ids[dropped:], max(0, cut - dropped)
            kind, copy = json.dumps(wanted, sort_keys=True, default=str), 0
            if options["do_sample"]:  # each copy of a request draws its own text
                copy = copies[kind, *ids]
                copies[kind, *ids] += 1
            groups[kind, copy][tuple(ids[:cut])][tuple(ids[cut:])].append(number)
        results: list[Any] = [None] * len(requests)
        with ProgressBar("generate", len(requests), shown=not disable_tqdm, transient=True) as bar:
            for readings in groups.values():
                for compressed, group in self._compressed_groups(readings):
                    wanted = requests[group[0][2][0]].args[1]
                    for text, (_, _, numbers) in zip(self._generate(compressed, group, wanted), group, strict=True):
                        for number in numbers:
                            results[number] = text
                            self.cache_hook.add_partial("generate_until", requests[number].args, text)
                            bar.advance(1)
        return results

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results: the model, the cache's settings, and what it kept at the cuts."""
        contexts = max(self._contexts, 1)
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "kv_gym": {
                "policy": self._policy_name,
                **self._settings,
                "context_field": self._fields,
                "context_end": self._ends,
                "contexts": self._contexts,
                "tokens_per_context": self._read_tokens / contexts,
                "tokens_kept_per_head": self._kept_tokens / contexts,
            },
        }

    def _new_cache(self) -> EvictingCache:
        return EvictingCache(self.model, self._policy, **self._settings)

    def _encode(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt and of what continues it, as the harness's model `hf` has them."""
        if prompt:
            return self._encode_pair(prompt, continuation)
        more = self.tok_encode(continuation, add_special_tokens=False)
        first = self.prefix_token_id
        return (more[:1], more[1:]) if more[0] == first else ([first], more)

    def _cut(self, request: Any, prompt: str, ids: Sequence[int]) -> int:
        """How many of a prompt's tokens are read before the compression."""
        last = len(ids) - 1
        if not prompt:  # a likelihood without context: nothing is cut
            return 0
        task = str(request.task_name)
        field, end = _of_task(self._fields, task), _of_task(self._ends, task)
        if field is not None:
            place = self._field_end(request.doc, field, prompt, task)
        elif end is None:
            return last
        elif (place := prompt.rfind(end)) < 1:
            raise UserError(
                f"a prompt of task {task!r} does not have the text {end!r} behind a context: give context_end= a text "
                "that stands between context and question in every prompt"
            )
        # tokenised alone, the context has other tokens from the one on that straddles its end
        alone = self.tok_encode(prompt[:place])
        same = next((number for number, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), None)
        return min(len(alone) if same is None else same, last)

    def _field_end(self, doc: Mapping[str, Any], field: str, prompt: str, task: str) -> int:
        text = doc.get(field)
        if not isinstance(text, str) or not text.strip():
            texts = ", ".join(sorted(name for name, value in doc.items() if isinstance(value, str) and value.strip()))
            raise UserError(
                f"a document of task {task!r} has no text in the field {field!r} (fields with one: {texts or 'none'}): "
                "name another field, or give context_end="
            )
        start = prompt.rfind(text.strip())
        if start < 0:
            raise UserError(
                f"the prompts of task {task!r} do not have the text of the field {field!r} as it stands in the "
                "document: give context_end= a text that stands between context and question"
            )
        return start + len(text.strip())

    def _warn_of_dropped(self, dropped: int, request: Any) -> None:
        if dropped:
            _LOGGER.warning(
                "a prompt of task %s is longer than the model's %d positions: its first %d tokens are left out",
                request.task_name, self.max_length, dropped,
            )  # fmt: skip

    def _compressed_groups(
        self, readings: Mapping[tuple, Mapping[tuple, list]]
    ) -> Iterator[tuple[_CompressedContexts, list[tuple[int, tuple, list]]]]:
        """Read and compress contexts, a batch at a time, and form groups of what is read behind them, longest first.

        Args:
            readings: context -> what follows it -> the requests that this answers.

        Yields:
            The contexts of a batch, and a group: row of the context, what follows it, and the requests.
        """
        for batch in self._batches(list(readings)):
            cache = self._new_cache()
            with cache:
                compressed = _CompressedContexts.read_all(self.model, cache, batch)
                self._contexts += len(batch)
                self._read_tokens += sum(map(len, batch))
                if cache.seen:
                    self._kept_tokens += float(cache.kept().double().mean((0, 2)).sum())
                asked = [(row, rest) for row, context in enumerate(batch) for rest in readings[context]]
                for group in self._batches(asked, key=lambda each: len(each[1])):
                    yield compressed, [(row, rest, readings[batch[row]][rest]) for row, rest in group]

    def _batches(self, items: Sequence[Any], key=len) -> Iterator[list[Any]]:
        ordered = sorted(items, key=key, reverse=True)
        for start in range(0, len(ordered), self.batch_size):
            yield ordered[start : start + self.batch_size]

    def _generate(
        self, compressed: _CompressedContexts, group: Sequence[tuple[int, tuple, list]], wanted: Mapping[str, Any]
    ) -> Iterator[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(wanted), self.max_gen_toks))
        end = None if self.eot_token_id is None else self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stop, new = handle_stop_sequences(options.pop("until", None), eos=end), int(options.pop("max_gen_toks"))
        fork, ids, mask = compressed.fork([row for row, _, _ in group], [rest for _, rest, _ in group])
        limit = options.pop("max_length", ids.shape[1] + new)
        with fork, torch.no_grad():
            output = self._model_generate(ids, limit, stop, attention_mask=mask, **with_cache(fork), **options)
        think = self.think_end_token
        for row in output[:, ids.shape[1] :].tolist():
            if isinstance(think, int) and think in row:
                row = row[len(row) - row[::-1].index(think) :]
            text = self.tok_decode(row)
            yield postprocess_generated_text(
                text.lstrip() if isinstance(think, int) else text, stop, think if isinstance(think, str) else None
            )


@dataclass
class _CompressedContexts:
    """Contexts of several lengths in one cache that was cut behind them.

    Attributes:
        model: that read them.
        cache: with a row for each context.
        ids: `[contexts, tokens]`, padded on the left.
        mask: `[contexts, tokens]` int64, 1 where a token is real.
    """

    model: Any
    cache: EvictingCache
    ids: Tensor
    mask: Tensor

    @classmethod
    def read_all(cls, model, cache: EvictingCache, contexts: Sequence[Sequence[int]]) -> _CompressedContexts:
        """Read contexts into an empty cache, which its trigger cuts; contexts without tokens leave it empty."""
        ids, mask = _padded(model, contexts)
        if ids.shape[1]:
            _forward(model, cache, ids, mask, 1)
        return cls(model, cache, ids, mask)

    def fork(self, rows: Sequence[int], rests: Sequence[Sequence[int]]) -> tuple[EvictingCache, Tensor, Tensor]:
        """A copy of some contexts, with the whole of their tokens and of those that follow, and the mask of both.

        Args:
            rows: which contexts, as often as they are needed.
            rests: what follows each; padding stands before it.
        """
        chosen = torch.tensor(rows, device=self.ids.device)
        ids, mask = _padded(self.model, rests)
        fork = self.cache.fork()
        if fork.seen:
            fork.batch_select_indices(chosen)
        return fork, torch.cat((self.ids[chosen], ids), 1), torch.cat((self.mask[chosen], mask), 1)

    def read(self, rows: Sequence[int], rests: Sequence[Sequence[int]], count: int) -> Tensor:
        """Logits `[rows, count, vocabulary]` of the last places of what follows some contexts."""
        fork, ids, mask = self.fork(rows, rests)
        with fork:
            return _forward(self.model, fork, ids[:, self.ids.shape[1] :], mask, count)


@torch.no_grad()
def _forward(model, cache: EvictingCache, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - ids.shape[1] :]
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, **with_cache(cache), use_cache=True,
        logits_to_keep=count,
    ).logits  # fmt: skip


def _padded(model, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids `[rows, tokens]`, padded on the left, and their mask."""
    longest = max(map(len, rows))
    ids = token_rows(model, [[0] * (longest - len(row)) + list(row) for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows], device=ids.device)
    return ids, (torch.arange(longest, 0, -1, device=ids.device) <= lengths).long()


def _judged(likelihood: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    expected = torch.tensor(continuation, device=likelihood.device)
    found = likelihood.gather(1, expected[:, None]).sum()
    return float(found), bool((likelihood.argmax(1) == expected).all())


def _by_task(setting: str | Mapping[str, str] | None) -> dict[str, str]:
    if setting is None:
        return {}
    return dict(setting) if isinstance(setting, Mapping) else {"*": str(setting)}


def _of_task(settings: Mapping[str, str], task: str) -> str | None:
    return next((setting for pattern, setting in settings.items() if fnmatchcase(task, pattern)), None)


def main() -> None:
    """The harness's command line, with the model `kv_gym`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
