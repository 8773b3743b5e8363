"""PPO on KVEvict-v0 in one file, as CleanRL writes it: a scorer of single slots, Gaussian actions, clipped updates.

Run: ``python examples/single_file_ppo.py`` (bundled sample). `flat=True` would give networks one array instead.
"""

import argparse

import gymnasium as gym
import torch
from torch import nn

import kv_gym  # noqa: F401 (registers KVEvict-v0)

ENVS, STEPS, EPOCHS, CLIP, NOISE = 64, 4, 4, 0.2, 0.3


def slots(observation: dict) -> torch.Tensor:  # [environments, slots, 2 d]
    return torch.cat([torch.from_numpy(observation[name]) for name in ("key", "value")], -1)


def train(updates: int, traces: str | None = None) -> tuple[int, float, float]:
    """Steps taken, and the mean reward of the first and the last five updates."""
    torch.manual_seed(0)
    env = gym.make_vec("KVEvict-v0", num_envs=ENVS, traces=traces)  # an episode is one step and is reset within it
    observation, width = env.reset(seed=0)[0], 2 * env.single_observation_space["key"].shape[-1]
    actor = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(-2))
    critic = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=1e-3)
    rewards = []
    for _ in range(updates):
        batch = []
        for _ in range(STEPS):
            inputs, mask = slots(observation), torch.from_numpy(observation["mask"]).float()
            with torch.no_grad():
                policy = torch.distributions.Normal(actor(inputs), NOISE)
                action = policy.sample()
                log_prob = policy.log_prob(action) * mask  # every slot has a ratio and a clip of its own
            observation, reward, *_ = env.step(action.numpy())
            batch.append((inputs, mask, action, log_prob, torch.from_numpy(reward).float()))
        inputs, mask, action, old, reward = map(torch.cat, zip(*batch, strict=True))
        for _ in range(EPOCHS):
            value = critic((inputs * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))[:, 0]
            advantage = reward - value.detach()  # one step: the return is the reward
            advantage = ((advantage - advantage.mean()) / (advantage.std() + 1e-8))[:, None]
            ratio = (torch.distributions.Normal(actor(inputs), NOISE).log_prob(action) * mask - old).exp()
            gain = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            loss = -(gain * mask).sum() / mask.sum() + 0.5 * (reward - value).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rewards.append(reward.mean().item())
    return updates * STEPS * ENVS, sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", help="trace set (default: the bundled sample)")
    parser.add_argument("--updates", type=int, default=100)
    arguments = parser.parse_args()
    print("{} steps, reward {:.3f} to {:.3f}".format(*train(arguments.updates, arguments.traces)))
