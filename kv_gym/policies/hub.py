"""Trained policies on the Hugging Face Hub, by their id `owner/name`: three known files of data, no code."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kv_gym.errors import UserError
from kv_gym.hub import download, front_matter, refuse_bad_id, upload

FILES = ("README.md", "policy.json", "policy.safetensors")
_LARGEST = {"README.md": 2**20, "policy.json": 2**20, "policy.safetensors": 2**31}


def download_policy(repo_id: str, revision: str | None = None) -> Path:
    """The folder into which huggingface_hub put a policy's files; without a network, the one from the last time.

    Args:
        repo_id: `owner/name` or `owner/name@revision`.
        revision: a branch, tag or commit, where the id has none; None means the main branch.

    Raises:
        UserError: nothing of that name could be had.
    """
    try:
        folder = download(repo_id, FILES, revision)
    except ValueError as reason:
        raise UserError(
            f"there is no folder {repo_id}, and no policy of that name could be had from the Hub ({reason}): "
            "check the spelling, or name a folder that `kv-gym train` exported"
        ) from None
    if not (folder / "policy.json").is_file():
        raise UserError(f"{repo_id} on the Hub holds no policy.json; expected a policy that push_to_hub wrote")
    return folder


def push_policy(policy, repo_id: str, private: bool | None = None) -> str:
    """Write an exported policy into a repository of the Hub, which is made if it is not there; returns its address.

    Args:
        policy: what has `save_pretrained(folder)`.
        repo_id: `owner/name`.
        private: whether a new repository is hidden from others; None leaves it to the owner's settings.

    Raises:
        UserError: an id of another form, no permission, or no network.
    """
    refuse_bad_id(repo_id)
    with tempfile.TemporaryDirectory() as parent:
        folder = policy.save_pretrained(Path(parent) / "policy")
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8").replace('"this-folder"', f'"{repo_id}"')
        card.write_text(front_matter("eviction") + text, encoding="utf-8")
        return upload(folder, repo_id, FILES, "the policy", private=private)


def refuse_large(folder: Path) -> None:
    """Raise a UserError for a file that is larger than any policy's, before anything of it is read."""
    for name, limit in _LARGEST.items():
        file = folder / name
        if file.is_file() and (size := file.stat().st_size) > limit:
            raise UserError(f"{file} holds {size:,} bytes and no exported policy's holds more than {limit:,}: not read")
