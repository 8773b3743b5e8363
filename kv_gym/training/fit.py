"""The training loop that the supervised agents share: draw contexts, step, validate, keep the best."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kv_gym.atomic import whole_file
from kv_gym.errors import UserError
from kv_gym.evaluation.replay import replay
from kv_gym.policies.scorer import CHECKPOINT, GroupedScorer, Scorer, refuse_foreign, slot_inputs
from kv_gym.traces import TraceSet, open_traces
from kv_gym.traces.sequence import Sequence
from kv_gym.training.expected import expected_loss
from kv_gym.training.joint import joint_loss
from kv_gym.training.monitor import Monitor
from kv_gym.training.settings import Settings

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"expected": expected_loss, "joint": joint_loss}
VALIDATION_BUDGETS = (1 / 4, 1 / 8, 1 / 16)


def train(
    agent: str,
    traces: str | Path | TraceSet,
    out: str | Path,
    *,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Scorer:
    """Train an agent on recorded traces and export its best checkpoint into `out`.

    Interrupted runs continue from ``out/checkpoint.pt`` when agent, seed, settings and traces are the same; a run
    that ended is not repeated, and its policy is returned.

    Args:
        agent: ``joint`` or ``expected``; settings in ``agents/<agent>.yml``.
        traces: a trace set, of which the split ``train`` is used.
        out: folder of the exported policy, the TensorBoard log and the checkpoint.
        seed: of weights and draws.
        progress: show a bar.
        **settings: replace those of the agent's file, see :class:`Settings`.

    Returns:
        The exported policy: the checkpoint with the highest held-out reward, which is the mean utility kept at
        equal budgets of 1/4, 1/8 and 1/16 on documents that the optimiser never saw.

    Raises:
        UserError: unknown agent or setting, too few contexts in the split, or a folder with another policy.
    """
    if agent not in LOSSES:
        raise UserError(f"unknown agent {agent!r}; known: {', '.join(sorted(LOSSES))}")
    chosen = Settings.load(agent, **settings)
    refuse_foreign(Path(out))
    trace_set = traces if isinstance(traces, TraceSet) else open_traces(traces)
    finished = _finished(Path(out), agent, seed, chosen, trace_set.hash)
    if finished is not None:
        return finished
    run = _Run(agent, chosen, seed, trace_set)
    return run.to_the_end(Path(out), progress)


def _finished(out: Path, agent: str, seed: int, settings: Settings, traces: str) -> Scorer | None:
    if not (out / "policy.json").is_file():
        return None
    there = Scorer.from_pretrained(out)
    if {k: v for k, v in there.training.items() if k != "held_out_reward"} != _told(agent, seed, settings, traces):
        raise UserError(f"{out} holds a policy that was trained otherwise: name a new folder, or remove that one")
    return there


def _told(agent: str, seed: int, settings: Settings, traces: str) -> dict:
    """What a policy says of its training, as plain JSON data."""
    return json.loads(json.dumps({"agent": agent, "seed": seed, "settings": asdict(settings), "traces": traces}))


@dataclass
class _Drawn:
    """One training context: inputs `[heads, n, f]` and utility `[heads, n]` of all layers' KV heads."""

    inputs: Tensor
    utility: Tensor


class _Run:
    def __init__(self, agent: str, settings: Settings, seed: int, traces: TraceSet):
        self.agent, self.settings, self.seed = agent, settings, seed
        self.fingerprint, self.trace_hash = traces.fingerprint, traces.hash
        sequences = traces.select(split="train").load()
        training, self.validation = _held_out(sequences, settings.validation)
        self.lengths = (min(len(s.tokens) for s in sequences), max(len(s.tokens) for s in sequences))
        self.contexts = [_drawn(s) for s in training]

        torch.manual_seed(seed)
        heads = len(self.fingerprint.layers) * self.fingerprint.kv_heads
        self.network = GroupedScorer(heads, self.fingerprint.head_dim, settings.hidden)
        self.network.standardise(torch.cat([c.inputs for c in self.contexts[:32]], 1))
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=settings.rate, weight_decay=settings.weight_decay
        )
        self.step, self.best_reward = 0, -math.inf
        self.best: dict[str, Tensor] = {}

    def to_the_end(self, out: Path, progress: bool) -> Scorer:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint = out / CHECKPOINT
        self._resume(checkpoint)
        self._save(checkpoint)
        with Monitor(out, f"train {self.agent}", self.settings.steps, self.step, progress) as monitor:
            while self.step < self.settings.steps:
                loss = self._one_step()
                monitor.advance(self.step)
                if self.step % 10 == 0:
                    monitor.log(self.step, train__loss=loss, train__rate=self.optimizer.param_groups[0]["lr"])
                if self.step % self.settings.every == 0 or self.step == self.settings.steps:
                    reward = self._validate()
                    monitor.log(self.step, validation__utility_kept=reward)
                    monitor.note(f"held-out reward {reward:.3f}")
                    self._save(checkpoint)
        self.network.load_state_dict(self.best)
        policy = self._policy()
        policy.save_pretrained(out)
        checkpoint.unlink(missing_ok=True)
        return policy

    def _one_step(self) -> float:
        # seeded by the step: a resumed run draws what an uninterrupted one would
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        picked = [self.contexts[i] for i in torch.randint(len(self.contexts), (self.settings.contexts,))]
        n = min(self.settings.slots, min(c.utility.shape[1] for c in picked))
        slots = [torch.randperm(c.utility.shape[1])[:n] for c in picked]
        inputs = torch.cat([c.inputs[:, s] for c, s in zip(picked, slots, strict=True)], 1)
        utility = torch.stack([c.utility[:, s] for c, s in zip(picked, slots, strict=True)])
        scores = self.network(inputs).view(inputs.shape[0], len(picked), -1).transpose(0, 1)
        loss = LOSSES[self.agent](scores, utility)
        self._set_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        if not math.isfinite(loss.item()):
            raise UserError(
                f"the loss is {loss.item()} at step {self.step}: train with a lower rate than {self.settings.rate}"
            )
        self.step += 1
        return loss.item()

    def _set_rate(self) -> None:
        done = self.step / self.settings.steps
        factor = min(1.0, (self.step + 1) / 20) * (1 + math.cos(math.pi * done)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * factor

    def _policy(self) -> Scorer:
        training = _told(self.agent, self.seed, self.settings, self.trace_hash) | {"held_out_reward": self.best_reward}
        calibrated = self.agent == "joint"
        return Scorer(self.network.eval(), self.fingerprint, self.lengths, self.settings.protect, calibrated, training)

    def _validate(self) -> float:
        rows = replay({"": self._policy()}, self.validation, VALIDATION_BUDGETS)
        reward = sum(row["utility_kept"] * row["n"] for row in rows) / sum(row["n"] for row in rows)
        if reward > self.best_reward:
            self.best_reward = reward
            self.best = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.network.train()
        return reward

    def _identity(self) -> str:
        return json.dumps(_told(self.agent, self.seed, self.settings, self.trace_hash))

    def _save(self, file: Path) -> None:
        state = {
            "identity": self._identity(), "step": self.step, "best_reward": self.best_reward, "best": self.best,
            "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        with whole_file(file) as part:
            torch.save(state, part)

    def _resume(self, file: Path) -> None:
        if not file.is_file():
            return
        try:
            state = torch.load(file, weights_only=True)
        except Exception:  # torch raises many kinds, some of them private to it
            raise UserError(f"{file} is damaged: remove it to train from the start") from None
        if state.get("identity") != self._identity():
            return  # another run's leftovers: start anew
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best_reward, self.best = state["step"], state["best_reward"], state["best"]


def _held_out(sequences: list[Sequence], share: float) -> tuple[list[Sequence], list[Sequence]]:
    """Split by document, or, where there are too few documents for that, keep the last contexts for validation."""
    if len(sequences) < 4:
        raise UserError(
            f"training needs at least 4 contexts in the split 'train', and the traces hold {len(sequences)}"
        )
    documents = sorted({s.text_hash for s in sequences})
    if len(documents) < 4:
        last = max(1, round(share * len(sequences)))
        return sequences[:-last], sequences[-last:]
    chosen = set(documents[:: max(2, round(1 / max(share, 1e-6)))])
    return [s for s in sequences if s.text_hash not in chosen], [s for s in sequences if s.text_hash in chosen]


def _drawn(sequence: Sequence) -> _Drawn:
    keys, values = torch.from_numpy(sequence.keys).flatten(0, 1), torch.from_numpy(sequence.values).flatten(0, 1)
    n = keys.shape[1]
    inputs = slot_inputs(keys, values, torch.arange(n).expand(keys.shape[:2]), torch.tensor(n))
    return _Drawn(inputs, torch.from_numpy(sequence.utility()).flatten(0, 1))
