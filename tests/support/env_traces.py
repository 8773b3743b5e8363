"""Small contexts made by hand, for the tests of the environment."""

import numpy as np

from kv_gym.traces.sequence import Continuation, Sequence


def context(future, queries=None, block=1, keys=None, values=None, name="c"):
    """A context of which only the attention matters.

    future: `[L, H, n, K]` attention summed over the queries of each block (or a list of such, one per continuation).
    """
    futures = [np.asarray(f, np.float32) for f in (future if isinstance(future, list) else [future])]
    layers, heads, n, _ = futures[0].shape
    shape = (layers, heads, n, 2)
    return Sequence(
        id=name,
        tokens=np.arange(n) + 10,
        keys=np.ones(shape, np.float32) if keys is None else np.asarray(keys, np.float32),
        values=np.ones(shape, np.float32) if values is None else np.asarray(values, np.float32),
        queries=np.zeros((layers, heads, 1, 2), np.float32),
        continuations=tuple(
            Continuation(
                np.zeros(f.shape[3] * block if queries is None else queries, int), np.stack((f, f / 2), -1), block
            )
            for f in futures
        ),
        layers=tuple(range(layers)),
        scaling=(1.0,) * layers,
    )


def one_head(utility):
    """A context of one head whose tokens have these utilities."""
    return context(np.asarray(utility)[None, None, :, None])


def random_contexts(lengths=(16, 9, 12), layers=2, heads=2, dim=4, continuations=2, queries=7, block=3, seed=0):
    """Contexts full of random numbers."""
    rng = np.random.default_rng(seed)
    made = []
    for i, n in enumerate(lengths):
        shape, blocks = (layers, heads, n), -(-queries // block)
        made.append(
            Sequence(
                id=f"random-{i}",
                tokens=rng.integers(0, 100, n),
                keys=rng.normal(size=(*shape, dim)).astype(np.float32),
                values=rng.normal(size=(*shape, dim)).astype(np.float32),
                queries=np.zeros((layers, heads, 1, dim), np.float32),
                continuations=tuple(
                    Continuation(rng.integers(0, 9, queries), rng.random((*shape, blocks, 2)).astype(np.float32), block)
                    for _ in range(continuations)
                ),
                layers=tuple(range(layers)),
                scaling=(1.0,) * layers,
            )
        )
    return made
