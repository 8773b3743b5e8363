"""The agent `ppo`: Stable-Baselines3's PPO on KVEvict-v0, with rankings as actions.

Paper: PPO, arXiv 1707.06347, as implemented by Stable-Baselines3. The environment, the loss and the optimiser are
theirs; :class:`RankingPolicy` and :class:`DecisionBuffer` are given to them as settings. Every draw of a ranking has a
ratio and a clip of its own (the buffer stores one log-probability per draw); all draws of a ranking share the
advantage, reward less the critic's value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO

from kv_gym.envs.sb3 import KVEvictVecEnv
from kv_gym.errors import UserError
from kv_gym.traces.sequence import Sequence
from kv_gym.training.contexts import inputs_of
from kv_gym.training.decision_buffer import DecisionBuffer
from kv_gym.training.learner import Learner, Told
from kv_gym.training.sb3_policy import RankingPolicy, stages_of
from kv_gym.training.settings import Settings

LARGEST_BUDGET = 0.5  # that the environment's reward looks at


@dataclass(frozen=True)
class PPOSettings(Settings):
    """Settings of `ppo`, beside those of every agent; `contexts` and `slots` do not matter to it.

    Attributes:
        envs: environments in the batch.
        rollout: steps of each environment between updates.
        batch: decisions in one optimiser step.
        epochs: passes over a rollout.
        clip: how far a draw's ratio counts from 1.
        entropy: weight of the entropy.
        value: weight of the critic's loss.
    """

    envs: int = 64
    rollout: int = 8
    batch: int = 128
    epochs: int = 2
    clip: float = 0.2
    entropy: float = 0.0
    value: float = 0.5


class RankingPPO(Learner):
    """One step: a rollout, and SB3's updates on it."""

    settings = PPOSettings
    chosen: PPOSettings
    any_inputs = False  # the environment's observations hold keys, values and positions

    def prepare(self, sequences: list[Sequence]) -> None:
        """Make the environment, and the agent around the network."""
        chosen, (sinks, recent) = self.chosen, self.chosen.protect
        if chosen.envs * chosen.rollout < 2:
            raise UserError("envs x rollout is 1: advantages are compared with one another, so give at least 2")
        self.standardise_fresh(map(inputs_of, sequences))
        self.env = KVEvictVecEnv(chosen.envs, sequences, index=True, sinks=sinks, recent=recent)
        self.agent = PPO(
            RankingPolicy, self.env, learning_rate=lambda _: self._rate, n_steps=chosen.rollout,
            batch_size=min(chosen.batch, chosen.envs * chosen.rollout), n_epochs=chosen.epochs, gamma=0.0,
            clip_range=chosen.clip, ent_coef=chosen.entropy, vf_coef=chosen.value,
            rollout_buffer_class=DecisionBuffer,
            rollout_buffer_kwargs={"stages": stages_of(self.env.observation_space, LARGEST_BUDGET)},
            policy_kwargs={"hidden": chosen.hidden, "prefix": LARGEST_BUDGET, "sinks": sinks, "recent": recent,
                           "per_stage": True, "optimizer_class": torch.optim.AdamW,
                           "optimizer_kwargs": {"weight_decay": chosen.weight_decay}},
            seed=self.seed, device="cpu",
        )  # fmt: skip
        self.agent.rollout_buffer.slots = self.env.get_attr("slots")[0]  # type: ignore[attr-defined]
        policy: Any = self.agent.policy
        policy.scorer.load_state_dict(self.network.state_dict())
        policy.critic.mean.copy_(self.network.mean)
        policy.critic.scale.copy_(self.network.scale)
        self.network, self.optimizer = policy.scorer, policy.optimizer
        _, self._callback = self.agent._setup_learn(chosen.steps * self.samples)

    @property
    def _rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @property
    def samples(self) -> int:
        """Rankings drawn in a step."""
        return self.chosen.envs * self.chosen.rollout

    def step(self, step: int) -> Told:
        """Collect a rollout from environments that begin anew, and learn from it."""
        self.begin(step)
        seed = torch.randint(2**31, ()).item()
        np.random.seed(seed)  # SB3 shuffles batches with it
        self.env.seed(int(seed))
        self.agent._last_obs = self.env.reset()  # type: ignore[assignment]
        self.agent._last_episode_starts = np.ones(self.chosen.envs, bool)
        self.agent.collect_rollouts(self.env, self._callback, self.agent.rollout_buffer, self.chosen.rollout)
        reward = float(self.agent.rollout_buffer.rewards.mean())
        self.agent.train()
        said = self.agent.logger.name_to_value
        if not math.isfinite(said["train/loss"]):
            raise UserError(f"the loss is {said['train/loss']}: train with a lower rate than {self.chosen.rate}")
        gradients = [p.grad for p in self.agent.policy.parameters() if p.grad is not None]
        return {
            "loss": said["train/loss"], "reward": reward, "kl": said["train/approx_kl"],
            "clip_share": said["train/clip_fraction"], "entropy": -said["train/entropy_loss"],
            "value_loss": said["train/value_loss"], "explained_variance": said["train/explained_variance"],
            # SB3 clips in place: this is the norm of the last batch, at most 0.5
            "gradient_norm": torch.nn.utils.get_total_norm(gradients),
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Actor, critic and their optimiser."""
        return {"policy": self.agent.policy.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from an earlier :meth:`state`."""
        self.agent.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
