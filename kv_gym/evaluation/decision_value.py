"""`kv-gym evaluate --decision-value`: predictors judged by the action they inform, against a baseline's action.

Idea: Beyond Eviction Prediction (arXiv 2401.16440, on housing), which judges a model by how many tenants at risk are
reached in the same time when visits are ranked by it, not by its AUC. Differs from it in: the action is a cut of a KV
cache, and what it is worth is recorded.

What it is for shows on the bundled sample: StreamingLLM predicts better than KeyDiff which slots the oracle keeps (AUC
.67 and .64), and yet half of the cache cut by KeyDiff keeps 12 points more of the future attention
(`kv-gym evaluate --traces traces/sample --split all --policies keydiff,streaming_llm --budgets 1/2 --decision-value
recency`, task multi_key; three contexts show that it happens, not how often).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from kv_gym.budgets import (
    Allocation,
    Budget,
    Selection,
    format_budget,
    parse_allocation,
    parse_budget,
    protection_for,
    select_context,
    uniform,
)
from kv_gym.cache_view import Future
from kv_gym.errors import UserError
from kv_gym.evaluation.evaluate import Policies, named_policies, refuse_other_model, traces_in_split
from kv_gym.evaluation.rows import refuse_unwritable, result, write_json
from kv_gym.evaluation.statistics import auc, mean_interval, spearman
from kv_gym.markdown import pipe_table
from kv_gym.policies import Policy
from kv_gym.policies.oracle import Oracle
from kv_gym.progress import ProgressBar
from kv_gym.traces.sequence import Sequence

MEASURES = (
    "gain_per_slot", "gain", "changed_slots", "changed_heads", "changed_contexts", "output_error",
    "output_error_change", "regret",
)  # fmt: skip
NOT_DECISIVE = ("spearman", "auc")


def decision_value(
    policies: Policies,
    baseline: str | Path | Policy,
    traces,
    budgets: Iterable[str | int | float],
    *,
    split: str | None = "test",
    sinks: int | None = None,
    recent: int | None = None,
    allocations: Iterable[str | Allocation] = ("uniform",),
    baseline_allocation: str | Allocation | None = None,
    json: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """What it is worth to cut by each policy instead of by the baseline, in the same states.

    Args:
        policies: names, class paths, exported folders or policy objects; a mapping gives them names for the rows.
        baseline: the policy that would act otherwise, such as ``snapkv``.
        traces: a trace set or its folder.
        budgets: slots per head or shares, see :func:`kv_gym.budgets.parse_budget`.
        split: of the traces, ``train`` or ``test``; None or ``all`` takes every context.
        sinks, recent: protection for every policy, the baseline and the oracle; None means each one's own.
        allocations: who gets the slots; every policy meets every one of them.
        baseline_allocation: the baseline's; None means the same as the policy's. Its total is the same, unless a rule
            does not spend the budget exactly.
        json: file to write the result to.
        progress: show a bar.

    Returns:
        ``{"rows": [...], "command", "versions", ...}``; see :func:`compare` for the rows.

    Raises:
        UserError: an unusable policy, budget or trace set; a policy of another model.
    """
    if json is not None:
        refuse_unwritable(json)
    rules = [parse_allocation(allocation) for allocation in allocations]
    chosen_budgets = [parse_budget(budget) for budget in budgets]
    if not rules or not chosen_budgets:
        raise UserError("there is nothing to compare; expected at least one budget and allocation")
    chosen, (other,) = named_policies(policies), named_policies([baseline]).items()
    part = traces_in_split(traces, split)
    refuse_other_model(chosen | dict([other]), part.fingerprint, "the model of the traces")
    with ProgressBar("decision value", len(part) * len(chosen), shown=progress, transient=True) as bar:
        rows = compare(
            chosen, other, part, chosen_budgets, sinks, recent, rules, baseline_allocation, bar.advance
        )  # fmt: skip
    data = result(rows, traces=part.hash, contexts=len(part), split=split or "all", baseline=other[0])
    if json is not None:
        write_json(json, data)
    return data


@torch.no_grad()
def compare(
    policies: Mapping[str, Policy],
    baseline: tuple[str, Policy],
    sequences: Iterable[Sequence],
    budgets: Seq[Budget],
    sinks: int | None = None,
    recent: int | None = None,
    allocations: Iterable[str | Allocation] = ("uniform",),
    baseline_allocation: str | Allocation | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[dict]:
    """One decision per context, at its end, by each policy and by the baseline.

    Args:
        policies: by the name that rows carry.
        baseline: the name that rows carry, and the policy.
        sequences: recorded contexts with at least one continuation each.
        advance: called after every context and policy (progress).
        budgets, sinks, recent, allocations, baseline_allocation: as for :func:`decision_value`.

    Returns:
        Rows of policy, budget, allocation, baseline, baseline_allocation, task, ``utility_kept`` and ``kept_share``
        (both as in :func:`~kv_gym.evaluation.measure.replay`), ``n`` (contexts), and means over contexts. Beside each
        stands ``<name>_interval``, half the width of its 95 % interval (Student's t over contexts, each paired with
        itself under the baseline; None for one context):

        - ``gain_per_slot``: utility kept above the baseline's, divided by the slots kept (attention per query).
        - ``gain``: the same as a share of the context's whole utility.
        - ``changed_slots``: share of the kept slots that the baseline evicts; ``changed_heads``: share of the heads in
          which any slot differs; ``changed_contexts``: share of the contexts in which any does.
        - ``output_error``: error of the attention output, sum over heads divided by the sum of its norms, see
          :func:`~kv_gym.evaluation.decision_value.output_error`; ``output_error_change``: less the baseline's, so
          negative is better.
        - ``regret``: utility kept by the oracle's cut (same budget and allocation; it sees the future) above the
          policy's, as a share of the whole. Where an allocation sets the heads' shares by the scores, the oracle's
          cut need not be the best one, and regret may be negative.
        - ``not_decisive``: ``spearman``, rank correlation of the scores with the utility, and ``auc`` for being kept
          by the oracle: how well importance is predicted, not what the action is worth. Over the slots that are not
          protected, within each head (mean over heads), or over the whole model where the allocation compares all its
          slots. None where undefined.

    Raises:
        UserError: a context without continuations, or without the queries or statistics that a policy needs; or an
            allocation that cannot use a policy's scores.
    """
    (baseline_name, baseline_policy), oracle = baseline, Oracle()
    rules = [parse_allocation(allocation) for allocation in allocations]
    baseline_rules = [rule if baseline_allocation is None else parse_allocation(baseline_allocation) for rule in rules]
    for rule, baseline_rule in zip(rules, baseline_rules, strict=True):
        baseline_rule.refuse_unfit(baseline_policy)
        for policy in policies.values():
            rule.refuse_unfit(policy)
    # by the budget's number, for a budget of 1 slot equals one of 1.0, which is everything
    settings = list(product(range(len(budgets)), range(len(rules))))
    found: dict[tuple, list[dict[str, float]]] = defaultdict(list)
    for sequence in sequences:
        if not sequence.continuations:
            raise UserError(f"context {sequence.id} has no continuations, so nothing tells what was worth keeping")
        sequence.refuse_sampled("decision_value")
        of_baseline, of_oracle = (_Cuts(each, sequence, sinks, recent) for each in (baseline_policy, oracle))
        baseline_cuts = {(b, r): of_baseline.cut(budgets[b], baseline_rules[r]) for b, r in settings}
        oracle_cuts = {(b, r): of_oracle.cut(budgets[b], rules[r]) for b, r in settings}
        for name, policy in policies.items():
            of_policy = _Cuts(policy, sequence, sinks, recent)
            for b, r in settings:
                cut, pooled = of_policy.cut(budgets[b], rules[r]), rules[r].whole_model
                measured = _measure(cut, baseline_cuts[b, r], oracle_cuts[b, r], pooled)
                found[name, b, rules[r].name, baseline_rules[r].name, sequence.task].append(measured)
            advance()
    return [
        {"policy": name, "budget": budgets[b], "allocation": rule, "baseline": baseline_name,
         "baseline_allocation": baseline_rule, "task": task} | _summary(measured)
        for (name, b, rule, baseline_rule, task), measured in found.items()
    ]  # fmt: skip


@dataclass(frozen=True)
class _Cut:
    """What one decision kept of a context.

    Attributes:
        selection: the slots that stay, and all utility.
        scores: `[L, H, n]`, in the form in which the allocation compares heads.
        ranked: `[n]` bool, the tokens that are not protected, so that scores decide about them.
        output_error: of what is kept.
    """

    selection: Selection
    scores: Tensor
    ranked: Tensor
    output_error: float

    @property
    def kept(self) -> Tensor:
        """The slots that stay, `[L, H, n]` bool."""
        return self.selection.kept

    @property
    def utility(self) -> float:
        """Utility of what is kept."""
        return float(self.selection.kept_utility.sum())


class _Cuts:
    """A policy in one context, at its end."""

    def __init__(self, policy: Policy, sequence: Sequence, sinks: int | None, recent: int | None) -> None:
        self._policy, self._protection = policy, protection_for(policy, sinks, recent)
        layers = range(len(sequence.layers))
        self._views = [sequence.view_for(policy, i) for i in layers]
        self._futures = [sequence.future(i) for i in layers]
        self._utility = torch.from_numpy(sequence.utility())

    def cut(self, budget: Budget, rule: Allocation) -> _Cut:
        slots = uniform(budget, self._views[0].seen, self._utility.shape[1])
        views = [view.with_budget(slots) for view in self._views]
        scores = [self._policy.score(view) for view in views]
        sinks, recent = self._protection
        selection = select_context(
            self._policy, rule, views, budget, self._utility, sinks=sinks, recent=recent, scores=scores
        )
        compared = [rule.compared(score, view)[0] for score, view in zip(scores, views, strict=True)]
        errors = [
            output_error(future, view.values, kept[None])
            for future, view, kept in zip(self._futures, views, selection.kept, strict=True)
        ]
        lost, total = (float(torch.stack(part).sum()) for part in zip(*errors, strict=True))
        ranked = ~views[0].protected(*self._protection)[0, 0]  # the budget is the same for all heads
        return _Cut(selection, torch.stack(compared), ranked, lost / max(total, 1e-12))


def _measure(cut: _Cut, baseline: _Cut, oracle: _Cut, pooled: bool) -> dict[str, float]:
    total, kept = float(cut.selection.total_utility.sum()), max(1, int(cut.kept.sum()))
    differs = cut.kept != baseline.kept
    shape = (1, -1) if pooled else (differs.shape[0] * differs.shape[1], -1)
    scores, wanted, utility = (
        each[..., cut.ranked].reshape(shape) for each in (cut.scores, oracle.kept, cut.selection.utility)
    )
    return {
        "gain_per_slot": (cut.utility - baseline.utility) / kept,
        "gain": (cut.utility - baseline.utility) / max(total, 1e-12),
        "changed_slots": float((cut.kept & ~baseline.kept).sum()) / kept,
        "changed_heads": float(differs.any(-1).double().mean()),
        "changed_contexts": float(differs.any()),
        "output_error": cut.output_error,
        "output_error_change": cut.output_error - baseline.output_error,
        "regret": (oracle.utility - cut.utility) / max(total, 1e-12),
        "spearman": float(spearman(scores, utility).nanmean()),
        "auc": float(auc(scores, wanted).nanmean()),
        "utility": cut.utility,
        "total": total,
        "kept_share": float(cut.kept.double().mean()),
    }


def _summary(measured: list[dict[str, float]]) -> dict:
    columns = {name: [one[name] for one in measured] for name in measured[0]}
    means: dict[str, float | None] = {}
    for name in (*MEASURES, *NOT_DECISIVE):
        means[name], means[f"{name}_interval"] = mean_interval(columns[name])
    not_decisive = {name: means.pop(name) for name in list(means) if name.startswith(NOT_DECISIVE)}
    return {
        "utility_kept": sum(columns["utility"]) / max(sum(columns["total"]), 1e-12),
        "kept_share": sum(columns["kept_share"]) / len(measured),
        "n": len(measured),
        **means,
        "not_decisive": not_decisive,
    }


def output_error(future: Future, values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Error of the context's part of the attention output of each head, and that part's norm.

    With w_i the attention that the mean query of a recorded block pays to context slot i, and v_i the slot's value,
    the context's part of the output is o = sum_i w_i v_i. When slots are evicted, a softmax over what is left gives
    their mass W to those that stay, in proportion, so that

        o - o' = sum over evicted of w_i v_i  -  W * (sum over kept of w_i v_i) / (sum over kept of w_i).

    A head that keeps no attention at all loses o as a whole. Norms of o - o' and of o are averaged over the blocks,
    every continuation weighing the same and its queries too.

    What it is: exact for a query alone in its block whose KV head serves one query head and whose own continuation
    takes no attention. What it is not: (1) a trace holds attention per block and KV head, so the output of the mean
    query stands for those of single queries and query heads, and errors that point in opposite directions cancel;
    (2) values of the continuation's tokens are not recorded, so the evicted mass is given to the context's slots
    alone, though a live model would give some of it to newer tokens; (3) it is measured before the output projection,
    with the queries, keys and values of the full cache: what a layer's error does to the layers above is left out.

    Args:
        future: what later queries attended to, of a batch of 1; the mean over query heads is taken.
        values: `[1, kv_heads, tokens, d]`.
        kept: `[1, kv_heads, tokens]` bool.

    Returns:
        Two tensors `[kv_heads]` float64 in units of the values.
    """
    attention = future.attention[0, ..., 1].double().transpose(-1, -2)  # [kv_heads, blocks, tokens]
    head_values, left = values[0].double(), attention * kept[0][:, None]
    output, output_left = attention @ head_values, left @ head_values  # [kv_heads, blocks, d]
    mass, mass_left = attention.sum(-1, keepdim=True), left.sum(-1, keepdim=True)
    # where nothing was evicted the factor is exactly 1, and so the error exactly 0
    scale = torch.where(mass_left > 0, mass / mass_left.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    weights = future.weights.double()
    return (output - scale * output_left).norm(dim=-1) @ weights, output.norm(dim=-1) @ weights


def decision_table(rows: Iterable[dict]) -> str:
    """The rows as a table in Markdown, by budget from large to small and then by gain; intervals behind `+-`."""
    rows = sorted(rows, key=lambda row: (row["task"], -row["budget"], -row["gain_per_slot"]))
    several = len({row["task"] for row in rows}) > 1
    forms = {
        "gain_per_slot": ("gain per slot", "{:.3g}"),
        "gain": ("gain", "{:.1%}"),
        "changed_slots": ("slots changed", "{:.1%}"),
        "changed_heads": ("heads changed", "{:.1%}"),
        "changed_contexts": ("contexts changed", "{:.0%}"),
        "output_error_change": ("output error, change", "{:.1%}"),
        "regret": ("regret", "{:.1%}"),
    }
    head = ["policy", "allocation", "budget", *(name for name, _ in forms.values()), "(Spearman)", "(AUC)", "n"]
    body = []
    for row in rows:
        cells = [_cell(row, name, form) for name, (_, form) in forms.items()]
        not_decisive = [_cell(row["not_decisive"], name, "{:.3f}") for name in NOT_DECISIVE]
        name = f"{row['policy']} ({row['task']})" if several else row["policy"]
        body.append([name, row["allocation"], format_budget(row["budget"]), *cells, *not_decisive, str(row["n"])])
    against = ", ".join(sorted({f"{row['baseline']} ({row['baseline_allocation']})" for row in rows}))
    return (
        pipe_table(head, body, 2)
        + f"\n\nAgainst the cut of {against} in the same contexts: mean over contexts +- half a 95 % interval. Gain and"
        " regret are shares of the whole future attention. Spearman and AUC say how well importance is predicted, not"
        " what the action is worth: no ground to choose by.\n"
    )


def _cell(row: Mapping, name: str, form: str) -> str:
    if row[name] is None:
        return ""
    half = row[f"{name}_interval"]
    return form.format(row[name]) + (f" +- {form.format(half)}" if half is not None else "")
