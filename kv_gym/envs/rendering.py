"""What an environment shows: which tokens stay after each decision, as text, as a picture, or in a window."""

from __future__ import annotations

import warnings
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_gym.errors import UserError

MODES = ("ansi", "rgb_array", "human")
FRAMES_PER_SECOND = 2  # a picture is read, not watched
TEXT_COLUMNS = 100
NO_WINDOW = "no window can be opened here, so nothing is shown: use render_mode='rgb_array' or 'ansi' instead"

Colour = tuple[int, int, int]

# whether a token stays, and whether an oracle would keep it: blue and orange also differ for colour-blind readers
PROTECTED: Colour = (110, 110, 118)
KEPT: Colour = (31, 95, 168)
KEPT_NEEDLESSLY: Colour = (158, 197, 235)
EVICTED_WRONGLY: Colour = (226, 112, 40)
EVICTED: Colour = (236, 236, 236)
LEGEND = (
    (KEPT, "kept"),
    (KEPT_NEEDLESSLY, "kept, an oracle would not"),
    (EVICTED_WRONGLY, "evicted, an oracle would keep it"),
    (EVICTED, "evicted"),
    (PROTECTED, "protected"),
)
EMPTY_ROW: Colour = (250, 250, 250)
BAR: Colour = (64, 64, 72)
FAINT: Colour = (150, 150, 150)
INK: Colour = (40, 40, 40)

# pixels
PLOT_WIDTH = 960
MIN_TOKEN_WIDTH = 4  # from which a token is set off from its neighbours by a line
LEFT, RIGHT, TITLE_HEIGHT, WORD_HEIGHT, BAR_HEIGHT, GAP, LEGEND_HEIGHT = 96, 76, 30, 84, 72, 10, 30
FONT_SIZE, SMALL_FONT_SIZE = 13, 11
ROWS_TOP = TITLE_HEIGHT + WORD_HEIGHT + BAR_HEIGHT + GAP
WORD_CANDIDATES = 500  # tokens that may get a word over their bar: several times as many as there is room for


@dataclass(frozen=True)
class Frame:
    """One decision in one context, to be drawn; H heads (1 unless joint) and n tokens.

    Attributes:
        title: which context this is.
        heads: `[H]` (layer, head) pairs.
        tokens: `[n]` int64 token ids.
        labels: `[rows]`, the budgets of a ranking, or the block.
        shares: `[rows]`, how good the choice was, at most 1; NaN where there was no choice.
        measure: what `shares` are.
        kept: `[rows, H, n]` bool, the slots that stay.
        best: `[rows, H, n]` bool, the slots that an oracle would keep.
        protected: `[n]` bool.
        utility: `[H, n]` float32, future attention.
        reward: of the step, None before the first.
        keeps_history: whether this decision is drawn below the earlier ones of the episode or instead of them.
        rows: how many rows pictures of this environment have room for.
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
    utility: NDArray[np.float32]
    reward: float | None
    keeps_history: bool
    rows: int

    @property
    def caption(self) -> str:
        """Context, head and length in words."""
        layer, head = self.heads[0]
        heads = f"layer {layer} head {head}" if len(self.heads) == 1 else f"{len(self.heads)} heads"
        return f"{self.title}, {heads}, {len(self.tokens)} tokens"


class Renderer:
    """Draws the current episode of each of B environments.

    Attributes:
        mode: one of :data:`MODES`, or None, which draws nothing.
    """

    def __init__(self, mode: str | None, traces: Any = None, tokenizer: Any = None) -> None:
        """Look for a tokenizer, where there is something to render.

        Args:
            mode: the environment's `render_mode`.
            traces: the environment's traces; the tokenizer of a stored trace set is used where it is on this machine.
            tokenizer: anything with ``convert_ids_to_tokens``; without any, token ids are shown.

        Raises:
            UserError: an unknown mode.
        """
        if mode is not None and mode not in MODES:
            raise UserError(f"render_mode is {mode!r}; expected {', '.join(map(repr, MODES))}")
        self.mode = mode
        self._tokenizer = tokenizer if tokenizer is not None or mode is None else _stored_tokenizer(traces)
        self._episodes: list[list[Frame]] = []  # the frames of each environment
        self._ended = np.zeros(0, bool)
        self._window: Window | None = None

    def reset(self, frames: Seq[Frame]) -> None:
        """Begin new episodes with these frames, one per environment."""
        self._episodes, self._ended = [[frame] for frame in frames], np.zeros(len(frames), bool)
        self._show()

    def step(self, frames: Seq[Frame], ended: NDArray[np.bool_]) -> None:
        """Add the frames of a step; an episode that ended is shown until the first step of the next one."""
        for frame, history, was_over in zip(frames, self._episodes, self._ended, strict=True):
            if was_over or not frame.keeps_history:
                history.clear()
            history.append(frame)
        self._ended = ended
        self._show()

    def render(self) -> tuple[Any, ...] | None:
        """Text or pictures `[height, width, 3]` uint8, one per environment; None where a window shows them."""
        if self.mode in (None, "human") or not self._episodes:
            return None
        return tuple(map(self._draw, self._episodes))

    def close(self) -> None:
        """Close the window, where there is one."""
        if self._window is not None:
            self._window.close()

    def _draw(self, frames: Seq[Frame]) -> Any:
        ids = frames[-1].tokens.tolist()
        words = list(map(str, ids)) if self._tokenizer is None else self._tokenizer.convert_ids_to_tokens(ids)
        return as_text(frames[-1], words) if self.mode == "ansi" else draw_picture(frames, words)

    def _show(self) -> None:
        if self.mode == "human":
            self._window = self._window or Window("KVEvict-v0", FRAMES_PER_SECOND)
            self._window.show(tile(list(map(self._draw, self._episodes))))


def _stored_tokenizer(traces: Any) -> Any:
    from kv_gym.traces import open_traces
    from kv_gym.traces.reader import names_trace_sets

    return open_traces(traces).tokenizer() if names_trace_sets(traces) else None


def as_text(frame: Frame, words: list[str]) -> str:
    """One paragraph per row: tokens that stay in at least half of the heads, a dot for each evicted one."""
    lines = [frame.caption]
    for label, kept in zip(frame.labels, frame.kept, strict=True):
        lines.append(f"[{label}] {int(kept.sum())} of {kept.size} slots stay")
        line = " "
        for word, stays in zip(words, kept.mean(0) >= 0.5, strict=True):
            shown = f" {word}" if stays else "·"
            if len(line) + len(shown) > TEXT_COLUMNS:
                lines.append(line)
                line = " "
            line += shown
        lines.append(line)
    return "\n".join(lines) + "\n"


def draw_picture(frames: Seq[Frame], words: Seq[str]) -> NDArray[np.uint8]:
    """Draw the decisions of one episode: tokens from left to right, their utility above, a row per decision below.

    A joint decision is drawn as the mean colour over its heads; more tokens than pixels as the mean colour of those
    that share a pixel, and the highest utility among them.

    Args:
        frames: the episode so far, each frame's rows below those of the one before.
        words: `[n]` text of the tokens.

    Returns:
        `[height, width, 3]` uint8; the size is the same for all frames of an environment, and even, because video
        formats need it.
    """
    last = frames[-1]
    row_height = 24 if last.rows <= 8 else 14
    height, width = ROWS_TOP + row_height * last.rows + LEGEND_HEIGHT, LEFT + PLOT_WIDTH + RIGHT
    canvas = np.full((height + height % 2, width + width % 2, 3), 255, np.uint8)
    title = last.caption if last.reward is None else f"{last.caption}: reward {last.reward:.3f}"
    paste(canvas, draw_text(shorten(title, FONT_SIZE, width - 20), FONT_SIZE), 7, 12)
    _draw_bars(canvas, last, words)
    labels = [label for frame in frames for label in frame.labels]
    shares = [share for frame in frames for share in frame.shares]
    colours = np.concatenate([_token_colours(frame) for frame in frames])
    share_left = LEFT + PLOT_WIDTH + 8
    paste(canvas, draw_text(last.measure, SMALL_FONT_SIZE), ROWS_TOP - GAP - SMALL_FONT_SIZE - 4, share_left, FAINT)
    size = FONT_SIZE if row_height > 16 else SMALL_FONT_SIZE
    offset = (row_height - 3 - draw_text("0", size).shape[0]) // 2
    for row in range(last.rows):
        y = ROWS_TOP + row * row_height
        strip = canvas[y : y + row_height - 3, LEFT : LEFT + PLOT_WIDTH]
        if row >= len(labels):
            strip[:] = EMPTY_ROW
            continue
        strip[:] = _to_pixels(colours[row])
        label = draw_text(labels[row], size)
        paste(canvas, label, y + offset, LEFT - 8 - label.shape[1])
        share = "–" if np.isnan(shares[row]) else f"{shares[row]:.2f}"
        paste(canvas, draw_text(share, size), y + offset, share_left)
    _draw_legend(canvas, height - LEGEND_HEIGHT + 9)
    return canvas


def _token_colours(frame: Frame) -> np.ndarray:
    """`[rows, n, 3]`, mean over heads."""
    palette = np.array([EVICTED, EVICTED_WRONGLY, KEPT_NEEDLESSLY, KEPT, PROTECTED], np.float32)
    kind = 2 * frame.kept.astype(np.int8) + frame.best
    kind[frame.kept & frame.protected] = 4
    if len(frame.heads) == 1:
        return palette[kind[:, 0]]
    shares = np.stack([(kind == number).mean(1, dtype=np.float32) for number in range(len(palette))], -1)
    return shares @ palette


def _to_pixels(colours: np.ndarray) -> np.ndarray:
    """`[n, 3]` of tokens to `[PLOT_WIDTH, 3]` of pixels."""
    n = len(colours)
    if n > PLOT_WIDTH:
        starts = np.arange(PLOT_WIDTH) * n // PLOT_WIDTH
        return np.add.reduceat(colours, starts) / np.diff(starts, append=n)[:, None]
    token = np.arange(PLOT_WIDTH) * n // PLOT_WIDTH
    pixels = colours[token]
    if n * MIN_TOKEN_WIDTH <= PLOT_WIDTH:
        pixels[np.flatnonzero(np.diff(token))] = 255
    return pixels


def _draw_bars(canvas: np.ndarray, frame: Frame, words: Seq[str]) -> None:
    """The utility of each token, and the words of the tokens with most of it, as many as there is room for."""
    base = ROWS_TOP - GAP
    utility = frame.utility.sum(0, dtype=np.float64)
    n = len(utility)
    heights = BAR_HEIGHT * utility / max(utility.max(), 1e-30)
    token = np.arange(PLOT_WIDTH) * n // PLOT_WIDTH
    pixels = heights[token] if n <= PLOT_WIDTH else np.maximum.reduceat(heights, token)
    if n * MIN_TOKEN_WIDTH <= PLOT_WIDTH:
        pixels[np.flatnonzero(np.diff(token))] = 0
    above_base = np.arange(BAR_HEIGHT, 0, -1)[:, None]  # of a pixel's upper edge
    canvas[base - BAR_HEIGHT : base, LEFT : LEFT + PLOT_WIDTH][above_base <= np.ceil(pixels)] = BAR
    canvas[base, LEFT : LEFT + PLOT_WIDTH] = FAINT
    axis = draw_text("utility", SMALL_FONT_SIZE)
    paste(canvas, axis, base - axis.shape[0], LEFT - 8 - axis.shape[1], FAINT)
    spacing = draw_text("0", SMALL_FONT_SIZE).shape[0] - 2
    taken = np.zeros(PLOT_WIDTH + spacing, bool)
    for best in np.lexsort((-np.arange(n), utility))[: -1 - WORD_CANDIDATES : -1]:
        centre = int((best + 0.5) * PLOT_WIDTH / n)
        start = max(0, centre - spacing // 2)
        if taken[start : start + spacing].any():
            continue
        taken[start : start + spacing] = True
        text = shorten(str(words[best]), SMALL_FONT_SIZE, WORD_HEIGHT - 8)
        word = draw_text(text, SMALL_FONT_SIZE, vertical=True)
        bottom = base - BAR_HEIGHT - 4
        paste(canvas, word, bottom - word.shape[0], LEFT + centre - word.shape[1] // 2)
        stem = canvas[bottom + 1 : base - int(np.ceil(heights[best])), LEFT + centre]
        stem[:] = np.minimum(stem, 225)


def _draw_legend(canvas: np.ndarray, top: int) -> None:
    left = 12
    for colour, text in LEGEND:
        canvas[top + 2 : top + 12, left : left + 14] = colour
        label = draw_text(text, SMALL_FONT_SIZE)
        paste(canvas, label, top, left + 19)
        left += 19 + label.shape[1] + 16


def tile(pictures: Seq[np.ndarray]) -> np.ndarray:
    """Pictures of one size as one, in a grid that is about as high as it is wide."""
    height, width = pictures[0].shape[:2]
    columns = max(1, round((len(pictures) * height / width) ** 0.5))
    rows = -(-len(pictures) // columns)
    grid = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        grid[row * height : (row + 1) * height, column * width : (column + 1) * width] = picture
    return grid


# -- text as arrays ----------------------------------------------------------------------------------------------


@cache
def _font(size: int):
    # matplotlib brings this font, which has the marks that tokenizers put before words
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


@lru_cache(maxsize=8192)
def draw_text(text: str, size: int, vertical: bool = False) -> np.ndarray:
    """Ink of a line of text, `[height, width]` float32 from 0 to 1.

    Args:
        text: one line; control characters are shown as boxes.
        size: of the font, in pixels.
        vertical: turned by 90 degrees, to be read from below.
    """
    from PIL import Image, ImageDraw

    shown = "".join(letter if letter.isprintable() else "□" for letter in text) or " "
    font = _font(size)
    ascent, descent = font.getmetrics()
    ink = Image.new("L", (max(1, int(np.ceil(font.getlength(shown)))), ascent + descent))
    ImageDraw.Draw(ink).text((0, 0), shown, fill=255, font=font)
    array = np.asarray(ink, np.float32) / 255
    return np.rot90(array) if vertical else array


def paste(canvas: NDArray[np.uint8], text: np.ndarray, top: int, left: int, colour: Colour = INK) -> None:
    """Put the ink of :func:`draw_text` on a `[height, width, 3]` canvas; what does not fit is cut off."""
    area = canvas[max(top, 0) :, max(left, 0) :]
    ink = text[max(-top, 0) :, max(-left, 0) :][: area.shape[0], : area.shape[1], None]
    area = area[: ink.shape[0], : ink.shape[1]]
    area[:] = area * (1 - ink) + np.array(colour, np.float32) * ink


def shorten(text: str, size: int, width: int) -> str:
    """The text, or as much of its beginning as fits into `width` pixels, with an ellipsis."""
    if draw_text(text, size).shape[1] <= width:
        return text
    while text and draw_text(text + "…", size).shape[1] > width:
        text = text[:-1]
    return text + "…"


# -- window ------------------------------------------------------------------------------------------------------


class Window:
    """Shows one picture after another. Where no window can be opened it warns once and does nothing."""

    def __init__(self, title: str, frames_per_second: float) -> None:
        """The window is opened with the first picture."""
        self._title, self._pause = title, 1 / frames_per_second
        self._figure: Any = None
        self._image: Any = None
        self._closed = False

    def show(self, picture: np.ndarray) -> None:
        """Show `[height, width, 3]` uint8 for the length of a frame; a window that was closed stays closed."""
        if self._closed or (self._figure is None and not self._open(picture)):
            return
        if not self._is_open():
            self._closed = True
            return
        self._image.set_data(picture)
        self._figure.canvas.draw_idle()
        self._figure.canvas.start_event_loop(self._pause)

    def close(self) -> None:
        """Close the window."""
        if self._figure is not None and self._is_open():
            from matplotlib import pyplot

            pyplot.close(self._figure)
        self._figure, self._closed = None, True

    def _open(self, picture: np.ndarray) -> bool:
        from matplotlib import pyplot

        height, width = picture.shape[:2]
        try:
            self._figure = pyplot.figure(self._title, figsize=(width / 100, height / 100), dpi=100)
            interactive = self._figure.canvas.required_interactive_framework is not None
        except Exception:  # every toolkit has an error of its own for a missing display
            interactive = False
        if not interactive:
            self.close()
            warnings.warn(NO_WINDOW, stacklevel=4)
            return False
        axes = self._figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        self._image = axes.imshow(picture)
        self._figure.show()
        return True

    def _is_open(self) -> bool:
        from matplotlib import pyplot

        return pyplot.fignum_exists(self._figure.number)
