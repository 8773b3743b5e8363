"""`kv-gym push`: a policy, a fit, traces or results as a repository of the Hugging Face Hub, with a card."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from kv_gym.errors import UserError
from kv_gym.files import read_text
from kv_gym.hub import front_matter, refuse_bad_id, upload

_ROWS = "rows.jsonl"


def push_to_hub(path: str | Path, repo_id: str, private: bool = False) -> str:
    """Write a policy, a fit, traces or results into a repository of the Hugging Face Hub.

    A policy and a fit become models, traces and results datasets; the repository is made if it is not there. Use them
    by their id: a policy wherever one is expected, a fit in `load_fit`, traces wherever traces are expected.

    Args:
        path: folder of a policy, of a fit or of traces; or results, a ``.json`` or ``.jsonl`` file or a folder of them.
        repo_id: ``owner/name``; you must be logged in as somebody who may write there (``hf auth login``).
        private: hide a new repository from others.

    Returns:
        Its address.

    Raises:
        UserError: another kind of folder or file, one that is damaged or not finished, an id of another form, no
            permission, or no network.
    """
    path = Path(path)
    refuse_bad_id(repo_id)
    if not path.exists():
        raise UserError(f"there is nothing at {path}; expected a folder or file that kv-gym wrote")
    kinds: tuple[tuple[str, Callable[[Path, str, bool], str]], ...] = (
        ("policy.json", _push_policy),
        ("fit.json", _push_fit),
        ("manifest.json", _push_traces),
    )
    push = next((push for name, push in kinds if (path / name).is_file()), _push_results)
    return push(path, repo_id, private)


def _push_policy(folder: Path, repo_id: str, private: bool) -> str:
    from kv_gym.policies.scorer import Scorer

    return Scorer.from_pretrained(folder).push_to_hub(repo_id, private)


def _push_fit(folder: Path, repo_id: str, private: bool) -> str:
    """The card with its tables, ``fit.json`` and the policy; neither traces nor the training log."""
    from kv_gym.fit.folder import FIT_FILES, read_fit

    read_fit(folder)
    files = [name for name in FIT_FILES if (folder / name).is_file()]
    card = read_text(folder / "README.md").replace('"this-folder"', f'"{repo_id}"')
    return _upload_with_card(front_matter("eviction") + card, folder, files, repo_id, "the fit", "model", private)


def _push_traces(folder: Path, repo_id: str, private: bool) -> str:
    from kv_gym.traces import open_traces
    from kv_gym.traces.reader import MANIFEST
    from kv_gym.traces.summary import info

    traces, about = open_traces(folder), info(folder)
    files = [MANIFEST, *sorted({entry.path.name for entry in traces.entries})]
    facts = "\n".join(f"| {name} | {value} |" for name, value in about.items() if not isinstance(value, dict | list))
    card = (
        f"{front_matter('traces')}# Traces of a KV cache\n\nWhat the queries behind recorded contexts attended to, for "
        "training and replaying policies of KV-cache eviction. Keys and values determine much of the texts: publish "
        f'what you may.\n\n```python\nfrom kv_gym import open_traces\n\ntraces = open_traces("{repo_id}")\n```\n\n'
        f"| | |\n|---|---|\n{facts}\n"
    )
    return _upload_with_card(card, folder, files, repo_id, "the traces", "dataset", private)


def _push_results(path: Path, repo_id: str, private: bool) -> str:
    """Rows as JSON lines, with a table as card."""
    from kv_gym.evaluation.report.document import markdown
    from kv_gym.evaluation.rows import read_rows

    files = sorted(path.glob("*.json*")) if path.is_dir() else [path]
    rows = [row for file in files for row in read_rows(file)]
    if not rows:
        raise UserError(
            f"{path} holds no policy.json, fit.json, manifest.json or rows of results; expected what `kv-gym train`,"
            " `fit`, `record`, `evaluate` or `leaderboard` wrote"
        )
    card = (
        f"{front_matter('results')}# Results of KV-cache eviction\n\nA row of `{_ROWS}` is one policy at one budget on "
        f"one task; `policy` full_cache evicts nothing.\n\n{markdown(rows)}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(folder) / _ROWS).write_text(lines, encoding="utf-8")
        return _upload_with_card(card, Path(folder), [_ROWS], repo_id, "the results", "dataset", private)


def _upload_with_card(
    card: str, folder: Path, files: Sequence[str], repo_id: str, what: str, repo_type: str, private: bool
) -> str:
    """Upload files of a folder with another card than it may have."""
    with tempfile.TemporaryDirectory() as parent:
        for name in files:
            target = Path(parent) / name
            target.parent.mkdir(exist_ok=True)
            try:
                target.hardlink_to((folder / name).resolve())  # shards are large
            except OSError:  # on another disk
                shutil.copy(folder / name, target)
        readme = Path(parent) / "README.md"
        readme.unlink(missing_ok=True)
        readme.write_text(card, encoding="utf-8")
        return upload(Path(parent), repo_id, [*files, "README.md"], what, repo_type, private)
