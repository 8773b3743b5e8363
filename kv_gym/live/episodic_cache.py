"""EpisodicCache: one small cache of a conversation for each of its episodes; a question chooses one of them.

EpiCache, arXiv 2509.17396. The conversation is read once for every episode, block by block; after each block the model
reads the episode's probe, and the tokens that the probe attends to most stay. Reading costs as many prefills as there
are episodes, and holds one episode's cache, a block and the probe at a time.
Differs from the published code in: shares of layers are normalised so that the total is exact; first tokens are
protected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kv_gym.budgets import Allocation, parse_budget, slots_after
from kv_gym.errors import UserError
from kv_gym.files import atomic_write, make_folder, read_json, validated
from kv_gym.live.cache import EvictingCache
from kv_gym.live.episodes import MATCHES, Embedding, Episodes, conversation_windows, model_embedding
from kv_gym.live.selection import Selection
from kv_gym.live.tiers import Tier
from kv_gym.models.cache_name import with_cache
from kv_gym.models.loading import token_rows
from kv_gym.policies import Policy

MANIFEST = "episodes.json"
WINDOW_TOKENS = 32  # of a context whose utterances are not known
_EXPECTED = "expected the episodes that EpisodicCache.save wrote"


class EpisodicCache:
    """Caches of one conversation, each cut by what one episode needs.

        windows = conversation_windows(utterances)
        with EpisodicCache(model, Episodes.find(windows, model_embedding(model)), budget=256) as cache:
            cache.read(conversation_ids)
            with cache.for_question(question_ids) as chosen:  # an EvictingCache, and the others are untouched
                model.generate(conversation_and_question, past_key_values=chosen)

    Args:
        model: a transformers decoder, as :class:`~kv_gym.live.EvictingCache` takes it.
        episodes: of the conversation.
        policy: scores the slots; it sees the attention of the probe's queries.
        budget: slots per KV head of each episode's cache, or a share of the conversation's tokens.
        allocation: who gets the slots: ``uniform``, ``ada``, ``epicache:FILE`` (layers by their sensitivity) ...
        block: tokens that are read between two cuts.
        sinks, recent: first and last tokens that always stay; None means the policy's own.
        evicted: what becomes of evicted pairs, as in :class:`~kv_gym.live.EvictingCache`.
        select: which of the slots a query reads.
        park: where the caches wait for questions: None leaves them on the model's device, ``"host"`` moves them to the
            host's memory, and a path is a folder that they are saved in.

    Attributes:
        episodes: of the conversation.
        chosen: the episode of the last question; None before the first.
        seen: tokens of the conversation that was read; 0 before.
        tokens_read: tokens that the model read for :meth:`read`, probes included: what the caches cost.

    Raises:
        UserError: a block below 1, or what :class:`~kv_gym.live.EvictingCache` refuses.
    """

    def __init__(
        self,
        model,
        episodes: Episodes,
        policy: str | Path | Policy = "epicache",
        budget: str | int | float = 0.25,
        allocation: str | Allocation = "uniform",
        block: int = 256,
        sinks: int | None = None,
        recent: int | None = None,
        evicted: str | Tier = "drop",
        select: str | Selection = "all",
        park: str | Path | None = None,
    ):
        if block < 1:
            raise UserError(f"a block has {block} tokens; expected a number from 1")
        self.episodes = episodes
        self._model, self._block, self._budget = model, block, parse_budget(budget)
        self._park = park if park in (None, "host") else Path(park)
        self._settings: dict[str, Any] = {
            "policy": policy, "allocation": allocation, "trigger": f"block:{block}", "sinks": sinks, "recent": recent,
            "evicted": evicted, "select": select,
        }  # fmt: skip
        self._caches: list[EvictingCache | Path] = []
        self.chosen: int | None = None
        self.seen = self.tokens_read = 0
        self._cache_of(0).detach()  # refuses settings before anything is read

    def _cache_of(self, episode: int, budget: int | float = 1.0) -> EvictingCache:
        return EvictingCache(self._model, budget=budget, probe=self.episodes.probes[episode], **self._settings)

    # what it does

    @torch.no_grad()
    def read(self, ids: Sequence[int] | Tensor) -> None:
        """Read a conversation, once for every episode.

        Args:
            ids: its token ids, all of them: `[tokens]` or `[1, tokens]`.

        Raises:
            UserError: no token, more than one row, or ids that the model does not know.
        """
        tokens = torch.as_tensor(ids).flatten().tolist()
        if not tokens or (isinstance(ids, Tensor) and ids.dim() > 1 and len(ids) > 1):
            raise UserError("an episodic cache reads one conversation: give the token ids of one, at least one of them")
        rows, slots = token_rows(self._model, [tokens]), slots_after(self._budget, len(tokens))
        self.reset()
        self.seen = len(tokens)
        for episode, probe in enumerate(self.episodes.probes):
            with self._cache_of(episode, slots) as cache:
                for block in rows.split(self._block, 1):
                    cuts = cache.seen + block.shape[1] > slots
                    self._model(input_ids=block, **with_cache(cache), use_cache=True, logits_to_keep=1)
                    self.tokens_read += block.shape[1] + cuts * len(probe)
                if len(tokens) % self._block:  # the last block is shorter than the trigger's
                    cache.compress()
            self._caches.append(self._parked(cache, episode))

    def choose(self, question: Sequence[int]) -> int:
        """The number of the episode that a question is about.

        Args:
            question: its token ids.

        Raises:
            UserError: an empty question, or an embedding of another width than the episodes'.
        """
        return self.episodes.choose(question)

    def for_question(self, question: Sequence[int]) -> EvictingCache:
        """A copy of the cache of the episode that a question is about, to go on with: see :meth:`of_episode`.

        Close it (``with``), or :meth:`~kv_gym.live.EvictingCache.detach` it, after the answer.

        Args:
            question: its token ids.

        Raises:
            UserError: nothing was read yet, or what :meth:`choose` refuses.
        """
        self._refuse_empty()
        self.chosen = self.choose(question)
        return self.of_episode(self.chosen)

    def of_episode(self, episode: int) -> EvictingCache:
        """A copy of the cache of one episode, on the model's device, which evicts nothing of what comes next.

        Args:
            episode: its number, from 0.

        Raises:
            UserError: nothing was read yet, or there is no such episode.
        """
        self._refuse_empty()
        if not 0 <= episode < len(self._caches):
            raise UserError(f"there is no episode {episode}; the cache holds {len(self._caches)}, counted from 0")
        cache = self._caches[episode]
        if isinstance(cache, Path):
            copy = EvictingCache.load(cache, self._model, self._settings["policy"], self._settings["allocation"])
        else:
            copy = cache.fork()
            if self._park == "host":
                copy.move()
        copy.set_budget(1.0)
        return copy

    def save(self, folder: str | Path) -> Path:
        """Write the caches and the episodes into a folder.

        Args:
            folder: is made if it is not there.

        Raises:
            UserError: nothing was read yet, or a folder that cannot be written.
        """
        self._refuse_empty()
        folder = make_folder(folder)
        for episode in range(len(self._caches)):
            with self.of_episode(episode) as cache:
                cache.save(folder / _file_name(episode))
        about = _Manifest(
            centroids=self.episodes.centroids.tolist(), probes=list(map(list, self.episodes.probes)),
            members=list(map(list, self.episodes.members)), match=self.episodes.match, budget=self._budget,
            block=self._block, seen=self.seen, tokens_read=self.tokens_read,
        )  # fmt: skip
        with atomic_write(folder / MANIFEST) as part:
            part.write_text(about.model_dump_json() + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model,
        embed: Embedding | None = None,
        policy: str | Path | Policy = "epicache",
        allocation: str | Allocation = "uniform",
    ) -> EpisodicCache:
        """Caches as they were when they were saved; they stay in the folder until a question needs one.

        Args:
            folder: what :meth:`save` wrote.
            model: the same model.
            embed: the embedding that found the episodes; None is the model's own.
            policy, allocation: those of the caches.

        Raises:
            UserError: a missing or damaged file, or another model, policy or allocation.
        """
        folder = Path(folder)
        file = folder / MANIFEST
        data = validated(_Manifest, read_json(file, _EXPECTED), str(file))
        if not data.probes or {len(data.probes), len(data.members)} != {len(data.centroids)}:
            raise UserError(f"{file} holds other numbers of centroids, probes and windows of episodes; {_EXPECTED}")
        if len({len(centroid) for centroid in data.centroids}) > 1:
            raise UserError(f"{file} holds centroids of several widths; {_EXPECTED}")
        episodes = Episodes(
            torch.tensor(data.centroids), tuple(map(tuple, data.probes)), tuple(map(tuple, data.members)),
            model_embedding(model) if embed is None else embed, data.match,
        )  # fmt: skip
        cache = cls(model, episodes, policy, data.budget, allocation, data.block, park=folder)
        cache.seen, cache.tokens_read = data.seen, data.tokens_read
        cache._caches = [folder / _file_name(episode) for episode in range(len(data.probes))]
        cache.of_episode(0).detach()  # refuses another model or damage now
        return cache

    def reset(self) -> None:
        """Forget the conversation; the episodes stay."""
        self._caches, self.chosen = [], None
        self.seen = self.tokens_read = 0

    def detach(self) -> None:
        """Nothing is left to detach: copies for questions alone hold the model's attention."""

    def __enter__(self) -> EpisodicCache:
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    # what it holds

    def kept(self) -> Tensor:
        """How many tokens each head holds, `[episodes, layers, 1, kv_heads]` int64 on the CPU.

        Raises:
            UserError: nothing was read yet.
        """
        self._refuse_empty()
        found = []
        for episode in range(len(self._caches)):
            with self.of_episode(episode) as cache:
                found.append(cache.kept())
        return torch.stack(found)

    def nbytes(self) -> int:
        """Bytes that the caches hold on the model's device: none where they are parked."""
        return 0 if self._park == "host" else self._bytes_in_memory()

    def host_nbytes(self) -> int:
        """Bytes of caches that are parked in the host's memory."""
        return self._bytes_in_memory() if self._park == "host" else 0

    def _bytes_in_memory(self) -> int:
        return sum(cache.nbytes() for cache in self._caches if isinstance(cache, EvictingCache))

    def _parked(self, cache: EvictingCache, episode: int) -> EvictingCache | Path:
        if isinstance(self._park, Path):
            return cache.save(make_folder(self._park) / _file_name(episode))
        if self._park == "host":
            cache.move("cpu")
        return cache

    def _refuse_empty(self) -> None:
        if not self._caches:
            raise UserError("the cache is empty: call read() with the conversation's token ids first")


@dataclass(frozen=True)
class EpisodeSettings:
    """How a context is divided into episodes and read, where a comparison makes the caches.

    Attributes:
        count: episodes.
        medoids: windows of an episode that make its probe.
        window: utterances of a window; a context without known utterances has windows of `WINDOW_TOKENS` tokens.
        block: tokens between two cuts.
        match: how a question chooses, see :class:`~kv_gym.live.episodes.Episodes`.

    Raises:
        UserError: a number below 1, or an unknown match.
    """

    count: int = 4
    medoids: int = 8
    window: int = 4
    block: int = 64
    match: str = "dot"

    def __post_init__(self) -> None:
        for name in ("count", "medoids", "window", "block"):
            if getattr(self, name) < 1:
                raise UserError(f"episodes have {name}={getattr(self, name)}; expected a number from 1")
        if self.match not in MATCHES:
            raise UserError(f"episodes have match={self.match!r}; expected {', '.join(map(repr, MATCHES))}")

    @property
    def name(self) -> str:
        """What :func:`parse_episodes` reads."""
        changed = [
            (each.name, getattr(self, each.name))
            for each in fields(self)[1:]
            if getattr(self, each.name) != each.default
        ]
        return ":".join([str(self.count), *(f"{name}={value}" for name, value in changed)])

    def find(self, model, ids: Sequence[int], utterances: Sequence[int] = ()) -> Episodes:
        """Episodes of a context by the model's own embeddings.

        Args:
            model: a transformers decoder.
            ids: the context.
            utterances: how many of the tokens lie before the end of each utterance; empty: that is not known.
        """
        if utterances:
            said = [ids[start:stop] for start, stop in pairwise([0, *utterances])]
            windows = conversation_windows(said, self.window)
        else:
            windows = [tuple(ids[start : start + WINDOW_TOKENS]) for start in range(0, len(ids), WINDOW_TOKENS)]
        return Episodes.find(windows, model_embedding(model), self.count, self.medoids, self.match)


def parse_episodes(text: str) -> EpisodeSettings | None:
    """Read ``none``, or ``4``, ``4:medoids=4:match=cosine`` and others: settings by name behind the count.

    Raises:
        UserError: anything else.
    """
    if text == "none":
        return None
    count, *options = str(text).split(":")
    numbers: dict[str, Any] = {
        name: int(value) for name, value in re.findall(r"(medoids|window|block)=(\d{1,9})(?=:|$)", text)
    }
    match: dict[str, Any] = dict(option.partition("=")[::2] for option in options if option.startswith("match="))
    if not count.isdecimal() or len(options) != len(numbers) + len(match):
        raise UserError(
            f"episodes {text!r} are not known; expected 'none', or a number with settings, such as "
            "'4:medoids=8:window=4:block=64:match=cosine'"
        )
    return EpisodeSettings(int(count), **numbers, **match)


class _Manifest(BaseModel):
    """What a folder says of its episodes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    centroids: list[list[float]]
    probes: list[list[int]]
    members: list[list[int]]
    match: str
    budget: int | float
    block: int
    seen: int
    tokens_read: int


def _file_name(episode: int) -> str:
    return f"episode-{episode}.safetensors"
