"""A folder that stands in for the Hugging Face Hub behind huggingface_hub's own functions."""

import fnmatch
import inspect
import shutil
from pathlib import Path

import huggingface_hub

REAL = {name: getattr(huggingface_hub, name) for name in ("create_repo", "snapshot_download", "upload_folder")}


class FolderHub:
    """Does with folders what the Hub does; refuses what the real functions would not take."""

    def __init__(self, root):
        self.root = root

    def _place(self, asked):
        kind = "datasets" if asked["repo_type"] == "dataset" else ""
        return self.root / kind / asked["repo_id"]

    def create_repo(self, *arguments, **more):
        asked = _bound("create_repo", arguments, more)
        self._place(asked).mkdir(parents=True, exist_ok=asked["exist_ok"])
        return f"https://hub.example/{'datasets/' * (asked['repo_type'] == 'dataset')}{asked['repo_id']}"

    def upload_folder(self, *arguments, **more):
        asked = _bound("upload_folder", arguments, more)
        _copy(Path(asked["folder_path"]), self._place(asked), asked["allow_patterns"])

    def snapshot_download(self, *arguments, **more):
        asked = _bound("snapshot_download", arguments, more)
        there = self._place(asked)
        if not there.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("404 Repository Not Found\nand more lines")
        snapshot = self.root / "cache" / (asked["revision"] or "main") / asked["repo_id"]
        snapshot.mkdir(parents=True, exist_ok=True)
        _copy(there, snapshot, asked["allow_patterns"])
        return str(snapshot)

    def install(self, monkeypatch):
        """Take the place of huggingface_hub's functions; returns the folder."""
        for name in REAL:
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))
        return self.root


def _bound(name, arguments, more):
    bound = inspect.signature(REAL[name]).bind(*arguments, **more)
    bound.apply_defaults()
    return bound.arguments


def _copy(source, target, patterns):
    assert source.is_dir() and target.is_dir()
    for file in source.rglob("*"):
        name = file.relative_to(source).as_posix()
        if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copy(file, (target / name).parent)
