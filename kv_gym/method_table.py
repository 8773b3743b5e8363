"""The methods of the library as tables, made of the attributes of their classes and the first lines of docstrings.

``kv-gym policies --table`` prints them and `docs/methods.md` holds them. Nothing is listed here: a new policy,
allocation, tier or agent appears by itself.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

from kv_gym.budgets import ALLOCATIONS, Allocation
from kv_gym.live.selection import SELECTIONS, parse_selection
from kv_gym.live.tiers import TIERS, LowRankState, Tier, parse_tier
from kv_gym.markdown import pipe_table
from kv_gym.policies import Policy, list_policies, make_policy, policy_class
from kv_gym.policies.wrapper import PolicyWrapper
from kv_gym.training.registry import learner_class, list_agents


def method_tables() -> str:
    """All tables as one Markdown page."""
    parts = [
        "# Methods",
        "Made by `kv-gym policies --table` from the classes; the file of a method says how it differs from its paper.",
        "## Policies: the score of a slot",
        "*reads*: the attention that a score is made of: of the last queries (a window), of all queries so far "
        "(statistics), of the context repeated, of the future (oracles: on traces only), or none. *decoding*: whether "
        "its source evicts while decoding too, or scores a prompt once; any trigger works with any policy. "
        "*comparable*: scores of different heads may be compared as they are, as one threshold for all of them needs.",
        pipe_table(
            ("policy", "paper", "reads", "trained", "memory", "decoding", "comparable", "beyond keys and attention"),
            [(name, paper_link(policy_class(name)), *_policy(name)) for name in list_policies()], None,
        ),
        "## Allocations: who gets how many slots",
        pipe_table(
            ("allocation", "paper", "heads differ", "layers differ", "cuts after", "reads"),
            [(name, paper_link(kind), *_allocation(kind)) for name, kind in ALLOCATIONS.items()], None,
        ),
        "## Tiers: what becomes of evicted pairs",
        pipe_table(("evicted", "paper", "what"), [_tier(name, type(parse_tier(name))) for name in TIERS]
                   + [_tier("less:FOLDER", LowRankState)], None),
        "## Selections: which of the held slots a query reads",
        pipe_table(("select", "paper", "what"), [_selection(name) for name in SELECTIONS], None),
        "## Agents: how a policy is learned",
        "`less` trains no policy but the kernels of the tier `less:FOLDER`, with a command of its own, `kv-gym "
        "train-less`: [write-an-agent.md](write-an-agent.md#kernels-of-a-tier).",
        pipe_table(("agent", "paper", "what"), [_agent(name) for name in list_agents()], None),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def paper_link(kind: type) -> str:
    """The paper of a policy, allocation, tier or agent as a Markdown link; "-" where there is none."""
    paper = getattr(kind, "paper", None)
    return "-" if paper is None else paper.link


def _tier(name: str, kind: type[Tier]) -> Sequence[str]:
    return name, paper_link(kind), _summary(kind.__doc__)


def _selection(name: str) -> Sequence[str]:
    kind = type(parse_selection(name if name == "all" else f"{name}:0.2"))
    return name if name == "all" else f"{name}:SHARE", paper_link(kind), _summary(kind.__doc__)


def _agent(name: str) -> Sequence[str]:
    kind = learner_class(name)
    return name, paper_link(kind), _summary(sys.modules[kind.__module__].__doc__)


def _summary(docstring: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((docstring or "").split("\n\n")[0].split())


def _policy(name: str) -> Sequence[str]:
    if name == "scorer":
        return "none, or as its inputs ask", "yes", "-", "yes", "where trained to", "learned weights"
    policy = make_policy(name)
    memory = "as its base" if isinstance(policy, PolicyWrapper) else _yes(bool(policy.statistics))
    return _reads(policy), "-", memory, _decoding(policy), _yes(policy.comparable), _beyond(policy)


def _reads(policy: Policy) -> str:
    wrapper = isinstance(policy, PolicyWrapper)
    window = policy.needs_queries if type(policy).needs_queries is not PolicyWrapper.needs_queries else 0
    sources = [
        ("the future", type(policy).needs_future),
        ("the context repeated", not wrapper and policy.repetition),
        ("statistics", not wrapper and policy.statistics and not policy.repetition),
        (f"a window of {window}", window),
        ("as its base", wrapper),
    ]
    return ", ".join(source for source, used in sources if used) or "none"


def _decoding(policy: Policy) -> str:
    if policy.needs_future:
        return "replay only"
    if type(policy).prompt_only:
        return "-"
    return "as its base" if isinstance(policy, PolicyWrapper) else "yes"


def _beyond(policy: Policy) -> str:
    needs = [
        (f"over another score ({getattr(policy, 'over', policy).name})", isinstance(policy, PolicyWrapper)),
        ("output projection", policy.needs_output),
        ("hidden states", policy.needs_hidden),
        ("a second reading of the context", policy.repetition),
        ("positions inside the cache", policy.positions == "cache"),
    ]
    return ", ".join(need for need, true in needs if true) or "-"


def _allocation(kind: type[Allocation]) -> Sequence[str]:
    second_rule = "within" in inspect.signature(kind).parameters
    heads = "as a second rule says" if second_rule else _yes(not kind.equal)
    layers = _yes(kind.own_totals or kind.whole_model)
    reads = "the last queries" if kind.needs_queries is not Allocation.needs_queries else "-"
    return heads, layers, "the last layer" if kind.whole_model else "each layer", reads


def _yes(true: bool) -> str:
    return "yes" if true else "-"
