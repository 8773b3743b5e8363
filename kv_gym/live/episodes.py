"""Episodes of a conversation: its windows, grouped by what they are about (EpiCache, arXiv 2509.17396).

    windows = conversation_windows(utterances)                          # token ids of four utterances each
    episodes = Episodes.find(windows, model_embedding(model), count=4)
    episodes.choose(question_ids)                                       # which episode a question is about

A window is embedded as a unit vector, the vectors are clustered by k-means, and the windows nearest to a centre are the
episode's *probe*: what the model reads between blocks of the conversation, so that its attention tells which tokens the
episode needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.models.wrapped_model import transformers_model

TokenIds = Sequence[int]
Embedding = Callable[[Sequence[TokenIds]], Tensor]
"""Texts as token ids -> `[texts, e]`; the lengths of the vectors do not matter."""

MATCHES = ("dot", "cosine", "worst")
RESTARTS, SEED = 10, 42  # of the published code


def conversation_windows(utterances: Sequence[TokenIds], size: int = 4) -> list[tuple[int, ...]]:
    """Windows of `size` consecutive utterances that do not overlap; the last one may be shorter.

    Args:
        utterances: token ids, in order; the published form of one is ``{speaker} said, "{text}"`` and a line break.
        size: utterances of a window, 4 as published.

    Raises:
        UserError: a size below 1.
    """
    if size < 1:
        raise UserError(f"a window has {size} utterances; expected a number from 1")
    starts = range(0, len(utterances), size)
    return [tuple(token for said in utterances[start : start + size] for token in said) for start in starts]


def model_embedding(model: Any) -> Embedding:
    """Mean of the model's own input embeddings: no other model is needed, and the published code is better with one."""
    table = transformers_model(model).get_input_embeddings()

    @torch.no_grad()
    def embed(texts: Sequence[TokenIds]) -> Tensor:
        device = table.weight.device
        return torch.stack([table(torch.tensor(tuple(ids), device=device)).float().mean(0) for ids in texts])

    return embed


def sentence_embedding(tokenizer: Any, name: str = "sentence-transformers/all-MiniLM-L6-v2") -> Embedding:
    """Embeddings of a model of sentence-transformers, as in the published code.

    Args:
        tokenizer: that the ids were made with; the other model reads their text.
        name: a folder, or a model of the Hub, which is then downloaded.

    Raises:
        UserError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(
            "sentence embeddings need the package sentence-transformers: pip install 'kv-gym[sentences]', or use "
            "model_embedding(model)"
        ) from None
    encoder = SentenceTransformer(name)

    def embed(texts: Sequence[TokenIds]) -> Tensor:
        readable = [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in texts]
        return torch.as_tensor(encoder.encode(readable))

    return embed


@dataclass(frozen=True)
class Episodes:
    """What a conversation's episodes are about, and how a question finds its own.

    Attributes:
        centroids: `[episodes, e]` float32, means of unit vectors, so that a loose episode has a short one.
        probes: of each episode, the token ids that the model reads between blocks.
        members: of each episode, the numbers of its windows, the nearest to its centroid first.
        embed: the embedding that found them.
        match: how a question is compared with the centroids: ``dot`` (as published, which favours tight episodes),
            ``cosine``, or ``worst``, the least similar by ``dot``: what choosing is compared with.
    """

    centroids: Tensor
    probes: tuple[tuple[int, ...], ...]
    members: tuple[tuple[int, ...], ...]
    embed: Embedding = field(repr=False, compare=False)
    match: str = "dot"

    def __post_init__(self) -> None:
        if self.match not in MATCHES:
            raise UserError(f"match={self.match!r} is unknown; expected {', '.join(map(repr, MATCHES))}")

    @classmethod
    def find(
        cls,
        windows: Sequence[TokenIds],
        embed: Embedding,
        count: int = 4,
        medoids: int = 8,
        match: str = "dot",
        instruction: TokenIds = (),
    ) -> Episodes:
        """Cluster a conversation's windows.

        Args:
            windows: token ids, in order, such as those of :func:`conversation_windows`.
            embed: the embedding, such as :func:`model_embedding`.
            count: episodes. Where windows repeat one another there may be fewer.
            medoids: windows nearest to the centroid that make an episode's probe, in the order of the conversation.
            match: see the class.
            instruction: token ids in front of every probe; the published one asks to extract what is essential.

        Raises:
            UserError: a conversation of one window, fewer windows than episodes, vectors that are not one for each
                window and finite, no scikit-learn, or a setting out of range.
        """
        if count < 1 or medoids < 1:
            raise UserError(f"got {count} episodes with {medoids} windows for a probe; expected numbers from 1")
        windows = [tuple(window) for window in windows if len(window)]
        if len(windows) < 2:
            raise UserError(
                f"the conversation has {len(windows)} window, and episodes are groups of windows: give a longer "
                "conversation, or smaller windows"
            )
        if len(windows) < count:
            raise UserError(
                f"the conversation has {len(windows)} windows and {count} episodes are asked for: ask for at most "
                f"{len(windows)}, or give smaller windows"
            )
        vectors = _unit_vectors(embed, windows)
        centroids, labels = _clusters(vectors, count)
        probes, members = [], []
        for episode, centroid in enumerate(centroids):
            own = (labels == episode).nonzero()[:, 0]
            nearest = own[(vectors[own] @ centroid).argsort(descending=True, stable=True)].tolist()
            members.append(tuple(nearest))
            chosen = sorted(nearest[:medoids])
            probes.append((*instruction, *(token for number in chosen for token in windows[number])))
        return cls(centroids, tuple(probes), tuple(members), embed, match)

    def similarities(self, question: TokenIds) -> Tensor:
        """Of a question with each episode, `[episodes]`: dot products or cosines, as `match` says.

        Raises:
            UserError: an empty question, or an embedding of another width than the centroids.
        """
        if not len(question):
            raise UserError("the question is empty; give at least one token to choose an episode by")
        (vector,) = _unit_vectors(self.embed, [tuple(question)])
        if len(vector) != self.centroids.shape[1]:
            raise UserError(
                f"the question's embedding has {len(vector)} numbers and the episodes' have {self.centroids.shape[1]}: "
                "use the embedding that found the episodes"
            )
        centroids = self.centroids
        return (torch.nn.functional.normalize(centroids, dim=-1) if self.match == "cosine" else centroids) @ vector

    def choose(self, question: TokenIds) -> int:
        """The number of the episode that a question is about; its errors are those of :meth:`similarities`."""
        similarities = self.similarities(question)
        return int(similarities.argmin() if self.match == "worst" else similarities.argmax())


def _unit_vectors(embed: Embedding, texts: Sequence[TokenIds]) -> Tensor:
    """`[texts, e]` float32 on the CPU."""
    vectors = torch.as_tensor(embed(texts)).detach().float().cpu()
    if vectors.dim() != 2 or len(vectors) != len(texts) or not bool(vectors.isfinite().all()):
        raise UserError(
            f"the embedding gave numbers of shape {list(vectors.shape)} for {len(texts)} texts; expected a finite "
            "vector for each"
        )
    return torch.nn.functional.normalize(vectors, dim=-1)


def _clusters(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centroids `[clusters, e]` of unit vectors, and the cluster of each vector `[vectors]` int64; none is empty."""
    if count == 1:
        return vectors.mean(0, keepdim=True), torch.zeros(len(vectors), dtype=torch.int64)
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise UserError(
            "grouping windows into episodes needs scikit-learn: pip install 'kv-gym[episodes]', or ask for one episode"
        ) from None
    count = min(count, len(vectors.unique(dim=0)))  # more clusters than distinct vectors would be empty
    found = KMeans(n_clusters=count, random_state=SEED, n_init=RESTARTS).fit(vectors.numpy())
    return torch.from_numpy(found.cluster_centers_).float(), torch.from_numpy(found.labels_).long()
