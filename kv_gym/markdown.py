"""Tables in Markdown, for pages and terminals alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def pipe_table(head: Sequence[str], body: Iterable[Sequence[str]], left: int | None = 1) -> str:
    """A table; the first `left` columns (None: all) are text and stand left, the others numbers and stand right.

    A bar in a cell is escaped where the cell has not done so; other markup in cells is theirs.
    """
    text = len(head) if left is None else left
    rule = ["---"] * text + ["---:"] * (len(head) - text)
    lines = [map(_whole, head), rule, *(map(_whole, line) for line in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _whole(cell: str) -> str:
    """A cell that no bar of its own cuts in two."""
    return cell.replace("\\|", "|").replace("|", "\\|")
