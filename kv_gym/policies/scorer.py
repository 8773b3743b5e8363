"""The learned policy: one small network per KV head, from key, value and position (or other inputs) to a score.

As in KVP an MLP per head reads key, value and position of a token.
Differs from the paper in: inputs are standardised, position enters as the logarithms of position and age (a
policy meets lengths it was not trained on), all heads run as one batched product, and the agent called `joint`
trains all heads against one another. :mod:`kv_gym.policies.scoring.inputs` has all inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StrictBool
from torch import Tensor, nn

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.hub import is_hub_id
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.models.rotary import rotary_frequencies
from kv_gym.policies.base import Paper, Policy
from kv_gym.policies.hub import download_policy, push_policy, refuse_large
from kv_gym.policies.scoring.attention_gate import AttentionGate
from kv_gym.policies.scoring.inputs import DEFAULT, INPUTS, check_inputs, input_width, read_inputs
from kv_gym.policies.scoring.network import ScoringNetwork, refuse_width
from kv_gym.weights_folder import WeightsFolder

FORMAT = 3
FOLDER = WeightsFolder(
    "policy", "policy.json", "policy.safetensors", FORMAT, "`kv-gym train` or `kv-gym export`",
    "export the policy again", checked_from=3,
)  # fmt: skip


class _PolicyFile(BaseModel):
    """The content of policy.json; what older files do not hold has the value that it had then."""

    model_config = ConfigDict(extra="forbid")

    format: int
    policy: Literal["scorer"] = "scorer"
    inputs: tuple[str, ...] = DEFAULT
    hidden: Annotated[int, Field(strict=True, ge=1, le=8192)]
    depth: Annotated[int, Field(strict=True, ge=0, le=8)] = 2
    hidden_size: Annotated[int, Field(strict=True, ge=0, lt=65536)] = 0
    gate_heads: Annotated[int, Field(strict=True, ge=0, le=256)] = 0
    fingerprint: dict[str, Any]
    lengths: tuple[NonNegativeInt, NonNegativeInt]
    protect: tuple[NonNegativeInt, NonNegativeInt]
    calibrated: StrictBool
    absolute: StrictBool = False
    training: dict[str, Any]
    sha256: str = ""


class GroupedScorer(ScoringNetwork):
    """One MLP per head with a leading head axis: A heads, f numbers in, two hidden layers, one score.

    Args:
        heads: A, layers x KV heads, layer by layer.
        head_dim: of the model's keys and values.
        hidden: width of the hidden layers.
        inputs: what it reads of a slot, names of :data:`~.scoring.inputs.INPUTS`; f = 2 d + 2 by default.
        hidden_size: width of the model's hidden states, where they are an input.
        depth: hidden layers; 0 is a linear map.
        frequencies: `[pairs]` of the model's rotary embedding, where an input needs them.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        hidden: int = 128,
        inputs: tuple[str, ...] = DEFAULT,
        hidden_size: int = 0,
        depth: int = 2,
        frequencies: Tensor | None = None,
    ):
        super().__init__()
        self.heads, self.head_dim, self.hidden = heads, head_dim, hidden
        self.inputs, self.hidden_size, self.depth = inputs, hidden_size, depth
        sizes = (input_width(inputs, head_dim, hidden_size), *[hidden] * depth, 1)
        self.register_buffer("mean", torch.zeros(heads, 1, sizes[0]))
        self.register_buffer("scale", torch.ones(heads, 1, sizes[0]))
        self.register_buffer("frequencies", frequencies)
        pairs = list(pairwise(sizes))
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(heads, i, o) * (2 / i) ** 0.5) for i, o in pairs)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(heads, 1, o)) for _, o in pairs)
        with torch.no_grad():  # scores start almost equal, so that no slot begins with all of the softmax
            self.weights[-1] *= 0.1

    @torch.no_grad()
    def with_inputs(self, inputs: tuple[str, ...]) -> GroupedScorer:
        """These networks without some of their inputs, as if those always had their means.

        Args:
            inputs: those that stay, in any order.
        """
        widths = [INPUTS[name].width(self.head_dim, self.hidden_size) for name in self.inputs]
        columns = dict(zip(self.inputs, torch.arange(sum(widths)).split(widths), strict=True))
        chosen = torch.cat([columns[name] for name in inputs])
        hidden_size = self.hidden_size if any(INPUTS[name].hidden for name in inputs) else 0
        frequencies = self.frequencies if any(INPUTS[name].rotary for name in inputs) else None
        fewer = GroupedScorer(self.heads, self.head_dim, self.hidden, inputs, hidden_size, self.depth, frequencies)
        state = self.state_dict() | {
            "mean": self.mean[..., chosen], "scale": self.scale[..., chosen], "weights.0": self.weights[0][:, chosen],
        }  # fmt: skip
        fewer.load_state_dict({name: state[name] for name in fewer.state_dict()})
        return fewer.to(self.mean.device)

    def scores(self, x: Tensor, heads: slice | Tensor = slice(None)) -> Tensor:
        """Scores `[heads, m]` of standardised inputs `[heads, m, f]`."""
        *inner, last = zip(self.weights, self.biases, strict=True)
        for weight, bias in inner:
            x = torch.baddbmm(bias[heads], x, weight[heads]).relu_()  # in place: the product itself is not needed again
        return torch.baddbmm(last[1][heads], x, last[0][heads])[..., 0]

    def score_view(self, view: CacheView, heads: slice) -> Tensor:
        """Scores `[batch, kv_heads, tokens]` of a view whose heads have the networks of that run.

        Raises:
            UserError: hidden states of another width.
        """
        batch, count, n, _ = view.keys.shape
        if view.hidden is not None and self.hidden_size:
            refuse_width(view.hidden, self.hidden_size)
        inputs = read_inputs(replace(view, frequencies=self.frequencies), self.inputs)
        flat = inputs.transpose(0, 1).reshape(count, batch * n, -1)
        return self(flat, heads).view(count, batch, n).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Scorer(Policy):
    """A trained network and the model it belongs to.

    Attributes:
        network: a :class:`GroupedScorer`, one MLP for each of the fingerprint's layers x KV heads; or an
            :class:`~.scoring.attention_gate.AttentionGate`.
        fingerprint: of the model whose cache it was trained on; any other is refused.
        lengths: shortest and longest context it was trained on.
        protect: first and last tokens it wants protected.
        calibrated: scores were trained against one another across heads.
        absolute: a score means the same in every context, such as the logarithm of a slot's utility, so that a
            threshold can be fixed ahead; scores that were only ranked within contexts may drift between them.
        training: how it was made: agent, seed, settings, trace hash, held-out reward.
        accept_fingerprint: serve every model of the fingerprint's sizes, such as a finetuned one; never stored.
    """

    paper = Paper("Learning to Evict from Key-Value Cache", "2602.10238", "section 4", venue="ICML 2026")
    network: ScoringNetwork
    fingerprint: Fingerprint
    lengths: tuple[int, int]
    protect: tuple[int, int] = (1, 1)
    calibrated: bool = False
    training: dict = field(default_factory=dict)
    absolute: bool = False
    accept_fingerprint: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what it reads of a slot."""
        return self.network.inputs

    @property
    def frequencies(self) -> Tensor | None:
        """`[pairs]` of the rotary embedding that the model must have, where an input needs them; else None."""
        return self.network.frequencies

    @property
    def needs_queries(self) -> int:
        return max(INPUTS[name].queries for name in self.inputs)

    @property
    def needs_hidden(self) -> bool:  # type: ignore[override]
        """Whether it reads hidden states; then a token is scored once, see :func:`~.scoring.inputs.check_inputs`."""
        return any(INPUTS[name].hidden for name in self.inputs)

    @property
    def static(self) -> bool:  # type: ignore[override]
        """Whether a token may be scored once, when it arrives, by itself."""
        return not self.scores_on_arrival and all(INPUTS[name].static for name in self.inputs)

    @property
    def scores_on_arrival(self) -> bool:  # type: ignore[override]
        """Whether it is a gate that sees the tokens of a forward together, when they arrive."""
        return self.network.gate_heads > 0

    @property
    def protection(self) -> tuple[int, int]:
        return self.protect

    @property
    def comparable(self) -> bool:  # type: ignore[override]
        """Whether scores of different heads may be compared as they are."""
        return self.calibrated

    def nbytes(self) -> int:
        """Bytes of the network's weights, charged in tables."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.network.state_dict().values())

    @torch.no_grad()
    def score(self, view: CacheView) -> Tensor:
        heads = view.keys.shape[1]
        first = self._ordinal(view.layer) * heads
        return self._score_heads(view, slice(first, first + heads))

    @torch.no_grad()
    def score_layers(self, views: Sequence[CacheView]) -> list[Tensor]:
        """All layers as one batched product, where they are the model's and no input depends on the layer."""
        heads = views[0].keys.shape[1]
        per_layer = self.needs_hidden or self.needs_queries
        split = len({view.keys.device for view in views}) > 1
        if per_layer or split or [view.layer for view in views] != list(self.fingerprint.layers):
            return super().score_layers(views)
        names = ("keys", "values", "positions", "valid")
        joined: dict[str, Any] = {name: torch.cat([getattr(view, name) for view in views], 1) for name in names}
        return list(self._score_heads(replace(views[0], **joined), slice(None)).split(heads, 1))

    def _score_heads(self, view: CacheView, networks: slice) -> Tensor:
        """Scores `[batch, heads, tokens]` of a view whose heads have the networks of that run."""
        return self._network_on(view.keys.device).score_view(view, networks)

    def _network_on(self, device: torch.device) -> ScoringNetwork:
        """The network, or a copy of it on another device: the layers of one model may lie on several."""
        if self.network.mean.device == device:
            return self.network
        if device not in self._copies:
            self._copies[device] = copy.deepcopy(self.network).to(device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, ScoringNetwork]:
        return {}

    def _ordinal(self, layer: int) -> int:
        try:
            return self.fingerprint.layers.index(layer)
        except ValueError:
            raise UserError(
                f"the policy knows layers {list(self.fingerprint.layers)} and was asked about layer {layer}: "
                "use it with the model that it was trained on"
            ) from None

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``policy.safetensors``, ``policy.json`` and a generated card; the folder appears whole or not at all.

        Raises:
            UserError: `folder` exists and holds something else than an exported policy.
        """
        return FOLDER.write(folder, self._description(), self.network, {"README.md": self.card().encode()})

    def push_to_hub(self, repo_id: str, private: bool | None = None) -> str:
        """Write the policy into the repository `repo_id` (``owner/name``) of the Hugging Face Hub: its address.

        Raises:
            UserError: an id of another form, no permission, or no network.
        """
        return push_policy(self, repo_id, private)

    def _description(self) -> dict:
        network = self.network
        return {
            "format": FORMAT,
            "policy": "scorer",
            "inputs": list(network.inputs),
            "hidden": network.hidden,
            "depth": network.depth,
            "hidden_size": network.hidden_size,
            **({"gate_heads": network.gate_heads} if network.gate_heads else {}),
            "fingerprint": self.fingerprint.to_json(),
            "lengths": list(self.lengths),
            "protect": list(self.protect),
            "calibrated": self.calibrated,
            "absolute": self.absolute,
            "training": self.training,
        }

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, revision: str | None = None, accept_fingerprint: bool = False
    ) -> Scorer:
        """Read an exported policy; nothing in the folder is ever run.

        Args:
            folder: a folder, or the id ``owner/name`` or ``owner/name@revision`` of a policy on the Hugging Face Hub.
            revision: with an id: a branch, tag or commit.
            accept_fingerprint: serve every model of the same sizes.

        Raises:
            UserError: missing, damaged, oversized or newer files, or weights of other sizes than described.
        """
        folder = download_policy(str(folder), revision) if is_hub_id(str(folder)) else Path(folder)
        refuse_large(folder)
        described, network = FOLDER.read(folder, _PolicyFile, lambda about: _network(about, folder))
        fingerprint = Fingerprint.from_json(described.fingerprint)
        return cls(
            network.eval(), fingerprint, described.lengths, described.protect, described.calibrated, described.training,
            described.absolute, accept_fingerprint,
        )  # fmt: skip

    def card(self) -> str:
        """The model card, generated from what the policy carries."""
        about = self._description()
        rows = {"bytes of weights": self.nbytes(), **asdict(self.fingerprint), **self.training}
        rows |= {
            "trained on contexts of": f"{self.lengths[0]} to {self.lengths[1]} tokens",
            "protects": about["protect"],
        }
        lines = "\n".join(f"| {name} | `{value}` |" for name, value in rows.items())
        return (
            "# A KV-cache eviction policy\n\nScores the slots of a transformers KV cache; trained with kv_gym.\n\n"
            f"| | |\n|---|---|\n{lines}\n\n```python\nfrom kv_gym import EvictingCache\n\n"
            'cache = EvictingCache(model, policy="this-folder", budget="1/8")\n'
            "model.generate(**inputs, past_key_values=cache)\n```\n"
        )


def input_frequencies(inputs: Sequence[str], fingerprint: Fingerprint) -> Tensor | None:
    """The frequencies `[pairs]` of a model's rotary embedding where one of the inputs needs them, else None.

    Raises:
        UserError: an input needs them, and they do not follow from the fingerprint.
    """
    if not any(INPUTS[name].rotary for name in inputs):
        return None
    return rotary_frequencies(fingerprint.rope, fingerprint.head_dim)


def _network(described: _PolicyFile, folder: Path) -> ScoringNetwork:
    check_inputs(described.inputs, folder / "policy.json")
    fingerprint = Fingerprint.from_json(described.fingerprint)
    heads = len(fingerprint.layers) * fingerprint.kv_heads
    if not (0 < heads <= 65536 and 0 < fingerprint.head_dim <= 4096):
        raise UserError(f"{folder} describes impossible sizes; export the policy again")
    if not described.gate_heads:
        sizes = described.hidden, described.inputs, described.hidden_size, described.depth
        return GroupedScorer(heads, fingerprint.head_dim, *sizes, input_frequencies(described.inputs, fingerprint))
    return AttentionGate(heads, fingerprint.kv_heads, described.hidden_size, described.hidden, described.gate_heads)
