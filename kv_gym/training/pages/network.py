"""The networks of page agents: a score for each candidate, and what Stable-Baselines3 needs around it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

_INVALID = -1e8  # of a candidate that is not there


class CandidateScorer(nn.Module):
    """The network of :class:`~kv_gym.pages.policies.learned.Learned`, for training: `[B, K, F]` to scores `[B, K]`.

    Args:
        features: F.
        hidden: width.
    """

    center: Tensor
    scale: Tensor

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.candidate = nn.Linear(features, hidden)
        self.own = nn.Linear(hidden, hidden)
        self.mean = nn.Linear(hidden, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.register_buffer("center", torch.zeros(features))
        self.register_buffer("scale", torch.zeros(features))

    def normalise(self, features: Tensor, mask: Tensor) -> None:
        """Take mean and deviation of the inputs from data, the first time that it is called."""
        if not self.scale.any():
            present = features[mask]
            self.center.copy_(present.mean(0))
            self.scale.copy_(present.std(0, unbiased=False) + 0.01)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Scores; those that `mask` leaves out mean nothing."""
        return self.score_and_pool(features, mask)[0]

    def score_and_pool(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `[B, K]`, and the mean `[B, hidden]` over what the first layer makes of the candidates."""
        hidden = torch.relu(self.candidate((features - self.center) / self.scale))
        present = mask[..., None].float()
        pooled = (hidden * present).sum(-2, keepdim=True) / present.sum(-2, keepdim=True).clamp(min=1)
        return self.score(torch.relu(self.own(hidden) + self.mean(pooled)))[..., 0], pooled[..., 0, :]

    def weights(self) -> dict[str, np.ndarray]:
        """The weights as a trained policy holds them, with the scaling of the inputs in the first layer."""
        with torch.no_grad():
            first = self.candidate.weight / self.scale
            tensors = {
                "candidate.weight": first.T,
                "candidate.bias": self.candidate.bias - first @ self.center,
                "own.weight": self.own.weight.T,
                "mean.weight": self.mean.weight.T,
                "joined.bias": self.own.bias,
                "score.weight": self.score.weight[0],
            }
        return {name: np.array(tensor.detach().numpy(), order="C") for name, tensor in tensors.items()}


class StackedCandidates(BaseFeaturesExtractor):
    """A `KVPage-v0` observation as one vector: `[B, K * (F + 1)]`, the features of each candidate and its mask."""

    def __init__(self, observation_space: gym.spaces.Dict):
        self.names = [*(name for name in observation_space.spaces if name != "mask"), "mask"]
        self.candidates = int(np.prod(observation_space["mask"].shape or (1,)))
        super().__init__(observation_space, self.candidates * len(self.names))

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """See the class."""
        return torch.stack([observations[name] for name in self.names], -1).flatten(1)


class CandidateHeads(nn.Module):
    """Preferences for evicting each candidate, and the value of the state, from a stacked observation.

    Args:
        extractor: made the stacked observations.
        hidden: width.
        dueling: give Q-values: the value plus the preferences less their mean over the candidates (Wang et al.,
            "Dueling Network Architectures for Deep Reinforcement Learning", arXiv 1511.06581, equation 9).
    """

    def __init__(self, extractor: StackedCandidates, hidden: int, dueling: bool = False):
        super().__init__()
        self.candidates, self.dueling = extractor.candidates, dueling
        self.scorer = CandidateScorer(len(extractor.names) - 1, hidden)
        self.value = nn.Linear(hidden, 1)
        self.latent_dim_pi, self.latent_dim_vf = self.candidates, hidden  # Stable-Baselines3's names

    def forward(self, stacked: Tensor) -> Any:
        """Q-values `[B, K]` where they are asked for, else what actor and critic of SB3 are made of."""
        logits, pooled = self._preferences(stacked)
        return logits if self.dueling else (logits, pooled)

    def forward_actor(self, stacked: Tensor) -> Tensor:
        """Logits `[B, K]`."""
        return self._preferences(stacked)[0]

    def forward_critic(self, stacked: Tensor) -> Tensor:
        """What the value is a linear function of, `[B, hidden]`."""
        return self._preferences(stacked)[1]

    def _preferences(self, stacked: Tensor) -> tuple[Tensor, Tensor]:
        rows = stacked.view(len(stacked), self.candidates, -1)
        mask = rows[..., -1] > 0.5
        scores, pooled = self.scorer.score_and_pool(rows[..., :-1], mask)
        preferences = -scores  # a score is for keeping
        if self.dueling:
            mean = (preferences * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
            preferences = self.value(pooled) + preferences - mean
        # after the trace's end there is no candidate, and nothing to leave out
        return preferences.masked_fill(~mask & mask.any(-1, keepdim=True), _INVALID), pooled
