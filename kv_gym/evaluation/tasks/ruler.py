"""RULER's files: needles, chains and counts in long texts (Hsieh et al. 2024, arXiv 2404.06654)."""

from __future__ import annotations

from pathlib import Path

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.answer_scores import match_all, match_part
from kv_gym.evaluation.tasks.free_text import FreeTextPrompt, FreeTextTask, encode_prompt
from kv_gym.evaluation.tasks.registry import register
from kv_gym.evaluation.tasks.task_files import TaskLine, Text, Texts, require_tokenizer
from kv_gym.files import validated
from kv_gym.records import read_records

_SCORES = {"all": match_all, "part": match_part}


class _RulerLine(TaskLine):
    input: Text
    outputs: Texts
    answer_prefix: str = ""


@register("ruler:FILE", "a file of RULER; `:marker=TEXT` says where the question begins", new="max_new_tokens",
          most="max_tokens")  # fmt: skip
def ruler(
    file: str | Path,
    tokenizer,
    seen: bool = False,
    chat: bool = False,
    score: str | None = None,
    max_new_tokens: int = 128,
    marker: str | None = None,
    max_tokens: int | None = None,
    count: int | None = None,
) -> FreeTextTask:
    """A file as RULER's own scripts write it, JSON lines with ``input``, ``outputs`` and maybe ``answer_prefix``.

    The input holds context and question in one text. The question is its last line (so it is in all of RULER's
    templates); inputs that end in something else, such as a chat template that is written out, need a `marker`. The
    answer's prefix is read after the question.

    Args:
        file: such as ``niah_single_1/validation.jsonl``.
        tokenizer: the model's.
        seen: whether the question and the prefix stand in the context when that is compressed.
        chat: whether the input is rendered as a user's message by the model's chat template, with the prefix as the
            beginning of the reply.
        score: ``all`` or ``part``, RULER's two string matches; by default ``part`` where the file or its folder is
            called ``qa...``, as in RULER, else ``all``.
        max_new_tokens: how many may be generated.
        marker: a text at whose last occurrence the question begins.
        max_tokens: of a context; the middle of longer ones is left out. None means all.
        count: number of lines, all by default.

    Raises:
        UserError: bad lines, an input without a line break or marker, an unknown score, or a number below 1.
    """
    file = Path(file)
    kind = score or ("part" if file.name.startswith("qa") or file.parent.name.startswith("qa") else "all")
    if kind not in _SCORES:
        raise UserError(f"RULER has no score {kind!r}; expected all or part")
    require_tokenizer(tokenizer, file)
    prompts = []
    for number, (where, data) in enumerate(read_records(file, "input and outputs", count)):
        line = validated(_RulerLine, data, where)
        start = _question_start(line.input, marker, where)
        context, question = line.input[:start], line.input[start:]
        ids = encode_prompt(tokenizer, context, question, line.answer_prefix, seen, max_tokens, chat)
        # by its line: "index" is not unique in files of some versions
        prompts.append(FreeTextPrompt(str(number), *ids, tuple(line.outputs), max_new_tokens, score=kind))
    title = file.parent.name if file.stem in ("validation", "test") else file.stem
    return FreeTextTask(f"ruler {title}{' seen' if seen else ''}", prompts, _score, tokenizer)


def _score(prediction: str, prompt: FreeTextPrompt) -> float:
    return _SCORES[prompt.score](prediction, prompt.answers)


def _question_start(text: str, marker: str | None, where: str) -> int:
    start = text.rfind("\n", 0, len(text.rstrip())) + 1 if marker is None else text.rfind(marker)
    if start <= 0:
        sought = "line break" if marker is None else f"{marker!r}"
        raise UserError(f"{where}: the input has no {sought} before a question; say where it begins with marker=TEXT")
    return start
