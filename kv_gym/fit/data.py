"""What a model is fitted to: contexts with what is asked of them, in three parts that share no text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks import (
    TaskContext,
    TaskQuestion,
    read_tasks,
    reference_tasks,
    tasks_hash,
)
from kv_gym.files import open_file, parse_json
from kv_gym.records import Source, is_dataset, name_of, read_records
from kv_gym.traces.prompts import Prompt, prompts_from_text, read_prompts

REFERENCE = "reference"
REFERENCE_TASK, REFERENCE_TOKENS = "multi_key", 512
VALIDATION_SEED = 898  # no training seed below it, no benchmark's validation and no pinned text comes here
PARTS = ("train", "validation", "test")
FEWEST = {"train": 8, "validation": 4, "test": 4}
CONTINUATION_TOKENS = 64


@dataclass(frozen=True)
class FitData:
    """Contexts to train on, to choose the budget by, and to report.

    Attributes:
        measure: ``accuracy`` (exact match of whole answers) or ``nll`` (of what followed, nats per token; the first
            token of a continuation is its question, since the whole context has said it before the cut).
        train, validation, test: no context stands in two of them.
        source: where they come from, as plain JSON data.
    """

    measure: str
    train: tuple[TaskContext, ...]
    validation: tuple[TaskContext, ...]
    test: tuple[TaskContext, ...]
    source: dict[str, Any]

    @property
    def hash(self) -> str:
        """SHA-256 over the measure and everything in the three parts."""
        parts = [tasks_hash(getattr(self, part)) for part in PARTS]
        return hashlib.sha256(json.dumps([self.measure, *parts]).encode()).hexdigest()

    def prompts(self) -> list[Prompt]:
        """The training part as prompts to record: every question with its answer is one continuation."""
        return [
            Prompt(
                f"{i:06d}-{document_of(context)}",
                list(context.context_ids),
                [[*question.question_ids, *question.answer_ids] for question in context.questions],
                context.task,
                "train",
                document_of(context),
            )
            for i, context in enumerate(self.train)
        ]


def read_data(
    data: Source,
    tokenizer: Any = None,
    *,
    count: int = 160,
    tokens: int | None = None,
    continuation_tokens: int | None = None,
    seed: int = 0,
    chat: bool = False,
) -> FitData:
    """Read contexts and divide them.

    A quarter of the contexts is for validation and a quarter for testing; of the rest at most `count` are trained on,
    and what is left over goes to the other two parts. JSON lines are divided by the hash of their context's tokens, so
    that their order in the file does not matter; a text is divided by place, so that neighbours stay together. A
    line's own ``split`` is not looked at.

    Args:
        data: records with context, question and answer, or with context and continuations (JSON lines or a dataset,
            see :mod:`kv_gym.records`); a text; or ``reference``, the bundled task, whose test part are the pinned
            held-out contexts. Dialogues without question and answer are continuations.
        tokenizer: a transformers tokenizer; needed for text.
        count: contexts to train on, at most; of a text, twice as many windows are read.
        tokens: length of a text's windows, 512 by default, or of the reference contexts; others have their own.
        continuation_tokens: of a text, what follows each window and is judged, 64 by default.
        seed: of the training contexts of ``reference``.
        chat: render text by the model's chat template; for records.

    Raises:
        UserError: no such file, something else in it, too few contexts, or a length that the data cannot have.
    """
    if count < FEWEST["train"]:
        raise UserError(f"count is {count}; expected at least {FEWEST['train']} contexts to train on")
    if isinstance(data, str) and data == REFERENCE:
        if continuation_tokens is not None or chat:
            raise UserError(
                "the reference task has its own questions and words: leave continuation_tokens and chat out"
            )
        return _reference(tokens or REFERENCE_TOKENS, count, seed)
    data = data if isinstance(data, str | Path | Mapping) else list(data)  # a mapping of splits is refused below
    kind = kind_of(data)
    name = Path(data).name if isinstance(data, str | Path) else name_of(data)
    source: dict[str, Any] = {"file": name, "kind": kind} | ({"chat": True} if chat else {})
    if kind == "text":
        assert isinstance(data, str | Path)  # as kind_of says
        if chat:
            raise UserError(f"{data} is a text, which no chat template renders: leave chat out, or give records")
        source |= {"tokens": tokens or 512, "continuation_tokens": continuation_tokens or CONTINUATION_TOKENS}
        windows = prompts_from_text(data, tokenizer, source["tokens"], source["continuation_tokens"], 2 * count)
        return _split("nll", _from_prompts(windows), count, source)
    if tokens is not None or continuation_tokens is not None:
        raise UserError(f"the records of {name} have lengths of their own: leave tokens and continuation_tokens out")
    if kind == "questions":
        measure, contexts = "accuracy", _merge_contexts(read_tasks(data, tokenizer, chat))
    else:
        measure, contexts = "nll", _from_prompts(read_prompts(data, tokenizer, chat))
    return _split(measure, sorted(contexts, key=document_of), count, source)


def document_of(context: TaskContext) -> str:
    """Names a context by its tokens: 16 digits of their SHA-256."""
    return hashlib.sha256(json.dumps(context.context_ids).encode()).hexdigest()[:16]


def contexts_for(validation: int, count: int) -> int:
    """How many contexts a file must hold so that `validation` of them choose the budget."""
    return max(sum(FEWEST.values()), min(4 * validation, count + 2 * validation))


def kind_of(data: Source) -> str:
    """``questions``, ``continuations`` or ``text``, by the first record, or the first line that is not empty.

    Raises:
        UserError: data that cannot be read, or whose first record is none of these.
    """
    if isinstance(data, str | Path) and not is_dataset(data):
        record = _first_line(Path(data))
    else:
        _, record = next(read_records(data, "a question and an answer, or continuations"))
    names = set(record) if isinstance(record, dict) else set()
    if names & {"continuations", "continuation_ids"}:
        return "continuations"
    if names & {"question", "question_ids", "answer", "answer_ids", "answers"}:
        return "questions"
    if "messages" in names:
        return "continuations"
    if isinstance(record, dict) or (isinstance(data, str | Path) and Path(data).suffix in (".jsonl", ".json")):
        raise UserError(
            f"the first record of {name_of(data)} has neither a question and an answer nor continuations; expected "
            'JSON lines such as {"context": "...", "question": "...", "answer": "..."}, or a text in a file of another '
            "name"
        )
    return "text"


def _first_line(path: Path) -> Any:
    """What the first line of a file holds, None where it is no JSON."""
    with open_file(path, f"expected JSON lines, a text, or the word {REFERENCE}") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        return parse_json(first.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text; convert it first") from None
    except UserError:
        return None


def _merge_contexts(contexts: Iterable[TaskContext]) -> list[TaskContext]:
    """One context for every text, with all that is questions of it anywhere in the file."""
    merged: dict[tuple[int, ...], TaskContext] = {}
    for context in contexts:
        known = merged.get(context.context_ids)
        questions = context.questions if known is None else (*known.questions, *context.questions)
        merged[context.context_ids] = TaskContext(context.context_ids, tuple(dict.fromkeys(questions)), context.task)
    return list(merged.values())


def _from_prompts(prompts: Iterable[Prompt]) -> list[TaskContext]:
    contexts = []
    for prompt in prompts:
        shortest = min(map(len, prompt.continuation_ids), default=0)
        if shortest < 2:
            raise UserError(
                f"prompt {prompt.id} has a continuation of {shortest} tokens; expected at least one continuation and "
                "2 tokens in each, because the first is predicted before anything is evicted"
            )
        questions = tuple(TaskQuestion(tuple(ids[:1]), tuple(ids[1:])) for ids in prompt.continuation_ids)
        contexts.append(TaskContext(tuple(prompt.context_ids), questions, prompt.task))
    return _merge_contexts(contexts)


def _split(measure: str, contexts: Sequence[TaskContext], count: int, source: dict[str, Any]) -> FitData:
    needed = sum(FEWEST.values())
    if len(contexts) < needed:
        raise UserError(
            f"{source['file']} holds {len(contexts)} different contexts and at least {needed} are needed, to train on "
            f"{FEWEST['train']}, to choose the budget by {FEWEST['validation']} and to test on {FEWEST['test']}: give "
            "more or shorter ones"
        )
    training = min(count, len(contexts) // 2)
    middle = training + (len(contexts) - training) // 2
    train, validation, test = contexts[:training], contexts[training:middle], contexts[middle:]
    return FitData(measure, tuple(train), tuple(validation), tuple(test), source)


def _reference(tokens: int, count: int, seed: int) -> FitData:
    if not 0 <= seed < VALIDATION_SEED:
        raise UserError(f"seed is {seed}; expected one from 0 to {VALIDATION_SEED - 1}")
    half = max(FEWEST["validation"], count // 2)
    train = reference_tasks(REFERENCE_TASK, tokens, count, seed)
    validation = reference_tasks(REFERENCE_TASK, tokens, half, VALIDATION_SEED)
    test = reference_tasks(REFERENCE_TASK, tokens, half)
    source = {"file": REFERENCE, "kind": "questions", "task": REFERENCE_TASK, "tokens": tokens}
    return FitData("accuracy", tuple(train), tuple(validation), tuple(test), source)
