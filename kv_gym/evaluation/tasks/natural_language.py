"""What the tasks in natural language share: filler, wordings kept apart by split, the chat template, exact lengths.

They work with any model and tokenizer. A context never depends on its questions, so that it is read and compressed
once; each question follows on a copy of the cache. Where the tokenizer has a chat template, a context is the beginning
of a user's message, and a question its end and the beginning of the answer.

The splits ``train``, ``validation`` and ``test`` share no wording, no name and no filler: a policy that was trained on
one has never seen the sentences of another.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.scripted import ForkedQuestion
from kv_gym.evaluation.tasks.task_files import require_tokenizer
from kv_gym.files import read_text
from kv_gym.models.chat_template import ChatTemplate
from kv_gym.models.loading import beginning_ids, text_ids

SPLITS = ("train", "validation", "test")
CONTEXTS = 100  # of a task, unless its name says another number
TEXTS = Path(__file__).parent / "texts"

_ADJECTIVES = (
    "amber ancient blue bold bright broken calm clever cold copper crooked dark distant dusty early empty faded "
    "famous foreign frozen gentle golden green grey happy heavy hidden hollow honest hungry iron large lazy little "
    "lonely lost loud lucky marble narrow noble northern pale patient plain proud purple quick quiet rapid red round "
    "royal rusty secret sharp silent silver simple small southern"
).split()
_NOUNS = (
    "anchor apple barrel basket bell boat bottle bridge bucket cabin camel candle carpet castle chair clock coat "
    "compass corner cradle crown curtain desk dragon drum eagle engine falcon feather fiddle flag forest fountain "
    "garden gate glove hammer harbor helmet horse island jacket kettle ladder lantern lemon letter lion market mirror "
    "monkey mountain needle orchard oven owl parrot pearl pencil pillow pistol pony rabbit ribbon river rocket saddle "
    "sailor shovel spoon station"
).split()


@dataclass(frozen=True)
class Wording:
    """How a fact is stated and asked for; each text is a format of ``key``, the statement also of ``value``.

    Attributes:
        statement: the sentence in the context.
        question: what the user asks.
        prefix: how the answer begins; the value follows it, with a space.
    """

    statement: str
    question: str
    prefix: str


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template puts around the messages of a conversation.

    Attributes:
        before: ids in front of the first user's message; the tokenizer's beginning token where it has no template.
        answer: text between a user's message and the answer to it.
        message: text between an answer and the user's next message.
    """

    before: tuple[int, ...]
    answer: str
    message: str

    @classmethod
    def plain(cls, tokenizer: Any) -> ChatFrame:
        """The frame of plain text."""
        return cls(tuple(beginning_ids(tokenizer)), "\nAnswer: ", "\n\n")

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFrame:
        """The frame of a tokenizer's chat template, or a plain one where it has none.

        Raises:
            UserError: a template that does not repeat the messages.
        """
        if getattr(tokenizer, "chat_template", None) is None:
            return cls.plain(tokenizer)
        before, answer, message = ChatTemplate(tokenizer).frame()
        return cls(tuple(text_ids(tokenizer, before)), answer, message)

    def ask(self, tokenizer: Any, question: str, prefix: str, answer: str, part: str = "") -> ForkedQuestion:
        """A question behind a context, with the beginning of its answer; `answer` follows with a space.

        A token of that space alone belongs to the question: it would be right whatever the model knows.
        """
        asked = text_ids(tokenizer, f"{question}{self.answer}{prefix}")
        expected = text_ids(tokenizer, f" {answer}")
        if not tokenizer.decode(expected[:1]).strip():
            asked, expected = asked + expected[:1], expected[1:]
        return ForkedQuestion(tuple(asked), tuple(expected), part)


class Filler:
    """Sentences of a text, from any place on, round and round.

    Args:
        tokenizer: the model's.
        split: whose bundled text to take.
        text: instead, a file in UTF-8, or a folder of ``.txt`` files.

    Raises:
        UserError: an unreadable text, or one without a sentence.
    """

    def __init__(self, tokenizer: Any, split: str, text: str | Path | None = None):
        path = TEXTS / f"{split}.txt" if text is None else Path(text)
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        words = " ".join(" ".join(read_text(file, "expected a text file in UTF-8").split()) for file in files)
        self.sentences = [sentence for sentence in re.split(r"(?<=[.!?][\"'”])\s|(?<=[.!?])\s", words) if sentence]
        if not self.sentences:
            raise UserError(f"{path} holds no text to put around the facts; give a text file, or a folder of them")
        self._tokenizer = tokenizer

    def sentence_ids(self, stream: random.Random) -> Iterator[list[int]]:
        """Ids of one sentence after another, from a random one on; each begins with a space."""
        place = int(stream.random() * len(self.sentences))
        while True:
            yield text_ids(self._tokenizer, " " + self.sentences[place % len(self.sentences)])
            place += 1

    def fill(
        self, stream: random.Random, tokens: int, before: Sequence[int], inserts: Sequence[tuple[float, Sequence[int]]]
    ) -> tuple[int, ...]:
        """Ids of a context of exactly `tokens` tokens: `before`, then filler with insertions between its sentences.

        The last sentence is cut off where the context ends.

        Args:
            stream: chooses where in the text the filler begins.
            tokens: length of the context.
            before: its first ids.
            inserts: depth from 0 to 1, a share of the filler, and ids; in the order of their depths.

        Raises:
            UserError: no room for the insertions.
        """
        room = tokens - len(before) - sum(len(ids) for _, ids in inserts)
        if room < 0:
            raise UserError(
                f"a context of {tokens} tokens has no room for what is asked; it takes {tokens - room} tokens"
            )
        waiting, ids, filled = list(inserts), list(before), 0
        for sentence in self.sentence_ids(stream):
            while waiting and filled >= waiting[0][0] * room - len(sentence) / 2:
                ids += waiting.pop(0)[1]
            if filled >= room:
                break
            ids += sentence[: room - filled]
            filled += len(sentence)
        for _, rest in waiting:
            ids += rest
        return tuple(ids)


def check_split(split: str, tokenizer: Any) -> None:
    """Raise a UserError where there is no such split, or no tokenizer."""
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}; expected {', '.join(SPLITS)}")
    require_tokenizer(tokenizer, "a task in natural language")


def numbered_streams(name: str, count: int | None, first: int | None) -> Iterator[tuple[int, random.Random]]:
    """Numbers of `count` contexts from `first` on, by default of the whole set, each with random numbers of its own.

    They depend on `name` and the number alone; only ``random()`` is to be called, whose stream Python guarantees.
    """
    start = first or 0
    for number in range(start, start + (CONTEXTS if count is None else count)):
        yield number, random.Random(f"{name} {number}")


def keys_of(split: str) -> tuple[list[str], list[str]]:
    """Adjectives and nouns of a split; no two splits share one."""
    number = SPLITS.index(split)
    return _ADJECTIVES[number::3], _NOUNS[number::3]


def digits(stream: random.Random, count: int) -> str:
    """A number of `count` digits, the first of which is not 0."""
    return str(10 ** (count - 1) + int(stream.random() * 9 * 10 ** (count - 1)))


def title(name: str, split: str, text: str | Path | None, seed: int) -> str:
    """A task's name in rows of results: what it is, and what is not the published set of it."""
    parts = [name, *([] if split == "test" else [split]), *([] if text is None else [Path(text).name])]
    return " ".join([*parts, *([] if seed == 0 else [f"seed {seed}"])])
