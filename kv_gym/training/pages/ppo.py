"""The page agent `ppo`: Stable-Baselines3's PPO on KVPage-v0, with the candidates that are there as actions.

Paper: PPO, arXiv 1707.06347, as implemented by Stable-Baselines3. Actor and critic share the first layer of the network
that scores the candidates; one that is not there has no probability.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from stable_baselines3 import PPO
from stable_baselines3.common.policies import MultiInputActorCriticPolicy

from kv_gym.training.pages.agent import EnvironmentSettings, PageAgent, PageSettings, PageTask
from kv_gym.training.pages.dqn import page_environments
from kv_gym.training.pages.network import CandidateHeads, CandidateScorer, StackedCandidates
from kv_gym.training.pages.recording import Decisions


class PPOSettings(EnvironmentSettings):
    """Settings of `ppo`, with those of every agent of the environment.

    Attributes:
        rollout: steps of each environment between updates.
        clip: how far a ratio of probabilities counts from 1.
        entropy: weight of the entropy.
    """

    rollout: PositiveInt = 128
    clip: NonNegativeFloat = 0.2
    entropy: NonNegativeFloat = 0.001


class PageActorCritic(MultiInputActorCriticPolicy):
    """SB3's policy around a :class:`~.network.CandidateHeads`."""

    def __init__(self, *arguments: Any, hidden: int = 32, **keywords: Any):
        self._hidden = hidden
        super().__init__(*arguments, **keywords, features_extractor_class=StackedCandidates)  # type: ignore[misc]

    def _build_mlp_extractor(self) -> None:
        extractor = self.features_extractor
        assert isinstance(extractor, StackedCandidates)
        self.mlp_extractor: Any = CandidateHeads(extractor, self._hidden).to(self.device)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = torch.nn.Identity()  # the heads give the logits
        make: Any = self.optimizer_class
        self.optimizer = make(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


class PagePPO(PageAgent):
    """PPO of Stable-Baselines3; see the module."""

    settings_class = PPOSettings
    settings: PPOSettings

    def __init__(self, task: PageTask, settings: PageSettings):
        super().__init__(task, settings)
        given = self.settings
        rollout = min(given.rollout, max(2, given.decisions // given.envs))
        self._agent = PPO(
            PageActorCritic, page_environments(task, given), learning_rate=given.rate,
            n_steps=rollout, batch_size=min(given.batch, rollout * given.envs), gamma=given.gamma,
            n_epochs=max(1, round(given.steps * given.batch / given.decisions)), clip_range=given.clip,
            ent_coef=given.entropy, seed=task.seed, device="cpu", policy_kwargs={"hidden": given.hidden},
        )  # fmt: skip
        self._begun = False

    @property
    def network(self) -> CandidateScorer:  # noqa: D102
        policy: Any = self._agent.policy
        return policy.mlp_extractor.scorer

    def train_round(self, recorded: Decisions | None) -> None:  # noqa: D102
        if not self._begun:
            self._normalise()
        self._agent.learn(self.settings.decisions, reset_num_timesteps=not self._begun)
        self._begun = True

    def _normalise(self) -> None:
        """Take the scale of the inputs from decisions of LRU."""
        env: Any = self._agent.get_env()
        seen, rows = env.reset(), []
        policy: Any = self._agent.policy
        for _ in range(max(1, min(2048, self.settings.decisions) // self.settings.envs)):
            stacked = policy.features_extractor({name: torch.from_numpy(array) for name, array in seen.items()})
            rows.append(stacked.view(len(stacked), self.task.candidates, -1))
            seen, *_ = env.step([0] * self.settings.envs)
        data = torch.cat(rows)
        self.network.normalise(data[..., :-1], data[..., -1] > 0.5)
