"""The conversations that a server remembers: the latest ones in memory, those before them on disk."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from kv_gym.errors import UserError
from kv_gym.live.cache import EvictingCache
from kv_gym.live.conversation import TextSession

_log = logging.getLogger("kv_gym.serving")


@dataclass
class ParkedSession:
    """A session whose cache is in a file.

    Attributes:
        session: the rest of it; its cache is an empty one.
        file: of :meth:`EvictingCache.save`.
        nbytes: size of the file.
    """

    session: TextSession
    file: Path
    nbytes: int


class Conversations:
    """Sessions by their transcripts, the most recently used ones last. Not for several threads at a time.

    Args:
        empty: a session that has read nothing, with the settings of all.
        most_in_memory: so many stay in memory.
        most_parked: so many more are kept on disk.
        most_parked_bytes: bytes of their files, at most.
        folder: where the files are; None parks nothing.
    """

    def __init__(
        self, empty: TextSession, most_in_memory: int, most_parked: int, most_parked_bytes: int, folder: Path | None
    ):
        self._empty, self._folder = empty, folder
        self._most_in_memory, self._most_parked, self._most_bytes = most_in_memory, most_parked, most_parked_bytes
        self._in_memory: OrderedDict[str, TextSession] = OrderedDict()
        self._parked: OrderedDict[str, ParkedSession] = OrderedDict()
        self._numbers = count()

    def new(self) -> TextSession:
        """A session that has read nothing."""
        return self._empty.fork()

    def take(self, transcript: str) -> tuple[str, TextSession] | None:
        """Take out the session whose transcript is the longest beginning of another one, and give both; None: none.

        A session whose file cannot be read any more is forgotten.
        """
        known = [key for each in (self._in_memory, self._parked) for key in each if transcript.startswith(key)]
        for key in sorted(known, key=len, reverse=True):
            if key in self._in_memory:
                return key, self._in_memory.pop(key)
            try:
                return key, self._unpark(self._parked.pop(key))
            except UserError as error:
                _log.warning("a parked conversation is lost: %s", error)
        return None

    def put(self, transcript: str, session: TextSession) -> None:
        """Remember a session; the least recently used ones give way."""
        self._in_memory[transcript] = session
        self._in_memory.move_to_end(transcript)
        if transcript in self._parked:
            self._forget(transcript)
        while len(self._in_memory) > self._most_in_memory:
            self._park(*self._in_memory.popitem(last=False))

    def close(self) -> None:
        """Forget all sessions and remove their files."""
        self._in_memory.clear()
        for transcript in list(self._parked):
            self._forget(transcript)

    @property
    def counts(self) -> tuple[int, int]:
        """How many are in memory, and how many on disk."""
        return len(self._in_memory), len(self._parked)

    @property
    def slots(self) -> int:
        """Slots that the caches in memory hold."""
        return sum(held_slots(session.cache) for session in self._in_memory.values())

    @property
    def nbytes(self) -> int:
        """Bytes that the caches in memory hold."""
        return sum(session.cache.nbytes() for session in self._in_memory.values())

    @property
    def parked_nbytes(self) -> int:
        """Bytes of the files."""
        return sum(parked.nbytes for parked in self._parked.values())

    def _park(self, transcript: str, session: TextSession) -> None:
        if self._folder is None or not self._most_parked:
            return
        file = self._folder / f"{next(self._numbers)}.safetensors"
        try:
            session.cache.save(file)
        except UserError as error:
            _log.warning("a conversation is forgotten instead of parked: %s", error)
            return
        session.cache = self._empty.cache
        self._parked[transcript] = ParkedSession(session, file, file.stat().st_size)
        while len(self._parked) > self._most_parked or self.parked_nbytes > self._most_bytes:
            self._forget(next(iter(self._parked)))

    def _unpark(self, parked: ParkedSession) -> TextSession:
        config = self._empty.cache.config
        try:
            parked.session.cache = EvictingCache.load(
                parked.file, config.model, config.policy, config.allocation, config.evicted
            )
        finally:
            parked.file.unlink(missing_ok=True)
        return parked.session

    def _forget(self, transcript: str) -> None:
        self._parked.pop(transcript).file.unlink(missing_ok=True)


def held_slots(cache: EvictingCache) -> int:
    """Slots that a cache holds, 0 for an empty one."""
    return int(cache.kept().sum()) if cache.seen else 0
