"""How the API pages read the package: an extension of griffe, which mkdocstrings uses.

Docstrings name other objects by Sphinx roles (``:class:`~kv_gym.live.EvictingCache` ``), which become links here; a
policy names its paper in its attribute ``paper``, which becomes a line; arguments that are described together stand in
rows of their own; and names that a package fetches on first use, listed in its ``_HOMES``, are found in their modules.
"""

from __future__ import annotations

import ast
import contextlib
import re
from typing import Any

import griffe

_SEVERAL = re.compile(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*(?:\n {5,}.*)*)", re.M)
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(~?)([\w.]+)`")


class DocstringRoles(griffe.Extension):
    """Named in mkdocs.yml."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Change every docstring of a package once all of its modules are read."""
        self._visit(pkg)

    def _visit(self, obj: griffe.Object) -> None:
        if obj.is_module and "_HOMES" in obj.members:
            homes = ast.literal_eval(str(obj.members["_HOMES"].value))
            for name, module in homes.items():
                if name not in obj.members:
                    home = module if "." in module else f"{obj.path}.{module}"
                    obj.set_member(name, griffe.Alias(name, f"{home}.{name}"))
            obj.exports = {*homes, *(name for name in obj.exports or () if isinstance(name, str))}
        if obj.docstring:
            text = re.sub(r"::$", ":", obj.docstring.value, flags=re.M)
            text = _SEVERAL.sub(_apart, text)
            obj.docstring.value = _ROLE.sub(lambda role: _link(obj, role[1], role[2]), text)
            if obj.is_class and "paper" in obj.members:
                obj.docstring.value += _paper(str(obj.members["paper"].value))
        for member in list(obj.members.values()):
            if not member.is_alias:
                self._visit(member)


def _apart(item: re.Match[str]) -> str:
    """One item for each of the arguments or attributes that a docstring describes together."""
    return "\n".join(f"    {name}: {item[2]}" for name in item[1].split(", "))


def _link(obj: griffe.Object, short: str, name: str) -> str:
    """A link to what a role names, where the site has it, and its name as code elsewhere."""
    shown = name.rpartition(".")[2] if short else name
    target = name
    if not name.startswith("kv_gym"):
        try:
            target = obj.resolve(name)
        except griffe.NameResolutionError:
            target = f"{obj.path}.{name}"
    both = f"{target}.{target.rpartition('.')[2]}"  # a function that has the name of its file
    with contextlib.suppress(KeyError, griffe.AliasResolutionError):
        obj.package[both.removeprefix("kv_gym.")]
        target = both
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'


def _paper(call: str) -> str:
    """The line about ``Paper("title", "arXiv id", "section")``."""
    parsed = ast.parse(call, mode="eval").body
    if not isinstance(parsed, ast.Call):  # a policy without a paper
        return ""
    names = ("title", "arxiv", "section", "venue", "url")
    given = dict(zip(names, (ast.literal_eval(each) for each in parsed.args), strict=False))
    given |= {each.arg: ast.literal_eval(each.value) for each in parsed.keywords if each.arg}
    url = f"https://arxiv.org/abs/{given['arxiv']}" if given.get("arxiv") else given.get("url")
    title = f"[{given['title']}]({url})" if url else given["title"]
    return "\n\nPaper: " + ", ".join(filter(None, (title, given.get("venue"), given.get("section")))) + "."
