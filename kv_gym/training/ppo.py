"""The agent `ppo`: Stable-Baselines3's PPO on KVEvict-v0, with rankings as actions.

Paper: PPO, arXiv 1707.06347, as implemented by Stable-Baselines3. The environment, the loss and the optimiser are
theirs; :class:`RankingPolicy` and :class:`DecisionBuffer` are given to them as settings. Every draw of a ranking has a
ratio and a clip of its own (the buffer stores one log-probability per draw); all draws of a ranking share the
advantage. For a decision s with reward R, the value V(s) of the critic and the draws t of its ranking (equations 7, 9):

    A = R - V(s)  (standardised over a batch),    r_t = p_t / p_old_t
    loss = - mean_t [ min(r_t A, clip(r_t, 1 - c, 1 + c) A) ] + value (R - V(s))^2 - entropy H
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveInt
from stable_baselines3 import PPO

from kv_gym.envs.sb3 import KVEvictVecEnv
from kv_gym.errors import UserError
from kv_gym.policies.base import Paper
from kv_gym.traces.sequence import Contexts
from kv_gym.training.learner import Learner, Metrics, Settings, sequence_inputs
from kv_gym.training.sb3_policy import DecisionBuffer, RankingPolicy, stages_of

LARGEST_BUDGET = 0.5  # that the environment's reward looks at


class PPOSettings(Settings):
    """Settings of `ppo`, with those of every agent; `contexts` and `slots` have no effect.

    Attributes:
        envs: environments in the batch.
        rollout: steps of each environment between updates.
        batch: decisions in one optimiser step.
        epochs: passes over a rollout.
        clip: how far a draw's ratio counts from 1.
        entropy: weight of the entropy.
        value: weight of the critic's loss.
    """

    envs: PositiveInt = 64
    rollout: PositiveInt = 8
    batch: PositiveInt = 128
    epochs: PositiveInt = 2
    clip: NonNegativeFloat = 0.2
    entropy: NonNegativeFloat = 0.0
    value: NonNegativeFloat = 0.5


class RankingPPO(Learner):
    """PPO of Stable-Baselines3 on KVEvict-v0, with rankings as actions; a step is a rollout and its updates."""

    paper = Paper("Proximal Policy Optimization Algorithms", "1707.06347")
    settings_class = PPOSettings
    settings: PPOSettings
    any_inputs = False  # the environment's observations hold keys, values and positions

    def prepare(self, sequences: Contexts) -> None:
        """Make the environment, and the agent around the network."""
        settings, (sinks, recent) = self.settings, self.settings.protect
        if settings.envs * settings.rollout < 2:
            raise UserError("envs x rollout is 1: advantages are standardised over a rollout, so give at least 2")
        self.fit_standardisation(map(sequence_inputs, sequences))
        memory = self.memory / 1e9
        self.env = KVEvictVecEnv(settings.envs, sequences, index=True, sinks=sinks, recent=recent, memory=memory)
        self.agent = PPO(
            RankingPolicy, self.env, learning_rate=lambda _: self._rate, n_steps=settings.rollout,
            batch_size=min(settings.batch, settings.envs * settings.rollout), n_epochs=settings.epochs, gamma=0.0,
            clip_range=settings.clip, ent_coef=settings.entropy, vf_coef=settings.value,
            rollout_buffer_class=DecisionBuffer,
            rollout_buffer_kwargs={"stages": stages_of(self.env.observation_space, LARGEST_BUDGET)},
            policy_kwargs={"hidden": settings.hidden, "prefix": LARGEST_BUDGET, "sinks": sinks, "recent": recent,
                           "per_stage": True, "optimizer_class": torch.optim.AdamW,
                           "optimizer_kwargs": {"weight_decay": settings.weight_decay}},
            seed=self.seed, device=self.device,
        )  # fmt: skip
        self.agent.rollout_buffer.slots = self.env.get_attr("slots")[0]  # type: ignore[attr-defined]
        policy: Any = self.agent.policy
        policy.scorer.load_state_dict(self.network.state_dict())
        policy.critic.mean.copy_(self.network.mean)
        policy.critic.scale.copy_(self.network.scale)
        self.network, self.optimizer = policy.scorer, policy.optimizer
        _, self._callback = self.agent._setup_learn(settings.steps * self.samples)

    @property
    def _rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @property
    def samples(self) -> int:
        """Rankings drawn in a step."""
        return self.settings.envs * self.settings.rollout

    def step(self, step: int) -> Metrics:
        """Reset the environments, collect a rollout, and learn from it."""
        self.start_step(step)
        seed = torch.randint(2**31, ()).item()
        np.random.seed(seed)  # SB3 shuffles batches with it
        self.env.seed(int(seed))
        self.agent._last_obs = self.env.reset()  # type: ignore[assignment]
        self.agent._last_episode_starts = np.ones(self.settings.envs, bool)
        self.agent.collect_rollouts(self.env, self._callback, self.agent.rollout_buffer, self.settings.rollout)
        reward = float(self.agent.rollout_buffer.rewards.mean())
        self.agent.train()
        logged = self.agent.logger.name_to_value
        self.refuse_non_finite(logged["train/loss"])
        gradients = [p.grad for p in self.agent.policy.parameters() if p.grad is not None]
        return {
            "loss": logged["train/loss"], "reward": reward, "kl": logged["train/approx_kl"],
            "clip_share": logged["train/clip_fraction"], "entropy": -logged["train/entropy_loss"],
            "value_loss": logged["train/value_loss"], "explained_variance": logged["train/explained_variance"],
            # SB3 clips in place: this is the norm of the last batch, at most 0.5
            "gradient_norm": torch.nn.utils.get_total_norm(gradients),
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Actor, critic and their optimiser."""
        return {"policy": self.agent.policy.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from an earlier :meth:`state_dict`."""
        self.agent.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
