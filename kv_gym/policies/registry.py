"""Policies by name: one of this package, a class path ``package.module:Class``, an exported folder, or a hub id."""

from __future__ import annotations

import difflib
import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from kv_gym.errors import UserError
from kv_gym.policies.base import Policy, load_settings
from kv_gym.policies.hub import is_hub_id

# every other file of this package is a policy of its own name
_MACHINERY = {"base", "hub", "registry", "scoring", "wrapper"}
_FILES = {"random_eviction": "random"}  # a module `random` would shadow the standard library's in scripts
_OLD_NAMES = {"uniform_order": "random", "kv_gym.policies.uniform_order:UniformOrder": "random"}


def list_policies() -> list[str]:
    """Names of the bundled policies; `scorer` is the learned one and is loaded from a folder."""
    return sorted(_bundled())


def policy_class(name: str) -> type[Policy]:
    """The class of a policy of :func:`list_policies`."""
    return _class_in(f"kv_gym.policies.{_bundled()[name]}")


def current_name(name: str) -> str:
    """Today's name of a policy, for files that an earlier version wrote; other names are returned as they are."""
    return _OLD_NAMES.get(name, name)


def _bundled() -> dict[str, str]:
    """Name -> module."""
    modules = (module.name for module in iter_modules([str(Path(__file__).parent)]))
    return {_FILES.get(module, module): module for module in modules if module not in _MACHINERY}


def make_policy(policy: str | Path | Policy, **settings: Any) -> Policy:
    """A new policy object.

    Args:
        policy: a name from :func:`list_policies`, a class path ``package.module:Class``, a folder with an
            exported policy, the id ``owner/name`` of one on the Hugging Face Hub, or a policy object, which is
            returned as it is. They are tried in this order.
        **settings: of the policy; unknown ones are refused.

    Raises:
        UserError: unknown name (the nearest known one is suggested), unknown setting, unreadable folder, or an id of
            which nothing could be had.
    """
    if isinstance(policy, Policy):
        return policy
    name = current_name(str(policy))
    if name != str(policy):
        warnings.warn(f"policy {policy} is called {name!r} now", DeprecationWarning, stacklevel=2)
    if name in list_policies() and name != "scorer":
        return load_settings(policy_class(name), settings)
    if ":" in name and not Path(name).exists():
        return load_settings(_from_class_path(name), settings)
    if (Path(name) / "policy.json").is_file() or is_hub_id(name):
        from kv_gym.policies.scorer import Scorer

        if settings:
            raise UserError(
                f"the exported policy {name} carries its own settings; give none (got {', '.join(settings)})"
            )
        return Scorer.from_pretrained(name)
    raise UserError(_unknown(name))


def _class_in(module: str) -> type[Policy]:
    kinds = [kind for kind in vars(import_module(module)).values() if isinstance(kind, type)]
    (kind,) = [kind for kind in kinds if issubclass(kind, Policy) and kind.__module__ == module]
    return kind


def _from_class_path(path: str) -> type[Policy]:
    module, _, attribute = path.partition(":")
    try:
        kind = getattr(import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UserError(f"cannot import policy {path}: {error}; expected package.module:Class") from None
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        raise UserError(f"{path} is no subclass of kv_gym.Policy")
    return kind


def _unknown(name: str) -> str:
    if name == "scorer":
        return "policy 'scorer' is learned: name the folder that `kv-gym train` exported, with its policy.json"
    if Path(name).is_dir():
        return f"folder {name} holds no policy.json; expected a policy exported by `kv-gym train` or `kv-gym export`"
    nearest = difflib.get_close_matches(name, list_policies(), n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(list_policies())}"
    return f"unknown policy {name!r}; {hint}"
