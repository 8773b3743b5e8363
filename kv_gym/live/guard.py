"""A guard: it measures a cheap signal at every forward, and something follows when the signal is too high."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.errors import UserError

OUTPUT_SIGNALS = ("entropy", "entropy_rise", "margin")
ATTENTION_SIGNALS = ("missing", "tier", "unmatched", "new")
SIGNALS = (*ATTENTION_SIGNALS, *OUTPUT_SIGNALS)
REACTIONS = ("warn", "enlarge", "restore")


@dataclass(frozen=True)
class Guard:
    """Measures a signal of the newest token and reacts when it exceeds a threshold.

    Signals of attention are means over query heads and layers, in [0, 1], and NaN before the first eviction:

    - ``missing``: the weight that the best matching evicted key would have, if that one alone were still there. Where
      evicted pairs are dropped or merged, their keys are kept for this in `bits` bits, without values; where they
      stay visible in low precision it is the weight that they really get.
    - ``tier``: the attention mass on pairs kept in low precision.
    - ``unmatched``: 1 minus the largest weight on a token that was there at the last eviction, the first token left
      out.
    - ``new``: the attention mass on tokens that came after the last eviction.

    Signals of the model's output: ``entropy`` (nats), ``entropy_rise`` (above its mean over the forwards before) and
    ``margin`` (second probability minus the first one).

    Attributes:
        signal: one of these.
        threshold: alarms above; calibrate it, see :func:`kv_gym.evaluation.guard_metrics.threshold_at`.
        then: ``warn``; ``enlarge``: the budget grows by `growth`, which matters where the trigger fires again;
            ``restore``: all evicted pairs are put back from the host and nothing is evicted any more, which needs
            ``EvictingCache(..., offload=True)``. Whatever follows is for the tokens to come: the alarm comes with
            the token whose query raised it.
        growth: by what `enlarge` multiplies the budget.
        bits: of a sketched key, 2, 4 or 8.
        layers: which of the evicting layers are averaged, counted from 0; None means all. What is not averaged is
            neither measured nor sketched: one layer, chosen on calibration contexts, can be better and costs less.

    Raises:
        UserError: an unknown signal or reaction, or numbers out of range.
    """

    signal: str = "missing"
    threshold: float = math.inf
    then: str = "warn"
    growth: float = 2.0
    bits: int = 2
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise UserError(f"guard signal {self.signal!r} is unknown; expected one of {', '.join(SIGNALS)}")
        if self.then not in REACTIONS:
            raise UserError(f"a guard cannot {self.then!r}; expected one of {', '.join(REACTIONS)}")
        for name in ("threshold", "growth"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise UserError(f"the guard's {name} is {number!r}; expected a number")
        if self.layers is not None and not (
            isinstance(self.layers, tuple | list) and all(type(layer) is int for layer in self.layers)
        ):
            raise UserError(f"the guard's layers are {self.layers!r}; expected numbers of layers, as in (0, 1)")
        if math.isnan(self.threshold):
            raise UserError("the guard's threshold is NaN; expected a number, such as threshold_at gives")
        if not self.growth > 1:
            raise UserError(f"the budget cannot grow by a factor of {self.growth}; expected one above 1")
        if self.bits not in (2, 4, 8):
            raise UserError(f"evicted keys cannot be sketched in {self.bits} bits; expected 2, 4 or 8")

    @classmethod
    def parse(cls, text: str) -> Guard:
        """A guard from ``SIGNAL:THRESHOLD`` or ``SIGNAL:THRESHOLD:REACTION``, such as ``missing:0.05:restore``.

        Raises:
            UserError: another form, or what the constructor refuses.
        """
        signal, _, rest = text.partition(":")
        threshold, _, reaction = rest.partition(":")
        try:
            return cls(signal, float(threshold), reaction or "warn")
        except UserError:
            raise
        except ValueError:
            expected = "expected SIGNAL:THRESHOLD[:REACTION], such as entropy:3.5"
            raise UserError(f"guard {text!r} has another form; {expected}") from None

    def covers(self, ordinal: int) -> bool:
        """Whether the evicting layer `ordinal` is measured."""
        return self.layers is None or ordinal in self.layers

    @property
    def reads_output(self) -> bool:
        """Whether the signal is of the model's output and not of its attention."""
        return self.signal in OUTPUT_SIGNALS

    def enlarged(self, budget: int | float) -> int | float:
        """A budget `growth` times as large; a share ends at 1."""
        return math.ceil(budget * self.growth) if isinstance(budget, int) else min(1.0, budget * self.growth)


class GuardMonitor:
    """What the guard of one cache measured last, and how often it raised an alarm.

    Attributes:
        guard: its settings.
        signal: `[batch]` float32, of the last forward; None or NaN where there is nothing to measure yet.
        alarms: forwards whose signal was above the threshold in some row.
    """

    def __init__(self, guard: Guard):
        self.guard = guard
        self.signal: Tensor | None = None
        self.alarms = 0

    def raises_alarm(self, signal: Tensor) -> bool:
        """Whether a new signal `[batch]` is too high in some row; it is counted, and warned of if nothing else is done.

        An accelerator is waited for, once per forward.
        """
        self.signal = signal
        if not bool((signal > self.guard.threshold).any()):  # NaN is above nothing
            return False
        self.alarms += 1
        if self.guard.then == "warn":
            warnings.warn(
                f"guard: {self.guard.signal!r} is above {self.guard.threshold:g}, so what was evicted may be "
                "missing here",
                stacklevel=2,
            )
        return True


@dataclass(frozen=True)
class LayerAttention:
    """One layer right after its attention.

    Attributes:
        query: `[batch, query_heads, m, d]` of the new tokens; their last one counts.
        token_mask: `[batch, m]` bool on the CPU, which of them are no padding; None means all.
        keys: `[batch, kv_heads, n, d]` in full precision, the new tokens' among them.
        positions: `[batch, kv_heads, n]` int64.
        real: `[batch, kv_heads, n]` bool.
        scaling: factor on the products.
        evicted_at: `[batch]` int64, tokens seen at the last eviction.
        evicted: keys of evicted pairs `[batch, kv_heads, e, d]`, and which are real; None: not known.
        evicted_are_visible: evicted pairs take part in attention.
    """

    query: Tensor
    token_mask: Tensor | None
    keys: Tensor
    positions: Tensor
    real: Tensor
    scaling: float
    evicted_at: Tensor
    evicted: tuple[Tensor, Tensor] | None
    evicted_are_visible: bool

    def last_query(self) -> tuple[Tensor, Tensor | None]:
        """Each row's last query that is no padding `[batch, query_heads, d]`, and which rows have one."""
        if self.token_mask is None:
            return self.query[:, :, -1], None
        last = (self.token_mask * torch.arange(1, self.token_mask.shape[1] + 1)).amax(1)
        rows, device = torch.arange(len(last)), self.query.device
        return self.query[rows.to(device), :, (last - 1).clamp(min=0).to(device)], (last > 0).to(device)

    def products(self, query: Tensor, keys: Tensor, real: Tensor) -> Tensor:
        """`[batch, kv_heads, group, n]` float32 (float64 for such a query), minus infinity where a slot is not real."""
        grouped = query.unflatten(1, (keys.shape[1], -1))
        exact = torch.promote_types(query.dtype, torch.float32)
        products = (grouped @ keys.transpose(-1, -2)).to(exact) * self.scaling
        return products.masked_fill(~real[:, :, None], -math.inf)


def attention_signal(signal: str, layer: LayerAttention, before: Tensor | None) -> Tensor:
    """The signal of one layer, `[batch]` float32, mean over query heads.

    Args:
        signal: one of :data:`ATTENTION_SIGNALS`.
        layer: right after its attention.
        before: `[batch]`, what stays for rows that have no new token.
    """
    query, has_query = layer.last_query()
    products = layer.products(query, layer.keys, layer.real)
    total = products.logsumexp(-1)
    evicted = None if layer.evicted is None else layer.products(query, *layer.evicted)
    if evicted is not None and layer.evicted_are_visible:
        total = torch.logaddexp(total, evicted.logsumexp(-1))
    if signal in ("missing", "tier"):
        if evicted is None:
            value = torch.zeros_like(total)
        elif signal == "tier":
            value = (evicted.logsumexp(-1) - total).exp()
        else:
            share = evicted.amax(-1) - total
            value = share.exp() if layer.evicted_are_visible else share.sigmoid()  # in the total, or added to it
    else:
        old = (layer.positions < layer.evicted_at[:, None, None]) & layer.real
        weights = (products - total[..., None]).exp()
        if signal == "new":
            value = weights.masked_fill((old | ~layer.real)[:, :, None], 0).sum(-1)
        else:
            value = 1 - weights.masked_fill(~(old & (layer.positions > 0))[:, :, None], 0).amax(-1)
    value = value.flatten(1).mean(1)
    if has_query is None:
        return value
    return torch.where(has_query, value, torch.full_like(value, math.nan) if before is None else before)


def output_signal(signal: str, logits: Tensor, mean: Tensor | None) -> Tensor:
    """The signal of the model's output, `[batch]` float32.

    Args:
        signal: one of :data:`OUTPUT_SIGNALS`.
        logits: `[batch, vocabulary]` for the next token.
        mean: `[batch]`, mean entropy of the forwards before; None: there were none.
    """
    log_probabilities = logits.float().log_softmax(-1)
    if signal == "margin":
        first, second = log_probabilities.exp().topk(2).values.unbind(-1)
        return second - first
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    if signal == "entropy":
        return entropy
    return torch.full_like(entropy, math.nan) if mean is None else entropy - mean
