"""Positions inside the cache: against a model that read nothing but what was kept, and against rotations by hand."""

import pytest
import torch
from live_models import FULL, SIZES, feed, tiny, tokens
from masked_reference import MaskedReference
from transformers import PhiConfig, PhiForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from kv_gym import EvictingCache, make_policy
from kv_gym.errors import UserError
from kv_gym.live import Guard, PolicyGroup
from kv_gym.live.rope_shift import RopeShift

GEMMA = {"layer_types": ["full_attention"], "sliding_window": 8}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FULL, "gemma3"])
def test_one_layer_decodes_as_if_the_kept_tokens_were_all(family, attention):
    # keys and values of a first layer depend on their own token alone, so the text without the rest is the reference
    model = tiny(family, attention, num_hidden_layers=1, **(GEMMA if family == "gemma3" else {}))
    ids = tokens(2, 40)
    with EvictingCache(model, "streaming_llm_reindexed", 8, trigger="every:1") as cache:
        feed(model, ids[:, :30], cache)
        for end in range(31, 41):
            logits = feed(model, ids[:, end - 1 : end], cache)
            kept = [*range(4), *range(end - 5, end)]  # the newest token saw one more than stays
            with torch.no_grad():
                alone = model(ids[:, kept]).logits[:, -1:]
            torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
    with EvictingCache(model, "streaming_llm", 8, trigger="every:1") as cache:
        feed(model, ids[:, :39], cache)
        assert not torch.allclose(feed(model, ids[:, 39:], cache), alone, atol=1e-2)


class CountedReference(MaskedReference):
    """A llama that sees of each KV head what was not hidden, with positions counted there from zero."""

    def _attention(self, module, query, key, value, mask, scaling=None, **rest):
        layer, (batch, query_heads, new, d), n = module.layer_idx, query.shape, key.shape[2]
        group = query_heads // key.shape[1]
        angles = 1e4 ** (-torch.arange(0, d, 2).double() / d)

        def turned(vectors, by):
            pairs = torch.complex(vectors[..., : d // 2].double(), vectors[..., d // 2 :].double())
            pairs = pairs * torch.polar(torch.ones(1).double(), by[:, None] * angles)
            return torch.cat((pairs.real, pairs.imag), -1)

        output = torch.zeros(batch, query_heads, new, d, dtype=torch.double)
        for row in range(batch):
            for head in range(query_heads):
                hidden = self.hidden.get(layer)
                shown = torch.arange(n)
                if hidden is not None:
                    shown = shown[~torch.cat((hidden[row, head // group], torch.zeros(n - hidden.shape[2]).bool()))]
                for i in range(new):
                    seen = shown[shown <= n - new + i]
                    own = torch.arange(len(seen))
                    keys = turned(key[row, head // group, seen], (own - seen).double())
                    asking = turned(query[row, head, i : i + 1], torch.tensor([len(seen) - 1.0 - (n - new + i)]))
                    weights = (asking @ keys.T * d**-0.5).softmax(-1)
                    output[row, head, i] = (weights @ value[row, head // group, seen].double())[0]
        self.keys[layer], self.values[layer] = key, value
        return output.transpose(1, 2).to(query.dtype), None


@pytest.mark.parametrize("allocation", ["uniform", "global:softmax"])
@pytest.mark.parametrize("policy", ["knorm", "streaming_llm", "snapkv"])
def test_every_head_counts_its_own_tokens(policy, allocation):
    model, ids = tiny(), tokens(2, 45)
    reference = CountedReference(model)
    with EvictingCache(model, policy, 10, allocation, "every:5", positions="cache") as cache:
        for piece in torch.split(ids, [30, *[1] * 12, 3], 1):
            expected = reference(piece)
            torch.testing.assert_close(feed(model, piece, cache), expected, rtol=1e-5, atol=1e-5)
            for layer in cache.evicting_layers:
                reference.hide(layer, cache.kept_positions(layer))


def test_forks_rows_and_files_keep_positions(tmp_path):
    model, ids = tiny(), tokens(2, 40)
    with EvictingCache(model, "streaming_llm_reindexed", 8, trigger="every:4") as cache:
        feed(model, ids[:, :32], cache)
        saved = cache.save(tmp_path / "context.safetensors")
        fork, plain = cache.fork(), cache.fork(positions="original")
        fork.batch_select_indices(torch.tensor([1]))
        expected = feed(model, ids[:, 32:33], cache)
        torch.testing.assert_close(feed(model, ids[1:, 32:33], fork), expected[1:])
        assert not torch.allclose(feed(model, ids[:, 32:33], plain), expected, atol=1e-2)
        with EvictingCache.load(saved, model) as loaded:
            assert torch.equal(feed(model, ids[:, 32:33], loaded), expected)
        for each in (fork, plain):
            each.detach()


def test_a_fork_has_the_positions_of_its_policy():
    model, ids = tiny(), tokens(1, 30)
    names = ("streaming_llm", "streaming_llm_reindexed")
    logits = []
    with EvictingCache(model, PolicyGroup(tuple(map(make_policy, names))), 1.0) as cache:
        feed(model, ids, cache)
        for name in names:
            with cache.fork(make_policy(name), 8) as fork, EvictingCache(model, name, 8) as direct:
                fork.compress()
                feed(model, ids, direct)
                logits.append(feed(model, ids[:, :1], fork))
                torch.testing.assert_close(logits[-1], feed(model, ids[:, :1], direct))
    assert not torch.allclose(*logits, atol=1e-2)


def test_padded_rows_count_their_own_tokens():
    model, ids = tiny(), tokens(2, 30)
    mask = torch.ones(2, 31, dtype=torch.int64)
    mask[1, :11] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    more = tokens(2, 1, seed=5)
    with EvictingCache(model, "streaming_llm_reindexed", "1/2") as cache, torch.no_grad():
        for part, new in ((slice(0, 30), ids), (slice(30, 31), more)):
            inputs = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            logits = model(new, past_key_values=cache, **inputs).logits
    with EvictingCache(model, "streaming_llm_reindexed", "1/2") as alone:
        feed(model, ids[1:, 11:], alone)
        torch.testing.assert_close(feed(model, more[1:], alone), logits[1:])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"positions": "middle"}, "expected 'original' or 'cache'"),
        ({"positions": "cache", "evicted": "bits:4"}, "choose one of the two"),
        ({"positions": "cache", "evicted": "merge"}, "choose one of the two"),
        ({"positions": "cache", "offload": True}, "choose one of the two"),
        ({"positions": "cache", "guard": Guard("missing", 0.5)}, "choose one of the two"),
    ],
)
def test_what_does_not_fit_is_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        EvictingCache(tiny(), "knorm", 8, **settings)


def test_angles_that_change_with_the_length_are_refused():
    model = tiny(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UserError, match="do not add up"):
        EvictingCache(model, "knorm", 8, positions="cache")


def test_a_model_that_rotates_a_part_of_each_key():
    config = PhiConfig(**SIZES, num_key_value_heads=2, partial_rotary_factor=0.5)
    torch.manual_seed(0)
    model, ids = PhiForCausalLM(config).double().eval(), tokens(1, 20)
    with EvictingCache(model, "knorm", 30, positions="cache") as cache:
        feed(model, ids[:, :19], cache)
        torch.testing.assert_close(feed(model, ids[:, 19:], cache)[:, -1], model(ids).logits[:, -1])
    turned = RopeShift(model).rotate(torch.eye(8).double()[None, None], torch.full((1, 1, 8), 3))
    assert torch.equal(turned[..., 4:], torch.eye(8).double()[None, None, :, 4:])


def test_a_layer_without_positions_is_refused():
    """SmolLM3 rotates no keys in some layers, though the model has a rotary embedding."""
    config = SmolLM3Config(**SIZES, num_key_value_heads=2, no_rope_layers=[1, 0, 1], use_sliding_window=False)
    model = SmolLM3ForCausalLM(config).eval()
    with pytest.raises(UserError, match="layer 1 of SmolLM3ForCausalLM does not rotate its keys"):
        EvictingCache(model, "knorm", 8, positions="cache")
    EvictingCache(model, "knorm", 8).detach()
