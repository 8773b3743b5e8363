"""The Triton kernel over uneven heads, in Triton's interpreter on the CPU, against softmax written out.

`test_ragged_kernel.py` runs this file in a process of its own: Triton decides when it is imported whether to interpret.
"""

import pytest
import torch
from less_reference import state_for
from live_models import feed, tiny, tokens

from kv_gym import EvictingCache
from kv_gym.live import ragged_backend, ragged_kernel
from kv_gym.live.tiers.quantiser import dequantise, quantise


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks so small that short rows have some."""
    monkeypatch.setattr(ragged_kernel, "MIN_CHUNK", 64)


def slow(query, keys, values, start, length, scaling):
    """Output and log-sum-exp of one row's queries `[group, d]`, in float64."""
    keys, values = (part[start : start + length].double() for part in (keys, values))
    products = query.double() @ keys.T * scaling
    return products.softmax(-1) @ values, products.logsumexp(-1)


@pytest.mark.parametrize(
    ("lengths", "group", "d", "dtype", "bits"),
    [
        ([0, 1, 63, 64, 65, 129], 3, 64, "float32", 0),  # around the borders of tiles and chunks; an empty head
        ([20, 300], 8, 80, "float32", 0),  # 1 : 15, and a width that is no power of two
        ([40], 1, 96, "float16", 0),
        ([0, 70], 4, 128, "bfloat16", 0),
        ([33], 2, 256, "bfloat16", 0),
        ([20, 0, 70], 2, 64, "float32", 2),
        ([70], 4, 80, "float32", 4),
        ([33], 1, 128, "float16", 8),
    ],
)
def test_the_kernel_equals_softmax_and_reads_no_slack(lengths, group, d, dtype, bits):
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    capacities = [length + 5 for length in lengths]
    starts = torch.tensor([0, *capacities]).cumsum(0)[:-1]
    keys, values = (torch.randn(sum(capacities), d).to(dtype) for _ in range(2))
    query = torch.randn(len(lengths), group, d).to(dtype)
    slack = torch.ones(len(keys), dtype=torch.bool)
    for start, length in zip(starts, lengths, strict=True):
        slack[start : start + length] = False
    stored, grids = [keys.clone(), values.clone()], []
    if bits:
        stored, grids = zip(*(quantise(numbers, bits, 16) for numbers in (keys, values)), strict=True)
        keys, values = (dequantise(*pair, bits, torch.float32) for pair in zip(stored, grids, strict=True))
    for tensor in grids or stored:
        tensor[slack] = float("nan")
    out, lse = ragged_kernel.attend_rows(
        query, *stored, starts, torch.tensor(lengths).int(), 0.3, max(capacities), bits, *grids
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if not length:
            assert not out[row].any() and bool((lse[row] == -torch.inf).all())
            continue
        expected, expected_lse = slow(query[row], keys, values, start, length, 0.3)
        torch.testing.assert_close(out[row].double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(lse[row].double(), expected_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("h2o", {"allocation": "global:zscore"}),
        ("keydiff", {"evicted": "bits:4:balanced"}),
        ("keydiff", {"evicted": "bits:2", "allocation": "global:raw", "trigger": "every:2"}),
        ("keydiff", {"evicted": state_for, "allocation": "global:raw", "trigger": "every:2"}),
    ],
)
@torch.no_grad()
def test_a_cache_decodes_alike_through_the_kernel(policy, settings):
    model = tiny("llama").float()
    if settings.get("evicted") is state_for:
        settings = settings | {"evicted": state_for(model)}
    prompt, answer = tokens(1, 24), tokens(1, 3, seed=1)
    logits = {}
    for backend in ("kernel", "per_head"):
        with EvictingCache(model, policy, 0.3, **settings) as cache, ragged_backend(backend):
            feed(model, prompt, cache)
            logits[backend] = torch.cat([model(token, past_key_values=cache).logits for token in answer.split(1, 1)], 1)
    torch.testing.assert_close(logits["kernel"], logits["per_head"], rtol=0, atol=2e-5)


def test_the_kernel_has_shapes_on_the_meta_device():
    with torch.device("meta"):
        query, slots = torch.empty(6, 4, 128, dtype=torch.bfloat16), torch.empty(99, 128, dtype=torch.bfloat16)
        rows = torch.empty(6, dtype=torch.int64)
    out, lse = ragged_kernel.attend_rows(query, slots, slots, rows, rows, 0.1, 40)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((6, 4, 128), torch.bfloat16, (6, 4), torch.float32)
