"""Needles: sentences with a seven-digit number, hidden in prose and asked for when the cache has been compressed.

RULER-style (Hsieh et al. 2024, arXiv 2404.06654, section 3, NIAH): keys of two words, values of seven digits. Differs
in: the prose is that of novels, every key of a context is asked for from a fork of the same cache, and an answer is
judged token by token instead of by a string match. So it is no published RULER score.
"""

from __future__ import annotations

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.generated import sample
from kv_gym.evaluation.tasks.natural_language import (
    ChatFrame,
    Filler,
    Wording,
    check_split,
    digits,
    keys_of,
    numbered_streams,
    title,
)
from kv_gym.evaluation.tasks.registry import register
from kv_gym.evaluation.tasks.scripted import ScriptedTask, TaskScript
from kv_gym.models.loading import text_ids

DIGITS = 7
INTRODUCTION = "Read the following text. I will ask you about it afterwards.\n\n"
WORDINGS = {
    "train": (
        Wording("The locker code of the {key} is {value}.", "What is the locker code of the {key}?",
                "The locker code of the {key} is"),
        Wording("Somebody had written on the wall: the {key} costs {value}.", "What does the {key} cost?",
                "The {key} costs"),
        Wording("Remember that the account of the {key} has the number {value}.",
                "Which number does the account of the {key} have?", "The account of the {key} has the number"),
        Wording("Call {value} to speak with the owner of the {key}.",
                "Which number reaches the owner of the {key}?", "To speak with the owner of the {key}, call"),
        Wording("Flight {value} is the one that brings the {key}.", "Which flight brings the {key}?",
                "The flight that brings the {key} is"),
        Wording("In the register, the {key} is listed under {value}.", "Under which entry is the {key} listed?",
                "In the register, the {key} is listed under"),
        Wording("The serial of the {key} reads {value}.", "What does the serial of the {key} read?",
                "The serial of the {key} reads"),
        Wording("There were exactly {value} visitors at the {key} last year.",
                "How many visitors were at the {key} last year?", "At the {key} last year, the visitors were"),
        Wording("Note: {key} = {value}.", "What is {key} equal to?", "{key} ="),
        Wording("My friend weighed the {key}, and it came to {value} grams.", "How many grams did the {key} weigh?",
                "In grams, the {key} came to"),
        Wording("Room {value} is where they keep the {key}.", "In which room do they keep the {key}?",
                "They keep the {key} in room"),
        Wording("For the {key}, dial {value} and wait.", "What should one dial for the {key}?", "For the {key}, dial"),
        Wording("The combination that opens the {key} has never changed: {value}.",
                "Which combination opens the {key}?", "The combination that opens the {key} has never changed:"),
        Wording("A letter came; it said that the {key} holds {value} coins.", "How many coins does the {key} hold?",
                "The coins that the {key} holds:"),
        Wording("{value}: this is the identifier that was given to the {key}.",
                "Which identifier was given to the {key}?", "The identifier that was given to the {key} is"),
        Wording("From here to the {key} it is {value} miles.", "How many miles is it to the {key}?",
                "In miles, the way to the {key} is"),
    ),
    "validation": (
        Wording("The ticket for the {key} carries the number {value}.", "Which number is on the ticket for the {key}?",
                "The ticket for the {key} carries the number"),
    ),
    "test": (
        Wording("One of the special magic numbers for {key} is: {value}.",
                "What is the special magic number for {key}?", "The special magic number for {key} is:"),
    ),
}  # fmt: skip


@register("needle:1024", "seven-digit numbers hidden in prose; `:keys=4` hides and asks for four")
def needles(
    tokens: int = 1024,
    tokenizer=None,
    keys: int = 1,
    split: str = "test",
    text: str | None = None,
    count: int | None = None,
    first: int | None = None,
    seed: int = 0,
    rows: int = 4,
) -> ScriptedTask:
    """Contexts of prose with needles, each asked for by a question that the compression did not see.

    Needles lie at random depths, one in each of `keys` equal parts of the context; parts of the rows are ``depth 1`` to
    ``depth 4``, quarters of the context.

    Args:
        tokens: length of a context, chat template and needles included.
        tokenizer: of the model.
        keys: needles in a context, and questions about it.
        split: ``test``, ``validation`` or ``train``: wordings, names and filler of each are its own.
        text: filler instead of the bundled one: a text file, or a folder of them.
        count: number of contexts, 100 by default.
        first: number of the first context, so that a set can be measured in portions.
        seed: gives other contexts of the same split.
        rows: contexts that are read together.

    Raises:
        UserError: no tokenizer, an unknown split, more keys than names, or a context that is too short.
    """
    check_split(split, tokenizer)
    adjectives, nouns = keys_of(split)
    if keys > min(len(adjectives), len(nouns)):
        raise UserError(f"{keys} keys are asked for; a context has up to {min(len(adjectives), len(nouns))}")
    frame, filler = ChatFrame.of(tokenizer), Filler(tokenizer, split, text)
    before = (*frame.before, *text_ids(tokenizer, INTRODUCTION))
    scripts = []
    for number, stream in numbered_streams(f"needle {split} {seed} {keys}", count, first):
        wording = WORDINGS[split][number % len(WORDINGS[split])]
        inserts, questions = [], []
        names = zip(sample(adjectives, keys, stream), sample(nouns, keys, stream), strict=True)
        for place, (adjective, noun) in enumerate(names):
            fact = {"key": f"{adjective} {noun}", "value": digits(stream, DIGITS)}
            depth = (place + stream.random()) / keys
            inserts.append((depth, text_ids(tokenizer, " " + wording.statement.format(**fact))))
            texts = (wording.question.format(**fact), wording.prefix.format(**fact), fact["value"])
            questions.append(frame.ask(tokenizer, "\n\n" + texts[0], *texts[1:], f"depth {int(depth * 4) + 1}"))
        ids = filler.fill(stream, tokens, before, inserts)
        scripts.append(TaskScript.of_one_context(number, ids, questions))
    name = title(f"needle {tokens}" if keys == 1 else f"{keys} needles {tokens}", split, text, seed)
    return ScriptedTask(name, "prefill", scripts, rows, list_answers=True)
