"""A trained policy: a small network scores each candidate, knowing the mean over all. `kv-gym pages train` makes it.

The decision among the least recently used pages, and LRU after a time limit, are those of Cold-RL (arXiv 2508.12485);
learning from Belady's choices is Parrot's idea (Liu et al., "An Imitation Learning Approach for Cache Replacement",
ICML 2020, arXiv 2006.16239). Differs from both: one scorer with shared weights, so that any number of candidates fits,
in NumPy, so that a decision needs no framework.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from kv_gym.errors import UserError, short_reason
from kv_gym.files import atomic_write, make_folder, read_bytes, read_json, validated
from kv_gym.pages.cache import Candidates, PageCache
from kv_gym.pages.features import FEATURES, feature_matrix
from kv_gym.pages.policies.base import PageRankingPolicy
from kv_gym.pages.shadow import ShadowLRU

_CARD, _WEIGHTS = "policy.json", "weights.safetensors"


class LearnedCard(BaseModel):
    """What `policy.json` says of a trained page policy.

    Attributes:
        format, version: mark the file.
        agent: which algorithm trained it.
        features: names of :data:`~kv_gym.pages.features.FEATURES`, in the order of the network's inputs.
        candidates: how many pages it chooses among.
        drawn: how many of these are drawn at random from all that may leave; the others are the least recently used.
        hidden: width of the network.
        trace, semantics, capacity, seed: what it was trained on.
        validation: hit rates on requests between training and test: `learned`, `lru` and `tail_oracle`, the bound.
        fallback: it was worse than LRU there, so that LRU decides.
        weights_sha256: of the file of weights.
        kv_gym: version that wrote it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["kv-gym-page-policy"] = "kv-gym-page-policy"
    version: Literal[1] = 1
    agent: Literal["clone", "dqn", "ppo"] = "clone"
    features: tuple[str, ...]
    candidates: int = Field(ge=2, le=1024)
    drawn: int = Field(ge=0, le=1023, default=0)
    hidden: int = Field(ge=1, le=4096)
    trace: str
    semantics: Literal["objects", "prefix"]
    capacity: int
    seed: int
    validation: dict[str, float] = {}
    fallback: bool = False
    weights_sha256: str = ""
    kv_gym: str

    @field_validator("features")
    @classmethod
    def _known(cls, features: tuple[str, ...]) -> tuple[str, ...]:
        if not features or set(features) - set(FEATURES):
            raise ValueError(f"expected some of {', '.join(FEATURES)}")
        return features

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        inputs, width = len(self.features), self.hidden
        return {
            "candidate.weight": (inputs, width),
            "candidate.bias": (width,),
            "own.weight": (width, width),
            "mean.weight": (width, width),
            "joined.bias": (width,),
            "score.weight": (width,),
        }


@dataclass(eq=False)
class Learned(PageRankingPolicy):
    """Scores of a network, higher = keep.

    Attributes:
        card: how it was trained, and on what.
        weights: arrays by name, as :attr:`LearnedCard.shapes` says.
        limit: seconds that a decision may take: one that takes longer is not used and the least recently used page
            leaves. 0: no limit, so that results can be repeated on a slower machine.
        shadow: pages of the LRU cache that is simulated beside the real one, see
            :class:`~kv_gym.pages.shadow.ShadowLRU`: where the policy has fallen behind it, LRU decides. 0: none.
        clock: gives the seconds.
        decisions, late: decisions of the network since `reset`, and those that took too long.
    """

    card: LearnedCard = field(metadata={"loaded": True})
    weights: dict[str, np.ndarray] = field(metadata={"loaded": True})
    limit: float = 0.0
    shadow: int = 65_536
    clock: Callable[[], float] = field(default=time.perf_counter, metadata={"loaded": True})

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise UserError(f"a limit of {self.limit} seconds is no time; expected 0 (none) or more")
        if self.shadow < 0:
            raise UserError(f"a shadow of {self.shadow} pages holds nothing; expected 0 (none) or more")
        self.candidates, self.drawn = self.card.candidates, self.card.drawn
        self.reset(0)

    @classmethod
    def load(cls, folder: str | Path, limit: float = 0.0, shadow: int = 65_536) -> Learned:
        """Read a trained policy.

        Raises:
            UserError: no such policy, another version, or weights that are damaged or not those of the card.
        """
        expected = "expected a folder that `kv-gym pages train` wrote"
        file = Path(folder) / _CARD
        card = validated(LearnedCard, read_json(file, expected), str(file))
        file = Path(folder) / _WEIGHTS
        data = read_bytes(file, expected)
        if hashlib.sha256(data).hexdigest() != card.weights_sha256:
            raise UserError(f"{file} is damaged or not the one that {_CARD} names; train or copy the policy again")
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            weights = load(data)
        except SafetensorError as error:
            raise UserError(f"{file} holds no tensors ({short_reason(error)}); {expected}") from None
        found = {name: array.shape for name, array in weights.items()}
        if found != card.shapes or not all(np.isfinite(array).all() for array in weights.values()):
            raise UserError(f"{file} holds other tensors than {_CARD} says, or numbers that are not finite; {expected}")
        return cls(card, weights, limit, shadow)

    def save(self, folder: str | Path) -> None:
        """Write card and weights into a folder, which is made where it is not there."""
        from safetensors.numpy import save

        make_folder(folder)
        data = save(self.weights)
        self.card = self.card.model_copy(update={"weights_sha256": hashlib.sha256(data).hexdigest()})
        with atomic_write(Path(folder) / _WEIGHTS) as part:
            part.write_bytes(data)
        with atomic_write(Path(folder) / _CARD) as part:
            part.write_text(json.dumps(self.card.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")

    def reset(self, seed: int) -> None:
        self.decisions = self.late = 0
        self._lru: ShadowLRU | None = None

    def observe(self, cache: PageCache, begin: int, end: int) -> None:
        if self.shadow and not self.card.fallback:
            self._lru = self._lru or ShadowLRU(cache, self.shadow)
            self._lru.follow(cache, begin, end)

    @property
    def late_share(self) -> float | None:
        """Share of decisions that took longer than the limit; None without a limit."""
        return self.late / max(self.decisions, 1) if self.limit else None

    @property
    def shadow_share(self) -> float | None:
        """Share of evictions left to LRU because the shadow had more hits; None without a shadow."""
        if not self.shadow:
            return None
        return self._lru.left if self._lru is not None else 0.0

    def rank(self, candidates: Candidates) -> np.ndarray:
        if self.card.fallback:
            return np.arange(len(candidates))  # the least recently used
        begin = self.clock() if self.limit else 0.0
        scores = self.score(feature_matrix(candidates, self.card.features))
        self.decisions += 1
        if self.limit and self.clock() - begin > self.limit:
            self.late += 1
            return np.arange(len(candidates))
        return scores

    def score(self, features: np.ndarray) -> np.ndarray:
        """Scores `[K]` of candidates with features `[K, F]`."""
        w = self.weights
        hidden = np.maximum(features @ w["candidate.weight"] + w["candidate.bias"], 0)
        context = hidden.mean(0) @ w["mean.weight"] + w["joined.bias"]
        return np.maximum(hidden @ w["own.weight"] + context, 0) @ w["score.weight"]
