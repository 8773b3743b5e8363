"""The rows of ``ablation.py``: what is trained, and how it differs from the first row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kv_gym.policies.scoring.inputs import DEFAULT as INPUTS
from kv_gym.training.registry import agent_settings

RULES = ("uniform", "ada", "pyramid", "global")
FIRST = "softmax, utility"
BASE = {"loss": "softmax", "target": "utility"}  # of `joint`, whatever its file says by now


@dataclass(frozen=True)
class Variant:
    """A row: an agent with some settings of its own, or started from another row's policy.

    Attributes:
        name: of the row.
        what: which choice it varies.
        agent: as `train` knows it.
        settings: beside those of the agent's file.
        init: the row whose policy of the same seed it starts from.
        rules: allocations that it is judged with.
        extra: only trained when ``--only`` names it.
    """

    name: str
    what: str
    agent: str = "joint"
    settings: dict[str, Any] = field(default_factory=dict)
    init: str = ""
    rules: tuple[str, ...] = ("global",)
    extra: bool = False

    def chosen(self, steps: int | None) -> dict[str, Any]:
        """All settings that it is trained with, or those of a trial run of so many steps."""
        trial = {} if steps is None else {"steps": steps, "every": steps}
        return agent_settings(self.agent, **self.settings | trial).model_dump(mode="json")


def joint(what: str, name: str, extra: bool = False, **settings: Any) -> Variant:
    return Variant(name, what, settings=BASE | settings, extra=extra)


def through(
    name: str, init: str = "", extra: bool = False, rules: tuple[str, ...] = ("global",), **settings: Any
) -> Variant:
    return Variant(name, "through the model", "end_to_end", settings, init, rules, extra)


VARIANTS = (
    Variant(FIRST, "first row", settings=BASE, rules=RULES),
    *(joint("loss", f"loss {loss}", loss=loss) for loss in ("softmax", "poisson", "listwise")),
    *(
        joint("target", f"target {target}", target=target)
        for target in ("utility", "mean", "value", "output", "layers", "output_layers", "gradient", "odds")
    ),
    joint("inputs", "inputs key", inputs=["key"]),
    joint("inputs", "inputs key, value", inputs=["key", "value"]),
    *(
        joint("inputs", f"inputs + {more}", inputs=[*INPUTS, more])
        for more in ("norms", "similarity", "redundancy", "attention")
    ),
    joint("inputs", "inputs hidden", inputs=["hidden"]),
    joint("inputs", "inputs key, value, hidden", inputs=["key", "value", "hidden"]),
    *(joint("protection", f"protect {a} + {b}", protect=[a, b]) for a, b in ((0, 0), (1, 1), (2, 8))),
    *(joint("continuations", f"continuations {k}", continuations=k) for k in (1, 2, 4)),
    joint("network", "hidden 128", hidden=128),
    joint("network", "steps 1200", extra=True, steps=1200),
    joint("together", "mean, listwise", target="mean", loss="listwise"),
    joint("together", "layers, listwise", target="layers", loss="listwise"),
    joint("together", "layers, listwise, inputs hidden", target="layers", loss="listwise", inputs=["hidden"]),
    joint("together", "output_layers, listwise", target="output_layers", loss="listwise"),
    through("end_to_end, 400 steps", rules=RULES, steps=400),
    through("end_to_end, 400 steps after softmax, utility", FIRST, steps=400),
    through("end_to_end, 400 steps after layers, listwise", "layers, listwise", steps=400),
    through(
        "end_to_end, 400 steps after layers, listwise, inputs hidden",
        "layers, listwise, inputs hidden",
        steps=400,
        inputs=["hidden"],
        extra=True,
    ),
    through("end_to_end", rules=RULES),  # the zoo's
    through("end_to_end, width 128", extra=True, hidden=128),
)
NAMED = {variant.name: variant for variant in VARIANTS}


def reads_hidden(variant: Variant) -> bool:
    """Whether its contexts must be recorded with hidden states."""
    start = NAMED.get(variant.init)
    return "hidden" in variant.settings.get("inputs", ()) or (start is not None and reads_hidden(start))


def chosen(only: list[str] | None) -> list[Variant]:
    """Rows by name, with those that they start from; all but the extra ones where none is named.

    A row that is the first by another name is left out.
    """
    unknown = sorted(set(only or ()) - set(NAMED))
    if unknown:
        raise SystemExit(f"unknown row {unknown[0]!r}; known: {'; '.join(NAMED)}")
    usual = NAMED[FIRST]
    wanted = [
        variant
        for variant in VARIANTS
        if (variant.name in only if only else not variant.extra)
        and (variant == usual or variant.agent != usual.agent or variant.chosen(None) != usual.chosen(None))
    ]
    starts = [NAMED[variant.init] for variant in wanted if variant.init]
    return list({variant.name: variant for variant in (usual, *starts, *wanted)}.values())
