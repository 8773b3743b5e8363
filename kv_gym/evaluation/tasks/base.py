"""The interface of a task: contexts, questions about them, and how a configuration is measured on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from kv_gym.evaluation.configurations import Configuration
from kv_gym.evaluation.outcomes import Outcome


class Task(ABC):
    """Contexts and questions about them; deterministic, and the same for every configuration.

        for batch in task.batches():
            for configuration, outcomes in task.measure(model, batch, configurations):
                ...

    The batches of a task may be measured in any order, by any number of processes and with any configurations: the
    outcomes are those of one configuration alone with one context alone, up to rounding.

    Attributes:
        name: the task in rows of results, such as ``multi_key 512`` or ``text novel.txt 1024``.
        trigger: when the cache is compressed: ``prefill`` where each context is compressed once and then forked,
            ``turn`` where it is compressed after every turn of a conversation, ``every:16`` or ``block:64`` where it is
            a stream that is compressed after so many tokens, as the cache's trigger of that name does.
    """

    name: str
    trigger: str

    @property
    @abstractmethod
    def hash(self) -> str:
        """SHA-256 of contexts, questions, answers and points of compression: equal hashes mean comparable rows."""

    @property
    def longest(self) -> int:
        """Tokens of the longest context with what is asked of it; 0 where no context has to fit into a model."""
        return 0

    @abstractmethod
    def batches(self) -> list[Sequence[Any]]:
        """Groups of contexts that are measured together, in a fixed order; an element is one context.

        A batch is the unit of resuming and of distribution to workers.
        """

    @abstractmethod
    def measure(
        self, model, batch: Sequence[Any], configurations: Sequence[Configuration]
    ) -> Iterator[tuple[Configuration, list[Outcome]]]:
        """Measure every configuration on one of :meth:`batches`.

        Args:
            model: a transformers decoder that :class:`~kv_gym.live.EvictingCache` serves.
            batch: one of :meth:`batches`.
            configurations: what is compared; the tokens before the first compression are read once for all of them.

        Yields:
            Each configuration once, in the order given, with its outcomes.

        Raises:
            UserError: a configuration that cannot run live, or does not fit the model.
        """

    @property
    def contexts(self) -> int:
        """Number of contexts."""
        return sum(map(len, self.batches()))
