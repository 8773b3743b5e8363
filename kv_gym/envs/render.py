"""What an environment shows of itself: which tokens stay at each budget, as text or as a picture."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_gym.errors import UserError

MODES = ("ansi", "rgb_array", "human")
FRAMES_PER_SECOND = 2  # a picture is read, not watched
_WIDTH = 100  # columns of a terminal


@dataclass(frozen=True)
class Scene:
    """One decision as the rules see it, N slots in the observation's order.

    Attributes:
        labels: `[rows]` budgets, or one moment.
        kept: `[rows, N]` bool, the slots that stay.
        best: `[rows, N]` bool, the slots that would stay if the future were known and that it attends to.
        open: `[N]` bool, the slots that are ranked: not protected.
        worth: `[N]` float32, the attention that the future pays to open slots.
        shares: `[rows]` how good the choice was, at most 1; NaN where there was none to make.
        measure: what a share is.
    """

    labels: list[str]
    kept: NDArray[np.bool_]
    best: NDArray[np.bool_]
    open: NDArray[np.bool_]
    worth: NDArray[np.float32]
    shares: list[float]
    measure: str


@dataclass(frozen=True)
class Frame:
    """A decision in one context of H heads (1 unless joint) and n tokens.

    Attributes:
        title: which context this is.
        heads: `[H]` (layer, head) pairs shown.
        tokens: `[n]` int64.
        labels, shares, measure: as in :class:`Scene`.
        kept, best: `[rows, H, n]` bool.
        protected: `[n]` bool.
        worth: `[H, n]` float32.
        reward: what the step paid, None before the first.
        goes_on: the picture of an episode shows this decision below the earlier ones, not in their place.
        lanes: rows that pictures of this environment have room for.
    """

    title: str
    heads: list[tuple[int, int]]
    tokens: np.ndarray
    labels: list[str]
    shares: list[float]
    measure: str
    kept: NDArray[np.bool_]
    best: NDArray[np.bool_]
    protected: NDArray[np.bool_]
    worth: NDArray[np.float32]
    reward: float | None
    goes_on: bool
    lanes: int

    @property
    def who(self) -> str:
        """Context, head and length in words."""
        one = len(self.heads) == 1
        heads = f"layer {self.heads[0][0]} head {self.heads[0][1]}" if one else f"{len(self.heads)} heads"
        return f"{self.title}, {heads}, {len(self.tokens)} tokens"

    def after(self, frames: list[Frame]) -> list[Frame]:
        """The frames of an episode with this one more."""
        return [*frames, self] if self.goes_on else [self]


def check_mode(render_mode: str | None) -> str | None:
    """Refuse a mode that does not exist."""
    if render_mode is not None and render_mode not in MODES:
        raise UserError(f"render_mode is {render_mode!r}; expected {', '.join(map(repr, MODES))}")
    return render_mode


def tokenizer_for(traces: Any, tokenizer: Any, render_mode: str | None) -> Any:
    """The caller's tokenizer, or that of stored traces where it is on this machine; looked for only to render."""
    if tokenizer is not None or render_mode is None:
        return tokenizer
    from kv_gym.traces import TraceSet, open_traces
    from kv_gym.traces.summary import tokenizer_of

    if traces is None or isinstance(traces, str | Path):
        traces = open_traces(traces)
    return tokenizer_of(traces) if isinstance(traces, TraceSet) else None


def draw(frames: Seq[Frame], mode: str, tokenizer: Any = None) -> Any:
    """An episode so far, as text or as a `[height, width, 3]` uint8 picture.

    Args:
        frames: its decisions; text tells the last one.
        mode: one of :data:`MODES`; ``human`` gets the picture, to be shown in a window.
        tokenizer: anything with ``convert_ids_to_tokens``; None shows token ids.
    """
    from kv_gym.envs.picture import picture

    ids = frames[-1].tokens.tolist()
    words = [str(token) for token in ids] if tokenizer is None else tokenizer.convert_ids_to_tokens(ids)
    return as_text(frames[-1], words) if mode == "ansi" else picture(frames, words)


def as_text(frame: Frame, words: list[str]) -> str:
    """One paragraph per budget: tokens that stay in at least half of the heads, a dot for each that went."""
    lines = [frame.who]
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
