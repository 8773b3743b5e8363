"""Paging with one-bit predictions: golden rows, equality with the optimum, and the proven bounds."""

import numpy as np
import pytest

from kv_gym.pages import RequestTrace, simulate
from kv_gym.pages.predictions import discard_bits, phase_bits, phases, predicted_bits, prediction_errors

# sequence: misses of the optimum, discard bits, misses of Flush with them, with zeros, with ones; phases, phase bits
GOLDEN = {
    "abcabcab": (5, "01010100", 5, 8, 8, "00112233", "01010111"),
    "abcabdac": (6, "01101100", 6, 8, 8, "00112233", "01111111"),
    "abacadab": (5, "01010100", 5, 7, 8, "00011223", "01010111"),
}


def misses(trace, policy, capacity):
    return len(trace) - simulate(trace, policy, capacity).hits


def text(bits):
    return "".join(str(int(bit)) for bit in bits)


@pytest.mark.parametrize("sequence", GOLDEN)
def test_golden_rows(sequence):
    trace = RequestTrace.from_keys(list(sequence), sequence)
    best, bits, flush, zeros, ones, phase, idle = GOLDEN[sequence]
    assert misses(trace, "belady", 2) == best
    assert text(discard_bits(trace, 2)) == bits and text(phases(trace, 2)) == phase
    assert text(phase_bits(trace, 2)) == idle
    assert misses(trace, "flush", 2) == misses(trace, "mark0", 2) == flush
    assert misses(trace, "flush:predictor=zeros", 2) == zeros and misses(trace, "flush:predictor=ones", 2) == ones


def sequences(count, seed):
    random = np.random.default_rng(seed)
    for _ in range(count):
        capacity = int(random.integers(2, 6))
        pages = random.integers(0, capacity + int(random.integers(1, 5)), int(random.integers(10, 60)))
        yield RequestTrace.from_keys(pages.tolist()), capacity, float(random.choice([0.05, 0.2, 0.5, 1.0]))


@pytest.mark.parametrize(("count", "seed"), [(300, 1), pytest.param(1500, 0, marks=pytest.mark.slow)])
def test_flush_meets_its_bound_on_random_sequences(count, seed):
    """(1, k - 1, 1): misses are at most OPT + (k - 1) times wrong zeros + wrong ones; perfect bits give OPT."""
    for trace, capacity, flip in sequences(count, seed):
        best = misses(trace, "belady", capacity)
        assert misses(trace, "flush", capacity) == misses(trace, "mark0", capacity) == best
        bits = discard_bits(trace, capacity)
        zeros, ones = prediction_errors(bits, predicted_bits(bits, trace, capacity, "oracle", flip))
        assert misses(trace, f"flush:flip={flip}", capacity) <= best + (capacity - 1) * zeros + ones


@pytest.mark.parametrize(
    ("policy", "bits", "factors"), [("mark0", discard_bits, (1, 2, 1)), ("mark_and_predict", phase_bits, (2, 1, 1))]
)
def test_randomised_ones_meet_their_bounds_in_the_mean_over_seeds(policy, bits, factors):
    alpha, beta, gamma = factors
    for trace, capacity, flip in sequences(25, 1):
        harmonic = sum(1 / j for j in range(1, capacity + 1))
        best, found, bound = misses(trace, "belady", capacity), [], []
        true = bits(trace, capacity)
        for seed in range(40):
            zeros, ones = prediction_errors(true, predicted_bits(true, trace, capacity, "oracle", flip, seed))
            found.append(misses(trace, f"{policy}:flip={flip}:seed={seed}", capacity))
            bound.append(alpha * best + beta * harmonic * zeros + gamma * ones)
        assert np.mean(found) <= np.mean(bound) + 1e-9


def test_mark_and_predict_with_constant_bits_is_random_marking():
    """At most 2 H_k times the optimum, whatever the predictor says."""
    for trace, capacity, _ in sequences(20, 2):
        harmonic = sum(1 / j for j in range(1, capacity + 1))
        best = misses(trace, "belady", capacity)
        for predictor in ("zeros", "ones"):
            runs = [misses(trace, f"mark_and_predict:predictor={predictor}:seed={s}", capacity) for s in range(30)]
            assert np.mean(runs) <= 2 * harmonic * best


def test_learned_bits_read_only_the_first_part():
    random = np.random.default_rng(0)
    trace = RequestTrace.from_keys(random.zipf(1.3, 2000).clip(max=100).tolist())
    bits = discard_bits(trace, 20)
    changed = bits.copy()
    changed[600:] = ~changed[600:]
    told = predicted_bits(bits, trace, 20, "learned")
    assert (told == predicted_bits(changed, trace, 20, "learned")).all()
    assert (told == bits)[600:].mean() > max(bits[600:].mean(), 1 - bits[600:].mean()) - 0.02
