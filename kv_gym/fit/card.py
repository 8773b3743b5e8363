"""What a fit found, in sentences and as the card of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kv_gym.evaluation.rows import FULL

LEARNED = "learned"  # the name that rows of the trained policy carry
_SNIPPET = """```python
from kv_gym.fit import load_fit

cache = load_fit(model, "this-folder")
model(context, past_key_values=cache)  # token ids [1, n]: read, and cut before anything is asked, as it was measured
model.generate(torch.cat([context, question], 1), past_key_values=cache, max_new_tokens=32)
```"""


def verdict(fit: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences: the budget, what the test contexts say of it, and which heuristics do as well.

    Args:
        fit: as :func:`kv_gym.fit.fit` returns it, but for this.
    """
    tolerance, at = fit["settings"]["tolerance"], share_of(fit["compared_at"])
    allowed = f"{_amount(fit, tolerance)} (upper end of the 95 % interval)"
    of_validation = [row for row in fit["rows"] if row["task"] == "validation" and row["policy"] == LEARNED]
    full, test = (_one(fit, "test", name) for name in (FULL, LEARNED))
    judged = f"{test['questions']} {_unit(fit)} of {test['n']} test contexts, which chose nothing"
    told = (
        f"{at} of the cache loses {_amount(fit, test['loss'])} on {judged}: {_quality(fit, test)} against "
        f"{_quality(fit, full)} of the full cache, at most {_amount(fit, test['loss_upper'])}"
    )
    if fit["budget"] < 1:
        n, least = of_validation[0]["questions"], min(row["budget"] for row in of_validation)
        end = ", and no smaller one was tried" if fit["budget"] == least else ""
        said = [
            f"The smallest cache within a loss of {allowed} on {n} validation {_unit(fit)} is {at}{end}.",
            f"{told}.",
        ]
        if test["loss"] > tolerance:
            said.append("The test contexts do not confirm the tolerance: expect the loss that they show.")
    else:
        said = [
            f"No budget below 1.0 stays within a loss of {allowed}, so the budget is 1.0 and nothing is evicted.",
            f"The largest that was tried fails: {told}.",
        ]
    lucky = [row["budget"] for row in of_validation if row["budget"] < fit["budget"] and row["loss_upper"] <= tolerance]
    if lucky:
        failed = max(row["budget"] for row in of_validation if row["loss_upper"] > tolerance)
        said.append(
            f"The walk down the budgets ended at {share_of(failed)}, the first not surely within the tolerance: that "
            f"{', '.join(map(share_of, lucky))} would be does not count, since one of many tries may be lucky."
        )
    if fit["enough"]:
        said.append(_without_training(fit))
    return said


def card(fit: Mapping[str, Any]) -> str:
    """The folder's README, in Markdown."""
    settings, tables = fit["settings"], []
    for part, title in (("validation", "Validation contexts, which chose the budget"), ("test", "Test contexts")):
        rows = [row for row in fit["rows"] if row["task"] == part]
        lines = "\n".join(_line(fit, row) for row in rows)
        header = f"| policy | allocation | budget | {' | '.join(_cells(fit))} | loss | at most | cache bytes |"
        columns = f"| --- | --- | ---: |{' ---: |' * len(_cells(fit))} ---: | ---: | ---: |"
        about = f"{rows[0]['n']} contexts, {rows[0]['questions']} {_unit(fit)}"
        tables.append(f"{title} ({about}):\n\n{header}\n{columns}\n{lines}\n")
    seconds = ", ".join(f"{phase} {spent:.0f}" for phase, spent in fit["seconds"].items())
    versions = ", ".join(f"{name} {version}" for name, version in fit["versions"].items())
    what = "share of the questions" if fit["measure"] == "accuracy" else "nats per token"
    tabulated = "\n".join(tables)
    found = "\n".join(f"- {line}" for line in fit["verdict"])
    return (
        f"# A KV cache of {share_of(fit['budget'])}\n\n{found}\n\n{_SNIPPET}\n\n{tabulated}\n"
        f"Loss, against the full cache: {what}; at most: the upper end of its 95 % interval, paired by context. NLL: "
        "nats per token. Accuracy: greedy exact match of the whole answer. Cache bytes: of one compressed context; "
        "behind a plus the policy's weights.\n\n"
        "| | |\n|---|---|\n"
        f"| agent | `{fit['agent']}` {settings['agent settings'] or ''} |\n"
        f"| allocation | `{fit['allocation']}` |\n| protects | first and last {fit['protection']} |\n"
        f"| tolerance | {settings['tolerance']} |\n| seed | {settings['seed']} |\n"
        f"| model | `{fit['fingerprint']['architecture']}`, weights `{settings['model'][:12]}` |\n"
        f"| data | {settings['file']}, `{fit['data'][:12]}` |\n| seconds | {seconds} |\n| versions | {versions} |\n\n"
        f"Made by `{fit['command']}`.\n"
    )


def _without_training(fit: Mapping[str, Any]) -> str:
    """The sentence about heuristics that stay within the tolerance on the validation contexts too."""
    rows = [_one(fit, "test", name) for name in fit["enough"]]
    them = [
        f"{row['policy']} ({row['allocation']}; on the test contexts it loses {_amount(fit, row['loss'])})"
        for row in rows
    ]
    listed = f"{', '.join(them[:-1])} and {them[-1]}" if len(them) > 1 else them[0]
    also = " too" if fit["budget"] < 1 else ""
    stays = f"{'stay' if len(them) > 1 else 'stays'} within the tolerance at {share_of(fit['compared_at'])}{also}"
    return f"Without training, {listed} {stays}: {'these' if len(them) > 1 else 'this'} may be enough."


def share_of(budget: float) -> str:
    """A share as a fraction where it is one, such as 1/90."""
    whole = round(1 / budget)
    return f"1/{whole}" if whole > 1 and abs(1 / whole - budget) < 1e-9 else f"{budget:.4g}"


def _one(fit: Mapping[str, Any], part: str, policy: str) -> dict[str, Any]:
    return next(row for row in fit["rows"] if (row["task"], row["policy"]) == (part, policy))


def _unit(fit: Mapping[str, Any]) -> str:
    return "questions" if fit["measure"] == "accuracy" else "continuations"


def _amount(fit: Mapping[str, Any], loss: float) -> str:
    return f"{100 * loss:.2f} points" if fit["measure"] == "accuracy" else f"{loss:.4f} nats per token"


def _quality(fit: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return f"{row['accuracy']:.1%}" if fit["measure"] == "accuracy" else f"{row['nll']:.4f}"


def _cells(fit: Mapping[str, Any], row: Mapping[str, Any] | None = None) -> list[str]:
    """A row's quality, or the names of these columns; nobody repeats a text word by word, so there it is NLL alone."""
    nll = "NLL" if row is None else f"{row['nll']:.4f}"
    accuracy = "accuracy" if row is None else f"{row['accuracy']:.1%}"
    return [accuracy, nll] if fit["measure"] == "accuracy" else [nll]


def _line(fit: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    weights = f" + {row['policy_bytes']:,}" if row["policy_bytes"] else ""
    return (
        f"| {row['policy']} | {row['allocation']} | {share_of(row['budget'])} | {' | '.join(_cells(fit, row))} | "
        f"{row['loss']:.4f} | {row['loss_upper']:.4f} | {row['cache_bytes']:,.0f}{weights} |"
    )
