"""What an agent observes: the slots of every decision, as many in memory as a limit holds."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from kv_gym.envs.context_arrays import ContextArrays
from kv_gym.errors import UserError
from kv_gym.policies import Policy, make_policy
from kv_gym.traces.bounded_cache import UNLIMITED
from kv_gym.traces.sequence import Contexts, Sequence

BOUND = 65504.0  # the largest float16: what a 16-bit model can cache is never clipped
LAST_POSITION = 2.0**24  # the integers a float32 can tell apart
LAST_DECISION = 2**31 - 1

Observation = dict[str, np.ndarray]
Heads = str | Seq[tuple[int, int]]


class ObservationTable:
    """The slots of M decisions of N slots each; N = `tokens` for one head, heads x `tokens` for a joint ranking.

    Attributes:
        head_pairs: every recorded head as (model layer, head); the index in this list is the head's id.
        head_ids: `[H]` int64, ids of the heads that are replayed.
        joint: all heads are ranked in one decision.
        tokens: tokens per head, padding included; of a context whose slots were sampled, the sampled ones.
        heads: heads within one decision (1 unless joint).
        sequence: `[M]` int64, index of the context that a decision shows.
        head: `[M]` int64, id of the head that a decision shows, -1 if joint.
        length: `[M]` int64, tokens of its context that have a slot.
        seen: `[M]` int64, all tokens of its context.
        lengths: the different lengths, sorted; arrays that depend on the length alone have a row for each.
        length_index: `[M]` int64, row of a decision's context in such arrays.
        is_token: `[lengths, N]` bool, slots that are not padding.
        time_of_slot: `[N]` int64, rank of a slot by its token's position, then its head: ties go to the later slot.
        slot_of_time: `[N]` int64, the inverse.
        clipped: `[M]` int64, numbers of its observation that were out of bounds.
    """

    def __init__(
        self,
        sequences: Contexts,
        heads: Heads = "all",
        max_tokens: int | None = None,
        features: Seq[str | Policy] = (),
        limit: int = UNLIMITED,
    ) -> None:
        """Read all contexts; as many of their keys and values stay in memory as `limit` bytes hold.

        Raises:
            UserError: no context, contexts of different models, an unboxes head, or a context above `max_tokens`.
        """
        first, slot_positions, seen = _read_all(sequences, max_tokens)
        self.head_pairs = [(layer, head) for layer in first.layers for head in range(first.keys.shape[1])]
        self.joint = heads == "joint"
        self.head_ids = _head_ids(heads, self.head_pairs)
        lengths = np.array([len(positions) for positions in slot_positions])
        self.tokens = int(lengths.max()) if max_tokens is None else max_tokens
        self.heads = len(self.head_ids) if self.joint else 1
        per_context = 1 if self.joint else len(self.head_ids)
        self.sequence = np.repeat(np.arange(len(sequences)), per_context)
        self.length = np.repeat(lengths, per_context)
        self.seen = np.repeat(seen, per_context)
        self.head = np.full(len(sequences), -1) if self.joint else np.tile(self.head_ids, len(sequences))
        self.lengths, self.length_index = np.unique(self.length, return_inverse=True)
        self.is_token = np.array([self.per_slot(np.ones(n, bool)) for n in self.lengths])
        self.slot_of_time = np.arange(self.size).reshape(self.heads, self.tokens).T.reshape(-1)
        self.time_of_slot = np.argsort(self.slot_of_time)
        self._position = np.full((len(sequences), self.tokens), -1, np.float32)
        for row, positions in zip(self._position, slot_positions, strict=True):
            row[: len(positions)] = positions
        self._slot_head = np.repeat(self.head_ids, self.tokens).astype(np.int32)
        self.clipped = np.zeros(len(self), np.int64)
        self._widths = {"key": first.keys.shape[-1], "value": first.keys.shape[-1]}
        policies = tuple(make_policy(policy) for policy in features)
        self._widths |= {"features": len(policies)} if policies else {}
        self._slots = ContextArrays(
            [per_context] * len(sequences),
            {name: (self.size, width) for name, width in self._widths.items()},
            lambda number: self._read(number, sequences[number], policies),
            limit,
        )

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def size(self) -> int:
        """Slots of one decision, padding included."""
        return self.heads * self.tokens

    def _read(self, number: int, sequence: Sequence, policies: tuple[Policy, ...]) -> dict[str, np.ndarray]:
        """What its decisions show of a context, `[decisions, N, ...]`; numbers out of bounds are clipped."""
        shown = {name: np.zeros((len(self.head_ids), self.tokens, w), np.float32) for name, w in self._widths.items()}
        n, width = sequence.slots, self._widths["key"]
        shown["key"][:, :n] = sequence.keys.reshape(-1, n, width)[self.head_ids]
        shown["value"][:, :n] = sequence.values.reshape(-1, n, width)[self.head_ids]
        if policies:
            shown["features"][:, :n] = _policy_scores(sequence, policies)[self.head_ids]
        decisions = np.flatnonzero(self.sequence == number)
        clipped = np.zeros(len(decisions), np.int64)
        for name, array in shown.items():
            shown[name] = array = array.reshape(len(decisions), self.size, -1)
            for decision, slots in enumerate(array):
                # NaN counts too: it is out of every bound
                out_of_bounds = slots.size - np.count_nonzero(np.abs(slots) <= BOUND)
                if out_of_bounds:
                    clipped[decision] += out_of_bounds
                    np.nan_to_num(np.clip(slots, -BOUND, BOUND, out=slots), copy=False)
        self.clipped[decisions] = clipped
        return shown

    def per_slot(self, of_tokens: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """From tokens of a context `[n]` to slots of a decision `[N]`: the same in every head, False in padding."""
        padded = np.zeros(self.tokens, bool)
        padded[: len(of_tokens)] = of_tokens
        return np.tile(padded, self.heads)

    def gather(self, decisions: NDArray[np.int64], cached: NDArray[np.bool_] | None = None) -> Observation:
        """New arrays with the observations of B decisions.

        Args:
            decisions: `[B]` int64.
            cached: `[B, N]` bool, the slots that are still cached, the others show zeros; None means all.
        """
        position = np.tile(self._position[self.sequence[decisions]], (1, self.heads))
        observation: Observation = self._slots.take(decisions)
        if cached is None:
            observation["position"] = position
            observation["mask"] = self.is_token.take(self.length_index[decisions], axis=0).astype(np.int8)
        else:
            for array in observation.values():
                array[~cached] = 0
            observation["position"] = np.where(cached, position, np.float32(-1))
            observation["mask"] = cached.astype(np.int8)
        if self.joint:
            observation["head"] = np.repeat(self._slot_head[None], len(decisions), axis=0)
        else:
            observation["head"] = self.head[decisions]
        return observation

    def empty(self) -> Observation:
        """The observation of one environment whose episode is over: no slots."""
        observation: Observation = {name: np.zeros((self.size, w), np.float32) for name, w in self._widths.items()}
        observation["position"] = np.full(self.size, -1, np.float32)
        observation["mask"] = np.zeros(self.size, np.int8)
        observation["head"] = self._slot_head.copy() if self.joint else np.zeros((), np.int64)[()]
        return observation

    def space(self, index: bool) -> spaces.Dict:
        """The observation space of one environment; its bounds do not depend on the numbers in the traces."""
        boxes: dict[str, spaces.Space] = {
            name: spaces.Box(-BOUND, BOUND, (self.size, width), np.float32) for name, width in self._widths.items()
        }
        boxes["position"] = spaces.Box(-1.0, LAST_POSITION, (self.size,), np.float32)
        boxes["mask"] = spaces.Box(0, 1, (self.size,), np.int8)
        if self.joint:
            boxes["head"] = spaces.Box(0, len(self.head_pairs) - 1, (self.size,), np.int32)
        else:
            boxes["head"] = spaces.Discrete(len(self.head_pairs))
        if index:
            boxes["decision"] = spaces.Box(0, LAST_DECISION, (1,), np.int32)
        return spaces.Dict(boxes)


def flat_space(space: spaces.Dict) -> spaces.Box:
    """The space of :func:`flatten`, float32."""
    flat = spaces.flatten_space(space)
    assert isinstance(flat, spaces.Box)
    return spaces.Box(flat.low.astype(np.float32), flat.high.astype(np.float32), dtype=np.float32)


def flatten(space: spaces.Dict, observation: Observation) -> NDArray[np.float32]:
    """Observations of B environments as rows `[B, size]`, as Gymnasium's ``FlattenObservation`` has them.

    Args:
        space: of one environment, whose entries follow one another; the id of a head is one-hot.
        observation: of B environments.
    """
    parts = []
    for name, entry in space.items():
        array = observation[name]
        if isinstance(entry, spaces.Discrete):
            array = np.arange(entry.n) == array[:, None]
        parts.append(array.reshape(len(array), -1).astype(np.float32))
    return np.concatenate(parts, 1)


def _read_all(sequences: Contexts, max_tokens: int | None) -> tuple[Sequence, list[np.ndarray], list[int]]:
    """The first context, and of all the positions of their slots and their tokens.

    Raises:
        UserError: no context, contexts of different models, or one with more slots than `max_tokens`.
    """
    first, positions, seen = None, [], []
    for sequence in sequences:
        first = first or sequence
        if sequence.layers != first.layers or _sizes(sequence) != _sizes(first):
            raise UserError(
                f"context {sequence.id!r} has layers {sequence.layers} and [layers, heads, dim] {_sizes(sequence)}, "
                f"and {first.id!r} has {first.layers} and {_sizes(first)}: replay traces of one model at a time"
            )
        if max_tokens is not None and sequence.slots > max_tokens:
            raise UserError(
                f"context {sequence.id!r} has {sequence.slots} tokens and max_tokens is {max_tokens}: raise max_tokens "
                "or choose shorter contexts"
            )
        positions.append(sequence.slot_positions)
        seen.append(len(sequence.tokens))
    if first is None:
        raise UserError("the trace set holds no context; expected at least one (is the split or task right?)")
    return first, positions, seen


def _sizes(sequence: Sequence) -> tuple[int, int, int]:
    layers, heads, _, width = sequence.keys.shape
    return layers, heads, width


def _head_ids(heads: Heads, pairs: list[tuple[int, int]]) -> NDArray[np.int64]:
    if isinstance(heads, str):
        if heads not in ("all", "joint"):
            raise UserError(f"heads is {heads!r}; expected 'all', 'joint' or a list of (layer, head) pairs")
        return np.arange(len(pairs))
    wanted = [(int(layer), int(head)) for layer, head in heads]
    unboxes = [pair for pair in wanted if pair not in pairs]
    if unboxes or not wanted:
        what = f"head {unboxes[0]} is not in the traces" if unboxes else "heads is empty"
        raise UserError(f"{what}; expected (layer, head) pairs from {pairs[0]} to {pairs[-1]}")
    return np.array([pairs.index(pair) for pair in wanted])


def _policy_scores(sequence: Sequence, policies: tuple[Policy, ...]) -> np.ndarray:
    """Scores of policies as features, `[L * H, n, F]`."""
    columns = []
    for policy in policies:
        sequence.refuse_unrecorded(policy)
        layers = range(len(sequence.layers))
        views = (sequence.view(i, policy=policy.statistics, hidden=policy.needs_hidden) for i in layers)
        columns.append(np.concatenate([policy.score(view)[0].float().numpy() for view in views]))
    return np.stack(columns, axis=-1)
