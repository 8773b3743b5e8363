"""The page agent `dqn`: Stable-Baselines3's DQN on KVPage-v0, double and dueling, trained on replayed experience.

Papers: DQN, arXiv 1312.5602; double DQN, arXiv 1509.06461; dueling networks, arXiv 1511.06581; the use is that of
Cold-RL (arXiv 2508.12485). The first round replays a mix of behaviours: half LRU, a quarter random, a quarter LFU;
later rounds add what the agent meets itself, with some random actions. Differs from Cold-RL in: next states are those
of the simulated cache, rewards are counted and not drawn, one page leaves at a time, and one scorer with shared weights
serves all candidates. For decision s, the page a that left, its reward r, the next decision s' and target weights w':

    loss = huber(Q_w(s, a) - (r + gamma Q_w'(s', argmax_b Q_w(s', b))))
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from pydantic import Field
from stable_baselines3 import DQN
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.dqn.policies import MultiInputPolicy, QNetwork

from kv_gym.envs.sb3 import KVPageVecEnv
from kv_gym.training.pages.agent import EnvironmentSettings, PageAgent, PageSettings, PageTask
from kv_gym.training.pages.network import CandidateHeads, CandidateScorer, StackedCandidates
from kv_gym.training.pages.recording import Decisions


class DQNSettings(EnvironmentSettings):
    """Settings of `dqn`, with those of every agent of the environment; 4, 8, ... `envs` give the mix exactly.

    Attributes:
        tau: share by which target weights follow in a step.
        epsilon: share of random actions from the second round on.
    """

    tau: float = Field(default=0.01, gt=0, le=1)
    epsilon: float = Field(default=0.1, ge=0, le=1)


class PageQPolicy(MultiInputPolicy):
    """SB3's policy with a dueling network that scores each candidate with the same weights."""

    def __init__(self, *arguments: Any, hidden: int = 32, **keywords: Any):
        self._hidden = hidden
        super().__init__(*arguments, **keywords, features_extractor_class=StackedCandidates)  # type: ignore[misc]

    def make_q_net(self) -> QNetwork:
        """A network of :class:`~.network.CandidateHeads`."""
        arguments = self._update_features_extractor(self.net_args, features_extractor=None)
        network = QNetwork(**arguments)
        extractor = network.features_extractor
        assert isinstance(extractor, StackedCandidates)
        network.q_net = CandidateHeads(extractor, self._hidden, dueling=True)  # type: ignore[assignment]
        return network.to(self.device)


class DoubleDQN(DQN):
    """SB3's DQN with the double target, and target weights that follow in every step."""

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Optimiser steps on the replay buffer."""
        self.policy.set_training_mode(True)
        assert self.replay_buffer is not None
        for _ in range(gradient_steps):
            data: Any = self.replay_buffer.sample(batch_size)
            with torch.no_grad():
                best = self.q_net(data.next_observations).argmax(1, keepdim=True)
                following = self.q_net_target(data.next_observations).gather(1, best)
                target = data.rewards + (1 - data.dones) * self.gamma * following
            current = self.q_net(data.observations).gather(1, data.actions.long())
            loss = torch.nn.functional.smooth_l1_loss(current, target)
            self.policy.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
            polyak_update(self.q_net.parameters(), self.q_net_target.parameters(), self.tau)


class PageDQN(PageAgent):
    """Dueling double DQN; see the module."""

    settings_class = DQNSettings
    settings: DQNSettings

    def __init__(self, task: PageTask, settings: PageSettings):
        super().__init__(task, settings)
        self._env = page_environments(task, self.settings)
        room = self.settings.rounds * self.settings.decisions
        self._agent = DoubleDQN(
            PageQPolicy, self._env, learning_rate=self.settings.rate, gamma=self.settings.gamma,
            tau=self.settings.tau, buffer_size=max(room, self.settings.envs), seed=task.seed, device="cpu",
            policy_kwargs={"hidden": self.settings.hidden},
        )  # fmt: skip
        self._now: Any = None  # observations of all environments

    @property
    def network(self) -> CandidateScorer:  # noqa: D102
        heads: Any = self._agent.q_net.q_net
        return heads.scorer

    def train_round(self, recorded: Decisions | None) -> None:  # noqa: D102
        first, buffer = self._now is None, cast(Any, self._agent.replay_buffer)
        if self._now is None:
            self._now = self._env.reset()
        for _ in range(max(1, self.settings.decisions // self.settings.envs)):
            actions = self._behave(self._now) if first else self._explore(self._now)
            step: Any = self._env.step(actions)
            following, rewards, dones, infos = step
            true = {name: array.copy() for name, array in following.items()}  # not the first of the next episode
            for row in np.flatnonzero(dones):
                for name, value in infos[row]["terminal_observation"].items():
                    true[name][row] = value
            buffer.add(self._now, true, actions, rewards, dones, infos)
            self._now = following
        if first:
            self._normalise()
        self._agent.train(self.settings.steps, self.settings.batch)

    def _behave(self, seen: dict[str, np.ndarray]) -> np.ndarray:
        """Half of the environments: the least recently used; a quarter: any; a quarter: the least often used."""
        count = seen["mask"].sum(1).astype(int)
        actions = np.zeros(len(count), int)
        often = next((seen[name] for name in ("hits", "seen") if name in seen), -seen["mask"])
        rare = np.where(seen["mask"] > 0, often, np.inf).argmin(1)
        actions[2::4] = self.random.integers(count)[2::4]
        actions[3::4] = rare[3::4]
        return actions

    def _explore(self, seen: dict[str, np.ndarray]) -> np.ndarray:
        chosen, _ = self._agent.predict(seen, deterministic=True)
        drawn = self.random.integers(seen["mask"].sum(1).astype(int))
        return np.where(self.random.random(len(chosen)) < self.settings.epsilon, drawn, chosen)

    def _normalise(self) -> None:
        data = cast(Any, self._agent.replay_buffer).sample(4096)
        extractor: Any = self._agent.q_net.features_extractor
        rows = extractor(data.observations).view(len(data.actions), self.task.candidates, -1)
        for network in (self._agent.q_net, self._agent.q_net_target):
            heads: Any = network.q_net
            heads.scorer.normalise(rows[..., :-1], rows[..., -1] > 0.5)


def page_environments(task: PageTask, settings: EnvironmentSettings) -> KVPageVecEnv:
    """Environments on the part of a task's trace that is for training; an action names the page that leaves."""
    env = KVPageVecEnv(
        settings.envs, requests=task.trace, capacity=task.capacity, candidates=task.candidates, drawn=task.drawn,
        semantics=task.semantics, features=task.features, horizon=settings.horizon, action="index",
        reward=settings.reward,
    )  # fmt: skip
    env.seed(task.seed)
    return env
