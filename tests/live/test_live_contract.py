"""What every policy keeps to in a live cache: a fork, reordered beams and a reset cache go on as a fresh one would."""

import pytest
import torch
from live_models import LIVE, feed, tiny, tokens

from kv_gym import EvictingCache

PIECES = [tokens(3, size, seed=size) for size in (20, 1, 5, 1)]
LATER = [tokens(3, 4, seed=40), tokens(3, 1, seed=41)]


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3")


def begun(model, name, rows):
    """A cache that has read the first pieces in these rows, evicting on the way."""
    cache = EvictingCache(model, name, 9, trigger="every:3", recent=2)
    for piece in PIECES:
        feed(model, piece[rows], cache)
    return cache


def ended(model, cache, rows):
    """What the later pieces give, and what is kept after them."""
    logits = [feed(model, piece[rows], cache) for piece in LATER]
    return *logits, *(cache.kept_positions(layer) for layer in cache.evicting_layers)


@pytest.mark.parametrize("name", LIVE)
def test_forks_beams_and_reset_equal_a_fresh_cache(model, name):
    everybody, beams = [0, 1, 2], [2, 0, 0]
    with begun(model, name, everybody) as cache, cache.fork() as fork, cache.fork() as searched:
        expected = ended(model, cache, everybody)
        assert all(torch.equal(one, other) for one, other in zip(ended(model, fork, everybody), expected, strict=True))

        searched.reorder_cache(torch.tensor(beams))
        with begun(model, name, beams) as fresh:
            for one, other in zip(ended(model, searched, beams), ended(model, fresh, beams), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)

        cache.reset()
        for piece in PIECES:
            feed(model, piece, cache)
        assert all(torch.equal(one, other) for one, other in zip(ended(model, cache, everybody), expected, strict=True))
