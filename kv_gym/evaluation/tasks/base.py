"""What a task is: contexts, what is asked of them, and how a configuration is judged on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from kv_gym.evaluation.configurations import Configuration
from kv_gym.evaluation.outcomes import Outcome


class Task(ABC):
    """Contexts and what is asked of them; deterministic, and the same for every configuration.

        for batch in task.batches():
            for configuration, outcomes in task.measure(model, batch, configurations):
                ...

    The batches of a task may be measured in any order, by any number of processes, and with any configurations:
    outcomes are those of a configuration alone with one context alone, up to rounding.

    Attributes:
        name: what rows call it, such as ``multi_key 512`` or ``text novel.txt 1024``.
        trigger: when configurations evict: ``prefill`` where each context is cut once and then forked, ``turn`` where
            it is cut again after every turn of a conversation, ``every:16`` or ``block:64`` where it is a stream that
            is cut after so many tokens, as the trigger of that name does.
    """

    name: str
    trigger: str

    @property
    @abstractmethod
    def hash(self) -> str:
        """SHA-256 over all that is asked and when it is cut: equal hashes mean comparable rows."""

    @abstractmethod
    def batches(self) -> list[Sequence[Any]]:
        """Groups of contexts that are measured together, in a fixed order; an element is one context.

        A batch is the unit of resuming and of distribution to workers.
        """

    @abstractmethod
    def measure(
        self, model, batch: Sequence[Any], configurations: Sequence[Configuration]
    ) -> Iterator[tuple[Configuration, list[Outcome]]]:
        """Judge every configuration on one of :meth:`batches`; they are yielded in the order given, each once.

        Args:
            model: a transformers decoder that :class:`~kv_gym.live.EvictingCache` serves.
            batch: one of :meth:`batches`.
            configurations: who is compared; the cost of reading what comes before the first cut is paid once for all.

        Raises:
            UserError: a configuration that cannot run live, or does not fit the model.
        """

    @property
    def contexts(self) -> int:
        """How many contexts there are."""
        return sum(map(len, self.batches()))
