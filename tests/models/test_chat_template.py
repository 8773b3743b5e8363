"""Chat templates: a context's tokens do not depend on the question, and all sources of dialogues agree."""

import json

import pytest
from users_files import _tokenizer

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks import contexts_from_records, parse_tasks, read_tasks
from kv_gym.models.chat_template import ChatTemplate
from kv_gym.traces import read_prompts

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<system>be kind</system>{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DIALOGUE = [{"role": "user", "content": "I am Ann."}, {"role": "assistant", "content": "Hi!"}]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = _tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def texts(tokenizer, *records):
    """Context, question and answer of each question, as the model reads them."""
    contexts = contexts_from_records(((f"row {i}", each) for i, each in enumerate(records)), tokenizer, chat=True)
    return [
        tuple(map(tokenizer.decode, (c.context_ids, q.question_ids, q.answer_ids)))
        for c in contexts
        for q in c.questions
    ]


def test_a_question_ends_the_users_message_and_leaves_the_context_alone(tokenizer):
    record = {"context": "A lamp. ", "answer": " Bob "}
    found = texts(
        tokenizer, record | {"question": "Who?"}, record | {"question": "What is it?", "answer_prefix": "It is "}
    )
    head = "<system>be kind</system><user>A lamp. "
    assert found == [
        (head, "Who?</user><assistant>", "Bob"),
        (head, "What is it?</user><assistant>It is", " Bob"),
    ]
    assert texts(tokenizer, {"context": "A lamp.", "question": "Who?", "answer": "Bob"})[0][1].startswith("\nWho?")


def test_dialogues_are_contexts_and_ask_with_their_last_message(tokenizer):
    more = [{"role": "user", "content": "Who am I?"}, {"role": "assistant", "content": "Ann."}]
    expected = (
        "<system>be kind</system><user>I am Ann.</user><assistant>Hi!</assistant><user>",
        "Who am I?</user><assistant>",
        "Ann.",
    )
    assert texts(tokenizer, {"messages": DIALOGUE, "question": "Who am I?", "answer": "Ann."}) == [expected]
    assert texts(tokenizer, {"messages": DIALOGUE + more}) == [expected]
    (prompt,) = read_prompts([{"messages": DIALOGUE + more}], tokenizer, chat=True)
    assert tokenizer.decode(prompt.context_ids) == expected[0]
    assert tokenizer.decode(prompt.continuation_ids[0]) == "Who am I?</user><assistant>Ann.</assistant>"


def test_a_continuation_is_what_the_other_side_says_next(tokenizer):
    rows = [
        {"context": "A lamp.", "continuations": ["Sold.", [{"role": "assistant", "content": "Lost."}]]},
        {"messages": DIALOGUE, "continuations": ["Who?"]},
    ]
    first, second = read_prompts(rows, tokenizer, chat=True)
    assert [tokenizer.decode(ids) for ids in first.continuation_ids] == [
        "</user><assistant>Sold.</assistant>",
        "</user><assistant>Lost.</assistant>",
    ]
    assert tokenizer.decode(second.continuation_ids[0]) == "Who?</user><assistant>"


def test_chat_is_an_option_of_tasks_of_text(tokenizer, tmp_path):
    line = {"input": "A lamp.\nWhat is it?", "outputs": ["lamp"], "answer_prefix": " It is"}
    (tmp_path / "ruler.jsonl").write_text(json.dumps(line) + "\n")
    (task,) = parse_tasks(f"ruler:{tmp_path / 'ruler.jsonl'}", tokenizer, chat=True)
    assert tokenizer.decode(task.prompts[0].context_ids) == "<system>be kind</system><user>A lamp.\n"
    assert tokenizer.decode(task.prompts[0].question_ids) == "What is it?</user><assistant>It is"
    with pytest.raises(UserError, match="'copy:32' has no form for chat models"):
        parse_tasks("copy:32", tokenizer, chat=True)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "row 0: messages are no list"),
        ([{"role": "user"}], "row 0: message 1 has no text under role or content"),
        (DIALOGUE[1:], "row 0: message 1 has the role 'assistant' where system or user was expected: user and assist"),
        (DIALOGUE[:1] * 2, "row 0: message 2 has the role 'user' where assistant was expected"),
        ([*DIALOGUE, {"role": "tool", "content": "x"}], "row 0: message 3 has the role 'tool' where user was expected"),
        (DIALOGUE[:1], "row 0 has no question"),
    ],
)
def test_messages_that_do_not_alternate_are_refused(tokenizer, messages, reason):
    with pytest.raises(UserError, match=f"^{reason}"):
        texts(tokenizer, {"messages": messages, "answer": "x"})


def test_the_process_renders_as_transformers_does(tokenizer):
    templates = [
        CHATML,
        "{% for m in messages %}\n  {% generation %}{{ m['content'].strip() }}{% endgeneration %}\n{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m | tojson }}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ eos_token }}{{ strftime_now('%Y') }}{{ tools }}",
    ]
    for template in templates:
        tokenizer.chat_template = template
        expected = tokenizer.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=True)
        assert ChatTemplate(tokenizer).render(DIALOGUE) == expected
    tokenizer.chat_template = CHATML


def test_a_template_without_end_is_stopped(tokenizer, monkeypatch):
    """Loops, numbers and texts that Jinja's sandbox allows."""
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for bomb, reason in {
        loop: "it took more than 1 seconds",
        "{{ 10 ** (10 ** (5 * messages | length)) }}": "it took more than 1 seconds",
        "{{ 'a' * 10 ** (5 * messages | length) }}": "it needs more than 1 GiB of memory",
        "{{ messages[0].role | center(9999999999) }}": "it needs more than 1 GiB of memory",
    }.items():
        tokenizer.chat_template = "{% if messages | length > 1 %}" + bomb + "{% endif %}ready"
        template = ChatTemplate(tokenizer)
        refusal = pytest.raises(UserError, match=f"^the model's chat template refuses the messages: {reason}")
        with monkeypatch.context() as patch, refusal:
            if "seconds" in reason:
                patch.setattr("kv_gym.models.template_renderer.SECONDS", 1.0)
            template.render(DIALOGUE)
        assert template.render(DIALOGUE[:1]) == "ready"
    tokenizer.chat_template = CHATML


def test_templates_that_cannot_be_used_are_refused(tokenizer):
    with pytest.raises(UserError, match="a tokenizer without a chat template, so it cannot chat: take a chat model"):
        ChatTemplate(_tokenizer())
    with pytest.raises(UserError, match="no tokenizer"):
        ChatTemplate(None)
    for template, reason in {
        "{{ raise_exception('no system here') }}": "refuses the messages: no system here",
        "{{ messages | length }}{{ messages[0].content }}": "renders a context otherwise when something follows it",
        "nothing": "renders a context otherwise",
    }.items():
        other = _tokenizer()
        other.chat_template = template
        with pytest.raises(UserError, match=reason):
            ChatTemplate(other).split(DIALOGUE[:1], following=DIALOGUE[1:])
    with pytest.raises(UserError, match="holds messages, which the model's chat template renders: ask for it with --c"):
        read_tasks([{"messages": DIALOGUE}], tokenizer)
