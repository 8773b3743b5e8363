"""Describe a trace set: what it holds, whether it is whole, which tokens of a context its future attends to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Group
from rich.text import Text

from kv_gym.budgets import format_budget, parse_budget, select
from kv_gym.errors import UserError, printable
from kv_gym.files import atomic_write, make_folder, refuse_address
from kv_gym.policies.oracle import Oracle
from kv_gym.traces.reader import TraceSet, open_traces
from kv_gym.traces.sequence import Sequence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, ROW, HIGHEST = 15.0, 0.16, 24.0  # inches: of the picture, of a row, and of a heat map at most
FIT = 110  # tokens whose words fit under a heat map; of more only those with the highest utility are named
SMALLEST = 1e-4  # attention below it is all one colour


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
        "slots": sum(entry.slots for entry in entries),
        "longest": max(lengths, default=0),
        "continuations": sum(entry.continuations for entry in entries),
        "splits": dict(Counter(entry.split for entry in entries)),
        "tasks": dict(Counter(entry.task for entry in entries)),
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

    Arrays are checked against the schema, and every hash is computed again: of arrays, of attributes, and of each
    sequence's id with the manifest.

    Args:
        path: folder or file; by default the bundled sample.

    Returns:
        How much was checked: sequences, arrays, bytes, recordings that stand in two files (one of them is read), and
        the set's hash.

    Raises:
        UserError: the first defect found.
    """
    traces = open_traces(path)
    splits: dict[str, str] = {}
    digests: dict[str, str] = {}
    for entry in traces.entries:
        if (other := digests.setdefault(entry.digest, entry.id)) != entry.id:
            raise UserError(f"sequences {other} and {entry.id} are copies of one another: remove one of them")
        if entry.text_hash and splits.setdefault(entry.text_hash, entry.split) != entry.split:
            raise UserError(f"sequence {entry.id} shares its text with the other split: keep a document in one split")
    arrays = sum(traces.verify(i) for i in range(len(traces)))
    size = sum(shard.stat().st_size for shard in {entry.path for entry in traces.entries})
    duplicates = sum(entry.recordings - 1 for entry in traces.entries)
    return {
        "sequences": len(traces), "arrays": arrays, "bytes": size, "duplicates": duplicates, "hash": traces.hash,
    }  # fmt: skip


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
    context = _find_sequence(traces, sequence)
    if not context.continuations:
        raise UserError(f"sequence {context.id} was recorded without continuations, so it has no future to show")
    layer, head = _choose_head(context, layer, head)
    tokenizer = tokenizer or traces.tokenizer()
    ids = context.tokens[context.slot_positions].tolist()
    words = [str(i) for i in ids] if tokenizer is None else list(map(_shown, tokenizer.convert_ids_to_tokens(ids)))
    title = (
        f"{context.id} ({context.task or 'no task'}, {context.split}): {_size(context)}, "
        f"continuations: {len(context.continuations)}; "
        f"layer {context.layers[layer]}, KV head {head}"
    )
    utility = torch.from_numpy(context.utility("max")[layer, head])
    parts = [
        Text(title, style="bold"),
        Text("what the oracle keeps there, which sees the continuations; dots stand for what is dropped"),
    ]
    for budget in budgets:
        view = context.view(layer, parse_budget(budget), oracle=True)
        kept = select(Oracle(), view, 0, 0)[0, head]
        share = float(utility[kept].sum() / utility.sum()) if float(utility.sum()) else 1.0
        parts.append(Text(f"\nbudget {format_budget(parse_budget(budget))}: utility kept {share:.3f}", style="bold"))
        parts.append(_kept_words(words, kept.tolist()))
    if out is not None:
        parts.append(Text(f"\npicture of all layers and heads: {draw_attention(context, words, out)}"))
    return Group(*parts)


def draw_attention(sequence: Sequence, words: Seq[str], out: str | Path) -> Path:
    """Draw what later queries attended to; :func:`attention_figure` says what there is to see.

    Args:
        sequence: a context with at least one continuation.
        words: `[n]` text of the slots' tokens.
        out: PNG file to write, whole or not at all.

    Returns:
        The file.

    Raises:
        UserError: no continuation, or a file that cannot be written or is no `.png`.
    """
    out = _writable(out)
    drawing = attention_figure(sequence, words)
    with atomic_write(out) as part:
        drawing.savefig(part, dpi=120, format="png")
    return out


def attention_figure(sequence: Sequence, words: Seq[str]) -> Figure:
    """Heat maps of one context, three axes from top to bottom.

    Above, how much of the attention of all heads each token gets. In the middle the utility (mean over continuations
    of the attention per query, the maximum over the KV head's query heads) of every slot: a row for each layer and
    head, a column for each token, the scale logarithmic. Below, the mean over heads of the attention per query of
    each block of each continuation.

    Args:
        sequence: a context with at least one continuation; L layers, H heads, n slots.
        words: `[n]` text of the slots' tokens.

    Raises:
        UserError: no continuation.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    if not sequence.continuations:
        raise UserError(f"sequence {sequence.id} was recorded without continuations, so it has no future to draw")
    utility = sequence.utility("max")
    layers, heads, n = utility.shape
    blocks = np.concatenate(
        [c.future[..., 1].mean((0, 1)).T / c.block_queries[:, None] for c in sequence.continuations]
    )  # [blocks of all continuations, n]
    heights = ((1.6, layers * heads), (0.8, len(blocks)))  # at least so many inches, for so many rows
    sizes = [1.1, *(min(HIGHEST, max(least, ROW * rows)) for least, rows in heights)]
    drawing = Figure(figsize=(WIDTH, sum(sizes) + 2.2), layout="constrained")
    top, middle, bottom = drawing.subplots(3, 1, sharex=True, height_ratios=sizes)
    token_utility = utility.mean((0, 1))
    top.bar(np.arange(n), token_utility, width=1.0 if n > 200 else 0.8, color="0.3")
    top.set(ylabel="mean utility", xlim=(-0.5, n - 0.5))
    top.set_title(
        f"{sequence.id} ({sequence.task or 'no task'}, {sequence.split}): {_size(sequence)}, {layers} layers of "
        f"{heads} KV heads, continuations: {len(sequence.continuations)}",
        fontsize=10, loc="left", parse_math=False,
    )  # fmt: skip
    style = {"aspect": "auto", "interpolation": "nearest", "cmap": "magma_r"}
    scale = LogNorm(SMALLEST, max(float(utility.max()), 10 * SMALLEST))
    image = middle.imshow(utility.reshape(-1, n).clip(SMALLEST), norm=scale, **style)
    bottom.imshow(blocks.clip(SMALLEST), norm=scale, **style)
    middle.set_ylabel("layer, one row per KV head")
    middle.set_yticks(np.arange(layers) * heads + (heads - 1) / 2, [str(layer) for layer in sequence.layers])
    middle.hlines(np.arange(1, layers) * heads - 0.5, -0.5, n - 0.5, color="0.6", linewidth=0.6)
    counts = [c.future.shape[3] for c in sequence.continuations]
    first = np.cumsum([0, *counts[:-1]])
    step = -(-len(counts) // max(1, int(sizes[2] / ROW)))  # as many numbers as there is height for
    bottom.set_ylabel("continuation" if max(counts) == 1 else "continuation, its blocks")
    middles = first + (np.array(counts) - 1) / 2
    bottom.set_yticks(middles[::step], [str(number) for number in range(0, len(counts), step)])
    bottom.hlines(first[1:] - 0.5, -0.5, n - 0.5, color="0.6", linewidth=0.6)
    _name_tokens(bottom, words, token_utility)
    drawing.colorbar(image, ax=[middle, bottom], label="attention per query", pad=0.01, fraction=0.03)
    return drawing


def _size(sequence: Sequence) -> str:
    tokens = f"{len(sequence.tokens)} tokens"
    return tokens if sequence.positions is None else f"{sequence.slots} sampled of {tokens}"


def _find_sequence(traces: TraceSet, sequence: str | int) -> Sequence:
    text = str(sequence)
    if text in traces.ids:
        return traces[text]
    if re.fullmatch("[0-9]{1,9}", text) and int(text) < len(traces):
        return traces[int(text)]
    raise UserError(f"there is no sequence {text!r}; expected a number below {len(traces)} or one of {traces.ids[:3]}")


def _choose_head(sequence: Sequence, layer: int | None, head: int | None) -> tuple[int, int]:
    utility = torch.from_numpy(sequence.utility("max"))  # [L, H, n]
    layers, heads, n = utility.shape
    if not 0 <= (layer or 0) < layers or not 0 <= (head or 0) < heads:
        raise UserError(f"there is no layer {layer}, head {head}; expected numbers below {layers} and {heads}")
    if layer is not None or head is not None:
        return layer or 0, head or 0
    # the first tokens receive attention whatever they mean: what a head attends to beyond them tells more
    concentration = utility[..., 4:].topk(min(8, n - 4), -1).values.sum(-1) if n > 4 else utility.sum(-1)
    best = int(concentration.flatten().argmax())
    return best // heads, best % heads


def _kept_words(words: list[str], kept: list[bool]) -> Text:
    line = Text()
    for i, (word, stays) in enumerate(zip(words, kept, strict=True)):
        if stays:
            line.append(word + " ", style="green")
        elif i == 0 or kept[i - 1]:
            line.append("· ", style="dim")
    return line


def _writable(out: str | Path) -> Path:
    refuse_address(out)
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise UserError(f"{out} is no name of a picture; expected a file that ends in .png")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file to write the picture to")
    make_folder(out.parent)
    return out


def _name_tokens(axes, words: Seq[str], utility: np.ndarray) -> None:
    """Words under all tokens where they fit, else under those with the highest utility that are far enough apart."""
    n = len(words)
    apart = n / FIT
    named: list[int] = []
    for token in np.argsort(-utility, kind="stable").tolist():
        if all(abs(token - other) >= apart for other in named):
            named.append(token)
    named.sort()
    axes.set_xticks(named, [_short(words[token]) for token in named], rotation=90, fontsize=7)
    axes.set_xlabel("token" if len(named) == n else f"token ({len(named)} of {n} are named: where most attention goes)")


def _shown(word: str | None) -> str:
    """A token as a terminal shows it; an id that the tokenizer does not know has none."""
    return printable(str(word))


def _short(word: str) -> str:
    shown = printable(str(word))
    # a dollar sign would begin a formula
    return (shown if len(shown) <= 14 else shown[:13] + "…").replace("$", r"\$")
