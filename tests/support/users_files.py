"""What a reader of the guides has: a model with a tokenizer, novels, questions, and files of RULER and LongBench."""

import json
import random
import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from traced_models import tiny_model
from transformers import PreTrainedTokenizerFast

CHARACTERS = ["<unk>", "<s>", *string.printable]
WORDS = "the a old lamp boat river key house of in under was sold lost found by Alice Bob Carol and then again".split()


def write_users_files(folder):
    """Write everything into `folder`; the model reads single characters and answers what it likes."""
    model, tokenizer = _model(), _tokenizer()
    for thing in (model, tokenizer):
        thing.save_pretrained(folder / "path" / "to" / "your-model")
    draw = random.Random(0)
    for name in ("novel.txt", "another.txt"):
        (folder / name).write_text(_text(draw, 600))
    contexts = [_text(draw, 12) for _ in range(24)]
    asked = [(context, question) for context in contexts for question in (" who?", " what then?")]
    _lines(folder / "questions.jsonl", [_question(model, tokenizer, *each) for each in asked])
    _lines(
        folder / "prompts.jsonl",
        [
            {"context": context, "continuations": [_text(draw, 3), _text(draw, 4)], "split": split}
            for number, context in enumerate(contexts)
            for split in ("test" if number % 4 == 0 else "train",)
        ],
    )
    (folder / "niah_single_1").mkdir()
    _lines(
        folder / "niah_single_1" / "validation.jsonl",
        [{"input": f"{_text(draw, 20)}\nWhat is it?", "outputs": ["key"], "answer_prefix": " It is"}] * 2,
    )
    _lines(
        folder / "hotpotqa.jsonl",
        [{"input": "Who?", "context": _text(draw, 20), "answers": ["Bob"], "dataset": "hotpotqa", "all_classes": None}],
    )
    (folder / "prompt.txt").write_text("Read this.\n{context}\n\nQuestion: {input}\nAnswer:")


def _model():
    sizes = {"vocab_size": len(CHARACTERS), "max_position_embeddings": 4096, "initializer_range": 0.1}
    return tiny_model("llama", **sizes, bos_token_id=1, eos_token_id=None)


def _tokenizer():
    core = Tokenizer(models.WordLevel({text: number for number, text in enumerate(CHARACTERS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


def _text(draw, words):
    return " ".join(draw.choice(WORDS) for _ in range(words))


@torch.no_grad()
def _question(model, tokenizer, context, question):
    """The question with what the model says with all of its cache, so that there is something to lose."""
    ids = tokenizer(context + question, return_tensors="pt")["input_ids"]
    scores = model(ids).logits[0, -1]
    scores[[CHARACTERS.index(text) for text in ("<unk>", "<s>", *string.whitespace)]] = -torch.inf
    return {"context": context, "question": question, "answer": CHARACTERS[int(scores.argmax())]}


def _lines(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
