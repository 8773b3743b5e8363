"""Questions to ask a decoding model: a context, and questions that it has not seen while compressing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.generated import generated
from kv_gym.evaluation.tasks.lines import json_lines
from kv_gym.evaluation.tasks.wording import Wording


@dataclass(frozen=True)
class TaskQuestion:
    """What is asked, and the tokens that answer it whole."""

    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True)
class TaskContext:
    """One context and the questions that share it: it is prefilled once."""

    context_ids: tuple[int, ...]
    questions: tuple[TaskQuestion, ...]
    task: str = ""


def tasks_hash(contexts: Iterable[TaskContext]) -> str:
    """SHA-256 over everything that is asked."""
    digest = hashlib.sha256()
    for context in contexts:
        asked = [(question.question_ids, question.answer_ids) for question in context.questions]
        digest.update(json.dumps([context.task, context.context_ids, asked]).encode())
    return digest.hexdigest()


def read_tasks(path: str | Path, tokenizer=None) -> list[TaskContext]:
    """Read JSON lines ``{"context", "question", "answer", "task"}``, or the same with ``context_ids`` and so on.

    Lines that follow one another with the same context share its prefill. Context, question and answer are
    tokenised apart, the context with the tokenizer's special tokens, the others without.

    Raises:
        UserError: missing file, bad JSON, a missing or empty field, or text without a tokenizer; the line is named.
    """
    contexts = contexts_from_records(json_lines(path, "context, question and answer"), tokenizer)
    if not contexts:
        raise UserError(f"task file {path} holds no task; expected JSON lines with context, question and answer")
    return contexts


def contexts_from_records(records: Iterable[tuple[str, dict]], tokenizer=None) -> list[TaskContext]:
    """Contexts of records as the lines of a task file are, see :func:`read_tasks`.

    Args:
        records: what names a record in errors, and its data.
        tokenizer: of the model; needed for text.
    """
    contexts: list[TaskContext] = []
    for where, data in records:
        context, question, answer = (
            _ids(data, name, tokenizer, where, special=name == "context") for name in ("context", "question", "answer")
        )
        asked, task = TaskQuestion(question, answer), str(data.get("task", ""))
        if contexts and (contexts[-1].context_ids, contexts[-1].task) == (context, task):
            contexts[-1] = TaskContext(context, (*contexts[-1].questions, asked), task)
        else:
            contexts.append(TaskContext(context, (asked,), task))
    return contexts


def _ids(data: dict, name: str, tokenizer, where: str, special: bool) -> tuple[int, ...]:
    ids = data.get(f"{name}_ids")
    if ids is None:
        text = data.get(name)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where} has no {name}; expected a text {name!r} or a list of ids {name + '_ids'!r}")
        if tokenizer is None:
            raise UserError(f"{where} holds text and the model has no tokenizer; give {name}_ids or the tokenizer")
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        if not ids:
            raise UserError(f"{where}: the model's tokenizer makes no token of the {name} {text!r}; give other text")
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise UserError(f"{where}: {name}_ids is no list of token ids from 0; expected at least one")
    return tuple(ids)


def reference_tasks(
    task: str = "multi_key", tokens: int = 512, count: int | None = None, seed: int | None = None, tokenizer=None
) -> list[TaskContext]:
    """The pinned held-out contexts of a reference task (`count` of them) with their questions.

    Args:
        task: one of `kv_gym.reference.generator.TASKS`.
        tokens: words per context.
        count: how many contexts; None means 64.
        seed: names other contexts, see :func:`kv_gym.evaluation.tasks.generated.generated`.
        tokenizer: of the model, unless it is the reference model.

    Raises:
        UserError: unknown task, or unusable length or seed.
    """
    wording = Wording.of(tokenizer)
    return [
        TaskContext(
            (*wording.beginning, *wording.ids(context.words)),
            tuple(TaskQuestion(wording.ids(q.question), wording.ids(q.answer)) for q in context.questions),
            task,
        )
        for context in generated(task, tokens, count, seed)
    ]
