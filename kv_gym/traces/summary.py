"""Look at a trace set: what it holds, whether it is whole, and which tokens of a context its future uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.text import Text

from kv_gym.budgets import format_budget, parse_budget, select
from kv_gym.errors import UserError
from kv_gym.models.loading import recorded_tokenizer
from kv_gym.policies.oracle import Oracle
from kv_gym.traces.reader import TraceSet, open_traces
from kv_gym.traces.sequence import Sequence


def info(path: str | Path | None = None) -> dict[str, Any]:
    """Show what a trace set holds, without reading its arrays.

    Args:
        path: folder or file; by default the bundled sample.

    Returns:
        Plain JSON data.

    Raises:
        UserError: no readable trace set.
    """
    traces = open_traces(path)
    manifest, fingerprint, entries = traces.manifest, traces.fingerprint, traces.entries
    shards = {entry.path for entry in entries}
    lengths = [entry.tokens for entry in entries]
    return {
        "sequences": len(entries),
        "tokens": sum(lengths),
        "longest": max(lengths, default=0),
        "continuations": sum(entry.continuations for entry in entries),
        "splits": _count(entry.split for entry in entries),
        "tasks": _count(entry.task for entry in entries),
        "shards": len(shards),
        "bytes": sum(shard.stat().st_size for shard in shards),
        "model": manifest.get("model", ""),
        "architecture": fingerprint.architecture,
        "layers": list(fingerprint.layers),
        "kv_heads": fingerprint.kv_heads,
        "query_heads": fingerprint.query_heads,
        "head_dim": fingerprint.head_dim,
        "dtype": manifest["dtype"],
        "storage": manifest["storage"],
        "settings": manifest["settings"],
        "recipe": manifest["recipe"],
        "versions": manifest["versions"],
        "format": manifest["version"],
        "hash": traces.hash,
    }


def validate(path: str | Path | None = None) -> dict[str, Any]:
    """Read a whole trace set and check it.

    Arrays are checked against the schema, and every hash is computed again.

    Args:
        path: folder or file; by default the bundled sample.

    Returns:
        How much was checked: sequences, arrays, bytes, and the set's hash.

    Raises:
        UserError: the first defect found.
    """
    traces = open_traces(path)
    splits: dict[str, str] = {}
    for entry in traces.entries:
        if entry.text_hash and splits.setdefault(entry.text_hash, entry.split) != entry.split:
            raise UserError(f"sequence {entry.id} shares its text with the other split: keep a document in one split")
    arrays = sum(traces.verify(i) for i in range(len(traces)))
    size = sum(shard.stat().st_size for shard in {entry.path for entry in traces.entries})
    return {"sequences": len(traces), "arrays": arrays, "bytes": size, "hash": traces.hash}


def show(
    path: str | Path | None = None,
    sequence: str | int = 0,
    layer: int | None = None,
    head: int | None = None,
    budgets: tuple[str | float, ...] = ("1/2", "1/4", "1/8"),
    tokenizer=None,
    out: str | Path | None = None,
) -> Group:
    """Show one context and the tokens that later queries use.

    These are the tokens that the oracle keeps in one head at some budgets.

    Args:
        path: folder or file; by default the bundled sample.
        sequence: id or number of the context.
        layer: number of the recorded layer.
        head: KV head; by default the one with most attention to single tokens beyond the first four.
        budgets: slots per head or shares of the tokens.
        tokenizer: to show text; without one the recorded model's is looked for on this machine, else ids are shown.
        out: PNG file to write, with the attention in all layers and heads.

    Returns:
        A rich renderable: dropped tokens are dots, kept ones stand out.

    Raises:
        UserError: no such set, sequence, layer or head, a sequence without continuations, or a picture that cannot be
            written.
    """
    traces = open_traces(path)
    one = _find(traces, sequence)
    if not one.continuations:
        raise UserError(f"sequence {one.id} was recorded without continuations, so it has no future to show")
    layer, head = _head(one, layer, head)
    known = tokenizer or tokenizer_of(traces)
    words = [str(i) for i in one.tokens] if known is None else known.convert_ids_to_tokens(one.tokens.tolist())
    title = (
        f"{one.id} ({one.task or 'no task'}, {one.split}): {len(words)} tokens, "
        f"continuations: {len(one.continuations)}; "
        f"layer {one.layers[layer]}, KV head {head}"
    )
    utility = torch.from_numpy(one.utility("max")[layer, head])
    parts = [
        Text(title, style="bold"),
        Text("what the oracle keeps there, which sees the continuations; dots stand for what is dropped"),
    ]
    for budget in budgets:
        view = one.view(layer, parse_budget(budget), oracle=True)
        kept = select(Oracle(), view, 0, 0)[0, head]
        share = float(utility[kept].sum() / utility.sum()) if float(utility.sum()) else 1.0
        parts.append(Text(f"\nbudget {format_budget(parse_budget(budget))}: utility kept {share:.3f}", style="bold"))
        parts.append(_kept_words(words, kept.tolist()))
    if out is not None:
        from kv_gym.traces.picture import picture

        parts.append(Text(f"\npicture of all layers and heads: {picture(one, words, out)}"))
    return Group(*parts)


def _find(traces: TraceSet, sequence: str | int) -> Sequence:
    text = str(sequence)
    if text in traces.ids:
        return traces[text]
    if text.isdigit() and int(text) < len(traces):
        return traces[int(text)]
    raise UserError(f"there is no sequence {text!r}; expected a number below {len(traces)} or one of {traces.ids[:3]}")


def _head(sequence: Sequence, layer: int | None, head: int | None) -> tuple[int, int]:
    utility = torch.from_numpy(sequence.utility("max"))  # [L, H, n]
    layers, heads, n = utility.shape
    if not 0 <= (layer or 0) < layers or not 0 <= (head or 0) < heads:
        raise UserError(f"there is no layer {layer}, head {head}; expected numbers below {layers} and {heads}")
    if layer is not None or head is not None:
        return layer or 0, head or 0
    # the first tokens take attention whatever they say: a head is telling by what it looks at beyond them
    telling = utility[..., 4:].topk(min(8, n - 4), -1).values.sum(-1) if n > 4 else utility.sum(-1)
    best = int(telling.flatten().argmax())
    return best // heads, best % heads


def _kept_words(words: list[str], kept: list[bool]) -> Text:
    line = Text()
    for i, (word, stays) in enumerate(zip(words, kept, strict=True)):
        if stays:
            line.append(word + " ", style="green")
        elif i == 0 or kept[i - 1]:
            line.append("· ", style="dim")
    return line


def tokenizer_of(traces: TraceSet) -> Any:
    """The recorded model's tokenizer where it is on this machine, else None; never a download."""
    return recorded_tokenizer(traces.manifest.get("model", ""), traces.manifest["tokenizer"])


def _count(names) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts
