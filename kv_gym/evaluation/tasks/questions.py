"""Questions about a context that is compressed once, before they are known or with the question at its end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.generated import WordEncoder, generated_contexts, name_with_seed
from kv_gym.evaluation.tasks.registry import register
from kv_gym.evaluation.tasks.scripted import AnswerSpan, ForkedQuestion, ScriptedTask, Segment, TaskScript
from kv_gym.evaluation.tasks.task_files import encode_text, require_tokenizer
from kv_gym.models.chat_template import ChatTemplate, answer_after, context_messages
from kv_gym.records import Source, read_records

# keys of other formats, which change what is asked: a line that has one would be another question without it
_OTHER_FORMATS = {
    **dict.fromkeys(("choice_A", "choice_B", "choice_C", "choice_D"), "LongBench v2: read it as longbench:FILE"),
    **dict.fromkeys(("input", "outputs"), "RULER or LongBench: read it as ruler:FILE or longbench:FILE"),
    **dict.fromkeys(("choices", "options", "instruction", "system"), "another format: write all into the question"),
}  # fmt: skip


@dataclass(frozen=True)
class TaskQuestion:
    """A question about a context.

    Attributes:
        question_ids: tokens that follow the context.
        answer_ids: tokens of the whole answer.
    """

    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True)
class TaskContext:
    """A context, which is read once, and the questions about it.

    Attributes:
        context_ids: tokens of the context.
        questions: each is asked on a copy of the cache.
        task: name of the task in rows of results; "" for that of the file.
    """

    context_ids: tuple[int, ...]
    questions: tuple[TaskQuestion, ...]
    task: str = ""


def tasks_hash(contexts: Iterable[TaskContext]) -> str:
    """SHA-256 of all tasks, contexts, questions and answers."""
    digest = hashlib.sha256()
    for context in contexts:
        questions = [(question.question_ids, question.answer_ids) for question in context.questions]
        digest.update(json.dumps([context.task, context.context_ids, questions]).encode())
    return digest.hexdigest()


def group_by_task(contexts: Iterable[TaskContext]) -> dict[str, list[TaskContext]]:
    """Contexts by the name of their task, in the order of first appearance."""
    groups: dict[str, list[TaskContext]] = {}
    for context in contexts:
        groups.setdefault(context.task, []).append(context)
    return groups


def read_tasks(source: Source, tokenizer=None, chat: bool = False) -> list[TaskContext]:
    """Read records ``{"context", "question", "answer", "task"}``, or the same with ``context_ids`` and so on.

    Records that follow one another with the same context share its prefill. Context, question and answer are
    tokenised apart; the tokenizer's beginning token stands before the context alone. ``answer_prefix``, if there is
    one, is read after the question. ``answers``, a list of texts or SQuAD's ``{"text": [...]}``, may stand for
    ``answer``: the first of them is expected, and a line break and a space set the three texts apart.

    With `chat`, text is rendered by the model's chat template. The context is the beginning of a user's message that
    the question ends, or a dialogue ``messages``, in which the question comes next; the answer is the reply, behind the
    prefix. Messages without ``question`` and ``answer`` ask with the user's last message and expect the reply to it.

    Args:
        source: JSON lines, or a dataset, see :mod:`kv_gym.records`.
        tokenizer: of the model; needed for text.
        chat: render text by the tokenizer's chat template.

    Raises:
        UserError: a source that cannot be read, a missing or empty field, a record of another format, messages that do
            not alternate, or text without a tokenizer; the record is named.
    """
    return contexts_from_records(read_records(source, "context, question and answer"), tokenizer, chat)


def contexts_from_records(records: Iterable[tuple[str, dict]], tokenizer=None, chat: bool = False) -> list[TaskContext]:
    """Contexts of records as the lines of a task file are, see :func:`read_tasks`.

    Args:
        records: what names a record in errors, and its data.
        tokenizer: of the model; needed for text.
        chat: render text by the tokenizer's chat template.
    """
    contexts: list[TaskContext] = []
    for where, data in records:
        for name, source in _OTHER_FORMATS.items():
            if data.get(name) is not None:
                raise UserError(f"{where} has a key {name!r}, as lines of {source}")
        data = _with_one_answer(data, where)
        if chat and "context_ids" not in data:
            data = _rendered(data, tokenizer, where)
        elif "messages" in data:
            raise UserError(f"{where} holds messages, which the model's chat template renders: ask for it with --chat")
        elif "answers" in data and isinstance(data.get("question"), str):
            data = data | {"question": f"\n{data['question']}"}  # such data knows nothing of what stands before it
        context, question, answer = (_ids(data, name, tokenizer, where) for name in ("context", "question", "answer"))
        task = "" if data.get("task") is None else str(data["task"])
        asked = TaskQuestion(question, answer)
        if contexts and (contexts[-1].context_ids, contexts[-1].task) == (context, task):
            contexts[-1] = TaskContext(context, (*contexts[-1].questions, asked), task)
        else:
            contexts.append(TaskContext(context, (asked,), task))
    return contexts


def _with_one_answer(data: dict, where: str) -> dict:
    """A record whose ``answers`` became one ``answer``, set apart by white space."""
    answers = data.get("answers")
    if answers is None or data.get("answer") is not None:
        return data
    texts = answers.get("text") if isinstance(answers, dict) else answers
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
        raise UserError(f"{where} has no answer under 'answers'; leave out questions that cannot be answered")
    return data | {"answer": f" {texts[0]}"}


def _rendered(data: dict, tokenizer, where: str) -> dict:
    """A record whose texts are rendered by the chat template, with their tokens."""
    template, messages = ChatTemplate(tokenizer), context_messages(data, where)
    question, answer, prefix = data.get("question"), data.get("answer"), data.get("answer_prefix")
    if answer is None and messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    if question is None and len(messages) > 1 and messages[-1]["role"] == "user":
        question = messages.pop()["content"]
    for name, text in (("question", question), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where} has no {name}; expected a text {name!r}, or messages that end with it")
    assert isinstance(question, str) and isinstance(answer, str)
    if not isinstance(prefix, str | None):
        raise UserError(f"{where}: answer_prefix is no text")
    try:
        context, asked = template.ask(messages, question, prefix or "")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    ids = {"context": context, "question": asked, "answer": answer_after(prefix or "", answer)}
    return data | {f"{name}_ids": template.ids(text) for name, text in ids.items()}


def _ids(data: dict, name: str, tokenizer, where: str) -> tuple[int, ...]:
    ids = data.get(f"{name}_ids")
    if ids is None:
        text = data.get(name)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where} has no {name}; expected a text {name!r} or a list of ids {name + '_ids'!r}")
        if name == "question" and isinstance(prefix := data.get("answer_prefix", ""), str):
            text += prefix
        require_tokenizer(tokenizer, where)
        ids = encode_text(tokenizer, text, is_context=name == "context")
        if not ids:
            raise UserError(f"{where}: the model's tokenizer makes no token of the {name} {text!r}; give other text")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{where}: {name}_ids is no list of token ids from 0; expected at least one")
    return tuple(ids)


def unseen_questions(contexts: Sequence[TaskContext], name: str = "", rows: int = 8) -> ScriptedTask:
    """Each context is read and compressed once; then every question is asked on a copy of the compressed cache.

    Args:
        contexts: contexts with their questions.
        name: of the task; by default the first context's.
        rows: contexts of equal length that are read together.
    """
    scripts = [
        TaskScript.of_one_context(
            number,
            context.context_ids,
            [ForkedQuestion(question.question_ids, question.answer_ids) for question in context.questions],
        )
        for number, context in enumerate(contexts)
    ]
    return ScriptedTask(name or contexts[0].task, "prefill", scripts, rows)


def seen_questions(contexts: Sequence[TaskContext], name: str = "", rows: int = 8) -> ScriptedTask:
    """Each question stands at the end of the context when that is compressed, and has a compression of its own.

    This is what SnapKV and its like were made for: the last queries are the question's. The first token of an answer
    comes from the forward pass that read the context, as in any deployment, so that eviction can only spoil those after
    it, and an answer of one token says nothing. A context of the task is one question of one of `contexts`, with the id
    ``<context>/<question>``.

    Args:
        contexts: contexts with their questions.
        name: of the task; by default the first context's and ``seen``.
        rows: contexts of equal length that are read together.
    """
    scripts = [
        TaskScript(
            f"{number}/{index}",
            (
                Segment((*context.context_ids, *question.question_ids), compress=True),
                Segment(question.answer_ids, (AnswerSpan(0, len(question.answer_ids)),)),
            ),
        )
        for number, context in enumerate(contexts)
        for index, question in enumerate(context.questions)
    ]
    return ScriptedTask(name or f"{contexts[0].task} seen", "prefill", scripts, rows)


def reference_tasks(
    task: str = "multi_key", tokens: int = 512, count: int | None = None, seed: int | None = None, tokenizer=None
) -> list[TaskContext]:
    """Contexts of the reference generator with their questions, the pinned held-out ones by default.

    Args:
        task: one of `kv_gym.reference.generator.TASKS`.
        tokens: words per context.
        count: number of contexts, 64 by default.
        seed: gives other contexts, see :func:`kv_gym.evaluation.tasks.generated.generated_contexts`.
        tokenizer: of the model, unless it is the reference model.

    Raises:
        UserError: unknown task, or unusable length or seed.
    """
    words = WordEncoder.for_tokenizer(tokenizer)
    return [
        TaskContext(
            (*words.beginning, *words.encode(context.words)),
            tuple(TaskQuestion(words.encode(q.question), words.encode(q.answer)) for q in context.questions),
            task,
        )
        for context in generated_contexts(task, tokens, count, seed)
    ]


def reference_questions(
    task: str,
    tokens: int = 512,
    seen: bool = False,
    unseen: bool = False,
    count: int | None = None,
    seed: int | None = None,
    tokenizer=None,
) -> ScriptedTask:
    """The task of :func:`reference_tasks`, with its questions unseen unless they are `seen`."""
    contexts = reference_tasks(task, tokens, count, seed, tokenizer)
    if seen:
        return seen_questions(contexts, name_with_seed(f"{task} seen {tokens}", seed))
    return unseen_questions(contexts, name_with_seed(f"{task} {tokens}", seed))


for _task, _help in {
    "single": "questions about a generated context of 512 words: facts that their name alone finds",
    "multi_key": "questions about a generated context: facts among look-alikes, found by two words together",
    "multi_value": "questions about a generated context: keys with two values, both asked for",
    "multi_query": "questions about a generated context: the values of two keys in one answer",
    "variable_tracking": "questions about a generated context: facts that point to other facts",
    "most_common": "a question about a generated context: the thing that it names most often",
}.items():
    register(f"{_task}:512", _help)(partial(reference_questions, _task))


@register("FILE", "questions of your own; `:seen` puts each at the end of its context before that is compressed, "
          "`:chat` renders them by the model's chat template")  # fmt: skip
def questions_of_file(
    file: str | Path, seen: bool = False, chat: bool = False, count: int | None = None, tokenizer=None
) -> list[ScriptedTask]:
    """Questions of a file, see :func:`read_tasks`: a task for every ``task`` of its lines.

    Args:
        file: JSON lines, or the rows of a dataset.
        seen: whether each question stands at the end of its context when that is compressed.
        chat: whether the model's chat template renders text.
        count: number of contexts, all by default.
        tokenizer: of the model.
    """
    build, suffix = (seen_questions, " seen") if seen else (unseen_questions, "")
    groups = group_by_task(read_tasks(file, tokenizer, chat)[:count])
    return [build(contexts, (name or Path(file).stem) + suffix) for name, contexts in groups.items()]
