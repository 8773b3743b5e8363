"""The design's rules about files and imports, read from the source with `ast`."""

import ast
import inspect
from pathlib import Path

import pytest

from kv_gym import list_policies
from kv_gym.policies import policy_class

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kv_gym"
FILES = sorted(PACKAGE.rglob("*.py"))

# A part of kv_gym may import parts of its own layer and of those before it.
LAYERS = (
    {
        "checksums",
        "errors",
        "files",
        "hub",
        "markdown",
        "notebook",
        "progress",
        "records",
        "remote",
        "weights_folder",
        "workers",
    },
    {"cache_view", "devices"},
    {"budgets", "models", "pages", "policies", "traces"},
    {"envs", "live", "reference"},
    {"evaluation", "interop", "serving", "training"},
    {"method_table", "testing"},
    {"fit"},
    {"cli", "publishing"},
    {"__main__"},
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

# Who may know how transformers is made inside: all others use its public names.
INSIDERS = ("live/", "models/", "traces/", "training/masked_context.py")
INTERNALS = {
    ("transformers", name)
    for name in (
        "ALL_ATTENTION_FUNCTIONS",
        "ALL_MASK_ATTENTION_FUNCTIONS",
        "AttentionInterface",
        "AttentionMaskInterface",
        "Cache",
        "CacheLayerMixin",
        "DynamicCache",
        "DynamicLayer",
        "StaticCache",
    )
}


def module_of(file):
    """`kv_gym/live/cache.py` is module `kv_gym.live.cache`; `kv_gym/live/__init__.py` is module `kv_gym.live`."""
    parts = ("kv_gym", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(file):
    """`kv_gym/live/cache.py` is part `live`; `kv_gym/errors.py` is part `errors`."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(file):
    """Every `(module, name or None)` that a file imports; relative imports made absolute.

    Imports inside functions and under `if TYPE_CHECKING:` count as any other.
    """
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["kv_gym", *file.relative_to(PACKAGE).parent.parts]
            above = ".".join(base[: len(base) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            found += [(module, alias.name) for alias in node.names]
    return found


def parts_imported(file):
    """The parts of kv_gym, other than its own, that a file imports."""
    parts = set()
    for module, name in imports(file):
        steps = module.split(".")
        if steps[0] != "kv_gym":
            continue
        if len(steps) > 1:
            parts.add(steps[1])
        elif name and ((PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()):
            parts.add(name)
        else:  # `from kv_gym import evaluate`: a lazy name, which could come from anywhere
            parts.add(f"kv_gym.{name}")
    return parts - {part_of(file)}


def test_every_part_has_its_place():
    parts = {part_of(file) for file in FILES} - {"__init__"}
    assert parts <= LEVEL.keys(), f"give {sorted(parts - LEVEL.keys())} a layer in this test and in the design"


def test_imports_run_one_way():
    upward = {}
    for file in FILES:
        if part_of(file) == "__init__":
            continue
        level = LEVEL[part_of(file)]
        # the package's own version is the one name that every layer may take from the top
        above = {part for part in parts_imported(file) - {"kv_gym.__version__"} if LEVEL.get(part, len(LAYERS)) > level}
        if above:
            upward[str(file.relative_to(ROOT))] = sorted(above)
    assert not upward


def modules_imported(file, modules):
    """Those of `modules` that a file imports: `from kv_gym.live import slots` is an import of `kv_gym.live.slots`."""
    found = {f"{module}.{name}" if f"{module}.{name}" in modules else module for module, name in imports(file)}
    return found & modules - {module_of(file)}


def circles(graph):
    """The circles in which the nodes of a graph (name -> names) lead to one another, one for each start."""
    done = set()

    def circle_from(node, path):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for other in sorted(graph.get(node, ())):
            if found := circle_from(other, [*path, node]):
                return found
        done.add(node)
        return None

    return [circle for node in sorted(graph) if (circle := circle_from(node, []))]


def test_parts_import_each_other_in_no_circle():
    graph = {}
    for file in FILES:
        graph.setdefault(part_of(file), set()).update(parts_imported(file))
    assert not circles(graph)


def test_modules_import_each_other_in_no_circle():
    modules = {module_of(file) for file in FILES}
    assert not circles({module_of(file): modules_imported(file, modules) for file in FILES})


def test_only_attention_live_and_recording_know_the_inside_of_transformers():
    knowing = {}
    for file in FILES:
        inside = [(m, n) for m, n in imports(file) if m.startswith("transformers.") or (m, n) in INTERNALS]
        if inside and not str(file.relative_to(PACKAGE)).startswith(INSIDERS):
            knowing[str(file.relative_to(ROOT))] = inside
    assert not knowing


def test_no_file_has_a_name_that_says_nothing():
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "random"}
    assert not [str(file) for file in FILES if vague & set(file.relative_to(PACKAGE).with_suffix("").parts)]


def calls(file):
    """`(dotted name, keyword arguments)` of every call in a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}


def test_no_code_names_the_cache_as_one_version_of_transformers_does():
    """`kv_gym.models.cache_name` knows what the installed transformers calls it."""
    naming = {
        str(file.relative_to(ROOT))
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.keyword | ast.Attribute)
        and "past_key_values" in (getattr(node, "arg", None), getattr(node, "attr", None))
    }
    assert not naming


def runs_code(file):
    """What in a file could run code that was read from elsewhere."""
    risky = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    found = [module for module, _ in imports(file) if module.split(".")[0] in risky]
    for function, keywords in calls(file):
        constant = {name: getattr(value, "value", value) for name, value in keywords.items()}
        if (
            function in {"eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
            or (function == "torch.load" and constant.get("weights_only") is not True)
            or constant.get("allow_pickle", False) is not False
            or constant.get("trust_remote_code", False) is not False
        ):
            found.append(function)
    return found


def test_nothing_that_is_read_can_run_code():
    assert not {str(file): found for file in FILES if (found := runs_code(file))}


def test_outside_data_is_read_by_the_one_safe_reader():
    """`json.loads` serves only what this package has just written itself, as the two ends of a pipe do."""
    wrong = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or file.name in ("files.py", "template_renderer.py"):
                continue
            function = ast.unparse(node.func)
            own = function == "json.loads" and ast.unparse(node.args[0]).startswith(("json.dumps(", "self.", "rule."))
            if function.startswith(("json.load", "yaml.")) and not own:
                wrong.append(f"{file.relative_to(ROOT)}, line {node.lineno}: {ast.unparse(node)}")
    assert not wrong


def policy_files():
    return [Path(inspect.getfile(policy_class(name))) for name in list_policies()]


@pytest.mark.parametrize("file", policy_files(), ids=list_policies())
def test_a_policy_is_one_file_with_its_source_and_one_frozen_dataclass(file):
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree)
    decorators = [ast.unparse(d) for node in tree.body if isinstance(node, ast.ClassDef) for d in node.decorator_list]
    dataclasses = [d for d in decorators if d.startswith("dataclass")]
    assert len(dataclasses) == 1 and "frozen=True" in dataclasses[0]


def test_the_rules_can_fail(tmp_path, monkeypatch):
    """The reader above sees imports inside functions or for types alone, relative ones and lazy names."""
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "budgets").mkdir()
    (tmp_path / "envs").mkdir()
    file = tmp_path / "budgets" / "wrong.py"
    file.write_text(
        "def f():\n    from kv_gym.envs import x\n    from ..live import y\n    from kv_gym import evaluate, envs\n"
    )
    assert parts_imported(file) == {"envs", "live", "kv_gym.evaluate"}
    file.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kv_gym.envs import right\n")
    other = tmp_path / "envs" / "right.py"
    other.write_text("import kv_gym.budgets.wrong\nfrom . import page\n")
    names = {"kv_gym.budgets.wrong", "kv_gym.envs", "kv_gym.envs.right"}
    assert modules_imported(file, names) == {"kv_gym.envs.right"}
    assert modules_imported(other, names) == {"kv_gym.budgets.wrong", "kv_gym.envs"}
    graph = {module_of(each): modules_imported(each, names) for each in (file, other)}
    assert circles(graph)[0] == ["kv_gym.budgets.wrong", "kv_gym.envs.right", "kv_gym.budgets.wrong"]
    file.write_text(
        "import pickle, torch, numpy as np\ntorch.load(f)\n"
        "np.load(f, allow_pickle=flag)\ntorch.load(f, weights_only=True)\n"
    )
    assert runs_code(file) == ["pickle", "torch.load", "np.load"]
