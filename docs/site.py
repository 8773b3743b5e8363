"""What MkDocs does not do by itself: pages that lie outside docs/, and pages of the API and of the command line.

A page keeps its path in the repository, so that a link such as ``../benchmarks/RESULTS.md`` leads to the same page here
and on GitHub. Files that pages link to, such as pictures and settings, are copied.
"""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/*.md", "agents/**/*.md", "traces/*.md", "benchmarks/**/*.md")
# Packages in the order of the navigation, and those whose modules are a page's sections: one file, one method.
PACKAGES = {
    "kv_gym": "", "kv_gym.live": "", "kv_gym.live.tiers": "", "kv_gym.policies": "kv_gym/policies",
    "kv_gym.budgets": "kv_gym/budgets", "kv_gym.models": "", "kv_gym.traces": "", "kv_gym.envs": "",
    "kv_gym.training": "kv_gym/training", "kv_gym.evaluation": "", "kv_gym.evaluation.tasks": "",
    "kv_gym.evaluation.leaderboard": "", "kv_gym.evaluation.report": "", "kv_gym.fit": "", "kv_gym.pages": "",
    "kv_gym.pages.policies": "kv_gym/pages/policies", "kv_gym.interop": "", "kv_gym.reference": "",
    "kv_gym.serving": "",
}  # fmt: skip


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the API pages into the navigation."""
    reference = next(part["Reference"] for part in config.nav if "Reference" in part)
    for entry in reference:
        if "API" in entry:
            entry["API"] = [{name: f"api/{name}.md"} for name in PACKAGES]
    return config


@event_priority(100)  # before the plugins that change single pages
def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The pages of the whole repository in place of those of docs/."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    pages = sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})
    for path in [*pages, *sorted(_linked(pages)), ROOT / "docs" / "site.css"]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        files.append(File.generated(config, f"examples/{notebook.stem}.md", content=_notebook(notebook)))
    for name, modules in PACKAGES.items():
        files.append(File.generated(config, f"api/{name}.md", content=_api_page(name, modules)))
    files.append(File.generated(config, "api/cli.md", content=_command_line()))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Links to notebooks lead to their pages; the first page stands alone in its part and needs no list beside it."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    return markdown.replace(".ipynb)", ".md)")


def _linked(pages: list[Path]) -> set[Path]:
    """Files that are no pages and to which pages link."""
    found = set()
    for page in pages:
        if page.suffix == ".md":
            for target in re.findall(r"\]\(([^)\s#:]+)\)", page.read_text(encoding="utf-8")):
                path = (page.parent / target).resolve()
                if path.is_file() and path not in pages and path.is_relative_to(ROOT):
                    found.add(path)
    return found


def _notebook(path: Path) -> str:
    """The cells of a notebook; it is committed without outputs."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    return "\n\n".join(
        f"```python\n{text}\n```" if cell["cell_type"] == "code" else text
        for cell, text in zip(cells, texts, strict=True)
    )


def _api_page(package: str, modules: str) -> str:
    """The public names of a package; and of a package of methods, every module that has one."""
    options = "show_root_heading: false, show_root_toc_entry: false"
    if package == "kv_gym":  # most of its names stand on the pages of their packages
        names = [f"- [`{name}`][{_place(home, name)}]" for name, home in import_module(package)._HOMES.items()]
        shown = f"{options}, members: [CacheView, push_to_hub]"
        return "\n".join(["# kv_gym", "::: kv_gym", f"    options: {{{shown}}}", "", "## Names", "", *names])
    parts = [f"# {package}", f"::: {package}", f"    options: {{{options}}}"]
    for name in sorted(getattr(import_module(package), "__all__", ())):
        if _place(package, name) != f"{package}.{name}" and f"{package}.{name}" not in PACKAGES:
            parts += ["", f"::: {_place(package, name)}", f"    options: {{heading: {name}, toc_label: {name}}}"]
    for path in sorted((ROOT / modules).glob("*.py")) if modules else ():
        if not path.name.startswith("_") and path.stem not in ("base", "registry"):  # their names stand above
            parts += ["", f"::: {modules.replace('/', '.')}.{path.stem}"]
    return "\n".join(parts)


def _place(package: str, name: str) -> str:
    """Where a public name is documented: a function that has the name of its module, in that module."""
    module = ROOT / package.replace(".", "/") / name
    return f"{package}.{name}.{name}" if module.is_dir() or module.with_suffix(".py").is_file() else f"{package}.{name}"


def _command_line() -> str:
    import typer
    from typer.cli import get_docs_for_click

    command: Any = typer.main.get_command(import_module("kv_gym.cli").app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="kv-gym", title="Command line")
