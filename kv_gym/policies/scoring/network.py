"""What the networks of learned policies share: standardised inputs, and scores for a run of heads."""

from __future__ import annotations

from torch import Tensor, nn

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError


class ScoringNetwork(nn.Module):
    """A network for all heads of a model; :meth:`scores` and :meth:`score_view` are its subclass's.

    Attributes:
        heads: layers x KV heads, layer by layer.
        hidden, depth: width and number of its hidden layers.
        inputs: what it reads of a slot, names of :data:`~.inputs.INPUTS`.
        hidden_size: width of the model's hidden states, where they are an input; else 0.
        gate_heads: attention heads of a gate, which sees the whole context; 0: tokens are scored one by one.
        mean, scale: `[heads, 1, f]` of the inputs.
        frequencies: `[pairs]` of the model's rotary embedding, where an input needs them; else None.
    """

    heads: int
    hidden: int
    depth: int
    inputs: tuple[str, ...]
    hidden_size: int
    gate_heads: int = 0
    mean: Tensor
    scale: Tensor
    frequencies: Tensor | None

    def standardise(self, inputs: Tensor) -> None:
        """Take mean and scale of every input from a sample `[heads, m, f]`."""
        self.mean.copy_(inputs.mean(1, keepdim=True))
        self.scale.copy_(1 / inputs.std(1, keepdim=True).clamp(min=1e-3))

    def forward(self, inputs: Tensor, heads: slice | Tensor = slice(None)) -> Tensor:
        """Scores `[heads, m]` of inputs `[heads, m, f]`; `heads` picks a run of the networks, or one per row."""
        return self.scores((inputs - self.mean[heads]) * self.scale[heads], heads)

    def scores(self, x: Tensor, heads: slice | Tensor = slice(None)) -> Tensor:
        """The same of inputs that were standardised before: training does that once, not at every step."""
        raise NotImplementedError

    def score_view(self, view: CacheView, heads: slice) -> Tensor:
        """Scores `[batch, kv_heads, tokens]` of a view whose heads have the networks of that run."""
        raise NotImplementedError


def refuse_width(hidden: Tensor, expected: int) -> None:
    """Raise a UserError where hidden states are of another width than a network's."""
    if hidden.shape[-1] != expected:
        raise UserError(
            f"the policy reads hidden states of {expected} numbers and the model's have {hidden.shape[-1]}: use it "
            "with the model that it was trained on"
        )
