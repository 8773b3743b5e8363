"""Repositories of the Hugging Face Hub by id, ``owner/name`` or ``owner/name@revision``: files of data, no code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kv_gym.errors import UserError, short_reason
from kv_gym.files import exists

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w.][\w./-]{0,199}", re.ASCII)


def split_hub_id(name: str) -> tuple[str, str | None] | None:
    """``owner/name`` and the revision behind an ``@`` (None: the main branch); None where it is no such id."""
    repo_id, at, revision = name.partition("@")
    if _ID.fullmatch(repo_id) is None or (at and _REVISION.fullmatch(revision) is None):
        return None
    return repo_id, revision if at else None


def is_hub_id(name: str) -> bool:
    """Whether a name looks like ``owner/name`` or ``owner/name@revision`` and is no local path."""
    return split_hub_id(name) is not None and not exists(name)


def front_matter(*tags: str) -> str:
    """What the Hub reads from the top of a card."""
    return "---\nlibrary_name: kv_gym\ntags:\n" + "".join(f"- {tag}\n" for tag in ("kv-cache", *tags)) + "---\n\n"


def download(name: str, files: Sequence[str], revision: str | None = None, repo_type: str = "model") -> Path:
    """The folder into which huggingface_hub put a repository's files; without a network, the one from the last time.

    Args:
        name: ``owner/name`` or ``owner/name@revision``.
        files: names or patterns of those that are fetched.
        revision: a branch, tag or commit, where `name` has none.
        repo_type: ``model`` or ``dataset``.

    Raises:
        ValueError: nothing of that name could be had; its text is one line with the reason.
    """
    import huggingface_hub

    repo_id, own = split_hub_id(name) or (name, None)
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=own or revision, allow_patterns=list(files), repo_type=repo_type
        )
    except Exception as error:  # of the Hub or of the network
        raise ValueError(_reason(error)) from None
    return Path(folder)


def upload(
    folder: Path, repo_id: str, files: Sequence[str], what: str, repo_type: str = "model", private: bool | None = None
) -> str:
    """Write files of a folder into a repository of the Hub, which is made if it is not there; returns its address.

    Args:
        folder: with the files.
        repo_id: ``owner/name``.
        files: names or patterns of those that are written.
        what: names the content in the commit and in errors, such as ``the policy``.
        repo_type: ``model`` or ``dataset``.
        private: whether a new repository is hidden from others; None leaves it to the owner's settings.

    Raises:
        UserError: an id of another form, no permission, or no network.
    """
    import huggingface_hub

    refuse_bad_id(repo_id)
    try:
        address = huggingface_hub.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type)
        huggingface_hub.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(files), repo_type=repo_type,
            commit_message=f"{what.removeprefix('the ').capitalize()} by kv_gym",
        )  # fmt: skip
    except Exception as error:  # as above
        raise UserError(
            f"{what} could not be pushed to {repo_id} ({_reason(error)}): log in with `hf auth login` as somebody who "
            "may write there"
        ) from None
    return str(address)


def refuse_bad_id(repo_id: str) -> None:
    """Raise a UserError for what is no ``owner/name``, which alone can be written to."""
    if _ID.fullmatch(repo_id) is None:
        raise UserError(f"{repo_id!r} is no id of the Hub; expected owner/name of letters, digits, '-', '_' and '.'")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {short_reason(lines[0])}" if lines else type(error).__name__
