"""Stable-Baselines3's PPO, as it comes, learns to rank a KV cache: train, save, load, judge on other contexts.

Run: ``python examples/train_ppo.py`` (bundled sample), ``tensorboard --logdir runs/ppo`` to watch. The default number
of steps shows that everything works; give ``--steps 100000 --num-envs 64`` and traces of your own to see it learn.
"""

import argparse
from pathlib import Path

from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

import kv_gym
from kv_gym.envs import KVEvictVecEnv


def judge(agent: PPO, env: VecNormalize) -> float:
    """Mean reward over every head of every context; 1 is a perfect ranking."""
    env.training = False  # the statistics of the training traces stay as they are
    reward, _ = evaluate_policy(agent, env, n_eval_episodes=env.get_attr("episodes")[0])
    return reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", help="trace set to train on (default: the bundled sample)")
    parser.add_argument("--eval-traces", help="trace set to judge on (default: the last training context, held out)")
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/ppo"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    traces = kv_gym.open_traces(args.traces).load()
    held_out = kv_gym.open_traces(args.eval_traces).load() if args.eval_traces else [traces.pop()]
    longest = max(len(context.tokens) for context in traces + held_out)  # one size of network for both

    # the stock network wants inputs around zero, and positions are not
    env = VecMonitor(KVEvictVecEnv(args.num_envs, traces, max_tokens=longest))
    env = VecNormalize(env, norm_obs_keys=["position"], norm_reward=False)
    agent = PPO(
        "MultiInputPolicy", env, n_steps=32, batch_size=128, n_epochs=2, gamma=0.0, learning_rate=3e-4,
        policy_kwargs={"log_std_init": -1.0}, tensorboard_log=str(args.out), seed=args.seed, device="cpu", verbose=1,
    )  # fmt: skip
    agent.learn(args.steps)
    agent.save(args.out / "agent")
    env.save(str(args.out / "normalize.pkl"))

    # from here on everything is read back, as another process would do
    other = VecMonitor(KVEvictVecEnv(args.num_envs, held_out, max_tokens=longest, order="sequential"))
    other = VecNormalize.load(str(args.out / "normalize.pkl"), other)
    loaded = PPO.load(args.out / "agent", env=other, device="cpu")
    fresh = PPO("MultiInputPolicy", other, seed=args.seed, device="cpu")
    print(f"mean reward on {len(held_out)} held-out context(s): {judge(loaded, other):.3f}")
    print(f"the same without training: {judge(fresh, other):.3f}")


if __name__ == "__main__":
    main()
