"""Utilities that `joint` may learn to rank slots by, by name.

From the attention a slot receives to what the model loses without it; L layers, H KV heads, n slots:

| name | utility of a slot, mean over the continuations |
|---|---|
| ``utility`` | attention received per query, the most of the KV head's query heads (as KVP) |
| ``mean`` | the same, the mean of the query heads |
| ``kvzip`` | the largest attention while the model repeats the context (KVzip's score, see ``record --stats``) |
| ``value`` | ``utility`` times the norm of what the value adds to the layer's output (KVzap divides by another) |
| ``output`` | how far the layer's output moves when this slot alone goes (CAOTE's error, arXiv 2504.14051, projected) |
| ``layers`` | ``mean`` times the loss per unit of it in that layer, measured once |
| ``output_layers`` | ``output`` times the loss per unit of it in that layer, measured once |
| ``gradient`` | change of the continuation's loss, to first order, when this slot alone goes |
| ``odds`` | change of the log-odds of what the model would say, to first order, root mean square |

All but the first three need the model. Attention is recorded as the mean over a block of queries: ``output`` is the
error of a block's mean output, which bounds the mean error of its queries from below. Values of the continuation's own
tokens are not recorded, so attention to them counts as if it read the block's mean over the context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.models.attention import attention_modules, output_projection
from kv_gym.traces.sequence import Contexts, Sequence
from kv_gym.training.masked_context import (
    RecordedContexts,
    continuation_logits,
    frozen_model,
    padded_continuations,
)

Target = Literal["utility", "mean", "kvzip", "value", "output", "layers", "output_layers", "gradient", "odds"]
TARGETS = get_args(Target)
FROM_TRACES, FROM_MODEL = TARGETS[:3], TARGETS[3:]
UtilityFunction = Callable[[Sequence], np.ndarray]
"""Utility of a context's slots, `[L, H, n]` float32, non-negative."""

MIN_REMAINDER = 1e-6  # attention of all other slots, where one slot receives everything
WEIGHTING_CONTEXTS = 8  # contexts on which layers are weighted
MAX_BATCH_TOKENS = 16384  # context tokens that a batch of continuations reads


def utility_function(name: str, model=None, sequences: Contexts | None = None) -> UtilityFunction:
    """The utility of that name.

    Args:
        name: one of ``TARGETS``.
        model: the transformers decoder that was recorded; those of ``FROM_MODEL`` need it.
        sequences: contexts, of which the first few weight the layers for ``layers`` and ``output_layers``.

    Raises:
        UserError: unknown name, or no model where one is needed.
    """
    if name not in TARGETS:
        raise UserError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    if name == "kvzip":
        return second_reading_utility
    if name in FROM_TRACES:
        return lambda sequence: sequence.utility("max" if name == "utility" else "mean")
    if model is None:
        raise UserError(f"target {name!r} reads the model: name the one that the traces were recorded of (--model)")
    if name in ("gradient", "odds"):
        change = loss_change if name == "gradient" else odds_change
        return lambda sequence: change(model, sequence)
    roots = output_roots(model)
    if name == "value":
        return lambda sequence: value_utility(sequence, roots)

    def unweighted(sequence: Sequence) -> np.ndarray:
        return sequence.utility("mean") if name == "layers" else output_change(sequence, roots)

    if name == "output":
        return unweighted
    count = 0 if sequences is None else min(len(sequences), WEIGHTING_CONTEXTS)
    weights = layer_weights(model, [sequences[i] for i in range(count)] if sequences is not None else [], unweighted)
    return lambda sequence: unweighted(sequence) * weights[:, None, None]


def limit_continuations(sequence: Sequence, count: int | None) -> Sequence:
    """The context with its first `count` continuations (None: all).

    Raises:
        UserError: it has fewer, or none.
    """
    recorded = len(sequence.continuations)
    if recorded < (count or 1):
        raise UserError(
            f"context {sequence.id} has {recorded} continuations and {count or 1} are asked for: record more of them, "
            "or set continuations lower"
        )
    return sequence if count in (None, recorded) else replace(sequence, continuations=sequence.continuations[:count])


def second_reading_utility(sequence: Sequence) -> np.ndarray:
    """KVzip's score of every slot, `[L, H, n]`, as the recording found it with whatever settings.

    A teacher: what it ranks high is found by reading the context twice, and a policy that learned it reads once.

    Raises:
        UserError: the context was recorded without it.
    """
    recorded = [state["paid"] for name, state in sequence.stats.items() if name.partition("(")[0] == "kvzip"]
    if not recorded:
        raise UserError(
            f"target 'kvzip' learns from a second reading and context {sequence.id} has none: record with --stats kvzip"
        )
    return recorded[0].astype(np.float32)


def output_roots(model) -> dict[int, Tensor]:
    """Square roots R `[H, d, d]` float32 of how each layer's output projection weighs a KV head's values.

    ``|x R|`` is the root mean square, over the query heads of the KV head, of ``|x W|``, where W `[d, D]` is what the
    output projection multiplies that query head's output by: norms in D dimensions at the cost of d.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    roots = {}
    for layer, module in attention_modules(model).items():
        slices = output_projection(module, config.num_attention_heads, d).double().cpu()  # [Hq, d, D]
        gram = (slices @ slices.transpose(1, 2)).unflatten(0, (heads, -1)).mean(1)
        squares, directions = torch.linalg.eigh(gram)
        roots[layer] = (directions * squares.clamp(min=0).sqrt()[:, None]).float()
    return roots


def value_utility(sequence: Sequence, roots: dict[int, Tensor]) -> np.ndarray:
    """Utility times ``|v W_O|``, `[L, H, n]`; `roots` as :func:`output_roots` gives them."""
    return sequence.utility() * torch.linalg.vector_norm(_output_values(sequence, roots), dim=-1).numpy()


def output_change(sequence: Sequence, roots: dict[int, Tensor]) -> np.ndarray:
    """``a / (1 - a) |(v - o) W_O|``, `[L, H, n]`: a is the mean attention of a block, o its mean output.

    Blocks are weighted by their number of queries, continuations equally.

    Raises:
        UserError: only some slots of the context were recorded.
    """
    sequence.refuse_sampled("target 'output'")  # o is the mean over all slots
    values = _output_values(sequence, roots)
    error = torch.zeros(values.shape[:3])
    for continuation in sequence.continuations:
        shares = continuation.block_queries / len(continuation.tokens) / len(sequence.continuations)
        for block, share in enumerate(shares.tolist()):
            queries = int(continuation.block_queries[block])
            attention = torch.from_numpy(continuation.future[..., block, 1]) / queries  # [L, H, n]
            total = attention.sum(-1, keepdim=True).clamp(min=MIN_REMAINDER)
            output = (attention / total)[..., None, :] @ values  # [L, H, 1, d]
            moved = torch.linalg.vector_norm(values - output, dim=-1)
            error += share * attention / (1 - attention).clamp(min=MIN_REMAINDER) * moved
    return error.numpy()


def _output_values(sequence: Sequence, roots: dict[int, Tensor]) -> Tensor:
    """Values `[L, H, n, d]` whose distances are those of what they add to their layer's output."""
    return torch.from_numpy(sequence.values) @ torch.stack([roots[layer] for layer in sequence.layers])


def layer_weights(model, sequences: list[Sequence], unweighted: UtilityFunction) -> np.ndarray:
    """Loss per unit of a utility in each layer, `[L]` float32, mean 1: summed ``gradient`` over summed utility.

    The gradients of single slots are noisy (see :func:`loss_change`), their sums over layers are not.

    Args:
        model: the transformers decoder that was recorded.
        sequences: contexts to measure on.
        unweighted: the utility whose layers are weighted.

    Raises:
        UserError: no context.
    """
    if not sequences:
        raise UserError("layers are weighted by recorded contexts, and there are none; expected at least one")
    loss = sum(loss_change(model, sequence).sum((1, 2), dtype=np.float64) for sequence in sequences)
    utility = sum(unweighted(sequence).sum((1, 2), dtype=np.float64) for sequence in sequences)
    weights = loss / np.maximum(utility, 1e-12)
    return (weights / weights.mean()).astype(np.float32)


def loss_change(model, sequence: Sequence) -> np.ndarray:
    """``|d NLL / d gate|`` of every slot, `[L, H, n]`, nats per predicted token, mean over the continuations.

    A gate multiplies a slot's attention before it is divided by its sum: the derivative at 1 is the change of the loss
    when the slot goes, to first order. The absolute value counts, since what a slot does to the loss of one
    continuation, for better or worse, it may do to that of another with the opposite sign.

    It saturates: where the full cache makes the model certain, the loss is flat around it, however much there is to
    lose further off.

    Raises:
        UserError: every continuation is a single token, so that nothing of it is predicted after the context.
    """
    if max(len(continuation.tokens) for continuation in sequence.continuations) < 2:
        raise UserError(f"context {sequence.id} has continuations of one token; expected two, to predict the second")

    def loss(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        log_probs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        predicted = mask[:, 1:]
        return -(log_probs * predicted).sum(-1) / predicted.sum(-1).clamp(min=1)

    return np.mean([gradient.abs().numpy() for gradient in _gate_gradients(model, sequence, loss)], 0)


def odds_change(model, sequence: Sequence) -> np.ndarray:
    """Root mean square over the continuations of ``d odds / d gate``, `[L, H, n]`, nats per token.

    The odds are the logarithm of p / (1 - p), where p is the probability of the token that the model predicts with
    the full cache; each token's are weighted by the square of p, since little is lost where the model only guesses.
    Log-odds do not saturate where a loss is flat, as :func:`loss_change` does.
    """

    def loss(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        predicted = logits.argmax(-1, keepdim=True)
        others = logits.scatter(-1, predicted, float("-inf")).logsumexp(-1)
        odds = logits.gather(-1, predicted)[..., 0] - others
        weight = mask * odds.detach().sigmoid().square()
        return (odds * weight).sum(-1) / mask.sum(-1)

    squares = [gradient.square().numpy() for gradient in _gate_gradients(model, sequence, loss)]
    return np.sqrt(np.mean(squares, 0))


def _gate_gradients(model, sequence: Sequence, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Derivatives of each continuation's loss with respect to the context's gates, each `[L, H, n]`.

    Args:
        model: the transformers decoder that was recorded.
        sequence: the context, with all of its slots.
        loss: of the continuations, `[Q]`, from logits `[Q, m, V]`, tokens `[Q, m]` and a mask of real tokens, 0 or 1,
            `[Q, m]`.
    """
    batch = max(1, MAX_BATCH_TOKENS // len(sequence.tokens))
    context = RecordedContexts.of([sequence], model.device)
    gradients: list[Tensor] = []
    with frozen_model(model):
        for start in range(0, len(sequence.continuations), batch):
            indices = list(range(start, min(start + batch, len(sequence.continuations))))
            tokens, mask = (x[0] for x in padded_continuations([sequence], [indices], model.device))
            # every continuation reads a context of its own, so that its gates have their own derivatives
            shape = (len(indices), -1, -1, -1, -1)
            contexts = RecordedContexts(
                context.keys.expand(shape), context.values.expand(shape), context.lengths.expand(len(indices))
            )
            gates = torch.ones(contexts.keys.shape[:4], device=model.device, requires_grad=True)
            logits = continuation_logits(model, contexts, gates, tokens[:, None])[:, 0].float()
            (gradient,) = torch.autograd.grad(loss(logits, tokens, mask).sum(), gates)
            gradients += gradient.cpu().unbind()
    return gradients
