"""Options that several verbs share, and how a named model is loaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kv_gym.errors import UserError

Model = Annotated[str, typer.Option("--model", help="Folder or hub id of a transformers decoder, or `reference`.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on CPU), float32, bfloat16 or float16.")]
Progress = Annotated[bool, typer.Option(help="Show progress bars.")]
Sinks = Annotated[int | None, typer.Option(help="First tokens always kept (default: the policy's own).")]
Recent = Annotated[int | None, typer.Option(help="Last tokens always kept (default: the policy's own).")]
Evicted = Annotated[
    str, typer.Option(help="Evicted pairs: drop, merge, merge:values, bits:2, bits:4 ... (`evaluate`: with commas).")
]
ReferenceTask = Annotated[str, typer.Option("--task", help="With --tasks reference: which task.")]
ReferenceTokens = Annotated[int, typer.Option("--tokens", help="Length of a reference context, in words.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of the agent, as in its file; repeatable."),
]


def named_model(name: str, device: str, dtype: str):
    """The model and tokenizer of a folder, a hub id, or `reference`."""
    from kv_gym.reference import MODEL
    from kv_gym.traces import load_model

    return load_model(MODEL if name == "reference" else name, device=device, dtype=dtype)


def settings_from(written: list[str] | None, **given: Any) -> dict[str, Any]:
    """``NAME=VALUE`` with values as YAML, beside settings that have an option of their own."""
    import yaml

    settings = {name: value for name, value in given.items() if value is not None}
    for text in written or ():
        name, equals, value = text.partition("=")
        if not equals or not name or name in settings:
            raise UserError(f"--set got {text!r}; expected NAME=VALUE, each name once, such as --set contexts=4")
        try:
            settings[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set got {text!r}; expected a value as in agents/*.yml, such as 4 or [0, 0]") from None
    return settings
