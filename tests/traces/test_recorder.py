"""What is recorded equals eager attention over context and continuation, for every supported family of models."""

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from traced_models import CONTEXT, FAMILIES, SIZES, VOCABULARY, some_prompt, tiny_model

from kv_gym.errors import UserError
from kv_gym.traces import Prompt, record, record_sequence


@torch.no_grad()
def eager_attention(model, ids, layers):
    """Weights `[L, Hq, n, n]` of the model's own slow attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.stack([attentions[layer][0] for layer in layers]).double()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_record_equals_eager_attention(family, implementation):
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    prompt = some_prompt()
    got = record_sequence(model, prompt, window=9, blocks=2)
    assert got.layers == ((1,) if family == "gemma3" else (0, 1, 2))
    kv_heads = got.keys.shape[1]
    over_context = eager_attention(model, prompt.context_ids, got.layers)

    mass = over_context.sum(2).unflatten(1, (kv_heads, -1)).mean(2)
    torch.testing.assert_close(torch.from_numpy(got.stats["h2o"]["mass"]).double(), mass, atol=1e-5, rtol=1e-5)
    for i in range(len(got.layers)):
        torch.testing.assert_close(got.view(i).attention()[0].double(), over_context[i, :, -9:], atol=1e-5, rtol=0)

    for ids, continuation in zip(prompt.continuation_ids, got.continuations, strict=True):
        weights = eager_attention(model, prompt.context_ids + ids, got.layers)[:, :, CONTEXT:, :CONTEXT]
        assert weights.amax() > 5 / CONTEXT, "attention so flat would hide an error"
        grouped = weights.unflatten(1, (kv_heads, -1))  # [L, H, g, c, n]
        starts = range(0, len(ids), continuation.block)
        assert continuation.future.shape[3] == len(starts)
        for k, start in enumerate(starts):
            rows = slice(start, start + continuation.block)
            expected = torch.stack([grouped[:, :, :, rows].amax(2).sum(2), grouped[:, :, :, rows].mean(2).sum(2)], -1)
            recorded = torch.from_numpy(continuation.future[:, :, :, k]).double()
            torch.testing.assert_close(recorded, expected, atol=1e-5, rtol=0)
    assert [c.block for c in got.continuations] == [10, 10, 3, 20]
    utility = np.mean([c.future.sum(3) / len(c.tokens) for c in got.continuations], axis=0)
    np.testing.assert_allclose(got.utility("mean"), utility[..., 1], atol=1e-6)


@torch.no_grad()
def test_keys_and_values_are_those_of_a_plain_cache_and_the_model_is_left_as_it_was():
    model = tiny_model("qwen3")
    prompt = some_prompt()
    before = model(torch.tensor([prompt.context_ids])).logits
    got = record_sequence(model.train(), prompt)
    assert model.training
    plain = model.eval()(torch.tensor([prompt.context_ids]), use_cache=True)
    np.testing.assert_array_equal(got.keys, torch.stack([layer.keys[0] for layer in plain.past_key_values.layers]))
    np.testing.assert_array_equal(got.values, torch.stack([layer.values[0] for layer in plain.past_key_values.layers]))
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(plain.logits, before)


def test_continuations_do_not_see_each_other():
    model = tiny_model("gemma3")  # its sliding layers must be rolled back as well
    prompt = some_prompt((7, 30, 7))
    together = record_sequence(model, prompt)
    for i, ids in enumerate(prompt.continuation_ids):
        alone = record_sequence(model, Prompt("p", prompt.context_ids, [ids]))
        np.testing.assert_allclose(together.continuations[i].future, alone.continuations[0].future, atol=1e-6)


def test_bfloat16_attention_is_close_to_float32():
    model = tiny_model().bfloat16()
    got = record_sequence(model, some_prompt((16,)), window=4)
    exact = record_sequence(tiny_model(), some_prompt((16,)), window=4)
    assert got.dtype == "bfloat16"
    assert got.keys.dtype == np.float32
    assert torch.equal(torch.from_numpy(got.keys), torch.from_numpy(got.keys).bfloat16().float())
    assert np.abs(got.utility("mean").sum(-1) - exact.utility("mean").sum(-1)).max() < 0.05


def test_more_continuations_than_fit_into_a_batch(monkeypatch):
    from kv_gym.traces import recorder as recording

    prompt = some_prompt((5,) * 7)
    whole = record_sequence(tiny_model(), prompt)
    monkeypatch.setattr(recording, "_BATCHED_TOKENS", 2 * (CONTEXT + 5))
    halves = record_sequence(tiny_model(), prompt)
    for a, b in zip(whole.continuations, halves.continuations, strict=True):
        np.testing.assert_allclose(a.future, b.future, atol=1e-6)
    assert len({c.future.tobytes() for c in whole.continuations}) == 7


def latent():
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=8, n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=1,
            moe_intermediate_size=16, first_k_dense_replace=1))  # fmt: skip


def linear():
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    )


def hybrid():
    return transformers.Qwen3NextForCausalLM(
        transformers.Qwen3NextConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=2, num_experts_per_tok=1,
            moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_value_heads=2,
            linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"]))  # fmt: skip


def capped():
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**{**SIZES, "layer_types": ["full_attention"] * 3}, head_dim=8)
    )


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (latent, "latent attention"),
        (linear, "attention interface"),
        (hybrid, "linear_attention|attention interface"),
        (capped, "softcap"),
    ],
)
def test_unsupported_models_are_refused_and_leave_nothing(make, reason, tmp_path):
    model = make().eval()
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match=reason):
        record(model, [some_prompt()], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"prompts": [{"context_ids": [1, 2], "continuation_ids": [[3]]}]}, "the prompts hold dict; expected Prompt"),
        ({"prompts": "prompts.jsonl"}, "the prompts hold str; expected Prompt objects"),
        ({"window": 1.5}, "window is 1.5; expected a whole number from 0"),
        ({"slots": 16.5}, "slots is 16.5; expected a whole number"),
        ({"blocks": 0}, "blocks is 0; expected a whole number from 1"),
    ],
)
def test_settings_that_are_none_leave_nothing(settings, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        record(tiny_model(), **({"prompts": [some_prompt()], "out": tmp_path / "out", "progress": False} | settings))
    assert not (tmp_path / "out").exists()


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        self.largest = max([self.largest, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return out


def test_nothing_of_context_squared_is_made():
    model = tiny_model(num_hidden_layers=1, max_position_embeddings=4096)
    largest = []
    for context in (1024, 2048):
        with LargestTensor() as watched:
            record_sequence(model, some_prompt((64,), context=context))
        largest.append(watched.largest)
    assert largest[0] >= 4 * 128 * 1024, "the attention of one block of queries was not seen"
    assert largest[1] <= 2.01 * largest[0] < 1024 * 1024 * 4
