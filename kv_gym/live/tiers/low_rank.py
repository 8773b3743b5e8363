"""Evicted pairs are absorbed into a state of fixed size, which takes part in attention: LESS.

Source: LESS (arXiv 2402.09398, ICML 2024) and its code. Per KV head the state is `H [R, d]` and `z [R]`; an evicted
pair adds `psi(k)^T v` and `psi(k)`, and a query attends to it as if the pair were still there with weight
`phi(q) . psi(k)` in place of `exp(q . k / sqrt d)`:

    phi(q) = e^c |gelu(gelu(q A) B)|      psi(k) = |u + (u M) t|  with  u = |s| gelu(gelu(k C) D)
    output = (phi(q) H + sum of exp(q . k) v over kept pairs) / (phi(q) z + sum of exp(q . k))

Differs from the paper in: a KV head of a group has one state, which the queries of its group read through a `phi` of
their own (the code has one state per query head); `phi` has a factor `e^c` per query head, because all logits of a
head may be far from 0; any policy evicts, at any time; a state that absorbed nothing has weight 0 (in the code 1e-6).
"""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import gelu

from kv_gym.checksums import described_data_hash
from kv_gym.live.tiers.base import EvictedPairs, LayerTier, Tier
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies.base import Paper
from kv_gym.weights_folder import WeightsFolder, weights_bytes

FORMAT = 1
RANK, WIDTH = 8, 128
START = 1e-4  # of the scales of psi: the training begins next to a tier that drops
FOLDER = WeightsFolder(
    "state", "state.json", "state.safetensors", FORMAT, "`kv-gym train-less`", "train the state again"
)


class LayerKernels(nn.Module):
    """`phi` of every query head of a layer and `psi` of every KV head.

    Args:
        query_heads, kv_heads, head_dim: of the layer.
        rank: R, numbers that a query or key is mapped to.
        width: of the hidden layers; the paper has 512.
        scale: what the scales of `psi` begin with; 0 absorbs nothing.

    Attributes:
        log_scale: `[query_heads, 1, 1]`, the logarithm c of the factor of `phi`.
    """

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int, width: int, scale: float = START):
        super().__init__()

        def matrices(heads: int, rows: int, columns: int) -> nn.Parameter:
            bound = (6 / (rows + columns)) ** 0.5  # Xavier's
            return nn.Parameter(torch.empty(heads, rows, columns).uniform_(-bound, bound))

        self.log_scale = nn.Parameter(torch.zeros(query_heads, 1, 1))
        self.query_in, self.query_out = matrices(query_heads, head_dim, width), matrices(query_heads, width, rank)
        self.key_in, self.key_out = matrices(kv_heads, head_dim, width), matrices(kv_heads, width, rank)
        self.mix = matrices(kv_heads, rank, rank)
        self.key_scale = nn.Parameter(torch.full((kv_heads, 1, rank), scale))
        self.mix_scale = nn.Parameter(torch.full((kv_heads, 1, rank), scale))

    @torch.no_grad()
    def absorb_nothing(self) -> None:
        """Set the scales of `psi` to 0: evicted pairs are dropped."""
        self.key_scale.zero_()
        self.mix_scale.zero_()

    def phi(self, query: Tensor) -> Tensor:
        """Features of queries `[batch, query_heads, m, d]`: `[batch, query_heads, m, R]`, before the factor `e^c`."""
        return gelu(gelu(query @ self.query_in) @ self.query_out).abs()

    def psi(self, keys: Tensor) -> Tensor:
        """Features of keys `[batch, kv_heads, n, d]`: non-negative, `[batch, kv_heads, n, R]`."""
        u = self.key_scale.abs() * gelu(gelu(keys @ self.key_in) @ self.key_out)
        return (u + (u @ self.mix) * self.mix_scale).abs()


class _StateFile(BaseModel):
    """The content of state.json."""

    model_config = ConfigDict(extra="forbid")

    format: int
    tier: Literal["less"]
    rank: Annotated[int, Field(strict=True, ge=1, le=1024)]
    width: Annotated[int, Field(strict=True, ge=1, le=65536)]
    fingerprint: dict[str, Any]
    training: dict[str, Any]
    sha256: str


class LowRankState(Tier):
    """Evicted pairs are absorbed into a low-rank state per KV head, by kernels that `kv-gym train-less` learned.

    Policies score, count and observe the full-precision slots alone: they choose as if evicted pairs were dropped. The
    state takes 4 R (d + 1) bytes for each KV head of a row, however many pairs it absorbed. It cannot give them back,
    and weighs each of them by a smooth function of query and key: it serves the sum of many weak pairs, not the recall
    of one. Attention that the state takes part in is computed in float32, whatever implementation the model has.

    Args:
        kernels: one for each full-attention layer.
        fingerprint: of the model that they were trained on.
        training: how, as plain JSON data.
        folder: from which they were read, or "".

    Attributes:
        digest: SHA-256 of weights and fingerprint; tiers of one digest are the same.
        weight_bytes: of the kernels, which all caches of a model share.
    """

    paper = Paper("Get More with LESS: Synthesizing Recurrence with KV Cache Compression for Efficient LLM Inference",
                  "2402.09398", venue="ICML 2024")  # fmt: skip

    def __init__(
        self,
        kernels: list[LayerKernels],
        fingerprint: Fingerprint,
        training: dict[str, Any] | None = None,
        folder: str = "",
    ):
        self.kernels, self.fingerprint = [layer.eval().requires_grad_(False) for layer in kernels], fingerprint
        self.training, self.folder = dict(training or {}), folder
        self.rank, self.width = kernels[0].key_out.shape[2], kernels[0].key_out.shape[1]
        self.weight_bytes = sum(tensor.nbytes for layer in kernels for tensor in layer.parameters())
        self.digest = described_data_hash(fingerprint.to_json(), weights_bytes(nn.ModuleList(self.kernels)))
        self._copies: dict[tuple[int, torch.device, torch.dtype], LayerKernels] = {}
        self._serves: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowRankState) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def untrained(
        cls, fingerprint: Fingerprint, rank: int = RANK, width: int = WIDTH, scale: float = 0.0
    ) -> LowRankState:
        """Random kernels for a model; with a `scale` of 0 they absorb nothing."""
        sizes = fingerprint.query_heads, fingerprint.kv_heads, fingerprint.head_dim, rank, width, scale
        return cls([LayerKernels(*sizes) for _ in fingerprint.layers], fingerprint)

    @property
    def name(self) -> str:
        """Such as ``less:runs/less``."""
        return f"less:{self.folder}" if self.folder else "less"

    @property
    def label(self) -> str:
        """Such as ``less (h2o, 5b8c61d2a0f4)``: the policy that evicted in training, and the digest's beginning."""
        return f"less ({self.training.get('policy', 'untrained')}, {self.digest[:12]})"

    def refuse_other_model(self, model) -> None:
        """Raise a UserError for a model that the kernels were not trained on; each model is looked at once."""
        if model not in self._serves:
            self.fingerprint.refuse_other(Fingerprint.of(model), f"tier {self.name!r}", type(model).__name__)
            self._serves.add(model)

    def begin(self, ordinal: int = 0) -> LayerTier:
        return AbsorbingLayer(self, ordinal)

    def kernels_of(self, ordinal: int, like: Tensor) -> LayerKernels:
        """A layer's kernels on the device of a tensor, in float32 or its wider dtype."""
        dtype, own = torch.promote_types(like.dtype, torch.float32), self.kernels[ordinal]
        if own.mix.device == like.device and own.mix.dtype == dtype:
            return own
        place = ordinal, like.device, dtype
        if place not in self._copies:
            self._copies[place] = copy.deepcopy(own).to(like.device, dtype)
        return self._copies[place]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``state.safetensors`` and ``state.json``, which :meth:`from_pretrained` reads.

        Raises:
            UserError: `folder` is a file, or holds something else.
        """
        about = {
            "format": FORMAT, "tier": "less", "rank": self.rank, "width": self.width,
            "fingerprint": self.fingerprint.to_json(), "training": self.training,
        }  # fmt: skip
        return FOLDER.write(folder, about, nn.ModuleList(self.kernels))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LowRankState:
        """Read what :meth:`save_pretrained` wrote; nothing in the folder is ever run.

        Raises:
            UserError: missing, damaged or newer files.
        """
        described, kernels = FOLDER.read(Path(folder), _StateFile, _kernels)
        fingerprint = Fingerprint.from_json(described.fingerprint)
        layers: list[Any] = list(kernels)
        return cls(layers, fingerprint, described.training, str(folder))


def _kernels(described: _StateFile) -> nn.ModuleList:
    fingerprint = Fingerprint.from_json(described.fingerprint)
    sizes = fingerprint.query_heads, fingerprint.kv_heads, fingerprint.head_dim, described.rank, described.width
    return nn.ModuleList(LayerKernels(*sizes) for _ in fingerprint.layers)


class AbsorbingLayer(LayerTier):
    """The state of one layer.

    Attributes:
        settings: the kernels.
        ordinal: which of the evicting layers it is.
        sums: H, `[batch, kv_heads, R, d]`; None before the first eviction.
        mass: z, `[batch, kv_heads, R]`; None before the first eviction. Both float32, or float64 as keys are.
    """

    row_tensors = ("sums", "mass")
    held_as = "in a low-rank state"

    def __init__(self, settings: LowRankState, ordinal: int):
        self.settings, self.ordinal = settings, ordinal
        self.sums: Tensor | None = None
        self.mass: Tensor | None = None

    @property
    def absorbs(self) -> bool:
        return self.mass is not None

    def take(self, pairs: EvictedPairs) -> None:
        keys, values = pairs.select(pairs.keys, pairs.values)
        kernels = self.settings.kernels_of(self.ordinal, keys)
        keys, values = keys.to(kernels.mix.dtype), values.to(kernels.mix.dtype)
        features = kernels.psi(keys)
        if not pairs.equal:
            real = torch.arange(pairs.most, device=keys.device) < pairs.evicted.sum(2)[..., None]
            features, values = (tensor.masked_fill(~real[..., None], 0) for tensor in (features, values))
        sums, mass = features.transpose(-1, -2) @ values, features.sum(2)
        self.sums = sums if self.sums is None else self.sums + sums
        self.mass = mass if self.mass is None else self.mass + mass

    def absorbed(self, query: Tensor) -> tuple[Tensor, Tensor]:
        assert self.mass is not None and self.sums is not None
        kernels = self.settings.kernels_of(self.ordinal, query)
        heads = self.mass.shape[1]
        phi = kernels.phi(query.to(kernels.mix.dtype)).unflatten(1, (heads, -1))  # [batch, kv_heads, group, m, R]
        weight = (phi @ self.mass[:, :, None, :, None])[..., 0]
        value = phi @ self.sums[:, :, None] / weight.clamp(min=torch.finfo(weight.dtype).tiny)[..., None]
        return weight.log().flatten(1, 2) + kernels.log_scale[..., 0], value.flatten(1, 2)

    def forget(self) -> None:
        self.sums = self.mass = None

    def saved_shapes(self, rows: int, dtype: torch.dtype) -> dict[str, tuple[list[int], torch.dtype]]:
        sizes, exact = self.settings.fingerprint, torch.promote_types(dtype, torch.float32)
        shape = [rows, sizes.kv_heads, self.settings.rank]
        return {"sums": ([*shape, sizes.head_dim], exact), "mass": (shape, exact)}
