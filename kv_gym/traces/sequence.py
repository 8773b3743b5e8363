"""One recorded context: what was cached, and what later queries attended to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np
import torch

from kv_gym.budgets import Budget, uniform
from kv_gym.cache_view import CacheView, Future
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy
from kv_gym.traces import safe_hdf5


@dataclass(frozen=True)
class Continuation:
    """What one continuation's queries attended to.

    Attributes:
        tokens: `[c]` int64, its token ids; every one of them is a query.
        future: `[L, H, n, K, 2]` float32: attention received by each context slot, summed over the queries of each
            of K blocks; the last axis is the maximum and the mean over the KV head's query heads.
        block: queries per block; the last block holds the rest.
    """

    tokens: np.ndarray
    future: np.ndarray
    block: int

    @property
    def block_queries(self) -> np.ndarray:
        """Queries in each block, `[K]` int64."""
        starts = np.arange(self.future.shape[3]) * self.block
        return np.minimum(len(self.tokens) - starts, self.block)


@dataclass(frozen=True)
class StoredHiddenStates:
    """Hidden states `[layers, tokens, width]` that stay on the disk: they are larger than all else in a trace.

    ``stored[layer]`` reads one layer's `[tokens, width]` float32, checked, every time.

    Attributes:
        path: the shard.
        group: name of the HDF5 group that holds them, as ``hidden``.
        shape: recorded layers, tokens, width of the model.
    """

    path: Path
    group: str
    shape: tuple[int, int, int]

    @classmethod
    def in_context(cls, context: h5py.Group, layers: int, tokens: int) -> StoredHiddenStates:
        """Hidden states of an open shard, if their type and shape are right; no number of them is read.

        Raises:
            UserError: another type or shape, links, filters, or a size beyond the file.
        """
        data = safe_hdf5.open_dataset(context, "hidden", safe_hdf5.FLOAT_TYPES, (layers, tokens, None))
        return cls(Path(context.file.filename), context.name.lstrip("/"), data.shape)

    def __getitem__(self, layer: int) -> np.ndarray:
        """Hidden states of one recorded layer, `[tokens, width]` float32.

        Raises:
            UserError: the file is gone, damaged or another one, or a number is not finite.
        """
        with safe_hdf5.open_file(self.path) as file:
            group = safe_hdf5.open_group(file, self.group)
            data = safe_hdf5.open_dataset(group, "hidden", safe_hdf5.FLOAT_TYPES, self.shape)
            return safe_hdf5.read_float32(data, layer)


@dataclass(frozen=True)
class Sequence:
    """One recorded context; L recorded layers, H KV heads, Hq query heads, n slots, d head dimension.

    There is a slot for every token, unless a sample of them was recorded (`positions`).

    Attributes:
        id: unique in its trace set.
        tokens: `[T]` int64, token ids of the whole context; T = n unless slots were sampled.
        keys, values: `[L, H, n, d]` float32 (bfloat16 and float16 recordings are widened when read).
        queries: `[L, Hq, m, d]`, the last m context queries.
        stats: state of stateful policies after the context: policy name -> state name -> `[L, H, n, ...]`.
        continuations: at least one for utility; none for an unlabelled context.
        layers: the model's indices of the recorded layers.
        scaling: factor on query-key products, per recorded layer.
        task, split, text_hash: what the context is, `train` or `test`, and the hash of its document.
        dtype: the type the model computed in, such as ``float32``.
        hidden: `[L, n, D]` float32, what each recorded layer's attention received, or None; of a trace on the disk
            each layer is read when it is asked for, as ``hidden[layer]``.
        positions: `[n]` int64, positions of the slots' tokens where slots were sampled, ascending; None: all tokens.
    """

    id: str
    tokens: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    continuations: tuple[Continuation, ...]
    layers: tuple[int, ...]
    scaling: tuple[float, ...]
    stats: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    task: str = ""
    split: str = "train"
    text_hash: str = ""
    dtype: str = "float32"
    hidden: np.ndarray | StoredHiddenStates | None = None
    positions: np.ndarray | None = None

    @property
    def slots(self) -> int:
        """Recorded slots per head, n."""
        return self.keys.shape[2]

    @property
    def slot_positions(self) -> np.ndarray:
        """Position of each slot's token in the context, `[n]` int64."""
        return np.arange(self.slots) if self.positions is None else self.positions

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays; hidden states that stay on the disk take none."""
        arrays = [self.tokens, self.keys, self.values, self.queries]
        arrays += [continuation.future for continuation in self.continuations]
        arrays += [state for states in self.stats.values() for state in states.values()]
        arrays += [self.hidden] if isinstance(self.hidden, np.ndarray) else []
        return sum(array.nbytes for array in arrays)

    def refuse_sampled(self, reader: str) -> None:
        """Raise a UserError where slots were sampled, for a reader that needs all of them."""
        if self.positions is not None:
            raise UserError(
                f"{reader} needs every slot of a context, and {self.id} holds {self.slots} of {len(self.tokens)}: "
                "record without --slots"
            )

    @cached_property
    def _expected(self) -> dict[str, np.ndarray]:
        utilities = [(c.future.sum(3) / len(c.tokens)) for c in self.continuations]
        mean = np.mean(utilities, axis=0) if utilities else np.zeros((*self.keys.shape[:3], 2), np.float32)
        return {"max": mean[..., 0], "mean": mean[..., 1]}

    def utility(self, reduction: str = "max") -> np.ndarray:
        """Expected utility of every slot, `[L, H, n]` float32: equal-weight mean over the continuations."""
        return self._expected[reduction]

    def future(self, layer: int) -> Future:
        """The future of recorded layer number `layer`, as oracles see it."""
        blocks, weights, starts = [], [], []
        for continuation in self.continuations:
            queries = continuation.block_queries
            blocks.append(continuation.future[layer] / queries[:, None])
            weights.append(queries / queries.sum() / len(self.continuations))
            starts.append(np.arange(len(queries)) == 0)
        attention = torch.from_numpy(np.concatenate(blocks, axis=2))[None]
        weight = torch.from_numpy(np.concatenate(weights)).float()
        return Future(attention.float(), weight, torch.from_numpy(np.concatenate(starts)))

    def hidden_of(self, layer: int) -> np.ndarray:
        """What the attention of recorded layer number `layer` received, `[n, D]` float32.

        Raises:
            UserError: the context was recorded without hidden states.
        """
        if self.hidden is None:
            raise UserError(
                f"context {self.id} was recorded without hidden states: record with `kv-gym record --hidden`"
            )
        return self.hidden[layer]

    def view(
        self, layer: int, budget: Budget = 1.0, policy: str = "", oracle: bool = False, hidden: bool = False
    ) -> CacheView:
        """The CacheView of recorded layer number `layer` at the end of the context, batch 1.

        Args:
            layer: index into the recorded layers (not the model's own index).
            budget: slots per head or share of the recorded slots, allocated uniformly.
            policy: name of the stateful policy whose recorded state to load, or "".
            oracle: include the future.
            hidden: include the hidden states.

        Raises:
            UserError: the context was recorded without hidden states.
        """
        dtype = getattr(torch, self.dtype)  # values are exact in the recording's own type

        def as_tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array))[None]

        view = CacheView.of(
            as_tensor(self.keys[layer]).to(dtype),
            as_tensor(self.values[layer]).to(dtype),
            layer=self.layers[layer],
            scaling=self.scaling[layer],
            queries=as_tensor(self.queries[layer]).to(dtype),
            state={name: as_tensor(state[layer]) for name, state in self.stats.get(policy, {}).items()},
            hidden=as_tensor(self.hidden_of(layer)).to(dtype) if hidden else None,
            future=self.future(layer) if oracle and self.continuations else None,
        )
        slots = uniform(budget, view.seen, view.keys.shape[1])
        if self.positions is not None:
            positions = torch.from_numpy(self.positions).expand(view.positions.shape)
            view = replace(view, positions=positions, seen=torch.tensor([len(self.tokens)]))
        return view.with_budget(slots)

    def view_for(self, policy: Policy, layer: int, budget: Budget = 1.0) -> CacheView:
        """The view of recorded layer number `layer` with all that `policy` needs: its state, hidden states, the future.

        Raises:
            UserError: see :meth:`refuse_unrecorded`.
        """
        self.refuse_unrecorded(policy)
        return self.view(layer, budget, policy.statistics, policy.needs_future, policy.needs_hidden)

    def refuse_unrecorded(self, policy: Policy) -> None:
        """Raise a UserError where too few queries, no statistics or no hidden states were recorded for a policy."""
        if policy.needs_queries:
            self.refuse_sampled(f"policy {policy.name!r} reads the attention of the last queries, so that it")
        if policy.needs_queries > self.queries.shape[2]:
            raise UserError(
                f"policy {policy.name!r} needs the last {policy.needs_queries} queries and context {self.id} has "
                f"{self.queries.shape[2]}: record with --window {policy.needs_queries}"
            )
        if policy.needs_hidden and self.hidden is None:
            raise UserError(
                f"policy {policy.name!r} needs hidden states and context {self.id} holds none: record with --hidden"
            )
        if policy.statistics and policy.statistics not in self.stats:
            raise UserError(
                f"context {self.id} holds no statistics of policy {policy.statistics!r}: record with --stats "
                f"{policy.statistics}"
            )


class Contexts(Protocol):
    """Recorded contexts by number: a list of them, or a trace set that reads each when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Sequence: ...

    def __iter__(self) -> Iterator[Sequence]: ...
