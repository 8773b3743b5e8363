"""Facts that a user tells once, at the beginning of a conversation, and asks for many turns later."""

from __future__ import annotations

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

FACTS, DIGITS = 4, 7
TURN = 128  # tokens of a turn, about
WORDINGS = {
    "train": (
        Wording("By the way, my code for the {key} is {value}.", "What did I say is my code for the {key}?",
                "Your code for the {key} is"),
        Wording("You will need this later: my {key} is number {value}.", "Which number is my {key}?",
                "Your {key} is number"),
        Wording("I should mention that the {key} of my sister has the label {value}.",
                "Which label has the {key} of my sister?", "The {key} of your sister has the label"),
        Wording("Write this down for me: {key}, {value}.", "What did you write down for the {key}?",
                "For the {key}, I wrote down"),
        Wording("My {key} was made in a series of {value} pieces.", "How many pieces were made of my {key}?",
                "The pieces made of your {key} were"),
    ),
    "validation": (
        Wording("Please keep in mind that I paid {value} for the {key}.", "How much did I pay for the {key}?",
                "You paid"),
    ),
    "test": (
        Wording("Before we begin: the password of my {key} is {value}.", "What is the password of my {key}?",
                "The password of your {key} is"),
    ),
}  # fmt: skip
REPLIES = (
    "Thank you, I will remember that.",
    "That is a lively passage. What comes next?",
    "I see. Please go on.",
    "The author describes it well.",
)


@register("told_once:1024", "facts told once in a conversation, and asked for many turns later")
def told_once(
    tokens: int = 1024,
    tokenizer=None,
    split: str = "test",
    text: str | None = None,
    count: int | None = None,
    first: int | None = None,
    seed: int = 0,
    rows: int = 4,
) -> ScriptedTask:
    """Conversations of a user who tells four facts in the first turns and then reads a book aloud, turn by turn.

    The cache is compressed once, before the last message asks for one of the facts.

    Args:
        tokens: length of a conversation before the question.
        tokenizer: of the model.
        split: ``test``, ``validation`` or ``train``: wordings, names and filler of each are its own.
        text: what is read aloud instead of the bundled text: a text file, or a folder of them.
        count: number of conversations, 100 by default.
        first: number of the first conversation, so that a set can be measured in portions.
        seed: gives other conversations of the same split.
        rows: conversations that are read together.

    Raises:
        UserError: no tokenizer, an unknown split, or a conversation that is too short.
    """
    check_split(split, tokenizer)
    frame, filler = ChatFrame.of(tokenizer), Filler(tokenizer, split, text)
    turns = max(FACTS + 1, tokens // TURN)
    scripts = []
    for number, stream in numbered_streams(f"told_once {split} {seed}", count, first):
        wording = WORDINGS[split][number % len(WORDINGS[split])]
        names = zip(*(sample(words, FACTS, stream) for words in keys_of(split)), strict=True)
        facts = [{"key": " ".join(name), "value": digits(stream, DIGITS)} for name in names]
        statements = [wording.statement.format(**fact) for fact in facts]
        before = (*frame.before, *text_ids(tokenizer, statements[0]))
        inserts = []
        for turn in range(1, turns + 1):
            reply = REPLIES[int(stream.random() * len(REPLIES))]
            opening = statements[turn] if turn < FACTS else "" if turn == turns else "Then it says:"
            inserts.append((turn / turns, text_ids(tokenizer, f"{frame.answer}{reply}{frame.message}{opening}")))
        questions = tuple(
            frame.ask(
                tokenizer, wording.question.format(**fact), wording.prefix.format(**fact), fact["value"], f"turn {turn}"
            )
            for turn, fact in enumerate(facts, 1)
        )
        ids = filler.fill(stream, tokens, before, inserts)
        scripts.append(TaskScript.of_one_context(number, ids, questions))
    return ScriptedTask(title(f"told_once {tokens}", split, text, seed), "prefill", scripts, rows, list_answers=True)
