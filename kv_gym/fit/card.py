"""What a fit found, in sentences and as the card of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kv_gym.evaluation.rows import FULL
from kv_gym.markdown import pipe_table

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
    tolerance, share = fit["settings"]["tolerance"], share_of(fit["compared_at"])
    allowed = f"{_amount(fit, tolerance)} (upper end of the 95 % interval)"
    validation = [row for row in fit["rows"] if row["task"] == "validation" and row["policy"] == LEARNED]
    full, test = (_row(fit, "test", name) for name in (FULL, LEARNED))
    test_sentence = (
        f"{share} of the cache loses {_amount(fit, test['loss'])} on {test['questions']} {_unit(fit)} of {test['n']} "
        f"test contexts, which chose nothing: {_quality(fit, test)} against {_quality(fit, full)} of the full cache, "
        f"at most {_amount(fit, test['loss_upper'])}"
    )
    if fit["budget"] < 1:
        smallest = min(row["budget"] for row in validation)
        end = ", and no smaller one was tried" if fit["budget"] == smallest else ""
        sentences = [
            f"The smallest cache within a loss of {allowed} on {validation[0]['questions']} validation {_unit(fit)} is "
            f"{share}{end}.",
            f"{test_sentence}.",
        ]
        if test["loss"] > tolerance:
            sentences.append("The test contexts do not confirm the tolerance: expect the loss that they show.")
    else:
        sentences = [
            f"No budget below 1.0 stays within a loss of {allowed}, so the budget is 1.0 and nothing is evicted.",
            f"The largest that was tried fails: {test_sentence}.",
        ]
    if fit.get("stopped_after"):
        sentences.append(
            f"The time was up after {fit['stopped_after']} of {fit['plan']['stages'][-1]['steps']} training steps: the "
            "best policy up to there was taken."
        )
    isolated = [r["budget"] for r in validation if r["budget"] < fit["budget"] and r["loss_upper"] <= tolerance]
    if isolated:
        failed = max(row["budget"] for row in validation if row["loss_upper"] > tolerance)
        sentences.append(
            f"The walk down the budgets ended at {share_of(failed)}, the first not surely within the tolerance: that "
            f"{', '.join(map(share_of, isolated))} would be does not count, since one of many tries may be lucky."
        )
    if fit["enough"]:
        sentences.append(_without_training(fit))
    return sentences


def card(fit: Mapping[str, Any]) -> str:
    """The folder's README, in Markdown."""
    settings, tables = fit["settings"], []
    columns = ["accuracy", "NLL"] if fit["measure"] == "accuracy" else ["NLL"]  # nobody repeats a text word by word
    for part, title in (("validation", "Validation contexts, which chose the budget"), ("test", "Test contexts")):
        rows = [row for row in fit["rows"] if row["task"] == part]
        head = ["policy", "allocation", "budget", *columns, "loss", "at most", "cache bytes"]
        table = pipe_table(head, [_cells(row, columns) for row in rows], 2)
        tables.append(f"{title} ({rows[0]['n']} contexts, {rows[0]['questions']} {_unit(fit)}):\n\n{table}\n")
    seconds = ", ".join(
        f"{phase} {spent:.0f} (planned {fit['plan']['seconds'].get(phase, 0):.0f})"
        for phase, spent in fit["seconds"].items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in fit["versions"].items())
    what = "share of the questions" if fit["measure"] == "accuracy" else "nats per token"
    findings, tabulated = "\n".join(f"- {line}" for line in fit["verdict"]), "\n".join(tables)
    return (
        f"# A KV cache of {share_of(fit['budget'])}\n\n{findings}\n\n{_SNIPPET}\n\n{tabulated}\n"
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
    rows = [_row(fit, "test", name) for name in fit["enough"]]
    names = [
        f"{row['policy']} ({row['allocation']}; on the test contexts it loses {_amount(fit, row['loss'])})"
        for row in rows
    ]
    listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    stay, these = ("stay", "these") if len(names) > 1 else ("stays", "this")
    also = " too" if fit["budget"] < 1 else ""
    share = share_of(fit["compared_at"])
    return f"Without training, {listed} {stay} within the tolerance at {share}{also}: {these} may be enough."


def share_of(budget: float) -> str:
    """A share as a fraction where it is one, such as 1/90."""
    whole = round(1 / budget)
    return f"1/{whole}" if whole > 1 and abs(1 / whole - budget) < 1e-9 else f"{budget:.4g}"


def _row(fit: Mapping[str, Any], part: str, policy: str) -> dict[str, Any]:
    return next(row for row in fit["rows"] if (row["task"], row["policy"]) == (part, policy))


def _unit(fit: Mapping[str, Any]) -> str:
    return "questions" if fit["measure"] == "accuracy" else "continuations"


def _amount(fit: Mapping[str, Any], loss: float) -> str:
    return f"{100 * loss:.2f} points" if fit["measure"] == "accuracy" else f"{loss:.4f} nats per token"


def _quality(fit: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return f"{row['accuracy']:.1%}" if fit["measure"] == "accuracy" else f"{row['nll']:.4f}"


def _cells(row: Mapping[str, Any], columns: list[str]) -> list[str]:
    quality = {"accuracy": f"{row['accuracy']:.1%}", "NLL": f"{row['nll']:.4f}"}
    weights = f" + {row['policy_bytes']:,}" if row["policy_bytes"] else ""
    return [
        row["policy"], row["allocation"], share_of(row["budget"]), *(quality[name] for name in columns),
        f"{row['loss']:.4f}", f"{row['loss_upper']:.4f}", f"{row['cache_bytes']:,.0f}{weights}",
    ]  # fmt: skip
