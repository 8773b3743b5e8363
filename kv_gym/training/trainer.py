"""The training run of every agent: split, train, validate, keep the best checkpoint, resume, export."""

from __future__ import annotations

import copy
import io
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kv_gym.budgets import format_budget
from kv_gym.checksums import read_checked, write_checked
from kv_gym.errors import UserError
from kv_gym.evaluation.measure import replay
from kv_gym.files import parse_json
from kv_gym.live.rope_shift import refuse_other_rotation
from kv_gym.models.fingerprint import Fingerprint, state_dict_hash
from kv_gym.models.loading import usable_device
from kv_gym.models.wrapped_model import transformers_model
from kv_gym.policies import StatefulPolicy, make_policy
from kv_gym.policies.scorer import FOLDER, GroupedScorer, Scorer, input_frequencies
from kv_gym.policies.scoring.inputs import DEFAULT, HIDDEN
from kv_gym.progress import duration
from kv_gym.traces import TraceSet, open_traces
from kv_gym.traces.bounded_cache import memory_limit
from kv_gym.traces.schema import Entry
from kv_gym.traces.sequence import Contexts, Sequence
from kv_gym.training.data_parallel import Processes
from kv_gym.training.learner import Metrics, Settings
from kv_gym.training.monitor import Monitor, RetentionPicture
from kv_gym.training.pace import Pace, steps_within
from kv_gym.training.registry import agent_settings, learner_class
from kv_gym.weights_folder import CHECKPOINT

SCRATCH = "scratch"
LOG_EVERY = 10
VALIDATION_BUDGETS = (1 / 4, 1 / 8, 1 / 16)
BASELINES = ("oracle", "recency", "keydiff", "random", "h2o")
PICTURED_CONTEXTS = 4
PACED_CONTEXTS = 4  # on which steps are timed
Recorded = TypeVar("Recorded", Sequence, Entry)


def train(
    agent: str,
    traces: str | Path | TraceSet | Iterable[str | Path | TraceSet],
    out: str | Path,
    *,
    seed: int = 0,
    init: str | Path | Scorer | None = None,
    model: Any = None,
    resume: bool | None = None,
    progress: bool = True,
    device: str | None = None,
    minutes: float | None = None,
    deadline: float | None = None,
    memory: float | None = None,
    **settings: Any,
) -> Scorer:
    """Train an eviction policy on recorded traces.

    The best checkpoint on held-out documents is exported into `out`. An interrupted run continues from
    ``out/checkpoint.pt`` when agent, seed, settings, traces and start are the same, and ends as if it had not been
    interrupted; a finished run is not repeated, and its policy is returned.

    Processes that torchrun starts share the contexts of every step (:mod:`kv_gym.training.data_parallel`), with agents
    whose class says so, such as ``joint`` and ``end_to_end``.

    Args:
        agent: name of an agent, such as end_to_end, joint or rloo; ``agents/<agent>.yml`` holds its settings.
        traces: trace set, of which the split ``train`` is used; several of one model, or a folder of them, are read as
            one.
        out: folder of the exported policy, the TensorBoard log and the checkpoint.
        seed: of weights and random draws.
        init: exported policy (or its folder) to start from instead of random weights: its networks, their hidden
            layers included, and the way they standardise their inputs. Of its inputs some may be left out
            (``inputs``); its networks then begin as if those always had their means.
        model: transformers decoder of the traces, which ``end_to_end`` and some targets of ``joint`` need.
        resume: continue an interrupted run, and refuse where there is none; if false, start anew. By default a run
            continues where it can.
        progress: show a bar.
        device: where the networks train, such as ``cuda``; None: where the model is, or the CPU without one.
        minutes: train for so long: some steps are timed first, and as many are planned as fit, at most those of the
            settings. A run that turns out slower ends in time with its best checkpoint.
        deadline: seconds after which the run ends with its best checkpoint, whatever was planned.
        memory: gigabytes (10^9 bytes) that contexts may take in memory: half for training, a quarter for validation,
            and a quarter while the inputs are standardised. What does not fit is read again when it is drawn. By
            default half of the machine's memory.
        **settings: In Python, they replace those of the agent's file; see
            :class:`~kv_gym.training.learner.Settings` and the agent's own settings class.

    Returns:
        The exported policy: the checkpoint with the highest held-out reward on documents that the optimiser never
        saw: the mean utility kept at equal budgets of 1/4, 1/8 and 1/16, or the agent's own reward. Its ``training``
        holds agent, seed, settings, traces, ``start`` (``scratch`` or the hash of the policy it started from),
        samples (rankings learned from) and seconds.

    Raises:
        UserError: unknown agent or setting, too few contexts in the split, a folder with another policy, or a policy
            to start from that belongs to another model.
    """
    kind = learner_class(agent)
    start = Scorer.from_pretrained(init) if isinstance(init, str | Path) else init
    if start is not None:
        if not isinstance(start.network, kind.network_class):
            raise UserError(
                f"the policy to start from is a network of class {type(start.network).__name__} and agent {agent!r} "
                f"trains one of class {kind.network_class.__name__}: name a policy of the same agent, or train from "
                "scratch"
            )
        gate = {"gate_heads": start.network.gate_heads} if start.network.gate_heads else {}
        for name, value in {"hidden": start.network.hidden, "inputs": start.inputs, **gate}.items():
            if settings.get(name) is None:
                settings[name] = value
    given = agent_settings(agent, **settings)
    trace_set = open_traces(traces)
    whole = all(entry.slots == entry.tokens for entry in trace_set.entries)
    resolved = kind.resolve_settings(given, model is not None and whole)
    if resolved.inputs != DEFAULT and not kind.any_inputs:
        raise UserError(
            f"agent {agent!r} learns from {', '.join(DEFAULT)} alone and was given inputs {list(resolved.inputs)}: "
            "leave them out, or train another agent"
        )
    FOLDER.refuse_foreign(Path(out))
    if start is not None:
        if set(resolved.inputs) < set(start.inputs) and isinstance(start.network, GroupedScorer):
            start = replace(start, network=start.network.with_inputs(resolved.inputs))
        _refuse_unfit_start(start, resolved, trace_set.fingerprint)
    if requirement := kind.model_requirement(resolved):
        if model is None:
            raise UserError(f"agent {agent!r} {requirement}: name the one that the traces were recorded of (--model)")
        trace_set.fingerprint.refuse_other(Fingerprint.of(model), "the trace set", type(model).__name__)
    if model is not None and (frequencies := input_frequencies(resolved.inputs, trace_set.fingerprint)) is not None:
        refuse_other_rotation(transformers_model(model), frequencies, agent)
    trainer = Trainer(agent, resolved, seed, trace_set, start, model, device, minutes, memory_limit(memory))
    trainer.processes = Processes.of_torchrun(trainer.device)
    if trainer.processes.count > 1:
        if memory is None:
            trainer.memory //= trainer.processes.of_this_machine
        if not kind.data_parallel:
            raise UserError(f"agent {agent!r} trains in one process: start it without torchrun")
        trainer.processes.own(resolved.contexts)
        if minutes is not None or deadline is not None:
            raise UserError("a time is planned for one process: give steps, or start it without torchrun")
    if minutes is not None and not (resume is not False and trainer.adopt_plan(Path(out))):
        trainer = planned_trainer(trainer, progress)
    if deadline is not None:
        trainer.limit = deadline
    finished = trainer.finished_policy(Path(out))
    if finished is not None and resume is not False:
        return finished
    return trainer.run(Path(out), resume, progress)


def planned_trainer(trainer: Trainer, progress: bool = True) -> Trainer:
    """A trainer with as many steps as fit into the limit of this one, which is used to time some steps.

    Raises:
        UserError: not one step fits.
    """
    assert trainer.limit is not None
    began = time.perf_counter()
    training, validation = trainer.split_sizes()
    pace = trainer.measure_pace()
    spent = time.perf_counter() - began
    settings = trainer.settings
    steps, every = steps_within(
        trainer.limit - spent, pace, training, validation, settings.steps, settings.every
    )  # fmt: skip
    if progress:
        print(
            f"train {trainer.agent}: {steps} of {settings.steps} steps, about "
            f"{duration(pace.seconds(steps, every, training, validation))} on this machine",
            file=sys.stderr,
        )
    planned = trainer.with_steps(steps, every)
    planned.seconds = spent
    return planned


def export(policy: str | Path | Scorer, out: str | Path) -> Path:
    """Write a trained policy into a folder of its own.

    It is checked, and written as weights, description and card.

    Args:
        policy: a trained policy, its folder, or its id on the Hugging Face Hub.
        out: folder to write.

    Returns:
        The folder.

    Raises:
        UserError: the policy is damaged, or `out` holds other files.
    """
    loaded = policy if isinstance(policy, Scorer) else Scorer.from_pretrained(policy)
    return loaded.save_pretrained(out)


class Trainer:
    """One training run; :func:`train` is its front door.

    Args:
        agent: name of the agent.
        settings: of the agent.
        seed: of weights and random draws.
        traces: whose split ``train`` is used.
        start: policy to start from.
        model: transformers decoder of the traces.
        device: where the networks train; None: where the model is, or the CPU without one.
        minutes: after which the run ends; None: no limit.
        memory: bytes of contexts that may be held; None: half of this machine's memory.

    Attributes:
        identity: agent, seed, settings, traces and start, as plain JSON data: what makes two runs the same.
        learner: the agent's algorithm, after :meth:`setup`.
        validation: contexts that choose the checkpoint, after :meth:`setup`.
        step: training steps done.
        limit: seconds after which the run ends with its best checkpoint; None: no limit.
        processes: that train together; those but the first write nothing.
        best: weights of the checkpoint with the highest held-out reward, ``best_reward``.
    """

    def __init__(
        self,
        agent: str,
        settings: Settings,
        seed: int,
        traces: TraceSet,
        start: Scorer | None = None,
        model: Any = None,
        device: str | None = None,
        minutes: float | None = None,
        memory: int | None = None,
    ):
        if not 0 <= seed < 2**63:
            raise UserError(f"seed is {seed}; expected a number from 0 and below 2^63")
        if minutes is not None and not minutes > 0:
            raise UserError(f"{minutes:g} minutes are given to train for; expected a number above 0")
        self.device = model.device if device is None and model is not None else usable_device(device or "cpu")
        self.agent, self.settings, self.seed, self.traces = agent, settings, seed, traces
        self.start, self.model, self.minutes = start, model, minutes
        self.limit = None if minutes is None else 60 * minutes
        self.processes = Processes()
        self.memory = memory_limit(None) if memory is None else memory
        self.identity: dict[str, Any] = {
            "agent": agent, "seed": seed, "settings": settings.model_dump(mode="json"), "traces": traces.hash,
            "start": weights_hash(start), **({} if minutes is None else {"minutes": minutes}),
        }  # fmt: skip
        self.stopped = False
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self._step_seconds = self._validation_seconds = 0.0  # of the last ones
        self.best_reward = -math.inf
        self.best: dict[str, Tensor] = {}

    def finished_policy(self, out: Path) -> Scorer | None:
        """The policy of an earlier run like this one, if there is one.

        Raises:
            UserError: the folder holds another run's policy.
        """
        if not (out / "policy.json").is_file():
            return None
        policy = Scorer.from_pretrained(out)
        if not self._matches(policy.training):
            raise UserError(f"{out} holds a policy that was trained otherwise: name a new folder, or remove that one")
        return policy

    def _matches(self, identity: dict[str, Any]) -> bool:
        """Whether `identity` is this run's; what older versions did not write had the default values."""
        known = {"start": SCRATCH, "minutes": None} | identity
        known["settings"] = type(self.settings)().model_dump(mode="json") | known.get("settings", {})
        own = {"minutes": None} | self.identity
        return {name: known.get(name) for name in own} == own

    def adopt_plan(self, out: Path) -> bool:
        """Take the steps that an earlier run like this one planned for the same time, if there is one in `out`."""
        if (out / "policy.json").is_file():
            known = Scorer.from_pretrained(out).training
        elif (out / CHECKPOINT).is_file():
            known = parse_json(_read_checkpoint(out / CHECKPOINT)["identity"], str(out / CHECKPOINT))
        else:
            return False
        plan = {name: known.get("settings", {}).get(name) for name in ("steps", "every")}
        if not all(isinstance(number, int) for number in plan.values()):
            return False
        planned = self.with_steps(**plan)
        if not planned._matches(known):
            return False
        self.settings, self.identity = planned.settings, planned.identity
        return True

    def with_steps(self, steps: int, every: int) -> Trainer:
        """The same run with other steps, not set up."""
        settings = self.settings.model_copy(update={"steps": steps, "every": every})
        return Trainer(
            self.agent, settings, self.seed, self.traces, self.start, self.model, str(self.device), self.minutes,
            self.memory,
        )  # fmt: skip

    def split_sizes(self) -> tuple[int, int]:
        """How many contexts are trained on, and how many validate."""
        parts = split_validation(self.traces.select(split="train").entries, self.settings.validation)
        return len(parts[0]), len(parts[1])

    def measure_pace(self) -> Pace:
        """Time the first steps on a few contexts; the trainer is of no use for a run afterwards."""
        whole, self.traces = (
            self.traces,
            self.traces.of(self.traces.select(split="train").entries[:PACED_CONTEXTS]),
        )
        seconds = [time.perf_counter()]
        for work in (self.setup, self.train_step, self.train_step, self._held_out):
            work()
            seconds.append(time.perf_counter())
        prepare, first, step, validation = (after - before for before, after in pairwise(seconds))
        training = len(self.traces) - len(self.validation)
        self.traces = whole
        return Pace(prepare / training, max(0.0, first - step) / training, step, validation / len(self.validation))

    def run(self, out: Path, resume: bool | None, progress: bool) -> Scorer:
        """Train to the end, or from the last checkpoint to the end, and export."""
        began = time.perf_counter()
        self.setup()
        checkpoint = out / CHECKPOINT
        self._resume(checkpoint, resume)
        self.processes.wait()  # all have read the checkpoint
        if not self.processes.writes:
            while self.step < self.settings.steps:
                self.train_step()
            self.processes.wait()
            return Scorer.from_pretrained(out)
        out.mkdir(parents=True, exist_ok=True)
        began -= self.seconds
        self._save(checkpoint)
        baselines = baseline_utility(self.validation)
        with Monitor(out, f"train {self.agent}", self.settings.steps, self.step, progress) as monitor:
            monitor.log_run(self.identity, baselines)
            if self.step == 0 and self.limit is not None:  # a run that ends early has a best checkpoint
                self._validate(monitor, baselines["oracle"])
            self.stopped = self._time_is_up(began)
            while self.step < self.settings.steps and not self.stopped:
                step_began = time.perf_counter()
                metrics = self.train_step()
                self._step_seconds = time.perf_counter() - step_began
                monitor.advance(self.step)
                self.stopped = self._time_is_up(began)
                finished = self.stopped or self.step == self.settings.steps
                if finished or self.step % LOG_EVERY == 0:
                    monitor.log(self.step, "train", metrics)
                if finished or self.step % self.settings.every == 0:
                    self._validate(monitor, baselines["oracle"])
                    self.seconds = time.perf_counter() - began
                    self._save(checkpoint)
            monitor.log_result(self.identity, self.best_reward)
        if self.stopped and progress:
            print(
                f"train {self.agent}: the time is up after {self.step} of {self.settings.steps} steps, so the best "
                "checkpoint so far is taken",
                file=sys.stderr,
            )
        self.learner.network.load_state_dict(self.best)
        policy = self._policy()
        policy.save_pretrained(out)
        checkpoint.unlink(missing_ok=True)
        self.processes.wait()
        return policy

    def setup(self) -> None:
        """Read the contexts and make the network."""
        fingerprint, settings = self.traces.fingerprint, self.settings
        entries = self.traces.select(split="train").entries
        training, validation = map(self.traces.of, split_validation(entries, settings.validation))
        self.validation = validation.cached(self.memory // 4)
        self.lengths = (min(entry.tokens for entry in entries), max(entry.tokens for entry in entries))
        torch.manual_seed(self.seed)
        if self.start is None:
            hidden_size = training[0].hidden_of(0).shape[-1] if HIDDEN in settings.inputs else 0
            network = learner_class(self.agent).make_network(settings, fingerprint, hidden_size)
        else:
            network = copy.deepcopy(self.start.network).train()
        network.to(self.device)
        self.learner = learner_class(self.agent)(settings, self.seed, network, self.start is None, self.model)
        self.learner.memory = self.memory // 2
        self.learner.processes = self.processes
        self.learner.prepare(training)
        pictured = self.validation.of(self.validation.entries[:PICTURED_CONTEXTS])
        self._picture = RetentionPicture(
            pictured, self.learner.calibrated, settings.inputs, self.learner.input_frequencies
        )

    def train_step(self) -> Metrics:
        """One step of the learner."""
        metrics = self.learner.step(self.step)
        self.step += 1
        self.samples += self.learner.samples
        return metrics | {"rate": self.learner.optimizer.param_groups[0]["lr"]}

    def _policy(self) -> Scorer:
        result = {"held_out_reward": self.best_reward, "samples": self.samples, "seconds": round(self.seconds, 1)}
        result |= {"stopped_after": self.step} if self.stopped else {}
        network = self.learner.network.eval()
        if network.mean.device.type != "cpu":  # validation contexts are on the host
            network = copy.deepcopy(network).cpu()
        return Scorer(
            network, self.traces.fingerprint, self.lengths, self.settings.protect, self.learner.calibrated,
            self.identity | result, self.learner.absolute,
        )  # fmt: skip

    def _time_is_up(self, began: float) -> bool:
        """Whether another step and the validation behind it would end after the limit."""
        needed = self._step_seconds + self._validation_seconds
        late = self.limit is not None and time.perf_counter() - began + needed > self.limit
        return late and self.step < self.settings.steps

    def _held_out(self) -> tuple[Scorer, float, list[dict]]:
        """The policy as it is, its reward on validation contexts, and what it keeps of them."""
        policy = self._policy()
        rows = replay({"": policy}, self.validation, VALIDATION_BUDGETS)
        reward = self.learner.reward(policy, self.validation)
        if reward is None:
            reward = sum(row["utility_kept"] * row["n"] for row in rows) / sum(row["n"] for row in rows)
        return policy, reward, rows

    def _validate(self, monitor: Monitor, oracle: dict[str, float]) -> None:
        began = time.perf_counter()
        policy, reward, rows = self._held_out()
        if reward > self.best_reward:
            self.best_reward = reward
            self.best = {name: tensor.clone() for name, tensor in policy.network.state_dict().items()}
        monitor.log_validation(self.step, reward, _utility_by_budget(rows)[""], oracle)
        monitor.log_image(self.step, self._picture.image(self.learner.network))
        self.learner.network.train()
        self._validation_seconds = time.perf_counter() - began

    def _save(self, file: Path) -> None:
        state = {
            "identity": json.dumps(self.identity), "step": self.step, "samples": self.samples,
            "seconds": self.seconds, "best_reward": self.best_reward, "best": self.best,
            "learner": self.learner.state_dict(),
        }  # fmt: skip
        data = io.BytesIO()
        torch.save(state, data)
        write_checked(file, data.getvalue())

    def _resume(self, file: Path, resume: bool | None) -> None:
        state = _read_checkpoint(file) if file.is_file() and resume is not False else {}
        if not state or not self._matches(parse_json(state["identity"], str(file))):
            if resume:
                raise UserError(
                    f"{file.parent} holds no checkpoint of this agent with the same seed, settings, traces and start: "
                    "leave --resume out to start anew"
                )
            return  # a checkpoint of another run is replaced
        self.learner.load_state_dict(state["learner"])
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
        self.best_reward, self.best = state["best_reward"], state["best"]


def weights_hash(policy: Scorer | None) -> str:
    """What ``training["start"]`` holds: the hash of a policy's weights, or ``scratch``."""
    return SCRATCH if policy is None else state_dict_hash(policy.network.state_dict())


def split_validation(sequences: list[Recorded], share: float) -> tuple[list[Recorded], list[Recorded]]:
    """Contexts to train on and to choose the best checkpoint with.

    Split by document, or, where there are too few documents for that, the last contexts are for validation.

    Args:
        sequences: all contexts, or what a trace set knows of them without reading them.
        share: of the documents (or contexts) for validation.

    Raises:
        UserError: fewer than 4 contexts.
    """
    if len(sequences) < 4:
        raise UserError(
            f"training needs at least 4 contexts in the split 'train', and the traces hold {len(sequences)}"
        )
    documents = sorted({s.text_hash for s in sequences})
    if len(documents) < 4:
        count = max(1, round(share * len(sequences)))
        return sequences[:-count], sequences[-count:]
    chosen = set(documents[:: max(2, round(1 / max(share, 1e-6)))])
    return [s for s in sequences if s.text_hash not in chosen], [s for s in sequences if s.text_hash in chosen]


def baseline_utility(sequences: Contexts) -> dict[str, dict[str, float]]:
    """Utility kept at the validation budgets by the oracle and by heuristics, each with its own protection.

    A heuristic whose statistics were not recorded is left out.

    Returns:
        Policy -> budget (as text) -> utility kept.
    """
    policies = {name: make_policy(name) for name in BASELINES}
    usable = {
        name: policy
        for name, policy in policies.items()
        if not isinstance(policy, StatefulPolicy) or all(policy.name in s.stats for s in sequences)
    }
    return _utility_by_budget(replay(usable, sequences, VALIDATION_BUDGETS))


def _utility_by_budget(rows: Iterable[dict]) -> dict[str, dict[str, float]]:
    """Rows of :func:`replay` as policy -> budget -> utility kept, tasks weighted by their contexts."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        entry = sums[row["policy"], format_budget(row["budget"])]
        entry[0] += row["utility_kept"] * row["n"]
        entry[1] += row["n"]
    kept: dict[str, dict[str, float]] = defaultdict(dict)
    for (policy, budget), (total, contexts) in sums.items():
        kept[policy][budget] = total / contexts
    return dict(kept)


def _refuse_unfit_start(start: Scorer, settings: Settings, fingerprint: Fingerprint) -> None:
    start.fingerprint.refuse_other(fingerprint, "the policy to start from", "the model of the traces")
    if start.inputs != settings.inputs or bool(start.network.depth) != bool(settings.depth):
        raise UserError(
            f"the policy to start from has inputs {list(start.inputs)} and {start.network.depth} hidden layers, "
            f"the settings say {list(settings.inputs)} and {settings.depth}: give the same, or train from scratch"
        )
    if start.network.hidden != settings.hidden:
        raise UserError(
            f"the policy to start from has width {start.network.hidden} and hidden is {settings.hidden}: leave "
            "hidden out, or train from scratch"
        )
    gate_heads = getattr(settings, "gate_heads", 0)
    if start.network.gate_heads != gate_heads:
        raise UserError(
            f"the policy to start from has {start.network.gate_heads} attention heads and gate_heads is {gate_heads}: "
            "leave gate_heads out, or train from scratch"
        )


def _read_checkpoint(file: Path) -> dict[str, Any]:
    remove = "remove it to train from the start"
    data = read_checked(file, remove)
    try:
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception:  # torch raises many kinds, some of them private to it
        raise UserError(f"{file} holds no checkpoint: {remove}") from None
