"""PPO of Stable-Baselines3 learns to rank a KV cache: train, save, load, evaluate on other contexts, export a policy.

Run: ``python examples/train_ppo.py`` (bundled sample), ``tensorboard --logdir runs/ppo`` to watch. The default number
of steps shows that everything works; ``--steps 40000`` and traces of your own show it learn. ``kv-gym train ppo`` does
the same with checkpoints; a stock ``PPO("MultiInputPolicy", ...)`` runs on the environment too, and learns far slower.
"""

import argparse
from pathlib import Path

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

import kv_gym
from kv_gym.envs import KVEvictVecEnv
from kv_gym.training.learner import sequence_inputs
from kv_gym.training.sb3_policy import DecisionBuffer, RankingPolicy, save_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", help="trace set to train on (default: the bundled sample)")
    parser.add_argument("--eval-traces", help="trace set to evaluate on (default: the last training context, held out)")
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/ppo"))
    args = parser.parse_args()
    recorded = kv_gym.open_traces(args.traces)
    traces = recorded.load()
    held_out = kv_gym.open_traces(args.eval_traces).load() if args.eval_traces else [traces.pop()]
    lengths = [len(context.tokens) for context in traces + held_out]
    options = {"max_tokens": max(lengths), "index": True}  # the buffer stores ids of decisions, not their slots
    env = VecMonitor(KVEvictVecEnv(args.num_envs, traces, **options))
    agent = PPO(
        RankingPolicy, env, n_steps=32, batch_size=128, n_epochs=2, gamma=0.0, learning_rate=3e-3, device="cpu",
        rollout_buffer_class=DecisionBuffer, tensorboard_log=str(args.out), seed=0, verbose=1,
    )  # fmt: skip
    agent.rollout_buffer.slots = env.get_attr("slots")[0]
    agent.policy.standardise(torch.cat([sequence_inputs(context) for context in traces], 1))
    eval_env = VecMonitor(KVEvictVecEnv(args.num_envs, held_out, order="sequential", **options))
    episodes = eval_env.get_attr("episodes")[0]
    untrained, _ = evaluate_policy(agent, eval_env, episodes)
    agent.learn(args.steps)
    agent.save(args.out / "agent")
    loaded = PPO.load(args.out / "agent", env=eval_env, device="cpu")
    trained, _ = evaluate_policy(loaded, eval_env, episodes)
    print(f"mean reward (1 is a perfect ranking) on {len(held_out)} held-out context(s): {trained:.3f}")
    print(f"the same without training: {untrained:.3f}")
    print(f"a policy for EvictingCache lies in {save_policy(loaded, args.out / 'policy', recorded)}")


if __name__ == "__main__":
    main()
