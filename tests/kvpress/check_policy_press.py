"""PolicyPress inside kvpress keeps what kv_gym's own rules keep of the plain model's cache."""

import pytest
import torch
from kvpress import AdaKVPress, DecodingPress, KeyDiffPress, KnormPress, TOVAPress
from tiny_models import FAMILIES, KV_HEADS, LAYERS, attended, prefilled, prompt, slow_attention, tiny
from transformers import DynamicCache

from kv_gym import CacheView, list_policies, make_policy
from kv_gym.budgets import select
from kv_gym.errors import UserError
from kv_gym.interop import PolicyPress
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies import StatefulPolicy
from kv_gym.policies.scorer import GroupedScorer, Scorer

N = 44
NAMED = ["h2o", "keydiff", "knorm", "snapkv", "streaming_llm", "tova"]
MORE = [name for name in list_policies() if name not in (*NAMED, "scorer") and not make_policy(name).repetition]
MORE = [name for name in MORE if not (make_policy(name).needs_future or make_policy(name).needs_hidden)]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture
def exported(model, tmp_path):
    """A folder with a random scorer for the model."""
    torch.manual_seed(3)
    network = GroupedScorer(LAYERS * KV_HEADS, 8, hidden=16)
    return Scorer(network, Fingerprint.of(model), (8, 64), protect=(2, 3)).save_pretrained(tmp_path / "policy")


def by_hand(policy, model, layer, keys, values, queries, budget):
    """The layer's view with queries and state worked out from the whole attention matrix."""
    scaling = model.model.layers[layer].self_attn.scaling
    view = CacheView.of(keys, values, budget, layer=layer, scaling=scaling)
    m = policy.needs_queries
    changes = {"queries": queries[:, :, N - m :] if m else None}
    if policy.needs_output:
        weight = model.model.layers[layer].self_attn.o_proj.weight.detach()
        changes["output"] = torch.stack([weight[:, 8 * head : 8 * head + 8].T for head in range(queries.shape[1])])
    if isinstance(policy, StatefulPolicy):
        paid = slow_attention(queries[0], keys[0], scaling)[None].float()
        changes["state"] = policy.observe(view, paid, policy.initial_state(view))
    return CacheView(**{**vars(view), **changes})


def positions_of(kept, every):
    """Where the rows `kept [kv_heads, k, d]` stand in `every [kv_heads, n, d]`."""
    found = [[(row - whole).abs().amax(-1) < 1e-9 for row in rows] for rows, whole in zip(kept, every, strict=True)]
    assert all(int(same.sum()) == 1 for rows in found for same in rows)
    return [[int(same.nonzero()) for same in rows] for rows in found]


def check_by_hand(model, policy):
    full = attended(model, prompt(N))
    pressed = prefilled(model, prompt(N), PolicyPress(0.5, policy))
    for layer, ((keys, values, queries), (fewer, their_values)) in enumerate(zip(full, pressed, strict=True)):
        view = by_hand(policy, model, layer, keys, values, queries, N // 2)
        wanted = select(policy, view, *policy.protection)[0]
        expected = [row.nonzero().flatten().tolist() for row in wanted]
        assert all(len(row) == N // 2 for row in expected)
        assert positions_of(fewer[0], keys[0]) == expected
        assert positions_of(their_values[0], values[0]) == expected


@pytest.mark.parametrize("name", [*NAMED, "exported", *MORE])
def test_keeps_the_tokens_of_a_view_made_by_hand(model, name, request):
    check_by_hand(model, make_policy(request.getfixturevalue("exported") if name == "exported" else name))


@pytest.mark.parametrize("name", ["h2o", "snapkv", "tova"])
def test_the_scaling_is_the_models_own(name):
    """As in Gemma, whose scaling does not follow from the head dimension."""
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.05
    check_by_hand(model, make_policy(name))


def test_protection_can_be_set(model):
    pressed = prefilled(model, prompt(N), PolicyPress(0.5, "knorm", sinks=5, recent=6))
    plain = prefilled(model, prompt(N))
    for (keys, _), (whole, _) in zip(pressed, plain, strict=True):
        for kept in positions_of(keys[0], whole[0]):
            assert kept[:5] == [0, 1, 2, 3, 4] and kept[-6:] == list(range(N - 6, N))


def test_ties_go_to_the_newer_token(model):
    keys = torch.ones(1, 2, 6, 8, dtype=torch.float64)
    values = torch.arange(6.0)[None, None, :, None].expand_as(keys)
    module = model.model.layers[0].self_attn
    kept, their_values = PolicyPress(0.5, "knorm").compress(module, torch.zeros(1, 6, 32), keys, values, None, {})
    assert kept.shape == (1, 2, 3, 8) and their_values[0, :, :, 0].tolist() == [[3, 4, 5], [3, 4, 5]]


def scores_of(press, model, ids):
    """A press's scores of each layer, asked while kvpress runs it."""
    asked = []
    score = press.score

    def listening(*arguments, **more):
        asked.append(score(*arguments, **more))
        return asked[-1]

    press.score = listening
    prefilled(model, ids, press)
    return asked


@pytest.mark.parametrize(("theirs", "ours"), [(KnormPress, "knorm"), (KeyDiffPress, "keydiff"), (TOVAPress, "tova")])
def test_scores_equal_those_of_kvpress(model, theirs, ours):
    expected = scores_of(theirs(0.5), model, prompt(N))
    found = scores_of(PolicyPress(0.5, ours), model, prompt(N))
    last = N - 1 if ours == "tova" else N  # kvpress always keeps the newest token, we score it as any other
    for layer in range(LAYERS):
        assert found[layer].dtype == torch.float32
        torch.testing.assert_close(found[layer][..., :last], expected[layer][..., :last].float(), rtol=1e-5, atol=1e-6)


def test_every_row_of_a_batch_is_compressed_for_itself(model):
    both = prompt(N, batch=2)
    together = prefilled(model, both, PolicyPress(0.5, "snapkv"))
    for row in range(2):
        alone = prefilled(model, both[row : row + 1], PolicyPress(0.5, "snapkv"))
        for (keys, _), (single, _) in zip(together, alone, strict=True):
            torch.testing.assert_close(keys[row : row + 1], single)


def test_ratio_zero_leaves_the_cache_alone(model):
    for (keys, _), (whole, _) in zip(
        prefilled(model, prompt(N), PolicyPress(0.0)), prefilled(model, prompt(N)), strict=True
    ):
        assert torch.equal(keys, whole)


def test_a_wrapper_of_kvpress_spares_protected_tokens(model):
    prefilled(model, prompt(N), AdaKVPress(PolicyPress(0.5, "knorm", sinks=3, recent=3)))
    for layer in model.model.layers:
        _, _, dropped = layer.self_attn.masked_key_indices
        assert len(dropped) == KV_HEADS * N // 2
        assert int(dropped.min()) >= 3 and int(dropped.max()) < N - 3


def test_decoding_presses_are_refused(model):
    cache = DynamicCache()
    with torch.no_grad(), DecodingPress(PolicyPress(policy="tova"), compression_interval=2, target_size=8)(model):
        model(prompt(16), past_key_values=cache)
        with pytest.raises(UserError, match="EvictingCache evicts while decoding"):
            for _ in range(4):
                model(prompt(1), past_key_values=cache)


def test_padded_rows_are_refused(model):
    mask = torch.ones(2, N, dtype=torch.long)
    mask[0, :5] = 0
    with pytest.raises(UserError, match="padded rows"):
        prefilled(model, prompt(N, batch=2), PolicyPress(0.5, "knorm"), attention_mask=mask)
    prefilled(model, prompt(N, batch=2), PolicyPress(0.5, "knorm"), attention_mask=torch.ones(2, N, dtype=torch.long))


def test_eager_attention_is_served(model):
    sdpa = prefilled(model, prompt(N), PolicyPress(0.5, "h2o"))
    model.set_attn_implementation("eager")
    try:
        eager = prefilled(model, prompt(N), PolicyPress(0.5, "h2o"))
    finally:
        model.set_attn_implementation("sdpa")
    for (keys, _), (theirs, _) in zip(sdpa, eager, strict=True):
        torch.testing.assert_close(keys, theirs, rtol=1e-3, atol=1e-4)  # eager softmax is computed in float32


def test_what_cannot_be_pressed_is_refused_in_one_sentence(model, exported):
    with pytest.raises(UserError, match="is an oracle"):
        PolicyPress(0.5, "oracle")
    with pytest.raises(UserError, match="read again"):
        PolicyPress(0.5, "kvzip")
    with pytest.raises(UserError, match="did you mean 'keydiff'"):
        PolicyPress(0.5, "keydif")
    with pytest.raises(UserError, match="expected numbers from 0"):
        PolicyPress(0.5, "knorm", sinks=-1)
    other = tiny("qwen3" if model.config.model_type == "llama" else "llama")
    with pytest.raises(UserError, match="use the model it was made for"):
        prefilled(other, prompt(N), PolicyPress(0.5, exported))
