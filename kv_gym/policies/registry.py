"""Policies by name, with settings: bundled ones, those of other packages, class paths, exported folders and hub ids.

A bundled policy is a file of this folder that says which paper it follows (``paper = Paper(...)`` or ``paper = None``),
so a new one needs no list to be edited. Other packages add theirs by an entry point of the group ``kv_gym.policies``::

    [project.entry-points."kv_gym.policies"]
    my_policy = "my_package.my_policy:MyPolicy"

Nothing is imported before it is asked for, and every call makes a new object.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from kv_gym.errors import UserError, short_reason
from kv_gym.files import exists, only_class
from kv_gym.hub import is_hub_id
from kv_gym.policies.base import Policy, load_settings

GROUP = "kv_gym.policies"
_ACCEPT = "accept_fingerprint"  # the only setting of an exported policy
_RENAMED_FILES = {"random_eviction": "random"}  # a module `random` would shadow the standard library's in scripts
_OLD_NAMES = {"uniform_order": "random", "kv_gym.policies.uniform_order:UniformOrder": "random"}


def list_policies() -> list[str]:
    """Names of the policies there are, also of other packages; `scorer`, the learned one, is loaded from a folder."""
    return sorted({*_bundled(), *_entry_points()})


def make_policy(policy: str | Path | Policy, **settings: Any) -> Policy:
    """A new policy object.

    Args:
        policy: tried in this order: a name from :func:`list_policies`; a class path ``package.module:Class``; a folder
            with an exported policy; the id ``owner/name`` of one on the Hugging Face Hub. Settings may follow a name
            or a class path, each behind a colon: ``snapkv:window=64:kernel=7``, ``caote:over=h2o``; behind a folder,
            ``runs/joint:accept_fingerprint=true`` serves every model of the same sizes. A policy object is returned as
            it is.
        **settings: of the policy; they replace those in the text.

    Raises:
        UserError: unknown name (the nearest known one is suggested), unknown setting or one of another type,
            unreadable folder, an id of which nothing could be had, or a package whose policy cannot be imported.
    """
    if isinstance(policy, Policy):
        return policy
    source = str(policy)
    name, texts = (source, {}) if exists(source) else _split(source)
    if current_name(name) != name:
        warnings.warn(f"policy {name} is called {current_name(name)!r} now", DeprecationWarning, stacklevel=2)
        name = current_name(name)
    if name in _bundled() and name != "scorer":
        kind = policy_class(name)
    elif ":" in name and not exists(name):
        kind = _from_class_path(name)
    elif exists(Path(name) / "policy.json") or is_hub_id(name):
        from kv_gym.policies.scorer import Scorer

        given = {**_typed(Scorer, texts), **settings}
        accept = given.pop(_ACCEPT, False)
        if given or not isinstance(accept, bool):
            raise UserError(
                f"the exported policy {name} carries its own settings; give none but {_ACCEPT}=true (got "
                f"{', '.join(given) or accept})"
            )
        return Scorer.from_pretrained(name, accept_fingerprint=accept)
    elif name in _entry_points():
        kind = policy_class(name)
    else:
        raise UserError(_unknown(name))
    return load_settings(kind, {**_typed(kind, texts), **settings})


def policy_class(name: str) -> type[Policy]:
    """The class of a policy of :func:`list_policies`.

    Raises:
        UserError: the package that offers it cannot be imported, or offers something else.
    """
    if name in _bundled():
        return _only_policy(f"kv_gym.policies.{_bundled()[name]}")
    entry = _entry_points()[name]
    try:
        kind = entry.load()
    except Exception as error:  # whatever the other package raises while it is imported
        raise UserError(f"policy {name!r} of {_origin(entry)} cannot be imported ({_reason(error)})") from None
    return _checked(kind, f"policy {name!r} of {_origin(entry)}")


def current_name(name: str) -> str:
    """Today's name of a policy, for files that an earlier version wrote; other names are returned as they are."""
    return _OLD_NAMES.get(name, name)


@cache
def _bundled() -> dict[str, str]:
    """Name -> module of every file of this folder that says which paper it follows."""
    states_paper = re.compile(r"^    paper = ", re.MULTILINE)
    modules = [file.stem for file in Path(__file__).parent.glob("*.py") if states_paper.search(file.read_text("utf-8"))]
    return {_RENAMED_FILES.get(module, module): module for module in modules}


def _entry_points() -> dict[str, EntryPoint]:
    """Policies of other packages by name; a bundled policy is never replaced."""
    offered = {}
    for entry in entry_points(group=GROUP):
        if entry.name in _bundled():
            warnings.warn(f"{_origin(entry)} offers a policy {entry.name!r}, which kv_gym has: ignored", stacklevel=3)
        else:
            offered[entry.name] = entry
    return offered


def _origin(entry: EntryPoint) -> str:
    return f"distribution {entry.dist.name!r}" if entry.dist else f"entry point {entry.value!r}"


def _split(source: str) -> tuple[str, dict[str, str]]:
    """``name:key=value:key=value`` as name and settings; what stands between is not yet typed."""
    name, *parts = re.split(r":(?=[A-Za-z_]\w*=)", source)
    pairs = [part.split("=", 1) for part in parts]
    settings = dict(pairs)  # type: ignore[arg-type]
    if len(settings) < len(pairs):
        raise UserError(f"policy {source!r} gives a setting twice; expected each once")
    bundled, colon, rest = name.partition(":")
    if colon and bundled in _bundled():
        raise UserError(
            f"policy {source!r} has {rest!r} behind its name; expected settings such as {bundled}:key=value"
        )
    return name, settings


def _typed(kind: type[Policy], texts: Mapping[str, str]) -> dict[str, Any]:
    """Settings that were given as text, in the types of the policy's fields; unknown ones are left to the caller."""
    known = {field.name for field in fields(kind) if field.init}
    hints = get_type_hints(kind) if texts else {}
    values: dict[str, Any] = {}
    for key, text in texts.items():
        if key not in known:
            values[key] = text
            continue
        adapter = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
        try:
            values[key] = None if text == "None" else adapter.validate_strings(text)
            adapter.validate_python(values[key])
        except ValidationError:
            expected = getattr(hints[key], "__name__", str(hints[key]))
            raise UserError(f"policy {kind.__name__} got {key}={text!r}; expected {expected}") from None
    return values


def _only_policy(module: str) -> type[Policy]:
    kinds = [kind for kind in vars(import_module(module)).values() if isinstance(kind, type)]
    found = [kind for kind in kinds if issubclass(kind, Policy) and kind.__module__ == module]
    return only_class(found, module)


def _from_class_path(path: str) -> type[Policy]:
    module, _, attribute = path.partition(":")
    try:
        kind = getattr(import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UserError(f"cannot import policy {path}: {short_reason(error)}; expected package.module:Class") from None
    return _checked(kind, path)


def _checked(kind: object, source: str) -> type[Policy]:
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        raise UserError(f"{source} is no subclass of kv_gym.Policy")
    return kind


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {short_reason(error)}"


def _unknown(name: str) -> str:
    if name == "scorer":
        return "policy 'scorer' is learned: name the folder that `kv-gym train` exported, with its policy.json"
    if exists(name) and Path(name).is_dir():
        return f"folder {name} holds no policy.json; expected a policy exported by `kv-gym train` or `kv-gym export`"
    nearest = difflib.get_close_matches(name, list_policies(), n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(list_policies())}"
    return f"unknown policy {name!r}; {hint}"
