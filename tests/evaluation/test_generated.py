"""Tasks of the reference language for models with another vocabulary: here one token a letter."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kv_gym.evaluation.configurations import Configuration, full_cache
from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.evaluation.tasks.generated import WordEncoder
from kv_gym.policies import make_policy
from kv_gym.reference.tokenizer import build_tokenizer, encode


@pytest.fixture(scope="module")
def letters():
    alphabet = [chr(i) for i in range(32, 127)]
    tokenizer = Tokenizer(
        models.WordLevel({letter: i for i, letter in enumerate(["?", *alphabet[:31], *alphabet[32:]])})
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=95, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_words_become_tokens_of_the_model(letters):
    ours, theirs = WordEncoder.for_tokenizer(build_tokenizer()), WordEncoder.for_tokenizer(letters)
    assert ours == WordEncoder.for_tokenizer(None) and (ours.beginning, theirs.beginning) == ((1,), ())
    assert ours.encode(("code", "Bob")) == tuple(encode(("code", "Bob")))
    assert letters.decode(theirs.encode(("code", "Bob"))) == " code Bob"


@pytest.mark.parametrize("name", ["multi_key:64", "multi_key:64:seen", "dialogue:128", "copy:32", "fact:64"])
def test_every_task_runs_on_it(model, letters, name):
    (task,) = parse_tasks(name, letters, count=2)
    (same,) = parse_tasks(name, None, count=2)
    assert task.hash != same.hash and len(task.scripts) == len(same.scripts)
    configurations = [full_cache(), Configuration("keydiff", make_policy("keydiff"), 20)]
    for batch in task.batches():
        for configuration, outcomes in task.measure(model, batch, configurations):
            assert {outcome.context for outcome in outcomes} == {script.id for script in batch}
            if configuration.name == "keydiff":
                assert {outcome.slots.unique().item() for outcome in outcomes} == {20.0}
    script, reference = task.scripts[0], same.scripts[0]
    if name != "copy:32":  # whose lists are as many tokens, not as many words
        for theirs, ours in zip(script.segments, reference.segments, strict=True):
            assert (
                letters.decode(theirs.ids).split()
                == build_tokenizer().decode(ours.ids, skip_special_tokens=True).split()
            )
            for span, own in zip(theirs.answers, ours.answers, strict=True):
                answer = letters.decode(theirs.ids[span.start : span.stop]).split()
                assert answer == build_tokenizer().decode(ours.ids[own.start : own.stop]).split()
