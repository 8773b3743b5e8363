"""Trained policies on the Hugging Face Hub, by their id `owner/name`: three known files of data, no code."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from kv_gym.errors import UserError, short_reason

FILES = ("README.md", "policy.json", "policy.safetensors")
_LARGEST = {"README.md": 2**20, "policy.json": 2**20, "policy.safetensors": 2**31}
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# what the Hub reads from the top of a card
_FRONT_MATTER = "---\nlibrary_name: kv_gym\ntags:\n- kv-cache\n- eviction\n---\n\n"


def is_hub_id(name: str) -> bool:
    """Whether a name looks like `owner/name` and is no local path."""
    return _ID.fullmatch(name) is not None and not Path(name).exists()


def download(repo_id: str, revision: str | None = None) -> Path:
    """The folder into which huggingface_hub put a policy's files; without a network, the one from the last time.

    Args:
        repo_id: `owner/name`.
        revision: a branch, tag or commit; None means the main branch.

    Raises:
        UserError: nothing of that name could be had.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES))
    except Exception as error:  # of the Hub or of the network
        raise UserError(
            f"there is no folder {repo_id}, and no policy of that name could be had from the Hub ({_reason(error)}): "
            "check the spelling, or name a folder that `kv-gym train` exported"
        ) from None
    if not (Path(folder) / "policy.json").is_file():
        raise UserError(f"{repo_id} on the Hub holds no policy.json; expected a policy that push_to_hub wrote")
    return Path(folder)


def push(policy, repo_id: str, private: bool | None = None) -> str:
    """Write an exported policy into a repository of the Hub, which is made if it is not there; returns its address.

    Args:
        policy: what has `save_pretrained(folder)`.
        repo_id: `owner/name`.
        private: whether a new repository is hidden from others; None leaves it to the owner's settings.

    Raises:
        UserError: an id of another form, no permission, or no network.
    """
    import huggingface_hub

    if _ID.fullmatch(repo_id) is None:
        raise UserError(f"{repo_id!r} is no id of the Hub; expected owner/name of letters, digits, '-', '_' and '.'")
    with tempfile.TemporaryDirectory() as parent:
        folder = policy.save_pretrained(Path(parent) / "policy")
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8").replace('"this-folder"', f'"{repo_id}"')
        card.write_text(_FRONT_MATTER + text, encoding="utf-8")
        try:
            address = huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
            huggingface_hub.upload_folder(
                repo_id=repo_id, folder_path=folder, allow_patterns=list(FILES), commit_message="Policy by kv_gym"
            )
        except Exception as error:  # as above
            raise UserError(
                f"the policy could not be pushed to {repo_id} ({_reason(error)}): log in with `hf auth login` as "
                "somebody who may write there"
            ) from None
    return str(address)


def refuse_large(folder: Path) -> None:
    """Raise a UserError for a file that is larger than any policy's, before anything of it is read."""
    for name, limit in _LARGEST.items():
        file = folder / name
        if file.is_file() and (size := file.stat().st_size) > limit:
            raise UserError(f"{file} holds {size:,} bytes and no exported policy's holds more than {limit:,}: not read")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {short_reason(lines[0])}" if lines else type(error).__name__
