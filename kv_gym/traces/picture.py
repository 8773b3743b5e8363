"""A recorded context as a picture: which tokens the future attends to, in every layer and head."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kv_gym.errors import UserError
from kv_gym.files import whole_file
from kv_gym.traces.sequence import Sequence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, ROW, HIGHEST = 15.0, 0.16, 24.0  # inches: of the picture, of a row, and of a heat map at most
FIT = 110  # tokens whose words fit under a heat map; of more only those that are worth most are named
SMALLEST = 1e-4  # attention below it is all one colour


def picture(sequence: Sequence, words: Seq[str], out: str | Path) -> Path:
    """Draw what later queries attended to; :func:`figure` says what there is to see.

    Args:
        sequence: a context with at least one continuation.
        words: `[n]` text of the tokens.
        out: PNG file to write, whole or not at all.

    Returns:
        The file.

    Raises:
        UserError: no continuation, or a file that cannot be written or is no `.png`.
    """
    out = _writable(out)
    drawn = figure(sequence, words)
    with whole_file(out) as part:
        drawn.savefig(part, dpi=120, format="png")
    return out


def figure(sequence: Sequence, words: Seq[str]) -> Figure:
    """Heat maps of one context, three axes from top to bottom.

    Above, how much of the attention of all heads each token gets. In the middle the utility (mean over continuations
    of the attention per query, the maximum over the KV head's query heads) of every slot: a row for each layer and
    head, a column for each token, the scale logarithmic. Below, the mean over heads of the attention per query of
    each block of each continuation.

    Args:
        sequence: a context with at least one continuation; L layers, H heads, n tokens.
        words: `[n]` text of the tokens.

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
    sizes = [
        1.1,
        *(min(HIGHEST, max(least, ROW * rows)) for least, rows in ((1.6, layers * heads), (0.8, len(blocks)))),
    ]
    drawn = Figure(figsize=(WIDTH, sum(sizes) + 2.2), layout="constrained")
    top, middle, bottom = drawn.subplots(3, 1, sharex=True, height_ratios=sizes)
    worth = utility.mean((0, 1))
    top.bar(np.arange(n), worth, width=1.0 if n > 200 else 0.8, color="0.3")
    top.set(ylabel="mean utility", xlim=(-0.5, n - 0.5))
    top.set_title(
        f"{sequence.id} ({sequence.task or 'no task'}, {sequence.split}): {n} tokens, {layers} layers of {heads} "
        f"KV heads, continuations: {len(sequence.continuations)}",
        fontsize=10, loc="left",
    )  # fmt: skip
    look = {"aspect": "auto", "interpolation": "nearest", "cmap": "magma_r"}
    scale = LogNorm(SMALLEST, max(float(utility.max()), 10 * SMALLEST))
    image = middle.imshow(utility.reshape(-1, n).clip(SMALLEST), norm=scale, **look)
    bottom.imshow(blocks.clip(SMALLEST), norm=scale, **look)
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
    _name_tokens(bottom, words, worth)
    drawn.colorbar(image, ax=[middle, bottom], label="attention per query", pad=0.01, fraction=0.03)
    return drawn


def _writable(out: str | Path) -> Path:
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise UserError(f"{out} is no name of a picture; expected a file that ends in .png")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file to write the picture to")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {out.parent} ({error.strerror}); name another file") from None
    return out


def _name_tokens(axes, words: Seq[str], worth: np.ndarray) -> None:
    """Words under all tokens where they fit, else under those that are worth most and stand far enough apart."""
    n = len(words)
    apart = n / FIT
    named: list[int] = []
    for token in np.argsort(-worth, kind="stable").tolist():
        if all(abs(token - other) >= apart for other in named):
            named.append(token)
    named.sort()
    axes.set_xticks(named, [_plain(words[token]) for token in named], rotation=90, fontsize=7)
    axes.set_xlabel("token" if len(named) == n else f"token ({len(named)} of {n} are named: where most attention goes)")


def _plain(word: str) -> str:
    shown = "".join(letter if letter.isprintable() else "□" for letter in str(word))
    # a dollar sign would begin a formula
    return (shown if len(shown) <= 14 else shown[:13] + "…").replace("$", r"\$")
