"""The reference language: frozen density, pinned held-out texts, and nothing given away by words or places."""

import collections
import json

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from kv_gym.reference.generator import FIRST_HELD_OUT_SEED, TASKS, make_context
from kv_gym.reference.heldout import FILE, HeldOut
from kv_gym.reference.tokenizer import (
    DISTRACTOR_RELATIONS,
    FACT_RELATIONS,
    THINGS,
    build_tokenizer,
    encode,
    vocabulary,
    word_ids,
)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [64, 96, 512, 1024])
def test_contexts_have_the_frozen_density(task, tokens):
    context = make_context(task, tokens, seed=7, questions=8)
    assert len(context.words) == tokens
    assert len(context.fact_values) == len(context.distractor_values) == 2 * tokens // 32
    assert context.questions and len(set(context.questions)) == len(context.questions)
    for relations, places in ((FACT_RELATIONS, context.fact_values), (DISTRACTOR_RELATIONS, context.distractor_values)):
        assert {context.words[place - 2] for place in places[::2]} <= set(relations)


@pytest.mark.parametrize("task", ["single", "multi_key", "multi_query", "dialogue"])
def test_answers_stand_behind_their_keys_and_nowhere_else(task):
    context = make_context(task, 512, seed=3, questions=8)
    text = " ".join(context.words)
    for question in context.questions:
        if task == "multi_query":
            facts = [question.answer[:4], question.answer[4:]]
        else:
            facts = [(*question.question[1:], *question.answer)]
        for relation, name, *values in facts:
            assert text.count(f"{relation} {name} ") == 1
            assert f"{relation} {name} {' '.join(values)}" in text


def test_variable_tracking_answers_follow_the_chain():
    context = make_context("variable_tracking", 512, seed=3)
    text = " ".join(context.words)
    for question in context.questions:
        assert f"{' '.join(question.question[1:])} {' '.join(question.answer[:2])}" in text
        assert " ".join(question.answer) in text


def test_most_common_is_the_most_common_thing():
    for seed in range(20):
        context = make_context("most_common", 512, seed)
        counts = collections.Counter(word for word in context.words if word in set(THINGS))
        assert counts.most_common(1)[0][0] == context.questions[0].answer[0]


def test_every_word_has_one_id_and_survives_the_tokenizer():
    words = vocabulary()
    assert 1000 <= len(words) <= 2000 and len(set(words)) == len(words)
    tokenizer = build_tokenizer()
    context = make_context("dialogue", 512, seed=1)
    assert tokenizer(" ".join(context.words))["input_ids"] == [word_ids()["<bos>"], *encode(context.words)]
    assert tokenizer.decode(encode(context.words)) == " ".join(context.words)


@pytest.mark.parametrize("row", json.loads(FILE.read_text()), ids=lambda row: f"{row['task']}-{row['tokens']}")
def test_held_out_texts_are_the_pinned_ones(row):
    texts = HeldOut(**row)
    assert texts.first_seed >= FIRST_HELD_OUT_SEED
    assert texts.hash() == row["sha256"]


@pytest.mark.parametrize("task", ["single", "multi_key", "multi_value", "multi_query", "dialogue"])
def test_word_and_place_alone_do_not_tell_facts_from_distractors(task):
    """A scorer fitted on token identity and position reaches at most AUC .6 on fresh contexts."""

    def values(seeds):
        words, places, labels = [], [], []
        for seed in seeds:
            context = make_context(task, 512, seed, questions=8)
            answers = {fact for q in context.questions for fact in zip(q.answer, q.answer[1:], strict=False)}
            for kind, indices in enumerate((context.distractor_values, context.fact_values)):
                for first in indices[::2]:
                    # of the facts, those that a question of this context asks for
                    if kind and (context.words[first], context.words[first + 1]) not in answers:
                        continue
                    for place in (first, first + 1):
                        words.append(word_ids()[context.words[place]])
                        places.append(place * 16 // 512)
                        labels.append(kind)
        return np.array(words), np.array(places), np.array(labels)

    words, places, labels = values(range(600))

    def log_odds(column, size):  # naive Bayes with add-one smoothing: the best scorer of independent parts
        asked = np.bincount(column[labels == 1], minlength=size) + 1.0
        other = np.bincount(column[labels == 0], minlength=size) + 1.0
        return np.log(asked / asked.sum()) - np.log(other / other.sum())

    by_word, by_place = log_odds(words, len(word_ids())), log_odds(places, 16)
    words, places, labels = values(range(10_000, 10_300))
    scores = by_word[words] + by_place[places]
    facts, distractors = scores[labels == 1], scores[labels == 0]
    area = mannwhitneyu(facts, distractors).statistic / len(facts) / len(distractors)
    assert 0.4 < area <= 0.6


@pytest.mark.slow
def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from kv_gym.reference import train as trainer

    def run(folder):
        trainer.train_reference_model(folder, stages=(trainer.Stage(64, 2, 4),), save_every=2, compiled=False)

    run(tmp_path / "whole")
    step, taken = trainer.batch_loss, 0

    def interrupted(*arguments):
        nonlocal taken
        taken += 1
        if taken == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(trainer, "batch_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    assert not (tmp_path / "cut" / "model").exists()
    run(tmp_path / "cut")
    assert taken == 6  # it went on from step 2
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(np.array_equal(whole[k].float(), cut[k].float()) for k in whole)


def test_a_quarter_of_a_batch_is_segments_repeated():
    import random

    from kv_gym.reference.train import Stage, make_batch

    ids, is_answer = make_batch(Stage(64, 200, 1), random.Random(0))
    assert ids.shape == is_answer.shape and ids.shape[0] == 200
    repeated = 0
    for row in ids.numpy():
        row = row[row != 0][1:]
        half = len(row) // 2
        repeated += len(row) % 2 == 0 and np.array_equal(row[:half], row[half:])
    assert 30 < repeated < 70
    assert set(ids[is_answer].tolist()) <= set(range(3, len(word_ids())))
