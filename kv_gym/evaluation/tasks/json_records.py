"""JSON records: an object of names and five-digit numbers within prose, from which single values are asked."""

from __future__ import annotations

import json

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
from kv_gym.evaluation.tasks.needles import INTRODUCTION
from kv_gym.evaluation.tasks.registry import register
from kv_gym.evaluation.tasks.scripted import ScriptedTask, TaskScript
from kv_gym.models.loading import text_ids

PAIRS, QUESTIONS, DIGITS = 20, 8, 5
WORDINGS = {  # the statement is a format of `value`, the whole object
    "train": (
        Wording("Prices: {value}", 'In the prices, what number belongs to the word "{key}"?', '{{"{key}":'),
        Wording("The file points.json holds {value}", 'How many points has "{key}" in the file?', '{{"{key}":'),
        Wording("Inventory: {value}", 'In the inventory, how many pieces are there of "{key}"?', '{{"{key}":'),
        Wording("Last month we counted {value}", 'How often was "{key}" counted?', '{{"{key}":'),
    ),
    "validation": (
        Wording("Weights: {value}", 'In the weights, what is the number of "{key}"?', '{{"{key}":'),
    ),
    "test": (
        Wording("JSON: {value}", 'In the JSON object, what number belongs to the key "{key}"?', '{{"{key}":'),
    ),
}  # fmt: skip


@register("json:1024", "values of a JSON object of 20 pairs within prose")
def json_records(
    tokens: int = 1024,
    tokenizer=None,
    split: str = "test",
    text: str | None = None,
    count: int | None = None,
    first: int | None = None,
    seed: int = 0,
    rows: int = 4,
) -> ScriptedTask:
    """Contexts of prose with one JSON object in the middle half; eight of its 20 values are asked for.

    Args:
        tokens: length of a context; the object takes about 250 tokens.
        tokenizer: of the model.
        split: ``test``, ``validation`` or ``train``: wordings, names and filler of each are its own.
        text: filler instead of the bundled one: a text file, or a folder of them.
        count: number of contexts, 100 by default.
        first: number of the first context, so that a set can be measured in portions.
        seed: gives other contexts of the same split.
        rows: contexts that are read together.

    Raises:
        UserError: no tokenizer, an unknown split, or a context that is too short.
    """
    check_split(split, tokenizer)
    frame, filler = ChatFrame.of(tokenizer), Filler(tokenizer, split, text)
    before = (*frame.before, *text_ids(tokenizer, INTRODUCTION))
    scripts = []
    for number, stream in numbered_streams(f"json {split} {seed}", count, first):
        wording = WORDINGS[split][number % len(WORDINGS[split])]
        record = {name: int(digits(stream, DIGITS)) for name in sample(keys_of(split)[1], PAIRS, stream)}
        stated = text_ids(tokenizer, " " + wording.statement.format(value=json.dumps(record)))
        ids = filler.fill(stream, tokens, before, [(0.25 + stream.random() / 2, stated)])
        questions = tuple(
            frame.ask(
                tokenizer,
                "\n\n" + wording.question.format(key=key),
                wording.prefix.format(key=key),
                str(record[key]),
            )
            for key in sample(list(record), QUESTIONS, stream)
        )
        scripts.append(TaskScript.of_one_context(number, ids, questions))
    return ScriptedTask(title(f"json {tokens}", split, text, seed), "prefill", scripts, rows, list_answers=True)
