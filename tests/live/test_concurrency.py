"""Several caches of one model at once, in threads and in turns, and forwards that fail: bit-equal, and no hook left."""

import threading

import pytest
import torch
from live_models import feed, tiny, tokens

from kv_gym import EvictingCache

KINDS = (
    {"policy": "h2o", "budget": 8, "trigger": "every:2"},
    {"policy": "snapkv", "budget": 0.25},
    {"policy": "keydiff", "budget": 0.5, "allocation": "global:softmax", "trigger": "every:3"},
    {"policy": "knorm", "budget": 6, "evicted": "bits:4", "trigger": "block:4"},
    {"policy": "h2o", "budget": 0.25, "offload": True},
)
SIZES = [20, 3, 1, 1, 5, 1, 1, 1]


def pieces(number):
    """Tokens `[rows, n]`, forward by forward; every cache has rows and tokens of its own."""
    return torch.split(tokens(1 + number % 3, sum(SIZES), seed=number), SIZES, 1)


def hooks(model):
    """Hooks and wrapped forwards of all modules; the attention function that is not the model's own."""
    found = [
        (name, kind)
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "forward")
        if vars(module).get(kind)
    ]
    attention = model.config._attn_implementation
    return found + [attention] * (attention != "sdpa")


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def alone(model):
    """Logits of every forward of every cache, one cache after the other."""
    found = []
    for number, settings in enumerate(KINDS):
        with EvictingCache(model, **settings) as cache:
            found.append([feed(model, piece, cache) for piece in pieces(number)])
    assert not hooks(model)
    return found


def assert_same(found, expected):
    for got, wanted in zip(found, expected, strict=True):
        assert len(got) == len(wanted) and all(map(torch.equal, got, wanted))


def test_caches_in_threads(model, alone):
    found, start = [[] for _ in KINDS], threading.Barrier(len(KINDS))

    def work(number):
        with EvictingCache(model, **KINDS[number]) as cache:
            start.wait()
            found[number] += [feed(model, piece, cache) for piece in pieces(number)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(KINDS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(found, alone)
    assert not hooks(model)


def test_caches_in_turns(model, alone):
    caches = [EvictingCache(model, **settings) for settings in KINDS]
    found = [[] for _ in KINDS]
    for each in zip(*map(pieces, range(len(KINDS))), strict=True):
        for number, piece in enumerate(each):
            found[number].append(feed(model, piece, caches[number]))
    for cache in caches:
        cache.detach()
    assert_same(found, alone)
    assert not hooks(model)


def test_forwards_that_fail_beside_others(model, alone):
    """One cache's forwards raise in the middle, in a thread of their own, again and again; nobody else notices."""
    found, stop = [], threading.Event()
    own = threading.local()

    def failing(module, arguments):
        if getattr(own, "fails", False):
            raise ZeroDivisionError("in the middle of a forward")

    def disturb():
        own.fails = True
        while not stop.is_set():
            cache = EvictingCache(model, "h2o", 8)
            with pytest.raises(ZeroDivisionError):
                feed(model, tokens(1, 12), cache)
            del cache

    handle = model.model.layers[1].mlp.register_forward_pre_hook(failing)
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for number, settings in enumerate(KINDS):
            with EvictingCache(model, **settings) as cache:
                found.append([feed(model, piece, cache) for piece in pieces(number)])
    finally:
        stop.set()
        thread.join()
        handle.remove()
    assert_same(found, alone)
    assert not hooks(model)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("part", ["self_attn", "mlp"])
def test_a_fork_made_before_a_failure_goes_on_as_if_nothing_had_happened(model, alone, layer, part):
    first, *rest = pieces(0)
    cache = EvictingCache(model, **KINDS[0])
    found = [feed(model, first, cache)]
    fork = cache.fork()

    def failing(module, arguments, *more):
        raise ZeroDivisionError("in the middle of a forward")

    handle = getattr(model.model.layers[layer], part).register_forward_hook(failing)
    with pytest.raises(ZeroDivisionError):
        feed(model, rest[0], cache)
    handle.remove()
    found += [feed(model, piece, fork) for piece in rest]
    fork.detach()
    assert_same([found], alone[:1])
    assert not hooks(model)
