"""A conversation over one cache: the same replies as over the whole text, cut after every turn, left cleanly."""

import pytest
import torch
from typer.testing import CliRunner
from users_files import _model, _tokenizer

from kv_gym.cli import app
from kv_gym.errors import UserError
from kv_gym.live import Conversation, chat, generate

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = _model(), _tokenizer()
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def reply_to(model, ids, new):
    return model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=0)[
        0, len(ids) :
    ].tolist()


def test_a_full_cache_replies_as_the_whole_text_does(loaded):
    model, tokenizer = loaded
    ids = tokenizer.encode("<system>be kind</system><user>", add_special_tokens=False)
    talk = Conversation(model, tokenizer, "h2o", 1.0, system="be kind", max_new_tokens=6)
    with talk.cache:
        for message in ("I am Ann.", "Who am I?"):
            ids += tokenizer.encode(f"{message}</user><assistant>", add_special_tokens=False)
            expected = reply_to(model, ids, 6)
            assert talk.say(message).text == tokenizer.decode(expected, skip_special_tokens=True)
            ids += [*expected, *tokenizer.encode("</assistant><user>", add_special_tokens=False)]


def test_a_stop_token_ends_a_reply_and_is_written_by_the_template_alone(loaded):
    model, tokenizer = loaded
    ids = tokenizer.encode("<user>Hi</user><assistant>", add_special_tokens=False)
    first, *others = reply_to(model, ids, 8)
    stop = next(token for token in others if token != first)
    model.generation_config.eos_token_id = [stop]
    try:
        talk = Conversation(model, tokenizer, "recency", 1.0, max_new_tokens=8)
        with talk.cache:
            turn = talk.say("Hi")
            assert stop not in tokenizer.encode(turn.text, add_special_tokens=False) and len(turn.text) < 8
            talk.say("Go on")
            assert talk.cache.seen >= len(ids) + len(turn.text) + len("</assistant><user>Go on</user><assistant>")
    finally:
        model.generation_config.eos_token_id = None


def test_the_cache_is_cut_when_a_document_is_read_and_after_every_turn(loaded):
    model, tokenizer = loaded
    talk = Conversation(model, tokenizer, "recency", 16, max_new_tokens=4)
    with talk.cache:
        for turn in (talk.read("a long text " * 4), talk.say("What?"), talk.say("Why?")):
            assert turn.spread == (16, 16) and turn.seen > 16
    with pytest.raises(UserError, match="the text to talk about is empty"):
        talk.read(" ")


def test_lines_are_messages_until_quit_or_an_interruption(loaded):
    model, tokenizer = loaded

    def interrupted():
        yield "first"
        raise KeyboardInterrupt

    written, noted = [], []
    options = {"max_new_tokens": 2, "write": written.append, "note": noted.append}
    turns = chat(model, tokenizer, "recency", 8, lines=["Hi", " ", "/quit", "never"], **options)
    assert len(turns) == 1 and noted == [f"[turn 1: {turns[0].cache_held}]"]
    assert "".join(written).rstrip("\n") == turns[0].text.rstrip("\n")
    assert len(chat(model, tokenizer, "recency", 8, lines=interrupted(), **options)) == 1
    with pytest.raises(UserError, match="the text so far has 4124 tokens and the model 4096 positions"):
        chat(model, tokenizer, "recency", 8, lines=["x" * 4100], **options)


def test_the_command_reads_plain_lines_and_generate_replies_to_a_prompt(loaded, tmp_path):
    model, tokenizer = loaded
    for part in loaded:
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The lamp is old.")
    words = ["chat", "--model", tmp_path / "model", "--policy", "recency", "--budget", "1/2", "--max-new-tokens", "3"]
    result = CliRunner().invoke(app, [*map(str, words), "--context", str(tmp_path / "text.txt")], input="Hi\nWho?\n")
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.stderr.splitlines() if line.startswith("[")][1:] == [
        "[turn 1",
        "[turn 2",
    ]
    said = generate(model, tokenizer, "Hi", "recency", 1.0, max_new_tokens=3, chat=True)
    assert said == generate(model, tokenizer, [{"role": "user", "content": "Hi"}], "recency", 1.0, max_new_tokens=3)
    ids = tokenizer.encode("<user>Hi</user><assistant>", add_special_tokens=False)
    assert said.text == tokenizer.decode(reply_to(model, ids, 3), skip_special_tokens=True)


def test_a_prompt_gets_the_beginning_token_and_no_end_token(loaded):
    model, tokenizer = loaded

    class Ending:
        """The tokenizer, which sets an end token behind a text unless it is told not to."""

        bos_token_id = None

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, add_special_tokens=True, **more):
            ids = tokenizer(text, add_special_tokens=False, **more)["input_ids"]
            return {"input_ids": [*ids, 2] if add_special_tokens else ids}

    options = {"policy": "recency", "budget": 1.0, "max_new_tokens": 4}
    assert (
        generate(model, Ending(), "the lamp", **options).text == generate(model, tokenizer, "the lamp", **options).text
    )
    with pytest.raises(UserError, match="bytes that are no UTF-8"):
        generate(model, tokenizer, b"the \xff lamp".decode("utf-8", "surrogateescape"), **options)
