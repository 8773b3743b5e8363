"""Tables in Markdown, for pages and terminals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def pipe_table(head: Sequence[str], body: Iterable[Sequence[str]], left: int | None = 1) -> str:
    """A table in Markdown.

    Args:
        head: titles of the columns.
        body: rows of cells; bars in cells are escaped, other markup is kept.
        left: how many columns from the left hold text, aligned left (None: all); the others hold numbers.
    """
    text = len(head) if left is None else left
    rule = ["---"] * text + ["---:"] * (len(head) - text)
    lines = [map(_escaped, head), rule, *(map(_escaped, line) for line in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(cell: str) -> str:
    """A cell on one line, with its bars escaped once."""
    return one_line(cell).replace("\\|", "|").replace("|", "\\|")


def one_line(text: str) -> str:
    """The text on one line: white space as single spaces, other characters that do not print as boxes."""
    return "".join(letter if letter.isprintable() else "□" for letter in " ".join(text.split()))
