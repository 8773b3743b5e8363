"""How fast a machine trains an agent, and how many steps fit into a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kv_gym.errors import UserError
from kv_gym.progress import duration

PREPARED = 8  # contexts after which preparing more of them costs little: layers are weighted on as many
VALIDATION_SHARE = 0.15  # of a limited time, at most, goes into validations
FEWEST_VALIDATIONS = 2


@dataclass(frozen=True)
class Pace:
    """Seconds that one agent takes on one machine, model and kind of contexts.

    Attributes:
        prepare: to prepare one training context, of the first eight.
        first_use: of the first step that draws a training context, beyond those of other steps.
        step: of a training step.
        validation: of a validation on one context.
    """

    prepare: float
    first_use: float
    step: float
    validation: float

    def seconds(self, steps: int, every: int, training: int, validation: int) -> float:
        """Of a whole run that validates its start and then at every `every` steps.

        Args:
            steps: of the run.
            every: steps between validations.
            training, validation: contexts of each kind.
        """
        validations = 1 + math.ceil(steps / every)
        return self.before(training) + self.step * steps + self.validation * validation * validations

    def before(self, training: int) -> float:
        """Of what is done once for each of so many training contexts."""
        return self.prepare * min(training, PREPARED) + self.first_use * training


def steps_within(seconds: float, pace: Pace, training: int, validation: int, steps: int, every: int) -> tuple[int, int]:
    """The most steps, and the steps between validations, of a run that takes at most so long.

    Args:
        seconds: for preparation, steps and validations.
        pace: as measured.
        training, validation: contexts of each kind.
        steps: of the agent's settings, never exceeded.
        every: of the agent's settings; validations are rarer where they would take more than 15 % of the time.

    Raises:
        UserError: not one step fits.
    """
    if pace.seconds(steps, every, training, validation) <= seconds:
        return steps, every
    one = pace.validation * validation
    left = seconds - pace.before(training) - one  # the start is validated too
    affordable = max(FEWEST_VALIDATIONS, math.floor(VALIDATION_SHARE * seconds / max(one, 1e-9)))
    for validations in (min(affordable, math.ceil(steps / every)), 1):
        fitting = math.floor((left - validations * one) / max(pace.step, 1e-9))
        if fitting >= validations:
            fitting = min(fitting, steps)
            return fitting, math.ceil(fitting / validations)
    least = pace.seconds(1, 1, training, validation)
    raise UserError(
        f"{duration(seconds)} are too short to train: one step with its preparation and validations takes about "
        f"{duration(least)} on this machine; give more minutes, or fewer or shorter contexts"
    )
