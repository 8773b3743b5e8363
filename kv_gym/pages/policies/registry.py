"""Page policies by name: every file of this folder that holds a policy is one, of its own name."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, get_type_hints

from kv_gym.errors import UserError, short_reason
from kv_gym.files import exists, is_of_type, only_class
from kv_gym.pages.policies.base import PagePolicy

_NOT_POLICIES = ("base", "exported", "learned", "registry")


def list_page_policies() -> list[str]:
    """Names of the bundled page policies."""
    return sorted(m.name for m in iter_modules([str(Path(__file__).parent)]) if m.name not in _NOT_POLICIES)


def make_page_policy(policy: str | PagePolicy, **settings: Any) -> PagePolicy:
    """A new policy object.

    Args:
        policy: a name of :func:`list_page_policies`, with settings after colons (``s3_fifo:small=0.2``), a class path
            ``package.module:Class``, the folder or the ONNX file of a trained one (``runs/clone:limit=0.0005``), or a
            policy object, which is returned as it is.
        **settings: of the policy; unknown ones are refused.

    Raises:
        UserError: an unknown name (the nearest known one is suggested) or setting, or a value of another type.
    """
    if isinstance(policy, PagePolicy):
        return policy
    name, *given = str(policy).split(":")
    if name in list_page_policies():
        kind = _class_in(f"kv_gym.pages.policies.{name}")
    elif (exists(name) and Path(name).is_dir()) or name.endswith(".onnx"):
        from kv_gym.pages.policies.exported import Exported
        from kv_gym.pages.policies.learned import Learned

        kind_of_file = Learned if Path(name).is_dir() else Exported
        pairs = dict(text.partition("=")[::2] for text in given)
        return kind_of_file.load(name, **_typed(Learned, name, pairs), **_typed(Learned, name, settings))
    elif given and "=" not in given[0]:
        kind = _from_class_path(name, given.pop(0))
    else:
        nearest = difflib.get_close_matches(name, list_page_policies(), n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(list_page_policies())}"
        raise UserError(f"unknown page policy {name!r}; {hint}")
    pairs = dict(text.partition("=")[::2] for text in given)
    return kind(**_typed(kind, name, pairs), **_typed(kind, name, settings))


def _class_in(module: str) -> type[PagePolicy]:
    kinds = [kind for kind in vars(import_module(module)).values() if isinstance(kind, type)]
    return only_class([kind for kind in kinds if issubclass(kind, PagePolicy) and kind.__module__ == module], module)


def _from_class_path(module: str, attribute: str) -> type[PagePolicy]:
    try:
        kind = getattr(import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UserError(f"cannot import page policy {module}:{attribute}: {short_reason(error)}") from None
    if not (isinstance(kind, type) and issubclass(kind, PagePolicy)):
        raise UserError(f"{module}:{attribute} is no subclass of kv_gym.pages.PagePolicy")
    return kind


def _typed(kind: type[PagePolicy], name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as their fields want them; texts are read as numbers or truth values where the field is one."""
    settable: tuple[Any, ...] = fields(kind) if is_dataclass(kind) else ()
    known: dict[str, Any] = {each.name: each.type for each in settable if each.init and not each.metadata}
    typed, hints = {}, get_type_hints(kind) if settings else {}
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"page policy {name!r} has no setting {key!r}; its settings: {', '.join(known) or 'none'}")
        try:
            if isinstance(value, str) and known[key] in ("int", "float"):
                value = int(value) if known[key] == "int" else float(value)
            elif isinstance(value, str) and known[key] == "bool":
                value = {"true": True, "false": False}[value.lower()]
        except (ValueError, KeyError):
            raise UserError(f"page policy {name!r}: {key}={value!r} is no {known[key]}") from None
        if not is_of_type(value, hints[key]):
            raise UserError(f"page policy {name!r}: {key}={reprlib.repr(value)} is no {known[key]}")
        typed[key] = value
    return typed
