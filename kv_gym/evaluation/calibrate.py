"""`kv-gym calibrate`: thresholds for budgets, found ahead on traces, so that prompts can be cut layer by layer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from kv_gym.budgets import parse_budget, protection_for, select_slots, slots_after
from kv_gym.budgets.calibrated import Calibrated, policy_identity, refuse_no_scale
from kv_gym.cache_view import protected_tokens
from kv_gym.errors import UserError
from kv_gym.evaluation.evaluate import refuse_other_model, traces_in_split
from kv_gym.evaluation.rows import refuse_unwritable, versions
from kv_gym.policies import Policy, make_policy
from kv_gym.progress import ProgressBar
from kv_gym.traces import Sequence, TraceSet, open_traces


@torch.no_grad()
def calibrate(
    policy: str | Path | Policy,
    traces: str | Path | TraceSet | Iterable[str | Path | TraceSet],
    shares: Iterable[str | float],
    out: str | Path | None = None,
    *,
    split: str | None = "train",
    sinks: int | None = None,
    recent: int | None = None,
    progress: bool = True,
) -> Calibrated:
    """Find score thresholds on traces, for `calibrated:FILE`.

    For each share of the tokens, this is the score at which a context keeps that share of its slots on average. With
    fixed thresholds a long prompt can be cut layer by layer while it is read.

    One scalar per share for the whole model: heads and contexts that score higher keep more. Thresholds on a sum of
    attention, as of ``h2o``, hold for contexts of about the same length as these. Learned scores say whether they
    have an absolute scale (:class:`~kv_gym.policies.scorer.Scorer`). Those without are warned about and not refused:
    one network made them all, and how far the share strays is measured here and stored.

    Args:
        policy: name, class path or folder of a policy whose scores compare across heads, and from context to context.
        traces: trace set or its folder, or several; continuations are not needed.
        shares: shares of the tokens, such as ``0.25`` or ``1/8``.
        out: file to write, for the allocation ``calibrated:FILE``.
        split: of the traces, ``train`` or ``test``; ``all`` takes every context. In Python, so does None.
        sinks: first tokens that are always kept, by default the policy's own number; use the same when decoding.
        recent: last tokens that are always kept, by default the policy's own number; use the same when decoding.
        progress: show a bar.

    Returns:
        The allocation. Its ``about`` holds, for every share, mean and standard deviation over contexts of the share
        that was really kept on these contexts.

    Raises:
        UserError: a policy without such a scale or of another model, a budget that is no share, no context in the
            split, or one without what the policy needs.
    """
    chosen = make_policy(policy)
    refuse_no_scale(chosen)
    if not getattr(chosen, "absolute", True):
        warnings.warn(
            f"scores of policy {chosen.name!r} were trained to rank slots within a context, which fixes no scale from "
            "one context to the next: look at how far the kept share strays, on contexts as long as yours",
            stacklevel=2,
        )
    wanted = sorted({_share(share) for share in shares})
    if out is not None:
        refuse_unwritable(out)
    if not wanted:
        raise UserError("there is no share to calibrate for; give at least one, such as 1/8")
    part = traces_in_split(traces, split)
    refuse_other_model({chosen.name: chosen}, part.fingerprint, "the model of the traces")
    protection = protection_for(chosen, sinks, recent)
    scores = []
    with ProgressBar("calibrate", len(part), shown=progress, transient=True) as bar:
        for sequence in part:
            sequence.refuse_sampled("calibrate")
            views = (sequence.view_for(chosen, i) for i in range(len(sequence.layers)))
            scores.append(torch.stack([chosen.score(view)[0].float() for view in views]))
            bar.advance()
    thresholds = tuple(threshold(scores, share, *protection) for share in wanted)
    rule = Calibrated(
        json.dumps(policy_identity(chosen)), *scores[0].shape[:2], tuple(wanted), thresholds  # type: ignore[call-arg]
    )  # fmt: skip
    kept = realised(rule, chosen, part, wanted, *protection)
    about = {
        "traces": open_traces(traces).hash, "split": split or "all", "contexts": len(part), "protection": protection,
        "absolute": bool(getattr(chosen, "absolute", True)),
        "lengths": [min(each.shape[2] for each in scores), max(each.shape[2] for each in scores)],
        "kept_mean": kept.mean(0).tolist(), "kept_deviation": kept.std(0, correction=0).tolist(),
        "model": part.manifest.get("model"), "versions": versions(),
    }  # fmt: skip
    rule = Calibrated(rule.policy, rule.layers, rule.kv_heads, rule.shares, rule.thresholds, json.dumps(about))
    return rule if out is None else Calibrated.read(rule.save(out))


def threshold(scores: list[Tensor], share: float, sinks: int, recent: int) -> float:
    """The score from which on contexts keep `share` of their slots on average, protected ones included.

    Args:
        scores: `[L, H, tokens]` float32 of each context, in text order.
        share: in (0, 1].
        sinks, recent: protected tokens, before they shrink to half a budget.
    """
    free, weights, guarded = [], [], 0.0
    for context in scores:
        n = context.shape[2]
        first, last = protected_tokens(slots_after(share, n), sinks, recent)
        free.append(context[..., first : n - last].flatten())
        weights.append(torch.full_like(free[-1], 1 / context.numel() / len(scores), dtype=torch.float64))
        guarded += (first + last) / n / len(scores)
    order = torch.cat(free).sort(descending=True)
    kept = guarded + torch.cat(weights)[order.indices].cumsum(0)
    # equal scores stay or go together
    kept[:-1].masked_fill_(order.values[:-1] == order.values[1:], float("inf"))
    return float(order.values[(kept - share).abs().argmin()])


def realised(
    rule: Calibrated, policy: Policy, sequences: Iterable[Sequence], shares: list[float], sinks: int, recent: int
) -> Tensor:
    """The share of its slots that each context keeps under `rule`, `[contexts, shares]` float64."""
    rows: list[list[float]] = []
    for sequence in sequences:
        rows.append([])
        for share in shares:
            views = [sequence.view_for(policy, i, share) for i in range(len(sequence.layers))]
            masks = torch.stack(select_slots(policy, rule, views, sinks, recent))
            rows[-1].append(float(masks.double().mean()))
    return torch.tensor(rows, dtype=torch.float64)


def _share(budget: str | float) -> float:
    share = parse_budget(budget)
    if isinstance(share, int):
        raise UserError(f"budget {budget} counts slots; thresholds belong to shares of the tokens, such as 1/8")
    return share
