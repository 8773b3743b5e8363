"""LongBench's files, both versions: questions, summaries, examples, code and choices over long texts.

Version 1: Bai et al. 2023, arXiv 2308.14508. Version 2: Bai et al. 2024, arXiv 2412.15204.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks import answer_scores as scores
from kv_gym.evaluation.tasks.free_text import FreeTextPrompt, FreeTextTask, encode_prompt
from kv_gym.evaluation.tasks.registry import register
from kv_gym.evaluation.tasks.task_files import TaskLine, Text, Texts, require_tokenizer
from kv_gym.files import read_text, validated
from kv_gym.records import read_records

TEMPLATE = "{context}\n\n{input}\n"
LARGEST_TEMPLATE = 100_000  # bytes
_CHOICES = "(A) {0}\n(B) {1}\n(C) {2}\n(D) {3}\nAnswer with the letter of the correct choice."
VERSION_2 = "longbench_v2"
_ONE_LINE = ("trec", "triviaqa", "samsum", "lsht")  # examples follow one another there: a model goes on with more
# dataset -> score, and how many tokens may be generated
DATASETS: dict[str, tuple[str, int]] = {
    "narrativeqa": ("qa_f1", 128),
    "qasper": ("qa_f1", 128),
    "multifieldqa_en": ("qa_f1", 64),
    "multifieldqa_zh": ("qa_f1_characters", 64),
    "hotpotqa": ("qa_f1", 32),
    "2wikimqa": ("qa_f1", 32),
    "musique": ("qa_f1", 32),
    "dureader": ("rouge_l_characters", 128),
    "gov_report": ("rouge_l", 512),
    "qmsum": ("rouge_l", 512),
    "multi_news": ("rouge_l", 512),
    "vcsum": ("rouge_l_characters", 512),
    "trec": ("classification", 64),
    "triviaqa": ("qa_f1", 32),
    "samsum": ("rouge_l", 128),
    "lsht": ("classification", 64),
    "passage_count": ("count", 32),
    "passage_retrieval_en": ("retrieval", 32),
    "passage_retrieval_zh": ("retrieval", 32),
    "lcc": ("code_similarity", 64),
    "repobench-p": ("code_similarity", 64),
    VERSION_2: ("choice", 128),
}
_SCORES: dict[str, Callable[[str, str], float]] = {
    name: getattr(scores, name) for name, _ in DATASETS.values() if name != "classification"
}


class _Line(TaskLine):
    """A line of version 1."""

    context: Text
    dataset: Text
    answers: Texts
    input: str = ""  # summaries ask nothing
    all_classes: list[str] = []


class _ChoiceLine(TaskLine):
    """A line of version 2: four choices, of which the answer names one by its letter."""

    context: Text
    question: Text
    choice_A: Text
    choice_B: Text
    choice_C: Text
    choice_D: Text
    answer: Text

    def as_version_1(self, where: str) -> _Line:
        """The same as a line of version 1: question and choices in one text."""
        if self.answer not in tuple("ABCD"):
            raise UserError(f"{where}: answer is {self.answer[:20]!r}; expected the letter of a choice, A to D")
        choices = _CHOICES.format(self.choice_A, self.choice_B, self.choice_C, self.choice_D)
        text = f"{self.question}\n{choices}"
        return _Line(context=self.context, dataset=VERSION_2, answers=[self.answer], input=text)


@register("longbench:FILE", "a file of LongBench, LongBench-E or LongBench v2; `:template=FILE` has its prompt",
          most="max_tokens")  # fmt: skip
def longbench(
    file: str | Path,
    tokenizer,
    seen: bool = False,
    chat: bool = False,
    template: str | Path | None = None,
    max_tokens: int | None = None,
    count: int | None = None,
) -> FreeTextTask:
    """A file of LongBench: JSON lines with ``input``, ``context``, ``answers``, ``dataset`` ...

    Lines of LongBench v2 have ``question``, ``choice_A`` to ``choice_D`` and ``answer`` instead. The score is the
    dataset's, the best over all answers; it and the number of new tokens are LongBench's. Its prompts are not part of
    this library: without a template the question follows the context.

    Args:
        file: such as ``hotpotqa.jsonl``.
        tokenizer: the model's.
        seen: whether the question stands in the context when that is compressed.
        chat: whether the prompt is rendered as a user's message by the model's chat template.
        template: file of a text with ``{context}``, and ``{input}`` where the question goes. All up to the end of the
            context is read before the compression, the rest after it.
        max_tokens: of a context; the middle of longer ones is left out, as LongBench does. None means all.
        count: number of lines, all by default.

    Raises:
        UserError: bad lines, an unknown dataset, a template without ``{context}``, or with nothing behind it, or a
            number below 1.
    """
    require_tokenizer(tokenizer, file)
    before, after = _template(template)
    prompts: list[FreeTextPrompt] = []
    ids: set[str] = set()
    for number, (where, data) in enumerate(read_records(file, "context, input, answers and dataset", count)):
        if any(key.startswith("choice_") for key in data):
            line = validated(_ChoiceLine, data, where).as_version_1(where)
        else:
            line = validated(_Line, data, where)
        score, max_new_tokens = DATASETS.get(line.dataset.removesuffix("_e"), ("", 0))
        if not score:
            raise UserError(
                f"{where}: dataset {line.dataset!r} is none of LongBench's; known are {', '.join(DATASETS)}"
            )
        if score == "classification" and not line.all_classes:
            raise UserError(f"{where} has no all_classes; expected a list of the names of all classes")
        context = before.replace("{input}", line.input) + line.context
        question = after.replace("{input}", line.input)
        tokens = encode_prompt(tokenizer, context, question, "", seen, max_tokens, chat)
        id = f"{line.dataset} {data.get('_id', number)}"
        if id in ids:  # published files give every line its id, a file of one's own may not
            id = f"{id} {number}"
        ids.add(id)
        classes = tuple(line.all_classes) if score == "classification" else ()
        prompts.append(FreeTextPrompt(id, *tokens, tuple(line.answers), max_new_tokens, classes, line.dataset))
    return FreeTextTask(f"longbench {Path(file).stem}{' seen' if seen else ''}", prompts, score_answer, tokenizer)


def score_answer(prediction: str, prompt: FreeTextPrompt) -> float:
    """The best score over a prompt's answers, by its dataset's measure."""
    dataset = prompt.score.removesuffix("_e")
    if dataset in _ONE_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    name = DATASETS[dataset][0]
    if name == "classification":
        return max(scores.classification(prediction, answer, prompt.classes) for answer in prompt.answers)
    return max(_SCORES[name](prediction, answer) for answer in prompt.answers)


def _template(file: str | Path | None) -> tuple[str, str]:
    expected = "expected a text in UTF-8 with {context} and, behind it, what follows the compression"
    text = TEMPLATE if file is None else read_text(file, expected, LARGEST_TEMPLATE)
    before, found, after = text.partition("{context}")
    if not found or not after:
        raise UserError(f"template {file} holds no {{context}}, or nothing behind it; {expected}")
    return before, after
