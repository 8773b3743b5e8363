"""The server against OpenAI's own client: what it replies, remembers, parks, counts and refuses."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from users_files import _model, _tokenizer

pytest.importorskip("fastapi", reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")

from kv_gym.errors import UserError  # noqa: E402
from kv_gym.live import Conversation  # noqa: E402
from kv_gym.serving import engine, make_server  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SETTINGS = {"policy": "keydiff", "budget": "1/2", "port": 0, "name": "tiny", "note": lambda _: None}


def loaded():
    model, tokenizer = _model(), _tokenizer()
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@pytest.fixture(scope="module")
def parts():
    return loaded()


def serving(parts, **settings):
    return make_server(*parts, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def server(parts):
    with serving(parts, conversations=2, max_tokens=64, timeout=20, request_kilobytes=64) as server:
        yield server


def client_of(server, **settings):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, **settings)


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


def ask(client, messages, tokens=6, **more):
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=tokens, **more)


def user(text):
    return {"role": "user", "content": text}


def turns_of(client, questions, history=(), **more):
    """Ask one question after the other; the replies' texts and the tokens that the cache had read before each."""
    messages, texts, cached = list(history), [], []
    for question in questions:
        messages.append(user(question))
        reply = ask(client, messages, **more)
        text = reply.choices[0].message.content
        messages.append({"role": "assistant", "content": text})
        texts.append(text)
        cached.append(reply.usage.prompt_tokens_details.cached_tokens)
    return texts, cached


def metric(server, name):
    with urllib.request.urlopen(server.url.replace("/v1", "/metrics")) as page:
        lines = dict(line.rsplit(" ", 1) for line in page.read().decode().splitlines() if not line.startswith("#"))
    return float(lines.get(f"kv_gym_{name}", 0))


def expected_turns(parts, questions, **settings):
    """What `kv-gym chat` replies, and what its cache has seen after each turn."""
    talk = Conversation(*parts, "keydiff", "1/2", max_new_tokens=6, **settings)
    with talk.cache:
        said = [talk.say(question) for question in questions]
    return [each.text for each in said], [each.seen for each in said]


def test_a_conversation_reads_only_what_is_new_and_equals_chat(parts, server, client):
    questions = ["I am Ann.", "Who am I?", "And you?"]
    expected, seen = expected_turns(parts, questions)
    read = metric(server, "tokens_read_total")
    texts, cached = turns_of(client, questions)
    assert texts == expected and cached == [0, *seen[:2]]
    # all that was read, by the prompts' tokens: the newest token of a reply is read with the next prompt
    assert metric(server, "tokens_read_total") - read == seen[-1] - 3 * 5


def test_a_stream_is_the_reply_in_parts(parts, client):
    (expected,), _ = expected_turns(parts, ["Hi there"])
    with ask(client, [user("Hi there")], stream=True, stream_options={"include_usage": True}) as stream:
        *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[0].choices[0].delta.role == "assistant" and last.usage.completion_tokens == 6


def test_parked_conversations_go_on_as_if_they_had_stayed(parts, server, client):
    questions = [["one", "two"], ["three", "four"], ["five", "six"]]
    first = [turns_of(client, [a], [{"role": "system", "content": "be kind"}]) for a, _ in questions]
    wait_for(lambda: metric(server, 'conversations{place="memory"}') == 2)  # a reply is sent before it is stored
    wait_for(lambda: metric(server, 'conversations{place="disk"}') >= 1)
    assert metric(server, 'cache_bytes{place="disk"}') > 0
    for (a, b), ((said,), _) in zip(questions, first, strict=True):  # the first is on disk, and the others follow
        history = [{"role": "system", "content": "be kind"}, user(a), {"role": "assistant", "content": said}]
        (text,), (cached,) = turns_of(client, [b], history)
        expected, seen = expected_turns(parts, [a, b], system="be kind")
        assert ([said, text], cached) == (expected, seen[0])


def test_a_prompt_is_gone_on_with_and_sampling_follows_its_seed(parts, client):
    model, tokenizer = parts

    def complete(prompt, **more):
        reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, **more)
        return reply.choices[0].text, reply.usage.prompt_tokens_details.cached_tokens

    text, cached = complete("the lamp")
    ids = tokenizer("the lamp", return_tensors="pt")["input_ids"]
    ids = torch.cat([torch.tensor([[1]]), ids], 1) if ids[0, 0] != 1 and tokenizer("")["input_ids"] else ids
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert text == tokenizer.decode(expected) and cached == 0
    assert complete(f"the lamp{text} and")[1] == ids.shape[1] + 4
    drawn = {complete("the key", temperature=1.5, top_p=0.9, seed=seed)[0] for seed in (1, 1, 2)}
    assert len(drawn) == 2
    assert complete("the key", temperature=0) == complete("the key")
    assert complete("the key", temperature=1.2) != complete("the key", temperature=1.2)


def test_a_stop_string_ends_the_reply_and_leaves_the_cache(parts, client):
    questions = ["Say it", "Again"]
    (whole, _), _ = expected_turns(parts, questions)
    stop = whole[2:4]
    reply = ask(client, [user("Say it")], stop=["never", stop])
    text = reply.choices[0].message.content
    assert text == whole[: whole.index(stop)] and reply.choices[0].finish_reason == "stop"
    followed = ask(client, [user("Say it"), {"role": "assistant", "content": text}, user("Again")])
    ids = parts[1].encode(f"<user>Say it</user><assistant>{text}", add_special_tokens=False)
    assert followed.usage.prompt_tokens_details.cached_tokens == len(ids)


@pytest.mark.parametrize(
    "change, status, said",
    [
        ({"n": 2}, 400, "this server does not serve n=2: leave n out"),
        ({"tools": [{"type": "function"}]}, 400, "does not serve tools"),
        ({"response_format": {"type": "json_object"}}, 400, "does not serve response_format"),
        ({"logprobs": True}, 400, "does not serve logprobs=true"),
        ({"colour": "red"}, 400, "unknown key 'colour'"),
        ({"temperature": 3}, 400, "temperature is 3"),
        ({"max_tokens": 65}, 400, "this server writes at most 64 tokens"),
        ({"max_tokens": 0}, 400, "max_tokens is 0"),
        ({"stop": ["a"] * 5}, 400, "stop holds 5 texts; expected at most 4"),
        ({"model": "other"}, 404, "there is no model 'other' here; expected 'tiny'"),
        ({"messages": []}, 400, "messages hold nothing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role is 'tool'"),
        ({"messages": [user("a"), user("b")]}, 400, "user and assistant take turns"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, 400, "the last message is the assistant's"),
        ({"messages": [user([{"type": "image_url", "image_url": "x"}])]}, 400, "type is 'image_url'; expected 'text'"),
        ({"messages": [user(None)]}, 400, "neither a text nor a list of parts"),
        ({"messages": [user("x" * 5000)]}, 400, "the model 4096 positions"),
        ({"messages": [user("x" * 70000)]}, 413, "larger than 65,536 bytes"),
        (b"{", 400, "no JSON"),
        (b"[" * 1000, 400, "nested deeper than 64 levels"),
        (b"\xff", 400, "no UTF-8 text"),
        (b'{"a": 1, "a": 2}', 400, "stands twice"),
        (b"[]", 400, "no JSON object"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_with_a_sentence(server, change, status, said):
    body = {"model": "tiny", "messages": [user("Hi")]}
    data = change if isinstance(change, bytes) else json.dumps(body | change).encode()
    found, answer = post(server, data)
    message = answer["error"]["message"]
    assert found == status and said in message and "\n" not in message


def post(server, data, path="/chat/completions", **headers):
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_neutral_fields_and_parts_of_text_are_taken(client):
    more = {"n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}
    plain = ask(client, [{"role": "system", "content": "be kind"}, user("Hello you")])
    content = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]
    developer = {"role": "developer", "content": "be kind"}
    other = ask(client, [developer, user(content)], user="Ann", response_format={"type": "text"}, **more)
    assert other.choices[0].message.content == plain.choices[0].message.content
    assert other.usage.prompt_tokens_details.cached_tokens == 0
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_users_do_not_share_conversations(client):
    (said,), _ = turns_of(client, ["My name"], user="Ann")
    history = [user("My name"), {"role": "assistant", "content": said}]
    assert turns_of(client, ["Go on"], history, user="Bob")[1] == [0]
    assert turns_of(client, ["Go on"], history, user="Ann")[1] != [0]


class Slow:
    """A model's forward that waits until it may go on, a forward at a time."""

    def __init__(self, model, monkeypatch):
        self.steps = threading.Semaphore(0)
        forward = model.lm_head.forward

        def slow(*args):
            self.steps.acquire(timeout=20)
            return forward(*args)

        monkeypatch.setattr(model.lm_head, "forward", slow)


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def test_a_killed_client_stops_its_generation_and_the_conversation_goes_on(parts, server, client, monkeypatch):
    questions = ["Tell me", "More"]
    expected, seen = expected_turns(parts, questions)
    (said,), _ = turns_of(client, questions[:1])
    history = [user("Tell me"), {"role": "assistant", "content": said}]
    stopped = metric(server, 'interrupted_replies_total{reason="disconnect"}')
    with monkeypatch.context() as patch:
        slow = Slow(parts[0], patch)
        slow.steps.release(3)
        stream = ask(client, [*history, user("More")], tokens=60, stream=True)
        next(iter(stream))
        stream.close()
        time.sleep(0.1)
        slow.steps.release(1)
        wait_for(lambda: metric(server, 'interrupted_replies_total{reason="disconnect"}') == stopped + 1)
    (text,), (cached,) = turns_of(client, questions[1:], history)
    assert (text, cached) == (expected[1], seen[0])


def test_one_generation_at_a_time_a_bounded_queue_and_time_outs(monkeypatch):
    parts = loaded()
    slow = Slow(parts[0], monkeypatch)
    with serving(parts, queue=1, timeout=1) as server, client_of(server) as client:
        found = []

        def send():
            try:
                found.append(ask(client, [user("Hi")]).choices[0].finish_reason)
            except openai.APIStatusError as error:
                found.append(error.status_code)

        threads = [threading.Thread(target=send) for _ in range(3)]
        for number, thread in enumerate(threads):
            thread.start()
            wait_for(lambda number=number: number == 2 or metric(server, "waiting_requests") == number + 1)
        for thread in threads:
            thread.join()
        assert sorted(found) == [429, 504, 504]  # nothing went on for a second
        slow.steps.release(100)
        wait_for(lambda: metric(server, "waiting_requests") == 0)
        assert ask(client, [user("Hi")]).choices[0].finish_reason == "length"
        assert metric(server, 'interrupted_replies_total{reason="timeout"}') == 1
        assert metric(server, 'requests_total{route="/v1/chat/completions",status="504"}') == 2


@pytest.mark.skipif(not engine._CHUNKS_WORK, reason="transformers gave chunks wrong positions before 5.4")
def test_a_long_prompt_is_read_in_chunks_and_no_more_of_it_when_its_client_left(parts, server, client, monkeypatch):
    monkeypatch.setattr(engine, "_CHUNK", 16)
    text = "the lamp was old and Ann sold it to Bob who has a boat in the river by the house." * 2
    expected, seen = expected_turns(parts, [text, text])
    stopped = metric(server, 'interrupted_replies_total{reason="disconnect"}')
    lengths = []

    def note(_, __, given, ___):
        lengths.append(given["input_ids"].shape[1])

    with monkeypatch.context() as patch:
        slow = Slow(parts[0], patch)
        slow.steps.release(2)
        hook = parts[0].register_forward_hook(note, with_kwargs=True)
        with client_of(server, timeout=0.5) as hasty, pytest.raises(openai.APITimeoutError):
            ask(hasty, [user(text)])

        def stops():
            slow.steps.release(1)
            return metric(server, 'interrupted_replies_total{reason="disconnect"}') == stopped + 1

        wait_for(stops)
        hook.remove()
    assert set(lengths) == {16} and 16 * len(lengths) < seen[0] - 16
    assert turns_of(client, [text, text]) == (expected, [0, seen[0]])


def test_a_server_that_stops_ends_the_reply_and_removes_its_files(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parts = loaded()
    server = serving(parts, conversations=1)
    client = client_of(server)
    with server:
        turns_of(client, ["a"])
        turns_of(client, ["b"])
        assert len(list(tmp_path.glob("*/*.safetensors"))) == 1
        slow = Slow(parts[0], monkeypatch)
        slow.steps.release(1)
        stream = iter(ask(client, [user("Hi")], tokens=50, stream=True))
        next(stream)
        threading.Timer(0.3, slow.steps.release, [1]).start()
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    client.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_keeps_conversations_for_the_next_server(parts, tmp_path):
    questions = [["one", "two"], ["three", "four"]]
    histories = []
    with serving(parts, conversations=1, folder=tmp_path) as server, client_of(server) as client:
        for first, _ in questions:
            (said,), _ = turns_of(client, [first])
            histories.append([user(first), {"role": "assistant", "content": said}])
    (tmp_path / "other.json").write_text("{}")
    with serving(parts, budget="1/4", folder=tmp_path) as server:
        assert metric(server, 'conversations{place="disk"}') == 0  # of other settings
    with serving(parts, folder=tmp_path) as server, client_of(server) as client:
        for (first, second), history in zip(questions, histories, strict=True):
            expected, seen = expected_turns(parts, [first, second])
            assert turns_of(client, [second], history) == ([expected[1]], [seen[0]])
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 and (tmp_path / "other.json").exists()


def test_metrics_hold_what_the_caches_hold(parts):
    with serving(parts, conversations=4, parked=0) as server, client_of(server) as client:
        talk = Conversation(*parts, "keydiff", "1/2", max_new_tokens=6)
        with talk.cache:
            talk.say("I am Ann.")
            turns_of(client, ["I am Ann."])
            kept = int(talk.cache.kept().sum())
            wait_for(lambda: metric(server, "slots") == kept)  # a reply is sent before it is counted
            assert metric(server, 'cache_bytes{place="memory"}') == talk.cache.nbytes()
            assert metric(server, "evicted_slots_total") == talk.cache.seen * talk.cache.kept().numel() - kept > 0
            assert metric(server, "tokens_generated_total") == 6 and metric(server, "tokens_per_second") > 0
            wait_for(lambda: metric(server, 'requests_total{route="/v1/chat/completions",status="200"}') == 1)


def test_a_guard_is_counted_and_restores(parts):
    said = []
    settings = {"guard": "entropy:0:restore", "conversations": 1, "note": said.append}
    with serving(parts, **settings) as server, client_of(server) as client:
        texts, cached = turns_of(client, ["Hi", "Who?"])
        assert metric(server, "alarms_total") > 0 and cached[1] > 0 and len(texts) == 2
    assert "conversations that leave the memory are forgotten" in said[0]


def test_keys_names_and_plain_models(parts):
    model, tokenizer = parts[0], _tokenizer()
    said = []
    with make_server(model, tokenizer, **{**SETTINGS, "api_key": "sésame", "note": said.append}) as server:
        data = json.dumps({"model": "tiny", "prompt": "Hi", "max_tokens": 2}).encode()
        key = {"Authorization": "Bearer sésame".encode().decode("latin-1")}
        assert post(server, data, "/completions")[0] == 401
        assert post(server, data, "/completions", Authorization="Bearer other")[0] == 401
        assert post(server, data, "/completions", **key)[0] == 200
        assert "no chat template" in post(server, data, **key)[1]["error"]["message"]
        with urllib.request.urlopen(server.url.replace("/v1", "/health")) as answer:
            assert json.load(answer) == {"status": "ok"}
    assert "no chat template" in said[0]


def test_other_names_of_the_loopback_and_other_kinds_of_content_are_refused(server):
    assert post(server, b"{}", Host="evil.example")[0] == 403
    assert post(server, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert post(server, b"{}", "/nothing")[0] == 404


def test_mistakes_at_the_start_are_one_sentence(parts):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="choose others"):
        serving(parts, port=taken.getsockname()[1])
    for settings, sentence in (
        ({"port": 70000}, "cannot listen on 127.0.0.1, port 70000"),
        ({"conversations": 0}, "conversations is 0; expected a number from 1"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"guard": "entropy"}, "guard 'entropy' has another form"),
        ({"guard": "entropy:1:enlarge"}, "changes nothing with the trigger 'turn'"),
        ({"policy": "nothing"}, "nothing"),
    ):
        with pytest.raises(UserError, match=sentence):
            serving(parts, **settings)
    with pytest.raises(UserError, match="has no tokenizer"):
        serving((parts[0], None))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal(parts, tmp_path, sent):
    for part in parts:
        part.save_pretrained(tmp_path / "tiny")
    words = ["serve", "--model", str(tmp_path / "tiny"), "--policy", "keydiff", "--budget", "1/2", "--port", "0"]
    environment = {**os.environ, "KV_GYM_API_KEY": "secret", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "kv_gym", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        line = next(line for line in process.stderr if line.startswith("tiny at http"))
        with openai.OpenAI(base_url=line.split()[2].rstrip(","), api_key="secret") as client:
            assert turns_of(client, ["Hi"])[1] == [0]
        process.send_signal(sent)
        assert process.wait(30) == 0 and process.stderr.read() == ""
    assert [file.name for file in tmp_path.iterdir()] == ["tiny"]
