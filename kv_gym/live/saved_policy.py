"""How a saved cache names its policy: bundled ones by name and settings; others are given again by whoever loads it."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError
from kv_gym.live.panel import Panel
from kv_gym.models.fingerprint import state_dict_hash
from kv_gym.policies import Policy, current_name, list_policies, make_policy

_DEEPEST = 4  # policies over policies


def described(policy: Policy) -> dict[str, Any]:
    """Plain JSON data: `name` and `settings`; or `name` and a digest, of a policy that no file can name."""
    if isinstance(policy, Panel):
        return {"name": "panel", "members": [described(member) for member in policy.members]}
    settings = {f.name: getattr(policy, f.name) for f in fields(policy) if f.init}
    settings = {name: described(each) if isinstance(each, Policy) else each for name, each in settings.items()}
    plain = {"name": policy.name, "settings": settings}
    try:
        if _rebuilt(plain) == policy:
            return plain
    except (UserError, TypeError, ValueError):
        pass
    return {"name": policy.name, "digest": _digest(policy)}


def chosen(stored: dict[str, Any], given: str | Path | Policy | None, file: Path) -> Policy:
    """The policy of a saved cache: as the file describes it, or the one given, which must be the same.

    Raises:
        UserError: another one was given, or none and the file cannot name it.
    """
    stored = _with_current_names(stored)
    name = str(stored["name"])
    if given is not None:
        policy = make_policy(given)
        if described(policy) != stored:
            raise UserError(
                f"the cache in {file} was saved with policy {name!r}, and {policy.name!r} was given or its settings "
                "are others: load it with that one, then fork(policy=...)"
            )
        return policy
    if "digest" in stored:
        raise UserError(
            f"the cache in {file} was saved with policy {name!r}, which no file can name: give its folder, its class "
            "path or the object as policy="
        )
    return _rebuilt(stored)


def _rebuilt(stored: dict[str, Any], depth: int = 0) -> Policy:
    if depth > _DEEPEST:
        raise ValueError("policies over policies without end")
    if stored["name"] == "panel":
        return Panel(tuple(_rebuilt(member, depth + 1) for member in stored["members"]))
    name = stored["name"]
    if name not in list_policies() or name == "scorer":
        raise ValueError(f"{name!r} is no bundled policy")
    usual, settings = make_policy(name), {}
    for key, value in stored["settings"].items():
        default = getattr(usual, key, None)
        if isinstance(default, Policy):
            value = _rebuilt(value, depth + 1)
        elif type(value) is not type(default) and not (type(value) is int and type(default) is float):
            raise ValueError(f"policy {name!r} with {key}={value!r}")
        settings[key] = value
    return make_policy(name, **settings)


def _with_current_names(stored: Any) -> Any:
    """What an earlier version described, with today's names of policies."""
    if not isinstance(stored, dict):
        return stored
    parts = {key: _with_current_names(value) for key, value in stored.items()}
    if isinstance(members := stored.get("members"), list):
        parts["members"] = [_with_current_names(member) for member in members]
    return parts | ({"name": current_name(str(stored["name"]))} if "name" in stored else {})


def _digest(policy: Policy) -> str:
    kind = type(policy)
    name = f"{kind.__module__}:{kind.__qualname__}"
    network = getattr(policy, "network", None)
    if network is None:
        return hashlib.sha256(f"{name}{policy!r}".encode()).hexdigest()
    return state_dict_hash(network.state_dict(), prefix=name)  # a learned policy is its weights
