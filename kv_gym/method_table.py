"""The methods of the library as tables, read off the classes and the docstrings of their files.

``kv-gym policies --table`` prints them and `docs/methods.md` holds them. Nothing is listed here: a new policy,
allocation, tier or agent appears by itself.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from kv_gym.budgets.allocation import Allocation
from kv_gym.budgets.registry import KINDS
from kv_gym.live.tiers import TIERS, Tier, parse_tier
from kv_gym.markdown import pipe_table
from kv_gym.policies import Policy, list_policies, make_policy, policy_class
from kv_gym.policies.wrapper import Over
from kv_gym.training.registry import list_agents

_PACKAGE = Path(__file__).parent


def method_tables() -> str:
    """All tables as one Markdown page."""
    parts = [
        "# Methods",
        "Made by `kv-gym policies --table` from the classes and their docstrings; what differs from each paper stands "
        "in the file of the method.",
        "## Policies: the score of a slot",
        "*reads*: the attention that a score is made of: of the last queries (a window), of all queries so far "
        "(statistics), of the context repeated, of the future (oracles: on traces only), or none. *decoding*: whether "
        "its source evicts while decoding too, or scores a prompt once; any trigger works with any policy. "
        "*comparable*: scores of different heads may be compared as they are, as one threshold for all of them needs.",
        pipe_table(
            ("policy", "paper", "reads", "trained", "memory", "decoding", "comparable", "beyond keys and attention"),
            [_policy(name) for name in list_policies()], None,
        ),
        "## Allocations: who gets how many slots",
        pipe_table(
            ("allocation", "paper", "heads differ", "layers differ", "cuts after", "reads"),
            [_allocation(name, kind) for name, kind in KINDS.items()], None,
        ),
        "## Tiers: what becomes of evicted pairs",
        pipe_table(("evicted", "paper", "what"), [_tier(parse_tier(name)) for name in TIERS], None),
        "## Agents: how a policy is learned",
        pipe_table(("agent", "paper", "what"), [_agent(name) for name in list_agents()], None),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def source(about: str) -> str:
    """The paper that a docstring names behind ``Paper:`` or ``Source:``, as Markdown; "" where it names none.

    An arXiv or OpenReview id becomes a link, with the name in front of it and the venue in brackets behind it; other
    sources are given up to the first full stop.
    """
    found = re.search(r"(?:^|\. )(?:Paper|Sources?): (.+?)(?:\n\n|\Z)", about, re.MULTILINE | re.DOTALL)
    if found is None:
        return ""
    text = " ".join(found[1].split())
    for pattern, address in (
        (r"arXiv (\d{4}\.\d{5})", "https://arxiv.org/abs/{}"),
        (r"OpenReview (\w+)", "https://openreview.net/forum?id={}"),
    ):
        if named := re.search(pattern, text):
            before, behind = text[: named.start()], text[named.end() :]
            name = re.match(r"([A-Z][\w -]*?)(?:,| \()", before)
            venue = re.match(r" \(([^();]*\d{4}[^();]*)", behind)
            link = f"[{named[0]}]({address.format(named[1])})"
            return f"{name[1] + ', ' if name else ''}{link}{f' ({venue[1]})' if venue else ''}"
    return re.split(r"[.:;] ", text)[0].rstrip(".")


def _policy(name: str) -> Sequence[str]:
    paper = _paper_of(policy_class(name))
    if name == "scorer":
        return name, paper, "none, or as its inputs ask", "yes", "-", "yes", "where trained to", "learned weights"
    policy = make_policy(name)
    return (
        name,
        paper,
        _reads(policy),
        "-",
        _memory(policy),
        _decoding(policy),
        _yes(policy.comparable),
        _beyond(policy),
    )


def _reads(policy: Policy) -> str:
    own = type(policy).needs_queries is not Over.needs_queries
    found = [
        ("the future", type(policy).needs_future),
        ("the context repeated", not isinstance(policy, Over) and policy.repetition),
        ("statistics", not isinstance(policy, Over) and policy.statistics and not policy.repetition),
        (f"a window of {policy.needs_queries}", own and policy.needs_queries),
        ("as its base", isinstance(policy, Over)),
    ]
    return ", ".join(what for what, true in found if true) or "none"


def _memory(policy: Policy) -> str:
    return "as its base" if isinstance(policy, Over) else _yes(bool(policy.statistics))


def _decoding(policy: Policy) -> str:
    if policy.needs_future:
        return "replay only"
    if type(policy).prompt_only:
        return "-"
    return "as its base" if isinstance(policy, Over) else "yes"


def _beyond(policy: Policy) -> str:
    hooks = [
        (f"over another score ({getattr(policy, 'over', policy).name})", isinstance(policy, Over)),
        ("output projection", policy.needs_output),
        ("hidden states", policy.needs_hidden),
        ("a second reading of the context", policy.repetition),
        ("positions inside the cache", policy.positions == "cache"),
    ]
    return ", ".join(what for what, true in hooks if true) or "-"


def _allocation(name: str, kind: type[Allocation]) -> Sequence[str]:
    layers = kind.own_totals or kind.whole_model
    second = "within" in inspect.signature(kind).parameters  # a rule for the heads of a layer
    within = "as a second rule says" if second else _yes(not kind.equal)
    reads = "the last queries" if kind.needs_queries is not Allocation.needs_queries else "-"
    after = "the last layer" if kind.whole_model else "each layer"
    return name, _paper_of(kind), within, _yes(layers), after, reads


def _tier(tier: Tier) -> Sequence[str]:
    return tier.name, _paper_of(type(tier)), _sentence(type(tier).__doc__ or "")


def _agent(name: str) -> Sequence[str]:
    # read, not imported: a table needs no learning library
    about = ast.get_docstring(ast.parse((_PACKAGE / "training" / f"{name}.py").read_text())) or ""
    return name, source(about) or "-", _sentence(about)


def _paper_of(kind: type) -> str:
    return source(inspect.getdoc(kind) or "") or source(import_module(kind.__module__).__doc__ or "") or "-"


def _sentence(about: str) -> str:
    return " ".join(about.split("\n\n")[0].split())


def _yes(true: bool) -> str:
    return "yes" if true else "-"
