"""LongBench's files: questions, summaries, examples and code over long texts (Bai et al. 2023, arXiv 2308.14508)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks import scores
from kv_gym.evaluation.tasks.lines import json_lines, text_of, texts_of
from kv_gym.evaluation.tasks.written import Prompt, WrittenTask, without_middle

TEMPLATE = "{context}\n\n{input}\n"
_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # examples follow one another there: a model goes on with more
# dataset: how it is scored, and how many tokens may be written
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
}
_TWO: dict[str, Callable[[str, str], float]] = {
    name: getattr(scores, name) for name, _ in DATASETS.values() if name != "classification"
}


def longbench(
    file: str | Path,
    tokenizer,
    seen: bool = False,
    template: str | Path | None = None,
    most: int | None = None,
    count: int | None = None,
) -> WrittenTask:
    """A file of LongBench or LongBench-E: JSON lines with ``input``, ``context``, ``answers``, ``dataset`` ...

    The score is the dataset's, the best over all answers; it and the number of tokens that may be written are
    LongBench's. Its prompts are not part of this library: without a template the question follows the context.

    Args:
        file: such as ``hotpotqa.jsonl``.
        tokenizer: the model's.
        seen: whether the question stands in the context when that is cut.
        template: file of a text with ``{context}``, and ``{input}`` where the question goes. All up to the end of the
            context is read before the cut, the rest after it.
        most: tokens of a context; the middle of longer ones is left out, as LongBench does. None means all.
        count: how many lines; None means all.

    Raises:
        UserError: bad lines, an unknown dataset, or a template without ``{context}``, or with nothing behind it.
    """
    if tokenizer is None:
        raise UserError(f"{file} holds text and the model has no tokenizer; give a model that has one")
    before, after = _template(template)
    prompts: list[Prompt] = []
    names: set[str] = set()
    for number, (where, data) in enumerate(json_lines(file, "context, input, answers and dataset")):
        if count is not None and number >= count:
            break
        dataset = text_of(data, "dataset", where)
        score, new_tokens = DATASETS.get(dataset.removesuffix("_e"), ("", 0))
        if not score:
            raise UserError(f"{where}: dataset {dataset!r} is none of LongBench's; known are {', '.join(DATASETS)}")
        asked = text_of(data, "input", where, empty=True)  # summaries ask nothing
        classes = texts_of(data, "all_classes", where) if score == "classification" else ()
        opening = before.replace("{input}", asked) + text_of(data, "context", where)
        context_ids = without_middle(tokenizer(opening)["input_ids"], most)
        question_ids = tuple(tokenizer(after.replace("{input}", asked), add_special_tokens=False)["input_ids"])
        if seen:
            context_ids, question_ids = context_ids + question_ids, ()
        answers, name = texts_of(data, "answers", where), f"{dataset} {data.get('_id', number)}"
        if name in names:  # published files name every line once, a file of one's own may not
            name = f"{name} {number}"
        names.add(name)
        prompts.append(Prompt(name, context_ids, question_ids, answers, new_tokens, classes, dataset))
    if not prompts:
        raise UserError(f"task file {file} holds no task; expected JSON lines with context, input and answers")
    return WrittenTask(f"longbench {Path(file).stem}{' seen' if seen else ''}", prompts, worth, tokenizer)


def worth(said: str, prompt: Prompt) -> float:
    """The best score over a prompt's answers, by its dataset's measure."""
    dataset = prompt.score.removesuffix("_e")
    if dataset in _FIRST_LINE:
        said = said.lstrip("\n").split("\n")[0]
    name = DATASETS[dataset][0]
    if name == "classification":
        return max(scores.classification(said, answer, prompt.classes) for answer in prompt.answers)
    return max(_TWO[name](said, answer) for answer in prompt.answers)


def _template(file: str | Path | None) -> tuple[str, str]:
    if file is None:
        text = TEMPLATE
    else:
        try:
            text = Path(file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"template {file} cannot be read; expected a text in UTF-8 with {{context}}") from None
    before, found, after = text.partition("{context}")
    if not found or not after:
        raise UserError(f"template {file} must hold {{context}} and, behind it, what comes after the cut")
    return before, after
