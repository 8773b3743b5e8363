"""A panel: several policies for which one prefill keeps all that they need."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies import Policy


@dataclass(frozen=True)
class Panel(Policy):
    """Watches a context for its members and scores nothing: a fork of the cache chooses one of them.

        cache = EvictingCache(model, policy=Panel((make_policy("h2o"), make_policy("snapkv"))), budget=1.0)
        model(context, past_key_values=cache)
        fork = cache.fork(policy=make_policy("h2o"), budget=0.25)
        fork.compress()

    Attributes:
        members: the policies; their queries and state are kept side by side.
    """

    members: tuple[Policy, ...]

    @property
    def needs_queries(self) -> int:
        """As many as the member that wants most."""
        return max((member.needs_queries for member in self.members), default=0)

    def score(self, view: CacheView) -> Tensor:
        """Refuse: nobody chose a member yet."""
        names = ", ".join(member.name for member in self.members)
        raise UserError(f"a panel does not score: fork the cache with one of its policies ({names}), then compress")


def watched(policy: Policy) -> tuple[Policy, ...]:
    """The policies whose queries and state a cache keeps for `policy`."""
    return policy.members if isinstance(policy, Panel) else (policy,)
