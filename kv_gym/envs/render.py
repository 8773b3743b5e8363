"""Which tokens stay at each budget, as text for a terminal or as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_gym.errors import UserError

MODES = ("ansi", "rgb_array")
_WIDTH = 100  # columns of a terminal


@dataclass(frozen=True)
class Frame:
    """What stays of one context.

    Attributes:
        title: which context this is.
        heads: `[H]` (layer, head) pairs shown.
        tokens: `[n]` int64.
        labels: `[rows]` budgets or moments.
        kept: `[rows, H, n]` bool.
    """

    title: str
    heads: list[tuple[int, int]]
    tokens: np.ndarray
    labels: list[str]
    kept: NDArray[np.bool_]


def check_mode(render_mode: str | None) -> str | None:
    """Refuse a mode that does not exist."""
    if render_mode is not None and render_mode not in MODES:
        raise UserError(f"render_mode is {render_mode!r}; expected {' or '.join(map(repr, MODES))}")
    return render_mode


def draw(frame: Frame, mode: str, tokenizer: Any = None) -> str | np.ndarray:
    """The frame in one of :data:`MODES`."""
    return as_text(frame, tokenizer) if mode == "ansi" else as_picture(frame)


def as_text(frame: Frame, tokenizer: Any = None) -> str:
    """One paragraph per budget: tokens that stay in at least half of the heads, a dot for each that went.

    Args:
        frame: what to show.
        tokenizer: anything with ``convert_ids_to_tokens``; None shows token ids.
    """
    ids = frame.tokens.tolist()
    words = [str(token) for token in ids] if tokenizer is None else tokenizer.convert_ids_to_tokens(ids)
    who = (
        f"layer {frame.heads[0][0]} head {frame.heads[0][1]}" if len(frame.heads) == 1 else f"{len(frame.heads)} heads"
    )
    lines = [f"{frame.title}, {who}, {len(ids)} tokens"]
    for label, kept in zip(frame.labels, frame.kept, strict=True):
        share = kept.mean(0)
        lines.append(f"[{label}] {int(kept.sum())} of {kept.size} slots stay")
        line = " "
        for word, stays in zip(words, share >= 0.5, strict=True):
            shown = f" {word}" if stays else "·"
            if len(line) + len(shown) > _WIDTH:
                lines.append(line)
                line = " "
            line += shown
        lines.append(line)
    return "\n".join(lines) + "\n"


def as_picture(frame: Frame) -> np.ndarray:
    """Tokens from left to right, budgets from top to bottom, dark = stays in all heads; `[height, width, 3]` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.35 * len(frame.labels)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(frame.kept.mean(1), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(frame.labels)), frame.labels)
    axes.set_xlabel("token")
    axes.set_title(f"{frame.title}, share of {len(frame.heads)} head(s) that keep it", fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
