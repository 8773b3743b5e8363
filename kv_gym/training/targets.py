"""What `joint` may learn to rank slots by: the worth of every slot of a recorded context, by name.

From what was attended to what would be lost, L layers, H KV heads, n slots:

| name | worth of a slot, mean over the continuations |
|---|---|
| ``utility`` | attention received per query, the most of the KV head's query heads (as KVP) |
| ``mean`` | the same, the mean of the query heads |
| ``value`` | ``utility`` times the norm of what the value adds to the layer's output (KVzap divides by another) |
| ``output`` | how far the layer's output moves when this slot alone goes (CAOTE's error, arXiv 2504.14051, projected) |
| ``layers`` | ``mean`` times what a unit of it in that layer is to the loss, measured once |
| ``output_layers`` | ``output`` times what a unit of it in that layer is to the loss, measured once |
| ``gradient`` | change of the continuation's loss, to first order, when this slot alone goes |
| ``odds`` | change of the log-odds of what the model would say, to first order, root mean square |

All but the first two need the model. Attention is recorded as the mean over a block of queries: ``output`` is the
error of a block's mean output, which bounds the mean error of its queries from below. Values of the continuation's own
tokens are not recorded, so attention to them counts as if it read the block's mean over the context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.models.attention import attention_of, output_projection
from kv_gym.traces.sequence import Sequence
from kv_gym.training.masked_context import Recorded, continuation_logits, frozen

Target = Callable[[Sequence], np.ndarray]
"""Worth of a context's slots, `[L, H, n]` float32, non-negative."""

FROM_TRACES = ("utility", "mean")
FROM_MODEL = ("value", "output", "layers", "output_layers", "gradient", "odds")
TARGETS = (*FROM_TRACES, *FROM_MODEL)
LEAST_REST = 1e-6  # attention of all other slots, which a single attended slot leaves nothing
MEASURED = 8  # contexts by which layers are weighed
TOGETHER = 16384  # context tokens that continuations read at once


def target_of(name: str, model=None, some: list[Sequence] | None = None) -> Target:
    """The target of that name.

    Args:
        name: one of ``TARGETS``.
        model: the transformers decoder that was recorded; those of ``FROM_MODEL`` need it.
        some: contexts on which layers are weighed, where they are; the first few are used.

    Raises:
        UserError: unknown name, or no model where one is needed.
    """
    if name not in TARGETS:
        raise UserError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    if name in FROM_TRACES:
        return lambda sequence: sequence.utility("max" if name == "utility" else "mean")
    if model is None:
        raise UserError(f"target {name!r} reads the model: name the one that the traces were recorded of (--model)")
    if name in ("gradient", "odds"):
        change = loss_change if name == "gradient" else odds_change
        return lambda sequence: change(model, sequence)
    roots = output_roots(model)
    if name == "value":
        return lambda sequence: value_worth(sequence, roots)

    def plain(sequence: Sequence) -> np.ndarray:
        return sequence.utility("mean") if name == "layers" else output_error(sequence, roots)

    if name == "output":
        return plain
    weights = layer_weights(model, (some or [])[:MEASURED], plain)
    return lambda sequence: plain(sequence) * weights[:, None, None]


def continued(sequence: Sequence, most: int | None) -> Sequence:
    """The context with its first `most` continuations (None: all).

    Raises:
        UserError: it has fewer, or none.
    """
    there = len(sequence.continuations)
    if there < (most or 1):
        raise UserError(
            f"context {sequence.id} has {there} continuations and {most or 1} are asked for: record more of them, or "
            "set continuations lower"
        )
    return sequence if most in (None, there) else replace(sequence, continuations=sequence.continuations[:most])


def output_roots(model) -> dict[int, Tensor]:
    """Square roots R `[H, d, d]` float32 of how each layer's output projection weighs a KV head's values.

    ``|x R|`` is the root mean square, over the query heads of the KV head, of ``|x W|``, where W `[d, D]` is what the
    output projection multiplies that query head's output by: norms in D dimensions at the cost of d.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    roots = {}
    for layer, module in attention_of(model).items():
        slices = output_projection(module, config.num_attention_heads, d).double().cpu()  # [Hq, d, D]
        gram = (slices @ slices.transpose(1, 2)).unflatten(0, (heads, -1)).mean(1)
        squares, directions = torch.linalg.eigh(gram)
        roots[layer] = (directions * squares.clamp(min=0).sqrt()[:, None]).float()
    return roots


def value_worth(sequence: Sequence, roots: dict[int, Tensor]) -> np.ndarray:
    """Utility times ``|v W_O|``, `[L, H, n]`; `roots` as :func:`output_roots` gives them."""
    return sequence.utility() * torch.linalg.vector_norm(_projected(sequence, roots), dim=-1).numpy()


def output_error(sequence: Sequence, roots: dict[int, Tensor]) -> np.ndarray:
    """``a / (1 - a) |(v - o) W_O|``, `[L, H, n]`: a is the mean attention of a block, o its mean output.

    Blocks weigh as their queries, continuations all alike.
    """
    values = _projected(sequence, roots)
    error = torch.zeros(values.shape[:3])
    for continuation in sequence.continuations:
        shares = continuation.block_queries / len(continuation.tokens) / len(sequence.continuations)
        for block, share in enumerate(shares.tolist()):
            queries = int(continuation.block_queries[block])
            attention = torch.from_numpy(continuation.future[..., block, 1]) / queries  # [L, H, n]
            reach = attention.sum(-1, keepdim=True).clamp(min=LEAST_REST)
            output = (attention / reach)[..., None, :] @ values  # [L, H, 1, d]
            moved = torch.linalg.vector_norm(values - output, dim=-1)
            error += share * attention / (1 - attention).clamp(min=LEAST_REST) * moved
    return error.numpy()


def _projected(sequence: Sequence, roots: dict[int, Tensor]) -> Tensor:
    """Values `[L, H, n, d]` whose distances are those of what they add to their layer's output."""
    return torch.from_numpy(sequence.values) @ torch.stack([roots[layer] for layer in sequence.layers])


def layer_weights(model, sequences: list[Sequence], plain: Target) -> np.ndarray:
    """What a unit of a worth is to the loss, `[L]` float32, mean 1: summed ``gradient`` over summed worth.

    Single slots' gradients tell little (see :func:`loss_change`), their sums over layers much.

    Args:
        model: whose contexts they are.
        sequences: contexts to measure on.
        plain: the worth whose layers are weighed.

    Raises:
        UserError: no context.
    """
    if not sequences:
        raise UserError("layers are weighed by recorded contexts, and there are none; expected at least one")
    lost = sum(loss_change(model, sequence).sum((1, 2), dtype=np.float64) for sequence in sequences)
    held = sum(plain(sequence).sum((1, 2), dtype=np.float64) for sequence in sequences)
    weights = lost / np.maximum(held, 1e-12)
    return (weights / weights.mean()).astype(np.float32)


def loss_change(model, sequence: Sequence) -> np.ndarray:
    """``|d NLL / d gate|`` of every slot, `[L, H, n]`, nats per predicted token of the continuation.

    A gate multiplies a slot's attention before it is divided by its sum: the derivative at 1 is what the loss changes
    by when the slot goes, as far as a straight line tells. Its size counts and not its sign: what a slot does to the
    loss of this continuation, for better or worse, it may do to that of another the other way round.

    It saturates: where the full cache makes the model certain, the loss is flat around it, however much there is to
    lose further off.

    Raises:
        UserError: every continuation is a single token, so that nothing of it is predicted after the context.
    """
    if max(len(continuation.tokens) for continuation in sequence.continuations) < 2:
        raise UserError(f"context {sequence.id} has continuations of one token; expected two, to predict the second")

    def loss(logits: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        told = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        predicted = real[:, 1:]
        return -(told * predicted).sum(-1) / predicted.sum(-1).clamp(min=1)

    return np.mean([gradient.abs().numpy() for gradient in _gate_gradients(model, sequence, loss)], 0)


def odds_change(model, sequence: Sequence) -> np.ndarray:
    """Root mean square over the continuations of ``d odds / d gate``, `[L, H, n]`, nats per token.

    The odds are the logarithm of p / (1 - p), where p is the probability of what the full cache makes the model say;
    each token's are weighed by the square of p, since little is lost where the model only guesses. Log-odds go on
    growing where a loss is flat, so that this does not saturate as :func:`loss_change` does.
    """

    def loss(logits: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        said = logits.argmax(-1, keepdim=True)
        others = logits.scatter(-1, said, float("-inf")).logsumexp(-1)
        odds = logits.gather(-1, said)[..., 0] - others
        weight = real * odds.detach().sigmoid().square()
        return (odds * weight).sum(-1) / real.sum(-1)

    squares = [gradient.square().numpy() for gradient in _gate_gradients(model, sequence, loss)]
    return np.sqrt(np.mean(squares, 0))


def _gate_gradients(model, sequence: Sequence, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Derivatives of each continuation's loss with respect to the context's gates, each `[L, H, n]`.

    Args:
        model: whose context it is.
        sequence: the context, all of its slots there.
        loss: of the continuations, `[Q]`, from logits `[Q, m, V]`, tokens `[Q, m]` and which of them are real, as 0 or
            1, `[Q, m]`.
    """
    at_once = max(1, TOGETHER // len(sequence.tokens))
    keys, values = (torch.from_numpy(array).to(model.device)[None] for array in (sequence.keys, sequence.values))
    found: list[Tensor] = []
    with frozen(model):
        for start in range(0, len(sequence.continuations), at_once):
            rows = [torch.from_numpy(c.tokens) for c in sequence.continuations[start : start + at_once]]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
            real = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
            count = len(rows)
            # every continuation reads a context of its own, so that its gates' derivatives are its own
            contexts = Recorded(
                keys.expand(count, -1, -1, -1, -1),
                values.expand(count, -1, -1, -1, -1),
                torch.full((count,), len(sequence.tokens)),
            )
            gates = torch.ones(contexts.keys.shape[:4], device=model.device, requires_grad=True)
            logits = continuation_logits(model, contexts, gates, tokens[:, None])[:, 0].float()
            told = loss(logits, tokens, real.to(model.device)).sum()
            found += torch.autograd.grad(told, gates)[0].cpu().unbind()
    return found
