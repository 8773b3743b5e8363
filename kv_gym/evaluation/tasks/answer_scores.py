"""Scores of answers in free text, from 0 to 1: the measures of RULER and of LongBench, written anew.

RULER: Hsieh et al. 2024 (arXiv 2404.06654), section 4 (recall-based accuracy). LongBench: Bai et al. 2023 (arXiv
2308.14508), table 1 and appendix. Differs from LongBench in: Chinese is compared by characters and not by words of a
segmenter, and ROUGE-L is the plain one of Lin 2004 (section 3.1) over whole texts, so numbers of those datasets are
not comparable with published ones. The choices of LongBench v2: Bai et al. 2024 (arXiv 2412.15204); a letter that
stands at the beginning of an answer counts, too.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"\d+")
_CHOICE = re.compile(r"(?i:answer(?: is|:)) *\(?([A-D])\b|^\W*([A-D])(?:[).:,\n]|\s*$)")


def match_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the prediction, whatever their case (RULER, all tasks but questions)."""
    lower = prediction.lower()
    return sum(answer.lower() in lower for answer in answers) / len(answers)


def match_part(prediction: str, answers: Sequence[str]) -> float:
    """1 where any of the answers occurs in the prediction, whatever its case (RULER's questions)."""
    return float(match_all(prediction, answers) > 0)


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of tokens, each counted as often as it occurs."""
    common = (Counter(prediction) & Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles (Rajpurkar et al. 2016, arXiv 1606.05250)."""
    return [word for word in text.lower().translate(_PUNCTUATION).split() if word not in _ARTICLES]


def characters(text: str) -> list[str]:
    """Letters and digits of a text in lower case, one by one: for languages that put no space between words."""
    return [letter for letter in text.lower() if letter.isalnum()]


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of normalised words."""
    return f1(words(prediction), words(answer))


def qa_f1_characters(prediction: str, answer: str) -> float:
    """F1 of characters."""
    return f1(characters(prediction), characters(answer))


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    above = [0] * (len(second) + 1)
    for item in first:
        row = [0]
        for place, other in enumerate(second):
            row.append(above[place] + 1 if item == other else max(above[place + 1], row[place]))
        above = row
    return above[-1]


def _overlap(first: Sequence[str], second: Sequence[str]) -> float:
    common = longest_common(first, second)
    return 2 * common / (len(first) + len(second)) if common else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, as they stand between spaces."""
    return _overlap(prediction.split(), answer.split())


def rouge_l_characters(prediction: str, answer: str) -> float:
    """ROUGE-L over characters."""
    return _overlap(characters(prediction), characters(answer))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / number of class names in the prediction, if the right one is among them.

    Names that are part of the right one's do not count: they occur wherever it does.
    """
    named = [name for name in classes if name in prediction and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that are the right one."""
    numbers = _NUMBER.findall(prediction)
    return numbers.count(answer.strip()) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that are the number of the right paragraph, the first in the answer."""
    right = _NUMBER.search(answer)
    return count(prediction, right[0]) if right else 0.0


def choice(prediction: str, answer: str) -> float:
    """1 where the prediction names the answer's letter: ``The correct answer is (B)``, or ``B.`` at its beginning."""
    named = _CHOICE.search(prediction.replace("*", ""))
    return float(named is not None and answer in named.groups())


def code_similarity(prediction: str, answer: str) -> float:
    """Likeness of the first line of code with the answer: 1 - insertions and deletions / length of both."""
    lines = prediction.lstrip("\n").split("\n")
    first = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return _overlap(first, answer)
