"""The folder of a fit: what was asked for, how far it came, and the cache that it was made for."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError
from kv_gym.evaluation.rows import write_json
from kv_gym.files import read_json, refuse_address
from kv_gym.hub import download, is_hub_id
from kv_gym.live import EvictingCache

FILE = "fit.json"
FIT_FILES = (FILE, "README.md", "policy/policy.json", "policy/policy.safetensors", "policy/README.md")
FORMAT = 1


class FitFolder:
    """``fit.json``, written anew after every phase: what is whole in it is not done again.

    Attributes:
        path: the folder.
        state: what the file holds, plain JSON data: ``settings``, ``seconds`` of each phase, and its results.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        """Open a folder, or begin a new one.

        Raises:
            UserError: it holds other things, or a fit with other settings.
        """
        refuse_address(path)
        self.path = Path(path)
        wanted = json.loads(json.dumps(dict(settings), default=str))
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{path} is a file; name a folder to write to")
        names = {file.name for file in self.path.iterdir()} - {f"{FILE}.tmp"} if self.path.is_dir() else set()
        if names and FILE not in names:
            raise UserError(f"{path} holds other things than an earlier fit; name a new folder")
        new = {"format": FORMAT, "finished": False, "settings": wanted, "seconds": {}}
        self.state = _read(self.path) if names else new
        if names == {FILE} and self.state["settings"] != wanted:  # nothing was recorded yet
            self.state = new
        _refuse_other(self.path, self.state["settings"], wanted)
        self.path.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self, **results: Any) -> None:
        """Write the file with more in it."""
        self.state |= results
        write_json(self.path / FILE, self.state)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of a block to a phase's, interrupted ones too."""
        before, began = self.state["seconds"].get(phase, 0.0), time.perf_counter()
        try:
            yield
        finally:
            self.state["seconds"][phase] = round(before + time.perf_counter() - began, 1)
            self.save()


def load_fit(model: Any, folder: str | Path, **settings: Any) -> EvictingCache:
    """An empty cache as a fit chose it: its policy, budget and allocation.

        cache = load_fit(model, "runs/fit")
        model(context, past_key_values=cache)  # read and cut; the question follows

    Args:
        model: the model that was fitted.
        folder: what ``kv-gym fit --out`` wrote, or the id ``owner/name`` or ``owner/name@revision`` of a fit on the
            Hugging Face Hub.
        **settings: more of :class:`~kv_gym.live.EvictingCache`'s, such as ``trigger``; ``budget`` and ``allocation``
            replace the fitted ones.

    Raises:
        UserError: no finished fit there, or another model.
    """
    if is_hub_id(str(folder)):
        try:
            folder = download(str(folder), FIT_FILES)
        except ValueError as reason:
            raise UserError(
                f"there is no folder {folder}, and no fit of that name could be had from the Hub ({reason}): expected "
                "a folder that `kv-gym fit` wrote"
            ) from None
    state = read_fit(folder)
    chosen = {"budget": state["budget"], "allocation": state["allocation"]} | settings
    return EvictingCache(model, policy=Path(folder) / "policy", **chosen)


def read_fit(folder: str | Path) -> dict[str, Any]:
    """What ``fit.json`` of a finished fit holds.

    Raises:
        UserError: no fit there, a damaged one, or one that is not finished.
    """
    state = _read(Path(folder))
    if not state["finished"]:
        raise UserError(f"the fit in {folder} is not finished: run the same `kv-gym fit` again to go on")
    return state


def _read(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"{folder} holds no {FILE}; expected a folder that `kv-gym fit` wrote")
    damaged = UserError(f"{file} is damaged: remove the folder and fit again")
    state = read_json(file, "expected what `kv-gym fit` wrote: remove the folder and fit again")
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise damaged
    if state["format"] > FORMAT:
        raise UserError(f"{file} has format {state['format']}, newer than {FORMAT}: upgrade kv-gym")
    kinds: dict[str, type] = {"settings": dict, "seconds": dict, "finished": bool}
    kinds |= {"budget": float, "allocation": str} if state.get("finished") else {}
    if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise damaged
    return state


def _refuse_other(folder: Path, begun: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in wanted:
        if begun.get(name) != wanted[name]:
            short = 12 if name in ("model", "data") else None  # digits of a hash
            old, new = (str(value)[:short] for value in (begun.get(name), wanted[name]))
            raise UserError(
                f"{folder} was begun with {name} {old} and this call has {new}: give the same, or name a new folder"
            )
