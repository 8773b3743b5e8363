"""Whose cache a trace or a policy belongs to: the same model is recognised, another one is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kv_gym.errors import UserError
from kv_gym.models.fingerprint import Fingerprint

SIZES = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def test_it_reads_the_sizes_of_a_model():
    fingerprint = Fingerprint.of(llama())
    assert (fingerprint.architecture, fingerprint.layers) == ("llama", (0, 1))
    assert (fingerprint.query_heads, fingerprint.kv_heads, fingerprint.head_dim) == (4, 2, 4)
    assert len(fingerprint.weights) == 64


def test_head_size_may_differ_from_hidden_size_over_heads():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))
    assert Fingerprint.of(model).head_dim == 8 and Fingerprint.of(model).architecture == "qwen3"


def test_layers_without_full_attention_are_left_out():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, layer_types=kinds, sliding_window=4, use_sliding_window=True))
    assert Fingerprint.of(model).layers == (1,)


def test_the_same_model_has_one_fingerprint_after_saving_and_in_both_precisions(tmp_path):
    model = llama()
    expected = Fingerprint.of(model)
    model.save_pretrained(tmp_path)
    assert Fingerprint.of(LlamaForCausalLM.from_pretrained(tmp_path)) == expected
    assert Fingerprint.of(LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)) == expected


def test_one_changed_weight_changes_it():
    model = llama()
    before = Fingerprint.of(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] += 1
    assert Fingerprint.of(model).weights != before.weights


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"num_key_value_heads": 4}, "kv_heads 2, and the trace has 4"),
        ({"hidden_size": 32}, "head_dim 4, and the trace has 8"),
        ({"num_attention_heads": 8, "head_dim": 4}, "query_heads 4, and the trace has 8"),
        ({"num_hidden_layers": 3}, r"layers \(0, 1\), and the trace has \(0, 1, 2\)"),
        ({"rope_theta": 500.0}, "rope .*10000.*500"),
        ({"seed": 1}, "weights hash [0-9a-f]{12}, and the trace has [0-9a-f]{12}"),
    ],
)
def test_another_model_is_refused_with_the_first_difference(other, difference):
    mine, theirs = Fingerprint.of(llama()), Fingerprint.of(llama(**other))
    with pytest.raises(UserError, match=f"the policy was made for a model with {difference}") as error:
        mine.refuse_other(theirs, "the policy", "the trace")
    assert "\n" not in str(error.value)


def test_the_same_model_is_not_refused():
    assert Fingerprint.of(llama()).refuse_other(Fingerprint.of(llama()), "the policy", "the trace") is None


def test_another_architecture_of_the_same_sizes_is_refused():
    mine = Fingerprint.of(llama())
    with pytest.raises(UserError, match="architecture llama, and the trace has mistral"):
        mine.refuse_other(replace(mine, architecture="mistral"), "the policy", "the trace")


def test_it_survives_json():
    fingerprint = Fingerprint.of(llama())
    assert Fingerprint.from_json(json.loads(json.dumps(fingerprint.to_json()))) == fingerprint


@pytest.mark.parametrize("damage", ["missing", "extra", "no layers", "layers no list"])
def test_a_damaged_fingerprint_is_refused(damage):
    data = Fingerprint.of(llama()).to_json()
    if damage == "missing":
        del data["weights"]
    elif damage == "extra":
        data["colour"] = "blue"
    elif damage == "no layers":
        del data["layers"]
    else:
        data["layers"] = 3
    with pytest.raises(UserError, match="the model fingerprint in the file is damaged"):
        Fingerprint.from_json(data)
