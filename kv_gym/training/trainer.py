"""The training run that all agents share: start, step, validate, keep the best, resume, export."""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.evaluation.replay import replay
from kv_gym.files import whole_file
from kv_gym.models.fingerprint import Fingerprint, state_dict_hash
from kv_gym.policies.scorer import CHECKPOINT, GroupedScorer, Scorer, refuse_foreign
from kv_gym.policies.scoring.inputs import DEFAULT, HIDDEN
from kv_gym.traces import TraceSet, open_traces
from kv_gym.training.baselines import VALIDATION_BUDGETS, by_budget, yardsticks
from kv_gym.training.contexts import held_out
from kv_gym.training.monitor import Monitor
from kv_gym.training.registry import learner_class
from kv_gym.training.retention import Retention
from kv_gym.training.settings import Settings

SCRATCH = "scratch"
LOG_EVERY = 10


def train(
    agent: str,
    traces: str | Path | TraceSet,
    out: str | Path,
    *,
    seed: int = 0,
    init: str | Path | Scorer | None = None,
    model: Any = None,
    resume: bool | None = None,
    progress: bool = True,
    **settings: Any,
) -> Scorer:
    """Train an agent on recorded traces and export its best checkpoint into `out`.

    Interrupted runs continue from ``out/checkpoint.pt`` when agent, seed, settings, traces and start are the same,
    and end as if they had not been interrupted; a run that ended is not repeated, and its policy is returned.

    Args:
        agent: one of ``end_to_end``, ``joint``, ``expected``, ``rloo``, ``grpo``, ``ppo``, ``distill``,
            ``foresight``, ``kvzap``; settings in ``agents/<agent>.yml``.
        traces: a trace set, of which the split ``train`` is used.
        out: folder of the exported policy, the TensorBoard log and the checkpoint.
        seed: of weights and draws.
        init: an exported policy (or its folder) to start from instead of random weights: its networks, their hidden
            layers included, and the way they standardise their inputs.
        model: the transformers decoder of the traces, which ``end_to_end`` and some targets of ``joint`` need.
        resume: True refuses to start anew, False never continues an earlier run; None continues where it can.
        progress: show a bar.
        **settings: replace those of the agent's file, see :class:`Settings` and the agent's own class.

    Returns:
        The exported policy: the checkpoint with the highest held-out reward on documents that the optimiser never
        saw: the mean utility kept at equal budgets of 1/4, 1/8 and 1/16, or what the agent puts in its place. Its
        ``training`` says agent, seed, settings, traces, ``start`` (``scratch`` or the hash of the policy it started
        from), samples (rankings learned from) and seconds.

    Raises:
        UserError: unknown agent or setting, too few contexts in the split, a folder with another policy, or a policy
            to start from that belongs to another model.
    """
    kind = learner_class(agent)
    start = Scorer.from_pretrained(init) if isinstance(init, str | Path) else init
    if start is not None and settings.get("hidden") is None:
        settings["hidden"] = start.network.hidden
    if start is not None and settings.get("inputs") is None:
        settings["inputs"] = start.inputs
    chosen = kind.settled(kind.settings.load(agent, **settings), model is not None)
    if chosen.inputs != DEFAULT and not kind.any_inputs:
        raise UserError(
            f"agent {agent!r} learns from {', '.join(DEFAULT)} alone and was given inputs {list(chosen.inputs)}: leave "
            "them out, or train another agent"
        )
    refuse_foreign(Path(out))
    trace_set = traces if isinstance(traces, TraceSet) else open_traces(traces)
    if start is not None:
        start.fingerprint.refuse_other(trace_set.fingerprint, "the policy to start from", "the model of the traces")
        if start.inputs != chosen.inputs or bool(start.network.depth) != bool(chosen.depth):
            raise UserError(
                f"the policy to start from has inputs {list(start.inputs)} and {start.network.depth} hidden layers, "
                f"the settings say {list(chosen.inputs)} and {chosen.depth}: give the same, or train from scratch"
            )
        if start.network.hidden != chosen.hidden:
            raise UserError(
                f"the policy to start from has width {start.network.hidden} and hidden is {chosen.hidden}: leave "
                "hidden out, or train from scratch"
            )
    if use := kind.model_use(chosen):
        if model is None:
            raise UserError(f"agent {agent!r} {use}: name the one that the traces were recorded of (--model)")
        trace_set.fingerprint.refuse_other(Fingerprint.of(model), "the trace set", type(model).__name__)
    run = _Run(agent, chosen, seed, trace_set, start, model)
    finished = run.finished(Path(out))
    if finished is not None and resume is not False:
        return finished
    return run.to_the_end(Path(out), resume, progress)


def start_of(policy: Scorer | None) -> str:
    """How a policy that starts from another names it: SHA-256 of its weights, or ``scratch``."""
    if policy is None:
        return SCRATCH
    return state_dict_hash(policy.network.state_dict())


class _Run:
    def __init__(
        self,
        agent: str,
        settings: Settings,
        seed: int,
        traces: TraceSet,
        start: Scorer | None = None,
        model: Any = None,
    ):
        self.model = model
        self.agent, self.settings, self.seed, self.traces, self.start = agent, settings, seed, traces, start
        told = {"agent": agent, "seed": seed, "settings": asdict(settings), "traces": traces.hash}
        self.identity: dict[str, Any] = json.loads(json.dumps(told | {"start": start_of(start)}))
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.best_reward = -math.inf
        self.best: dict[str, Tensor] = {}

    def finished(self, out: Path) -> Scorer | None:
        """The policy of an earlier run like this one, if there is one."""
        if not (out / "policy.json").is_file():
            return None
        there = Scorer.from_pretrained(out)
        if not self._same(there.training):
            raise UserError(f"{out} holds a policy that was trained otherwise: name a new folder, or remove that one")
        return there

    def _same(self, identity: dict[str, Any]) -> bool:
        """Whether a run with `identity` was this one; what older versions did not name was as the defaults are."""
        usual = json.loads(json.dumps(asdict(type(self.settings)())))
        known = {"start": SCRATCH} | identity
        known["settings"] = usual | known.get("settings", {})
        return {name: known.get(name) for name in self.identity} == self.identity

    def to_the_end(self, out: Path, resume: bool | None, progress: bool) -> Scorer:
        began = time.perf_counter()
        self.load()
        out.mkdir(parents=True, exist_ok=True)
        checkpoint = out / CHECKPOINT
        self._resume(checkpoint, resume)
        began -= self.seconds
        self._save(checkpoint)
        lines = yardsticks(self.validation)
        with Monitor(out, f"train {self.agent}", self.settings.steps, self.step, progress) as monitor:
            monitor.describe(self.identity, lines)
            while self.step < self.settings.steps:
                told = self._one_step()
                monitor.advance(self.step)
                if self.step % LOG_EVERY == 0 or self.step == self.settings.steps:
                    monitor.log(self.step, "train", told)
                if self.step % self.settings.every == 0 or self.step == self.settings.steps:
                    self._validate(monitor, lines)
                    self.seconds = time.perf_counter() - began
                    self._save(checkpoint)
            monitor.result(self.identity, self.best_reward)
        self.learner.network.load_state_dict(self.best)
        policy = self._policy()
        policy.save_pretrained(out)
        checkpoint.unlink(missing_ok=True)
        return policy

    def load(self) -> None:
        """Read the contexts and make the network."""
        fingerprint, settings = self.traces.fingerprint, self.settings
        sequences = self.traces.select(split="train").load()
        training, self.validation = held_out(sequences, settings.validation)
        self.lengths = (min(len(s.tokens) for s in sequences), max(len(s.tokens) for s in sequences))
        torch.manual_seed(self.seed)
        if self.start is None:
            heads = len(fingerprint.layers) * fingerprint.kv_heads
            width = training[0].hidden_of(0).shape[-1] if HIDDEN in settings.inputs else 0
            shape = fingerprint.head_dim, settings.hidden, settings.inputs, width, settings.depth
            network = GroupedScorer(heads, *shape)
        else:
            network = copy.deepcopy(self.start.network).train()
        self.learner = learner_class(self.agent)(settings, self.seed, network, fresh=self.start is None)
        self.learner.model = self.model
        self.learner.prepare(training)
        self.retention = Retention(self.validation[:4], self.learner.calibrated, settings.inputs)

    def _one_step(self) -> dict:
        told = self.learner.step(self.step)
        self.step += 1
        self.samples += self.learner.samples
        return told | {"rate": self.learner.optimizer.param_groups[0]["lr"]}

    def _policy(self) -> Scorer:
        made = {"held_out_reward": self.best_reward, "samples": self.samples, "seconds": round(self.seconds, 1)}
        network = self.learner.network.eval()
        return Scorer(
            network, self.traces.fingerprint, self.lengths, self.settings.protect, self.learner.calibrated,
            self.identity | made, self.learner.absolute,
        )  # fmt: skip

    def _validate(self, monitor: Monitor, lines: dict[str, dict[str, float]]) -> None:
        policy = self._policy()
        rows = replay({"": policy}, self.validation, VALIDATION_BUDGETS)
        reward = self.learner.reward(policy, self.validation)
        if reward is None:
            reward = sum(row["utility_kept"] * row["n"] for row in rows) / sum(row["n"] for row in rows)
        if reward > self.best_reward:
            self.best_reward = reward
            self.best = {name: tensor.clone() for name, tensor in self.learner.network.state_dict().items()}
        monitor.validated(self.step, reward, by_budget(rows)[""], lines["oracle"])
        monitor.picture(self.step, self.retention.picture(self.learner.network))
        self.learner.network.train()

    def _save(self, file: Path) -> None:
        state = {
            "identity": json.dumps(self.identity), "step": self.step, "samples": self.samples,
            "seconds": self.seconds, "best_reward": self.best_reward, "best": self.best,
            "learner": self.learner.state(),
        }  # fmt: skip
        with whole_file(file) as part:
            torch.save(state, part)

    def _resume(self, file: Path, wanted: bool | None) -> None:
        state = _read(file) if file.is_file() and wanted is not False else {}
        if not state or not self._same(json.loads(state["identity"])):
            if wanted:
                raise UserError(
                    f"{file.parent} holds no checkpoint of this agent with the same seed, settings, traces and start: "
                    "leave --resume out to start anew"
                )
            return  # another run's leftovers: start anew
        self.learner.load(state["learner"])
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
        self.best_reward, self.best = state["best_reward"], state["best"]


def _read(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, weights_only=True)
    except Exception:  # torch raises many kinds, some of them private to it
        raise UserError(f"{file} is damaged: remove it to train from the start") from None
