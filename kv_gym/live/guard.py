"""Guard: the settings of a safety net, what it measures at every forward and what follows an alarm."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kv_gym.errors import UserError

OUTPUT = ("entropy", "entropy_rise", "margin")
ATTENTION = ("missing", "tier", "unmatched", "new")
SIGNALS = (*ATTENTION, *OUTPUT)
REACTIONS = ("warn", "enlarge", "restore")


@dataclass(frozen=True)
class Guard:
    """Watches a cheap signal of the newest token and does something when it exceeds a threshold.

    Signals of attention are means over query heads and layers, in [0, 1], and NaN before the first eviction:

    - ``missing``: the weight that the best matching evicted key would have, if that one alone were still there. Where
      evicted pairs are dropped or merged, their keys are kept for this in `bits` bits, without values; where they
      stay visible in low precision it is the weight that they really get.
    - ``tier``: the attention mass on pairs kept in low precision.
    - ``unmatched``: 1 minus the largest weight on a token that was there at the last cut, the first one left out.
    - ``new``: the attention mass on tokens that came after the last cut.

    Signals of the model's output: ``entropy`` (nats), ``entropy_rise`` (above its mean over the forwards before) and
    ``margin`` (second probability minus the first one).

    Attributes:
        signal: one of these.
        threshold: alarms above; calibrate it, see :func:`kv_gym.evaluation.safety.threshold_at`.
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
        if math.isnan(self.threshold):
            raise UserError("the guard's threshold is NaN; expected a number, such as threshold_at gives")
        if not self.growth > 1:
            raise UserError(f"the budget cannot grow by a factor of {self.growth}; expected one above 1")
        if self.bits not in (2, 4, 8):
            raise UserError(f"evicted keys cannot be sketched in {self.bits} bits; expected 2, 4 or 8")

    def heeds(self, place: int) -> bool:
        """Whether the evicting layer `place` counts."""
        return self.layers is None or place in self.layers

    @property
    def reads_output(self) -> bool:
        """Whether the signal is of the model's output and not of its attention."""
        return self.signal in OUTPUT
