"""Commands made from Python functions: a verb and its Python twin share one signature and one docstring.

The function is read from its source file and not imported, so that `kv-gym --help` loads neither torch nor
transformers. Names, types and defaults of options come from the signature, help texts from the docstring.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ..., or auto: over all GPUs.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (float32 on CPU), float32, bfloat16 or float16.")]

_SCALARS = {"bool": bool, "int": int, "float": float}
_LIST = re.compile(r"(Iterable|Sequence|Seq|tuple|list)\[")
_NO_DEFAULT = inspect.Parameter.empty


@dataclass(frozen=True)
class OptionSource:
    """What a function's source says about one parameter.

    Attributes:
        kind: ``bool``, ``int``, ``float``, ``str``, ``Path``, ``list`` (strings with commas), or None where no text on
            the command line can stand for it, such as a model.
        default: its value; None where it is no literal.
        required: it has no default.
        help: its text under `Args`.
    """

    kind: type | None
    default: Any
    required: bool
    help: str


@dataclass(frozen=True)
class FunctionSource:
    """A function as its source file describes it.

    Attributes:
        module: from which it is imported.
        name: of the function.
        description: its docstring up to `Args`.
        parameters: by name.
    """

    module: str
    name: str
    description: str
    parameters: dict[str, OptionSource]

    @classmethod
    @cache
    def read(cls, path: str) -> FunctionSource:
        """Read ``module.function`` of this package without importing it."""
        module, _, name = path.rpartition(".")
        node = _find_function(module, name)
        described, texts = _read_docstring(ast.get_docstring(node) or "")
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        positional: list[ast.expr | None] = [*node.args.defaults]
        defaults = [None] * (len(arguments) - len(positional) - len(node.args.kw_defaults)) + positional
        parameters = {
            argument.arg: OptionSource(
                _kind(argument.annotation), _literal(default), default is None, texts.get(argument.arg, "")
            )
            for argument, default in zip(arguments, [*defaults, *node.args.kw_defaults], strict=True)
        }
        return cls(module, name, described, parameters)


def _find_function(module: str, name: str) -> ast.FunctionDef:
    """The definition of a function that `module` defines, imports, or names in a table of lazy imports."""
    file = Path(__file__).parent.parent.joinpath(*module.split(".")[1:])
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            return _find_function(node.module, name)
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if _literal(key) == name and isinstance(home := _literal(value), str):
                    return _find_function(home if home.startswith("kv_gym.") else f"{module}.{home}", name)
    raise LookupError(f"{module} has no function {name}")


def _kind(annotation: ast.expr | None) -> type | None:
    if annotation is None:
        return None
    parts = [part.strip() for part in re.split(r"\|(?![^\[]*\])", ast.unparse(annotation))]
    if any(map(_LIST.match, parts)):
        return list
    if "Path" in parts and set(parts) <= {"str", "Path", "None"}:
        return Path
    if {"str", "Path"} & set(parts):
        return str
    return next((_SCALARS[part] for part in parts if part in _SCALARS), None)


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _read_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """The description, and the text of each entry under `Args`, both as plain text."""
    description, *sections = re.split(r"^(?:Args|Returns|Raises|Yields):\n", docstring, flags=re.MULTILINE)
    texts: dict[str, str] = {}
    if sections and "\nArgs:\n" in docstring:
        for entry in re.split(r"^    (?=\S)", sections[0], flags=re.MULTILINE)[1:]:
            names, _, text = entry.partition(":")
            for name in names.split(","):
                texts[name.strip().lstrip("*")] = _as_help(text)
    return _plain(description).strip(), texts


def _plain(text: str) -> str:
    """Without the marks of reStructuredText."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


def _as_help(text: str) -> str:
    """One line that begins with a capital and ends with a full stop; sentences for Python alone are left out."""
    line = re.sub(r"(?<=[.;]) In Python,? .*?[.;](?= |$)", "", " ".join(_plain(text).split()))
    line = line if line.endswith("...") else line.rstrip(".;") + "."
    return line[:1].upper() + line[1:] if len(line) > 1 else ""


class Call:
    """One call of a function with what was given on the command line; what was not given keeps its default.

    Attributes:
        given: arguments by name.
    """

    def __init__(self, source: FunctionSource, given: dict[str, Any], load: Sequence[Any] | None):
        """Hold what was given; `load` is the value of ``--model``, ``--device`` and ``--dtype``, None without them."""
        self._source, self.given, self._load = source, given, load

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name, self._source.parameters[name].default)

    @property
    def model_name(self) -> str | None:
        """What ``--model`` names."""
        return self._load[0] if self._load is not None else None

    @cached_property
    def model(self) -> tuple[Any, Any]:
        """The model of ``--model`` and its tokenizer; None for both without the option."""
        return load_named_model(*self._load) if self._load is not None and self._load[0] is not None else (None, None)

    def __call__(self, **more: Any) -> Any:
        """Import the function and call it; `more` are arguments that the command line has no option for."""
        known = self._source.parameters
        loaded = dict(zip(("model", "tokenizer"), self.model, strict=True)) if self._load is not None else {}
        if self._load is not None:
            loaded["device"] = None if self._load[1] == "auto" else self._load[1]
        arguments = {name: value for name, value in loaded.items() if name in known} | self.given | more
        return getattr(import_module(self._source.module), self._source.name)(**arguments)

    def other(self, path: str, **more: Any) -> Any:
        """Call another function with those of the given arguments that it takes too."""
        source = FunctionSource.read(path)
        shared = {name: value for name, value in self.given.items() if name in source.parameters}
        return Call(source, shared, None)(**more)


def load_named_model(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    """The model and tokenizer of a folder, a hub id, or `reference`."""
    from kv_gym.files import MODEL
    from kv_gym.models import load_model

    return load_model(MODEL if name == "reference" else name, device=device, dtype=dtype)


def verb(
    app: typer.Typer,
    twin: str,
    *,
    arguments: tuple[str, ...] = (),
    rename: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    kinds: Mapping[str, type | None] | None = None,
    command_name: str | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command for a Python function; the decorated function makes the call and prints the result.

    Its first parameter is the :class:`Call`. Its other parameters are options that only the command line has; they
    take the place of a parameter of the same name. A parameter `model` becomes ``--model``, ``--device`` and
    ``--dtype``.

    Args:
        app: where to add the command, under the function's name unless `command_name` is given.
        twin: ``module.function``.
        arguments: parameters that are given by position.
        rename: from parameters to the name of their option.
        defaults: that differ from those of the function.
        kinds: of parameters whose annotation does not tell; None leaves the parameter out.
        command_name: name of the command; None: the function's.
    """
    rename, defaults, kinds = rename or {}, defaults or {}, kinds or {}
    source = FunctionSource.read(twin)

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
        own_names = {parameter.name for parameter in own}
        has_model = "model" in source.parameters and "model" not in own_names
        generated: dict[str, OptionSource] = {}
        for name, parameter in source.parameters.items():
            kind = kinds.get(name, parameter.kind)
            if kind is not None and name not in own_names and not (has_model and name in ("model", "device", "dtype")):
                default = defaults.get(name, parameter.default)
                required = parameter.required and name not in defaults
                generated[name] = OptionSource(kind, default, required, parameter.help)
        options = [_option(name, each, name in arguments, rename.get(name)) for name, each in generated.items()]
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        if has_model:
            model = source.parameters["model"]
            text = " ".join(filter(None, (model.help, "Folder, GGUF file, hub id, or `reference`.")))
            info = typer.Option("--model", help=text, show_default=False)
            own = [_parameter("model", Annotated[str, info], _NO_DEFAULT if model.required else None), *own]
            options += [_parameter("device", Device, "cpu"), _parameter("dtype", Dtype, "auto")]
        options = [*own, *options]
        options.sort(key=lambda option: (option.default is not _NO_DEFAULT, option.name == "progress"))

        def command(**values: Any) -> None:
            load = tuple(values[name] for name in ("model", "device", "dtype")) if has_model else None
            given = {name: value for name, value in values.items() if name in generated and value is not None}
            given = {name: _value(generated[name], value) for name, value in given.items()}
            body(Call(source, {**defaults, **given}, load), **{name: values[name] for name in own_names})

        command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        command.__annotations__ = {option.name: option.annotation for option in options}
        app.command(command_name or source.name, help=source.description)(command)
        return body

    return decorate


def _option(name: str, source: OptionSource, positional: bool, option_name: str | None) -> inspect.Parameter:
    flag = "--" + (option_name or name).replace("_", "-")
    kind = str if source.kind is list else source.kind
    default = ",".join(map(str, source.default)) if isinstance(source.default, tuple | list) else source.default
    # the default stands in the help alone: what is not given is not passed on, so that the function's own applies
    shown = "" if default in (None, "") or isinstance(default, bool) else f"  [default: {default}]"
    help_text = f"{source.help}{shown}"
    # readable=False: whoever reads a path says in one sentence why it cannot be read
    if positional:
        kind = list[str] if source.kind is list else kind
        info: Any = typer.Argument(help=help_text, show_default=False, readable=False)
    elif source.kind is bool:
        info = typer.Option(flag if default is False else f"{flag}/--no-{flag[2:]}", help=help_text, show_default=False)
    else:
        metavar = "A,B,..." if source.kind is list else None
        info = typer.Option(flag, help=help_text, show_default=False, metavar=metavar, readable=False)
    if source.required:
        return _parameter(name, Annotated[kind, info])
    return _parameter(name, Annotated[kind | None, info], None)  # type: ignore[operator]


def _parameter(name: str, annotation: Any, default: Any = _NO_DEFAULT) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _value(source: OptionSource, value: Any) -> Any:
    if source.kind is list and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return str(value) if source.kind is Path else value  # functions compare some paths with words, such as `reference`
