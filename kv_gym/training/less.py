"""The agent `less`: trains the kernels that absorb evicted pairs, layer by layer, from text that is read once.

Source: LESS (arXiv 2402.09398, section 3.2) and its code. A layer's kernels descend the squared error of its output,
behind the output projection, when pairs that a policy evicts are weighed by `phi(q) . psi(k)`; keys, queries and the
target are those of the full cache, so layers do not wait for one another and the model is frozen.
Differs from the paper in: the model runs over fresh windows of text and each layer learns while it is run, so nothing
is recorded, and there is no dropout; any policy that cuts layer by layer may evict, at a budget that is drawn for every
step; the error counts in units of the output's energy, and its gradient is clipped; the scale of `phi` begins at the
mean log-sum-exp of the kept pairs' logits; a layer that never beats dropping on held-out text absorbs nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from kv_gym.checksums import read_checked, write_checked
from kv_gym.errors import UserError
from kv_gym.files import parse_json, validated
from kv_gym.live.config import CacheConfig
from kv_gym.live.simulated_eviction import SimulatedLayer, refuse_unfit, simulate_evictions
from kv_gym.live.tiers.low_rank import FOLDER, LayerKernels, LowRankState
from kv_gym.models.attention import output_projection
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies import Policy, make_policy
from kv_gym.training.monitor import Monitor
from kv_gym.weights_folder import CHECKPOINT

VALIDATION_WINDOWS = 8
LARGEST_GRADIENT = 1.0  # norm over a layer's kernels, of an error in units of the output's energy


class LessSettings(BaseModel):
    """Settings of `less`.

    Attributes:
        rank: R, numbers that a key or query is mapped to; a state of 8 takes the bytes of 4 slots in float32.
        width: of the kernels' hidden layers; the paper has 512 for heads of 128 channels.
        steps: optimiser steps.
        rows: windows of text per step.
        tokens: of a window.
        block: tokens between evictions.
        queries: random queries of a window that the error is taken of.
        smallest, largest: budgets, as shares of a window; drawn log-uniformly.
        rate: peak learning rate of AdamW; a warm-up, then a cosine to zero.
        validation: share of every text, at its end, that chooses the checkpoint.
        every: steps between validations (and checkpoints).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    rank: PositiveInt = 8
    width: PositiveInt = 128
    steps: PositiveInt = 1000
    rows: PositiveInt = 4
    tokens: PositiveInt = 512
    block: PositiveInt = 32
    queries: PositiveInt = 64
    smallest: PositiveFloat = 1 / 16
    largest: PositiveFloat = 1 / 4
    rate: NonNegativeFloat = 3e-3
    validation: NonNegativeFloat = 0.1
    every: PositiveInt = 100


def train_less(
    texts: Sequence[Sequence[int]],
    out: str | Path,
    *,
    model: Any,
    policy: str | Path | Policy = "h2o",
    seed: int = 0,
    resume: bool | None = None,
    progress: bool = True,
    **settings: Any,
) -> LowRankState:
    """Train the kernels of a low-rank state of evicted pairs (LESS), for ``evicted="less:FOLDER"``.

    The model reads windows of text and stays as it is. An interrupted run continues from ``out/checkpoint.pt`` and ends
    as if it had not been interrupted; a finished run is not repeated, and its kernels are returned.

    Args:
        texts: documents that windows are drawn from. In Python, each is a list of token ids.
        out: folder of the trained state, the TensorBoard log and the checkpoint.
        model: transformers decoder that the kernels are for.
        policy: which policy evicts in training; the kernels serve others too, less well.
        seed: of weights and random draws.
        resume: continue an interrupted run, and refuse where there is none; if false, start anew. By default a run
            continues where it can.
        progress: show a bar.
        **settings: In Python, see :class:`LessSettings`.

    Returns:
        The trained tier, each layer from the checkpoint with its smallest held-out error. Its ``training`` holds
        policy, seed, settings, seconds, ``error``, the held-out squared error as a share of that of dropping, and
        ``layers``, both squared errors of each layer.

    Raises:
        UserError: an unknown setting, texts that are shorter than two windows, a policy that does not cut layer by
            layer, or a folder with something else in it.
    """
    resolved = validated(LessSettings, LessSettings().model_dump() | settings, "agent 'less'")
    if not resolved.smallest <= resolved.largest <= 1:
        raise UserError(
            f"smallest is {resolved.smallest:g} and largest {resolved.largest:g}; expected smallest <= largest <= 1"
        )
    run = _Run(texts, Path(out), model, make_policy(policy), seed, resolved)
    finished = run.finished()
    return finished if finished is not None and resume is not False else run.train(resume, progress)


class _Run:
    """One training run; :func:`train_less` is its front door."""

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        out: Path,
        model: Any,
        policy: Policy,
        seed: int,
        settings: LessSettings,
    ):
        FOLDER.refuse_foreign(out)
        self.out, self.model, self.settings, self.seed = out, model, settings, seed
        self.config = CacheConfig.parse(model, policy=policy, budget=1, trigger=f"block:{settings.block}")
        refuse_unfit(self.config)
        self.training, self.validation = self._split(texts)
        self.fingerprint = Fingerprint.of(model)
        self.identity: dict[str, Any] = {
            "agent": "less", "policy": policy.name, "seed": seed, "settings": settings.model_dump(mode="json"),
            "texts": hashlib.sha256(json.dumps([list(text) for text in texts]).encode()).hexdigest(),
            "weights": self.fingerprint.weights,
        }  # fmt: skip

    def _split(self, texts: Sequence[Sequence[int]]) -> tuple[list[Tensor], Tensor]:
        """Documents to draw windows from, and evenly spaced windows `[count, tokens]` of their ends."""
        tokens = self.settings.tokens
        training: list[Tensor] = []
        held_out: list[Tensor] = []
        for text in texts:
            ids = torch.tensor(text, dtype=torch.int64)
            cut = len(ids) - max(tokens, int(self.settings.validation * len(ids)))
            if cut >= tokens:
                training.append(ids[:cut])
                held_out += ids[cut:].unfold(0, tokens, tokens).unbind()
        if not training:
            longest = max(map(len, texts), default=0)
            raise UserError(
                f"the longest text has {longest} tokens, and one window to train on and one to validate on take "
                f"{2 * tokens}: give longer texts, or fewer tokens to a window (tokens)"
            )
        count = min(VALIDATION_WINDOWS, len(held_out))
        chosen = [held_out[len(held_out) * number // count] for number in range(count)]
        return training, torch.stack(chosen).to(self.model.device)

    def finished(self) -> LowRankState | None:
        """The state of an earlier run like this one, if there is one."""
        if not (self.out / FOLDER.description).is_file():
            return None
        state = LowRankState.from_pretrained(self.out)
        if {name: state.training.get(name) for name in self.identity} != self.identity:
            raise UserError(f"{self.out} holds a state that was trained otherwise: name a new folder, or remove it")
        return state

    def train(self, resume: bool | None, progress: bool) -> LowRankState:
        """Train to the end, or from the last checkpoint to the end, and write the best state."""
        torch.manual_seed(self.seed)
        sizes = self.fingerprint.query_heads, self.fingerprint.kv_heads, self.fingerprint.head_dim
        settings, checkpoint = self.settings, self.out / CHECKPOINT
        self.kernels = [LayerKernels(*sizes, settings.rank, settings.width) for _ in self.fingerprint.layers]
        for layer in self.kernels:
            layer.to(self.model.device)
        self.optimizer = torch.optim.AdamW(
            [weight for layer in self.kernels for weight in layer.parameters()], lr=settings.rate, weight_decay=0.0
        )
        self.step, self.seconds = 0, 0.0
        if not self._resume(checkpoint, resume):
            self._scale_to_kept_mass()
            self.errors = [(math.inf, math.inf)] * len(self.kernels)  # held-out, absorbed and dropped
            self.best: list[dict[str, Tensor]] = [{}] * len(self.kernels)  # weights of each layer
            self._validate()
        self.out.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter() - self.seconds
        with Monitor(self.out, "train less", settings.steps, self.step, progress) as monitor:
            while self.step < settings.steps:
                monitor.log(self.step, "train", {"error": self._train_step()})
                self.step += 1
                monitor.advance(self.step)
                if self.step % settings.every == 0 or self.step == settings.steps:
                    monitor.log(self.step, "validation", {"error": self._validate()})
                    self.seconds = time.perf_counter() - began
                    self._save(checkpoint)
        for layer, own, (absorbed, dropped) in zip(self.kernels, self.best, self.errors, strict=True):
            layer.load_state_dict(own)
            if absorbed >= dropped:
                layer.absorb_nothing()
        result = {"error": self._error(), "layers": self.errors, "seconds": round(self.seconds, 1)}
        LowRankState(self.kernels, self.fingerprint, self.identity | result).save_pretrained(self.out)
        checkpoint.unlink(missing_ok=True)
        return LowRankState.from_pretrained(self.out)

    def _scale_to_kept_mass(self) -> None:
        """Give features of size 1 the weight that queries pay the kept tokens, in the geometric mean."""
        share = math.sqrt(self.settings.smallest * self.settings.largest)
        queries = self._queries(share, torch.Generator().manual_seed(0))

        def scale(layer: SimulatedLayer) -> None:
            mass = _kept_products(layer, queries, self.settings.block)[0].logsumexp(-1)
            self.kernels[layer.ordinal].log_scale.copy_(mass.mean((0, 3)).view(-1, 1, 1))

        self._simulate(self.validation[: self.settings.rows], share, scale)

    def _train_step(self) -> float:
        """One optimiser step on fresh windows, seeded by its own number: the error as a share of that of dropping."""
        settings = self.settings
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        lengths = torch.tensor([len(ids) - settings.tokens + 1 for ids in self.training], dtype=torch.float64)
        windows = []
        for number in torch.multinomial(lengths, settings.rows, True, generator=generator).tolist():
            start = int(torch.randint(int(lengths[number]), (), generator=generator))
            windows.append(self.training[number][start : start + settings.tokens])
        low, high = math.log(settings.smallest), math.log(settings.largest)
        share = math.exp(low + (high - low) * float(torch.rand((), generator=generator)))
        errors: list[tuple[float, float]] = []

        def descend(layer: SimulatedLayer) -> None:
            with torch.enable_grad():
                kernels = self.kernels[layer.ordinal]
                absorbed, dropped, energy = squared_errors(kernels, layer, queries, settings.block)
                (absorbed / energy.clamp(min=1e-30)).backward()
                torch.nn.utils.clip_grad_norm_(kernels.parameters(), LARGEST_GRADIENT)
            errors.append((float(absorbed.detach()), float(dropped)))

        queries = self._queries(share, generator)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate * self._schedule()
        self.optimizer.zero_grad()
        self._simulate(torch.stack(windows).to(self.model.device), share, descend)
        self.optimizer.step()
        return sum(absorbed for absorbed, _ in errors) / max(1e-30, sum(dropped for _, dropped in errors))

    def _schedule(self) -> float:
        warm = max(1, self.settings.steps // 20)
        return min(1.0, (self.step + 1) / warm) * (1 + math.cos(math.pi * self.step / self.settings.steps)) / 2

    def _queries(self, share: float, generator: torch.Generator) -> Tensor:
        """Positions of random queries of a window, of those that come after the first eviction, ascending."""
        settings = self.settings
        first = min(-(-self._slots(share) // settings.block) * settings.block, settings.tokens - 1)
        order = first + torch.randperm(settings.tokens - first, generator=generator)
        return order[: settings.queries].sort().values

    def _slots(self, share: float) -> int:
        return max(1, round(share * self.settings.tokens))

    def _simulate(self, windows: Tensor, share: float, show) -> None:
        simulate_evictions(self.config.model, windows, self.config.fork(budget=self._slots(share)), show)

    def _validate(self) -> float:
        """The held-out error at the geometric mean of the budgets; the best weights of each layer so far are kept."""
        share = math.sqrt(self.settings.smallest * self.settings.largest)
        queries = self._queries(share, torch.Generator().manual_seed(0))
        sums = torch.zeros(len(self.kernels), 2, dtype=torch.float64)

        def measure(layer: SimulatedLayer) -> None:
            found = squared_errors(self.kernels[layer.ordinal], layer, queries, self.settings.block)
            sums[layer.ordinal] += torch.stack(found[:2]).double().cpu()

        for windows in self.validation.split(self.settings.rows):
            self._simulate(windows, share, measure)
        for ordinal, (absorbed, dropped) in enumerate(sums.tolist()):
            if absorbed < self.errors[ordinal][0]:
                self.errors[ordinal] = absorbed, dropped
                state = self.kernels[ordinal].state_dict()
                self.best[ordinal] = {name: tensor.clone() for name, tensor in state.items()}
        return self._error()

    def _error(self) -> float:
        """The smallest held-out squared errors of all layers, as a share of those of dropping."""
        dropped = sum(dropped for _, dropped in self.errors)
        return sum(min(pair) for pair in self.errors) / max(1e-30, dropped)

    def _save(self, file: Path) -> None:
        state = {
            "identity": json.dumps(self.identity), "step": self.step, "seconds": self.seconds,
            "best": self.best, "errors": self.errors,
            "kernels": [layer.state_dict() for layer in self.kernels], "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        data = io.BytesIO()
        torch.save(state, data)
        write_checked(file, data.getvalue())

    def _resume(self, file: Path, resume: bool | None) -> bool:
        """Whether the run goes on from a checkpoint."""
        if file.is_file() and resume is not False:
            again = "remove it to train from the start"
            try:
                state = torch.load(io.BytesIO(read_checked(file, again)), weights_only=True, map_location="cpu")
            except UserError:
                raise
            except Exception:  # torch raises many kinds, some of them private to it
                raise UserError(f"{file} holds no checkpoint: {again}") from None
            if parse_json(state["identity"], str(file)) == self.identity:
                for layer, own in zip(self.kernels, state["kernels"], strict=True):
                    layer.load_state_dict(own)
                self.optimizer.load_state_dict(state["optimizer"])
                self.step, self.seconds = state["step"], state["seconds"]
                self.best, self.errors = state["best"], state["errors"]
                return True
        if resume:
            raise UserError(
                f"{self.out} holds no checkpoint of this run with the same seed, settings, policy and texts: leave "
                "--resume out to start anew"
            )
        return False


def squared_errors(
    kernels: LayerKernels, layer: SimulatedLayer, queries: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error of a layer's output at some queries, mean over them: with evicted pairs absorbed, and dropped.

    The last one is the full cache's output squared. The parallel form: every evicted pair has its own weight, and no
    state is made.

    Args:
        kernels: of the layer.
        layer: what the full cache and a bounded one did.
        queries: `[m]` positions.
        block: tokens between evictions.
    """
    products, evicted = _kept_products(layer, queries, block)
    exact, heads, d = products.dtype, layer.keys.shape[1], layer.keys.shape[3]
    query, keys, values = (tensor.to(exact) for tensor in (layer.query[:, :, queries], layer.keys, layer.values))
    mass = products.logsumexp(-1, keepdim=True)
    dropped = (products - mass).exp() @ values[:, :, None]  # [batch, kv_heads, group, m, d]
    phi = kernels.phi(query.to(kernels.mix.dtype)).unflatten(1, (heads, -1))
    weights = phi @ kernels.psi(keys.to(kernels.mix.dtype))[:, :, None].transpose(-1, -2)
    scale = (kernels.log_scale.unflatten(0, (heads, -1)) - mass).exp()
    weights = weights.masked_fill(~evicted[:, :, None], 0).to(exact) * scale
    absorbed = (dropped + weights @ values[:, :, None]) / (1 + weights.sum(-1, keepdim=True))

    target = layer.output[:, queries].to(exact).transpose(1, 2)
    projection = output_projection(layer.module, query.shape[1], d).to(exact)

    def energy(output: Tensor) -> Tensor:
        return torch.einsum("bhmd,hde->bme", output, projection).square().sum(-1).mean()

    return energy(absorbed.flatten(1, 2) - target), energy(dropped.flatten(1, 2) - target), energy(target)


def _kept_products(layer: SimulatedLayer, queries: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Scaled products of some queries and the keys that a bounded cache shows them, and what was evicted before.

    Returns:
        `[batch, kv_heads, group, m, n]` float32 or wider, -inf for other keys; and `[batch, kv_heads, m, n]` bool.
    """
    exact = torch.promote_types(layer.query.dtype, torch.float32)
    query, keys = layer.query[:, :, queries].to(exact), layer.keys.to(exact)
    at, tokens = queries[:, None].to(keys.device), torch.arange(keys.shape[2], device=keys.device)
    first = at // block * block  # of the query's own block, none of which was judged yet
    held = layer.held[queries // block].movedim(0, 2)
    visible = (held | (tokens >= first)) & (tokens <= at)
    products = query.unflatten(1, (keys.shape[1], -1)) @ keys[:, :, None].transpose(-1, -2) * layer.scaling
    return products.masked_fill(~visible[:, :, None], -torch.inf), ~held & (tokens < first)
