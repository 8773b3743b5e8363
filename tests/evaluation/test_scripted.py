"""Tasks that are scripts: batched and forked runs against one context, one configuration and one token at a time."""

import math
from dataclasses import replace

import pytest
import torch

from kv_gym.budgets import parse_allocation
from kv_gym.errors import UserError
from kv_gym.evaluation.configurations import Configuration, configurations_of, full_cache
from kv_gym.evaluation.outcomes import Outcome, measured_fields, per_context
from kv_gym.evaluation.tasks import parse_tasks, scripted
from kv_gym.evaluation.tasks.dialogue import context_facts
from kv_gym.evaluation.tasks.perplexity import perplexity
from kv_gym.files import MODEL
from kv_gym.live import EvictingCache
from kv_gym.live.selection import parse_selection
from kv_gym.policies import make_policy
from kv_gym.reference.generator import make_context
from kv_gym.reference.tokenizer import build_tokenizer, encode, vocabulary

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the reference model is not in this checkout")

NATIVE = {"prefill": "prefill", "turn": "prefill"}  # else the trigger of the task's own name


@pytest.fixture(scope="module")
def model():
    from kv_gym.models import load_model

    return load_model(MODEL)[0]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "novel.txt"
    words = [word for i in range(3) for word in make_context("multi_key", 64, i).words]
    file.write_text("\ufeff" + " ".join(words), encoding="utf-8")
    names = "multi_key:64,multi_key:64:seen,dialogue:256,copy:32,fact:128"
    named = {task.name.rsplit(" ", 1)[0]: task for task in parse_tasks(names, count=2)}
    return named | {"text": perplexity(file, build_tokenizer(), tokens=64, block=16, count=2)}


TASKS = ["multi_key", "multi_key seen", "dialogue turns", "copy", "fact", "text"]


def one_by_one(model, task, script, policy, share):
    """(part, right, nll) of every answer, sorted: the first segment whole, then token by token, and no forks."""
    budget = share if script.length is None else max(1, int(share * script.length))
    found, last = [], None

    @torch.no_grad()
    def feed(cache, ids):
        nonlocal last
        last = model(input_ids=torch.tensor([ids]), past_key_values=cache).logits[0, -1].log_softmax(-1)

    def feed_and_judge(cache, ids):
        """Log-likelihood of each token before it is fed, and whether it is the likeliest."""
        judged = []
        for token in ids:
            judged.append((last[token].item(), int(last.argmax()) == token) if last is not None else None)
            feed(cache, [token])
        return judged

    def read(judging):
        cache = EvictingCache(model, policy, budget, trigger=NATIVE.get(task.trigger, task.trigger))
        for index, segment in enumerate(script.segments):
            if index == 0 and not segment.answers:
                feed(cache, list(segment.ids))
            else:
                judged = feed_and_judge(cache, segment.ids)
                for answer in segment.answers if judging else ():
                    judge(judged[answer.start : answer.stop], answer.part)
            if segment.compress and task.trigger == "turn" and index:
                cache.compress()
        return cache

    def judge(judged, part):
        found.append((part, all(right for _, right in judged), -sum(p for p, _ in judged) / len(judged)))

    if any(segment.answers for segment in script.segments):
        read(True).detach()
    for question in script.questions:
        with read(False) as cache:
            feed_and_judge(cache, question.question_ids)
            judge(feed_and_judge(cache, question.answer_ids), question.part)
    return found


def by_part(found):
    parts = {}
    for part, right, nll in found:
        asked, correct, loss = parts.get(part, (0, 0, 0.0))
        parts[part] = (asked + 1, correct + right, loss + nll)
    return parts


# every task with one policy, and a policy with memory where answers are fed while it decodes
PAIRS = [(name, "keydiff") for name in TASKS] + [("copy", "h2o"), ("dialogue turns", "h2o")]
PAIRS += [("multi_key", "kvzip"), ("fact", "kvzip")]  # a second reading, of the first cut's context and of later ones


@pytest.mark.parametrize(("name", "policy"), PAIRS)
def test_batched_runs_equal_a_plain_loop_over_tokens(model, tasks, name, policy):
    task = tasks[name]
    batch = task.batches()[0]
    assert len(batch) > 1 or name == "dialogue turns"
    (_, outcomes), _ = task.measure(model, batch, [Configuration(policy, make_policy(policy), 0.5), full_cache()])
    for script in batch:
        expected = by_part(one_by_one(model, task, script, policy, 0.5))
        own = {o.part: (o.questions, o.correct, o.nll) for o in outcomes if o.context == script.id}
        assert own.keys() == expected.keys()
        for part, (asked, right, nll) in expected.items():
            assert own[part][:2] == (asked, right), part
            assert own[part][2] == pytest.approx(nll, abs=2e-3 * asked)


@pytest.mark.parametrize("select", ["all", "mpcache:0.5:group=4"])
def test_questions_of_other_lengths_are_asked_as_each_alone(model, tasks, select):
    """Together, padded behind; where queries read a selection, with those of their length."""
    (script,) = tasks["multi_key"].scripts[:1]
    first, second = script.questions[:2]
    longer = replace(second, question_ids=(*second.question_ids[:1], *second.question_ids))
    configurations = configurations_of(
        {"keydiff": make_policy("keydiff")}, [0.5], [parse_allocation("uniform")], select=[parse_selection(select)]
    )

    def answers(*questions):
        task = replace(tasks["multi_key"], scripts=[replace(script, questions=questions)], list_answers=True)
        (batch,) = task.batches()
        ((_, outcomes),) = task.measure(model, batch, configurations)
        return sorted((*answer, outcome.slots_read) for outcome in outcomes for answer in outcome.answers)

    together, alone = answers(first, longer), sorted(answers(first) + answers(longer))
    assert [grade for grade, _, _ in together] == [grade for grade, _, _ in alone]
    assert [loss for _, loss, _ in together] == pytest.approx([loss for _, loss, _ in alone], abs=2e-3)
    assert together[0][2] == pytest.approx((alone[0][2] + alone[1][2]) / 2)  # of a row the mean over its questions
    (group,) = scripted._similar([(0, longer), (0, first)], 1.25)
    assert [question for _, question in group] == [first, longer]
    assert len(list(scripted._similar([(0, longer), (0, first)], 1.0))) == 2


def test_all_configurations_of_a_policy_share_its_second_reading(model, tasks, monkeypatch):
    from kv_gym.live import cache as live

    readings, read_again = [], live.run_second_reading
    monkeypatch.setattr(live, "run_second_reading", lambda *given: (readings.append(1), read_again(*given)))
    task, kvzip = tasks["multi_key"], make_policy("kvzip")
    batch = task.batches()[0]
    configurations = [
        Configuration("kvzip", kvzip, share, parse_allocation(rule))
        for share in (0.5, 0.25)
        for rule in ("uniform", "ada")
    ]
    together = [outcomes for _, outcomes in task.measure(model, batch, [full_cache(), *configurations])][1:]
    assert len(readings) == 1
    alone = [next(task.measure(model, batch, [configuration]))[1] for configuration in configurations]
    assert len(readings) == 1 + len(configurations)
    for ours, theirs in zip(together, alone, strict=True):
        assert [(o.correct, o.cache_bytes, o.slots.tolist()) for o in ours] == [
            (o.correct, o.cache_bytes, o.slots.tolist()) for o in theirs
        ]
        assert [o.nll for o in ours] == pytest.approx([o.nll for o in theirs], abs=1e-4)
        assert all(o.seconds > 0 for o in ours)


@pytest.mark.parametrize("name", TASKS)
def test_the_full_cache_is_plain_transformers(model, tasks, name):
    task = tasks[name]
    batch = task.batches()[0]
    # another configuration with it, compressed in every way there is: the full cache must not notice
    rule = parse_allocation("global:softmax")
    configurations = [Configuration("keydiff", make_policy("keydiff"), 4, rule, sinks=0, recent=0), full_cache()]
    (_, cut), (_, outcomes) = task.measure(model, batch, configurations)
    assert abs(math.fsum(o.nll for o in cut) - math.fsum(o.nll for o in outcomes)) > 1e-4
    for script in batch:
        fed = [token for segment in script.segments for token in segment.ids]
        found, start = [], 0
        for segment in script.segments:
            spans = [(start + answer.start, start + answer.stop, answer.part) for answer in segment.answers]
            found += judged_plainly(model, fed, spans)
            start += len(segment.ids)
        for question in script.questions:
            ids = [*fed, *question.question_ids, *question.answer_ids]
            found += judged_plainly(model, ids, [(len(ids) - len(question.answer_ids), len(ids), question.part)])
        own = {o.part: (o.questions, o.correct, o.nll) for o in outcomes if o.context == script.id}
        for part, (asked, right, nll) in by_part(found).items():
            assert own[part] == (asked, right, pytest.approx(nll, abs=2e-3 * asked))
        slots = next(o.slots for o in outcomes if o.context == script.id)
        last_cut = max(i for i, segment in enumerate(script.segments) if segment.compress)
        assert slots.unique().tolist() == [sum(len(segment.ids) for segment in script.segments[: last_cut + 1])]


def judged_plainly(model, ids, spans):
    if not spans:
        return []
    with torch.no_grad():
        likelihood = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    found = []
    for start, stop, part in spans:
        places = range(start - 1, stop - 1)
        right = all(int(likelihood[place].argmax()) == ids[place + 1] for place in places)
        found.append((part, right, -sum(likelihood[place, ids[place + 1]].item() for place in places) / len(places)))
    return found


def test_a_bounded_stream_holds_its_share_and_not_more(model, tasks):
    task = tasks["copy"]  # 33 tokens of prompt and 96 of copies
    (_, outcomes), (_, whole_model), (_, few) = task.measure(
        model,
        task.scripts,
        [
            Configuration("recency", make_policy("recency"), 0.25),
            Configuration("keydiff", make_policy("keydiff"), 0.25, parse_allocation("global:softmax")),
            Configuration("recency", make_policy("recency"), 7),
        ],
    )
    assert {o.slots.unique().item() for o in outcomes} == {129 // 4}
    assert {o.slots.sum().item() for o in whole_model} == {129 // 4 * 12}
    assert {o.slots.unique().item() for o in few} == {7}
    # 4 layers x 3 heads: keys and values of 32 numbers in float32, and the position
    assert {o.cache_bytes for o in few} == {12 * 7 * (2 * 32 * 4 + 8)}
    assert all(o.seconds > 0 for o in few)


def test_the_list_that_is_copied_is_one_the_model_can_copy(model):
    (task,) = parse_tasks("copy:64:count=2")
    ((_, outcomes),) = task.measure(model, task.scripts, [full_cache()])
    assert [o.questions for o in per_context(outcomes)] == [24, 24]
    assert sum(o.correct for o in outcomes) >= 46
    first, second = (script.segments[0].ids for script in task.scripts)
    assert first != second and len(set(first)) == 65  # a beginning and 64 distinct words


def test_a_dialogue_asks_once_about_earlier_turns(tasks):
    words = build_tokenizer()
    for number, script in enumerate(tasks["dialogue turns"].scripts):
        turns, asked = [], []
        for segment in script.segments:
            if segment.compress:
                turns.append(words.decode(segment.ids))
                continue
            (answer,) = segment.answers
            text = words.decode(segment.ids).split()
            assert (answer.start, answer.stop) == (3, 5) and text[0] == "question" and text[-1] == "."
            fact, turn = " ".join(text[1:5]), int(answer.part.removeprefix("turn "))
            assert turn == len(turns)
            assert fact in " ".join(turns[:-1]) if turn > 1 else fact in turns[0]
            asked.append(fact)
        assert len(turns) == 2 and len(asked) == len(set(asked)) == 4
        assert " ".join(turns).replace("<bos> ", "") == " ".join(
            make_context("dialogue", 256, 1_000_060_256 + number, 8).words
        )


def test_facts_are_asked_for_after_as_many_cuts_as_the_part_says(tasks):
    words = build_tokenizer()
    for script in tasks["fact"].scripts:
        assert all(segment.compress for segment in script.segments) and len(script.questions) == 2
        blocks = [words.decode(segment.ids) for segment in script.segments]
        for question in script.questions:
            fact = words.decode((*question.question_ids, *question.answer_ids)).removeprefix("question ")
            cuts = int(question.part.split()[1])
            assert fact in blocks[len(blocks) - cuts]
            key = " ".join(fact.split()[:2])
            assert sum(block.count(f"{key} ") for block in blocks) >= 1
    context = make_context("multi_key", 64, 0)
    for end, key, value in context_facts(context):
        assert (*key, *value, ".") == context.words[end - 4 : end + 1]


def test_stretches_of_a_text_are_where_their_names_say(tasks, tmp_path):
    words = list(vocabulary()[:200])
    (tmp_path / "a.txt").write_text(" ".join(words))
    task = perplexity(tmp_path / "a.txt", build_tokenizer(), tokens=64, block=16, count=2)
    assert [script.id for script in task.scripts] == ["token 0", "token 100"]
    for script, first in zip(task.scripts, (0, 100), strict=True):
        fed = [token for segment in script.segments for token in segment.ids]
        assert fed == [1, *encode(words[first : first + 63])]
        assert [segment.compress for segment in script.segments] == [True, True, True, False]
        assert sum(len(segment.answers) for segment in script.segments) == 63  # all but the first
    assert (task.name, task.trigger) == ("text a.txt 64", "block:16")


def test_hashes_name_what_is_asked_and_nothing_else():
    def of(name):
        return parse_tasks(name)[0].hash

    assert of("copy:32:count=2") == of("copy:32:count=2")
    different = ["copy:32:count=2", "copy:32:count=3", "copy:32:count=2:seed=1", "fact:128:count=2"]
    different += ["multi_key:64:count=2", "multi_key:64:count=2:seen", "multi_key:64:count=2:seed=7"]
    assert len({of(name) for name in different}) == len(different)
    longer, shorter = parse_tasks("fact:128:count=1")[0].scripts[0], parse_tasks("fact:64:count=1")[0].scripts[0]
    assert longer.segments[0] == shorter.segments[0]


def test_parts_are_joined():
    slots = torch.full((1, 2), 3.0)
    parts = [Outcome("a", "x", 2, 1.0, 0.5, 10, slots, 0.1), Outcome("b", "x", 1, 0.0, 2.0, 12, slots + 2, 0.1)]
    parts.append(Outcome("a", "y", 3, 2.0, 1.0, 10, slots, 0.2))
    first, second = per_context(parts)
    assert (first.context, first.part, first.questions, first.correct, first.nll, first.cache_bytes) == (
        "a",
        "",
        5,
        3,
        1.5,
        10,
    )
    assert first.seconds == pytest.approx(0.3) and second.questions == 1
    assert measured_fields(parts)["slots"] == [[4.0, 4.0]]
    parts[1].slots = None
    assert measured_fields(parts)["slots"] is None


def test_a_policy_meets_the_rules_that_can_use_its_scores():
    rules = [parse_allocation(name) for name in ("uniform", "global")]
    configurations = configurations_of({"snapkv": make_policy("snapkv"), "knorm": make_policy("knorm")}, [8], rules)
    assert [(each.name, each.allocation.name) for each in configurations] == [
        ("snapkv", "uniform"), ("snapkv", "global"), ("knorm", "uniform"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="not comparable across heads"):
        configurations_of({"knorm": make_policy("knorm")}, [8], rules[1:])


def test_every_policy_meets_every_budget_and_allocation():
    rules = [parse_allocation(name) for name in ("uniform", "ada")]
    configurations = configurations_of({"snapkv": make_policy("snapkv")}, [8, 0.5], rules)
    assert [(each.budget, each.allocation.name) for each in configurations] == [
        (8, "uniform"), (8, "ada"), (0.5, "uniform"), (0.5, "ada"),
    ]  # fmt: skip


def test_bad_texts_are_refused_in_one_sentence(tmp_path):
    words = build_tokenizer()
    (tmp_path / "short.txt").write_text("the lamp was old")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for file, lengths, message in (
        ("missing.txt", {}, "cannot be read"),
        ("bytes.txt", {}, "not UTF-8 text"),
        ("short.txt", {}, "has 4 tokens and a window needs 1023"),
        ("short.txt", {"tokens": 100}, "multiple of 4 blocks of 64"),
    ):
        with pytest.raises(UserError, match=message):
            perplexity(tmp_path / file, words, **lengths)


def test_no_dialogue_asks_for_a_fact_that_two_turns_share():
    words, torn = build_tokenizer(), 0
    for number, script in enumerate(parse_tasks("dialogue:512:count=12")[0].scripts):
        turns = [words.decode(segment.ids) for segment in script.segments if segment.compress]
        context = make_context("dialogue", 512, 1_000_060_512 + number, 8)
        for segment in script.segments:
            if not segment.compress:
                assert any(" ".join(words.decode(segment.ids).split()[1:5]) in turn for turn in turns)
        torn += sum(
            not any(" ".join((*key, *value)) in turn for turn in turns) for _, key, value in context_facts(context)
        )
    assert torn  # there are some that could have been asked for
