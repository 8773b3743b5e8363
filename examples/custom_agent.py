"""A custom agent: a small scorer of keys and values, trained by REINFORCE with a group baseline in PyTorch.

Run: ``python examples/custom_agent.py`` (bundled sample).
"""

import argparse

import gymnasium as gym
import torch
from torch import nn

import kv_gym

GROUP, NOISE = 8, 0.3


def inputs(observation: dict) -> torch.Tensor:  # [environments, slots, 2 d]
    return torch.cat([torch.from_numpy(observation[name]) for name in ("key", "value")], -1)


def mean_reward(traces: list, score) -> float:
    """Mean reward of a scoring function over every head of every context."""
    env = gym.make_vec("KVEvict-v0", num_envs=1, traces=traces, order="sequential")
    observation, _ = env.reset(seed=0)
    total = 0.0
    for _ in range(env.episodes):
        observation, reward, *_ = env.step(score(observation))
        total += reward.item() / env.episodes
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", help="trace set (default: the bundled sample); its last context is held out")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.manual_seed(0)
    *traces, held_out = kv_gym.open_traces(args.traces).load()
    env = gym.make_vec("KVEvict-v0", num_envs=64, group=GROUP, traces=traces)
    observation, _ = env.reset(seed=0)
    scorer = nn.Sequential(nn.Linear(inputs(observation).shape[-1], 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(-2))
    optimizer = torch.optim.Adam(scorer.parameters(), lr=1e-3)
    for step in range(args.steps):
        mean = scorer(inputs(observation))
        action = (mean + NOISE * torch.randn_like(mean)).detach()  # copies of a group rank the same slots differently
        observation, reward, *_ = env.step(action.numpy())
        grouped = torch.from_numpy(reward).float().view(-1, GROUP)
        advantage = (grouped - grouped.mean(1, keepdim=True)).flatten()
        log_prob = -((action - mean) ** 2).sum(-1) / (2 * NOISE**2)
        optimizer.zero_grad()
        (-advantage * log_prob).mean().backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: training reward {reward.mean():.3f}")
    print(f"held out, learned: {mean_reward([held_out], lambda batch: scorer(inputs(batch)).detach().numpy()):.3f}")
    print(f"held out, smallest keys: {mean_reward([held_out], lambda batch: -(batch['key'] ** 2).sum(-1)):.3f}")


if __name__ == "__main__":
    main()
