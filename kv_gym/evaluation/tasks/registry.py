"""Tasks by name, as ``--tasks`` and leaderboards give them: ``multi_key:512:seen,ruler:FILE:count=8``.

A task registers the function that builds it, in the file of that function; :func:`list_tasks` imports every file of
this package. The options of a name are the parameters of the function, so that they are written down once.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, TypeVar, get_args

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.base import Task
from kv_gym.files import exists
from kv_gym.markdown import pipe_table

Builder = TypeVar("Builder", bound=Callable[..., Any])
_RESERVED = {"tokenizer"}  # no option
_REGISTERED: dict[str, TaskType] = {}


@dataclass(frozen=True)
class TaskType:
    """A registered kind of task.

    Attributes:
        usage: an example of its name, such as ``copy:128`` or ``ruler:FILE``.
        help: what it asks, in one line.
        build: returns a task, or a list of tasks.
        argument: the first parameter of `build`: what follows the name, a length or a file.
        options: the other parameters by the names of their options. A ``bool`` is a flag, an ``int`` a number, anything
            else a text.
    """

    usage: str
    help: str
    build: Callable[..., Any]
    argument: inspect.Parameter
    options: dict[str, inspect.Parameter]

    def flags(self) -> set[str]:
        """Options that are given by their name alone."""
        return {name for name, parameter in self.options.items() if parameter.annotation is bool}

    def tasks(
        self, item: str, argument: str, options: Iterable[str], tokenizer, count: int | None, chat: bool = False
    ) -> list[Task]:
        """Build the tasks of a name.

        Args:
            item: the whole name, for errors.
            argument: what stands between name and options.
            options: ``option=value``, or the name of a flag.
            tokenizer: of the model.
            count: number of contexts where the options do not say it.
            chat: whether the options mean ``chat`` without saying it.
        """
        values: dict[str, Any] = {} if count is None else {"count": _number(item, "count", str(count))}
        if chat and "chat" not in self.options:
            raise UserError(f"task {item!r} has no form for chat models; leave --chat out, or name a file of questions")
        values |= {"chat": True} if chat else {}
        for option in options:
            name, _, text = option.partition("=")
            if name not in self.options:
                raise UserError(f"task {item!r} has no option {name}; it takes {', '.join(self.options)}")
            parameter = self.options[name]
            values[parameter.name] = _value(item, name, text, parameter)
        if not argument and self.argument.default is inspect.Parameter.empty:
            raise UserError(f"task {item!r} names no {self.argument.name}; expected a name such as {self.usage}")
        given = [_value(item, self.argument.name, argument, self.argument)] if argument else []
        built = self.build(*given, tokenizer=tokenizer, **values)
        return built if isinstance(built, list) else [built]


def _value(item: str, name: str, text: str, parameter: inspect.Parameter) -> Any:
    if parameter.annotation is bool:
        return True
    return _number(item, name, text) if int in (parameter.annotation, *get_args(parameter.annotation)) else text


def _number(item: str, name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"task {item!r}: {name} is {text!r} and no number; give digits, such as {name}=64")
    if text.strip("0") == "" and name != "seed":
        raise UserError(f"task {item!r}: {name} is {text}; expected 1 or more")
    return int(text)


def register(usage: str, help: str, **short: str) -> Callable[[Builder], Builder]:
    """Register the decorated function as the builder of a task.

    Args:
        usage: an example of the task's name with its argument; the name is what stands before the first colon.
        help: what the task asks, in one line; the table of :func:`task_table` is made of these.
        **short: short names of options, such as ``new="max_new_tokens"``.
    """

    def decorate(build: Builder) -> Builder:
        argument, *others = inspect.signature(build, eval_str=True).parameters.values()
        names = {parameter: name for name, parameter in short.items()}
        options = {names.get(each.name, each.name): each for each in others if each.name not in _RESERVED}
        name = "file" if usage == "FILE" else usage.partition(":")[0]
        _REGISTERED[name] = TaskType(usage, help, build, argument, options)
        return build

    return decorate


def list_tasks() -> dict[str, TaskType]:
    """All registered tasks by name; ``file``, questions of a file, is what a name that is none of them stands for."""
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"{__package__}.{module.name}")
    return dict(sorted(_REGISTERED.items()))


def task_table() -> str:
    """All tasks with their options as a Markdown table, for the documentation."""
    rows = []
    for name, kind in list_tasks().items():
        flags = kind.flags()
        options = [f"`:{option}`" if option in flags else f"`:{option}=`" for option in kind.options]
        rows.append(("`FILE.jsonl`" if name == "file" else f"`{kind.usage}`", kind.help, ", ".join(options)))
    return pipe_table(("name", "task", "options"), rows, left=None)


def parse_tasks(text: str, tokenizer=None, count: int | None = None, chat: bool = False) -> list[Task]:
    """Tasks from their names: ``name:argument:option=value:flag``, several with commas between them.

    :func:`list_tasks` has the names with their options. What is none of these names is a file of questions, see
    :func:`~kv_gym.evaluation.tasks.read_tasks`. A file's name may hold no comma, unless it is all of `text`. All tasks
    take ``count=32``, the number of contexts; generated ones take ``seed=7``: other contexts than the held-out ones, to
    choose settings on.

    Args:
        text: the names.
        tokenizer: of the model; None means the reference model's.
        count: contexts of each task that does not say it itself.
        chat: all tasks have the option ``chat``.

    Raises:
        UserError: an unknown name or option, or whatever the task refuses.
    """
    if exists(text) and Path(text).is_file():
        return list_tasks()["file"].tasks(text, text, [], tokenizer, count, chat)
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise UserError(f"no task in {text!r}; name one, such as multi_key:512")
    return [task for item in items for task in _parse(item, tokenizer, count, chat)]


def _parse(item: str, tokenizer, count: int | None, chat: bool) -> list[Task]:
    known, fields = list_tasks(), item.split(":")
    flags = set().union(*(kind.flags() for kind in known.values()))
    end = len(fields)
    while end > 1 and (fields[end - 1] in flags or re.match(r"\w+=", fields[end - 1])):
        end -= 1
    name, start = (fields[0], 1) if fields[0] in known else ("file", 0)
    argument = ":".join(fields[start:end])
    if name == "file" and not argument.endswith((".jsonl", ".arrow", ".parquet")) and not exists(argument):
        raise UserError(f"task {item!r} is neither a file nor known; known are {', '.join(known)}")
    return known[name].tasks(item, argument, fields[end:], tokenizer, count, chat)
