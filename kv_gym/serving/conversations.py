"""The conversations that a server remembers: the latest ones in memory, those before them on disk."""

from __future__ import annotations

import logging
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from kv_gym.errors import UserError
from kv_gym.files import atomic_write, read_json, validated
from kv_gym.live.cache import EvictingCache
from kv_gym.live.conversation import TextSession

_log = logging.getLogger("kv_gym.serving")


class _Record(BaseModel):
    """What stands beside a cache's file, so that another server can go on with it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    transcript: str
    ids: list[int]
    settings: list[str]


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
        keep: leave the files of all sessions at the end, and begin with those that are there.
    """

    def __init__(
        self,
        empty: TextSession,
        most_in_memory: int,
        most_parked: int,
        most_parked_bytes: int,
        folder: Path | None,
        keep: bool = False,
    ):
        self._empty, self._folder, self._keep = empty, folder, keep
        self._most_in_memory, self._most_parked, self._most_bytes = most_in_memory, most_parked, most_parked_bytes
        self._in_memory: OrderedDict[str, TextSession] = OrderedDict()
        self._parked: OrderedDict[str, ParkedSession] = OrderedDict()
        if folder is not None and keep:
            self._find(folder)

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
        """Forget all sessions; their files are removed, or those in memory get files too."""
        while self._in_memory:
            transcript, session = self._in_memory.popitem(last=False)
            if self._keep:
                self._park(transcript, session)
        while self._parked and not self._keep:
            self._forget(next(iter(self._parked)))

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
        file = self._folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            session.cache.save(file)
            if self._keep:
                about = _Record(transcript=transcript, ids=session.ids, settings=self._empty.settings)
                with atomic_write(file.with_suffix(".json")) as part:
                    part.write_text(about.model_dump_json(), encoding="utf-8")
        except (OSError, UserError) as error:
            _remove(file)
            _log.warning("a conversation is forgotten instead of parked: %s", error)
            return
        session.cache = self._empty.cache
        self._parked[transcript] = ParkedSession(session, file, file.stat().st_size)
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        while len(self._parked) > self._most_parked or self.parked_nbytes > self._most_bytes:
            self._forget(next(iter(self._parked)))

    def _unpark(self, parked: ParkedSession) -> TextSession:
        config = self._empty.cache.config
        try:
            cache = EvictingCache.load(parked.file, config.model, config.policy, config.allocation, config.evicted)
        finally:
            _remove(parked.file)
        if cache.seen > len(parked.session.ids):
            raise UserError(f"the cache in {parked.file} has seen more tokens than the file beside it lists")
        parked.session.cache = cache
        return parked.session

    def _find(self, folder: Path) -> None:
        """Take over the sessions that another server left, the latest ones last."""
        for file in sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime):
            cache = file.with_suffix(".safetensors")
            try:
                about = validated(_Record, read_json(file, "expected a conversation of kv-gym serve"), str(file))
                nbytes = cache.stat().st_size
            except (OSError, UserError) as error:
                _log.warning("a file in the folder of conversations is left alone: %s", error)
                continue
            if about.settings == self._empty.settings:
                session = self._empty.fork()
                session.ids, session.cache = about.ids, self._empty.cache
                self._parked[about.transcript] = ParkedSession(session, cache, nbytes)
        self._drop_oldest()

    def _forget(self, transcript: str) -> None:
        _remove(self._parked.pop(transcript).file)


def _remove(file: Path) -> None:
    """Remove the file of a cache and what stands beside it."""
    for each in (file, file.with_suffix(".json")):
        each.unlink(missing_ok=True)


def held_slots(cache: EvictingCache) -> int:
    """Slots that a cache holds, 0 for an empty one."""
    return int(cache.kept().sum()) if cache.seen else 0
