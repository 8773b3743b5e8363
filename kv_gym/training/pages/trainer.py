"""`kv-gym pages train`: rounds of training, of which the one with the most hits on later requests is kept."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from inspect import isabstract
from pathlib import Path

import torch

from kv_gym import __version__
from kv_gym.errors import UserError
from kv_gym.evaluation.rows import refuse_unwritable
from kv_gym.files import bundled, only_class, read_yaml, refuse_address, validated
from kv_gym.pages.cache import check_drawn
from kv_gym.pages.features import check_features, features_of
from kv_gym.pages.policies.base import PageRankingPolicy
from kv_gym.pages.policies.learned import Learned, LearnedCard
from kv_gym.pages.policies.tail_oracle import TailOracle
from kv_gym.pages.readers import read_requests
from kv_gym.pages.requests import RequestTrace
from kv_gym.pages.simulator import simulate
from kv_gym.training.pages.agent import PageAgent, PageTask
from kv_gym.training.pages.recording import record_decisions

TRAINING, VALIDATION = 0.5, 0.7
"""Shares of the requests up to which agents train, and up to which the best round is chosen; the rest is for tests."""


def list_page_agents() -> list[str]:
    """Names of the page agents: every ``agents/pages/*.yml`` is one."""
    return sorted(file.stem for file in bundled("page_agents").glob("*.yml"))


def _agent_class(agent: str) -> type[PageAgent]:
    if agent not in list_page_agents():
        raise UserError(f"unknown page agent {agent!r}; known: {', '.join(list_page_agents())}")
    module = import_module(f"kv_gym.training.pages.{agent}")
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    return only_class([kind for kind in kinds if issubclass(kind, PageAgent) and not isabstract(kind)], module.__name__)


def train_pages(
    agent: str,
    requests: str | Path | RequestTrace,
    out: str | Path,
    capacity: int,
    semantics: str = "objects",
    oversize: str = "refuse",
    candidates: int = 16,
    drawn: int = 0,
    features: Sequence[str] | None = None,
    hidden: int | None = None,
    rounds: int | None = None,
    decisions: int | None = None,
    steps: int | None = None,
    rate: float | None = None,
    seed: int = 0,
    format: str = "auto",
) -> Learned:
    """Train a page policy on the first half of a trace.

    The round with the most hits between half and 0.7 of the requests is kept; where LRU has more hits there, the policy
    leaves every decision to LRU and says so. The last 0.3 of the requests are not looked at: measure on them with
    `kv-gym pages simulate --policies FOLDER,lru --warm-up 0.7`.

    Args:
        agent: clone: imitate the oracle that chooses among the candidates; dqn, ppo: reinforcement learning from hits.
        requests: a trace, or the file of one.
        out: folder to write the policy into.
        capacity: pages, or bytes where the trace has sizes.
        semantics: objects: every page stands alone; prefix: requests are chains of which only the ends may leave.
        oversize: what becomes of an object that is larger than the cache: refuse the trace, or pass it by.
        candidates: how many pages it chooses among.
        drawn: how many of these are drawn at random from all that may leave; the others are the least recently used.
        features: what it sees of each; None: all that can differ between pages of the trace.
        hidden: width of the network (None, as for all that follow: as in agents/pages/AGENT.yml).
        rounds: of gathering decisions and training on them; the best one is kept.
        decisions: gathered in a round, at most.
        steps: optimiser steps in a round.
        rate: learning rate, at its peak where it has one.
        seed: of the weights and of what is drawn.
        format: of the file: auto, mooncake, keys, times, csv, nginx or cache2k.

    Returns:
        The policy; its `card` holds the hit rates on the validation part.

    Raises:
        UserError: an unknown agent or feature, a file that cannot be read, or a trace where nothing must leave.
    """
    kind, file = _agent_class(agent), bundled("page_agents") / f"{agent}.yml"
    written = validated(kind.settings_class, read_yaml(file, "expected settings as NAME: VALUE") or {}, str(file))
    given = {"hidden": hidden, "rounds": rounds, "decisions": decisions, "steps": steps, "rate": rate}
    given = {name: value for name, value in given.items() if value is not None}
    settings = validated(kind.settings_class, written.model_dump() | given, f"page agent {agent!r}")
    refuse_address(out)
    if Path(out).is_file():
        raise UserError(f"{out} is a file; name a folder to write the policy into")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}; expected a number from 0 and below 2^63")
    if candidates < 2:
        raise UserError(f"with candidates={candidates} there is nothing to decide; expected 2 or more")
    check_drawn(drawn, candidates)
    trace = requests if isinstance(requests, RequestTrace) else read_requests(requests, format)
    if features is None:  # the place in the list says nothing of pages that were drawn
        features = tuple(name for name in features_of(trace, semantics) if not drawn or name != "order")
    check_features(features)
    training, seen = int(TRAINING * trace.requests), trace.part(0, max(1, int(VALIDATION * trace.requests)))
    lru = simulate(seen, "lru", capacity, semantics, oversize, warm_up=TRAINING / VALIDATION)
    if not lru.evictions:
        raise UserError(
            f"nothing leaves a cache of {capacity} in the first part of {trace.name}: give a smaller capacity"
        )
    described = {
        "agent": agent, "features": tuple(features), "candidates": candidates, "drawn": drawn,
        "hidden": settings.hidden, "trace": trace.name, "semantics": semantics, "capacity": capacity, "seed": seed,
        "kv_gym": __version__,
    }  # fmt: skip
    card = validated(LearnedCard, described, f"page agent {agent!r}")
    refuse_unwritable(Path(out) / "policy.json")
    torch.manual_seed(seed)
    task = PageTask(trace.part(0, max(1, training)), capacity, semantics, candidates, drawn, tuple(features), seed)
    learner = kind(task, settings)
    policy: PageRankingPolicy = TailOracle(candidates=candidates, drawn=drawn)
    rates: list[float] = []
    learned: list[Learned] = []
    for number in range(settings.rounds + 1):  # the last run only counts the hits of the last round
        recording = kind.imitates and number < settings.rounds
        count = settings.decisions if recording else 0
        made, hit_rate = record_decisions(seen, policy, capacity, semantics, features, count, learner.random, training)
        rates.append(hit_rate)
        if number < settings.rounds:
            if recording and not len(made.mask):
                raise UserError(
                    f"nothing leaves a cache of {capacity} in the first half of {trace.name}: give a smaller capacity"
                )
            learner.train_round(made if recording else None)
            policy = Learned(card, learner.network.weights(), shadow=0)
            learned.append(policy)
    oracle, *rates = rates
    best = max(range(len(rates)), key=rates.__getitem__)
    validation = {"learned": rates[best], "lru": lru.hit_rate, "tail_oracle": oracle}
    card = card.model_copy(update={"validation": validation, "fallback": rates[best] < lru.hit_rate})
    chosen = Learned(card, learned[best].weights)
    chosen.save(out)
    return chosen
