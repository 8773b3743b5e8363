"""The error for mistakes that the user can mend."""

_LONGEST = 1500  # characters of a sentence


class UserError(ValueError):
    """Something the user gave cannot be used: one sentence with what was seen, what was expected, what to do.

    The command line prints it on stderr and exits with code 2. A sentence repeats names and texts of files, which may
    be anybody's: what does not print becomes a space or a box, and a very long one is cut in its middle.
    """

    def __init__(self, sentence: object = ""):
        text = printable(str(sentence))
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 4 :]}")


def printable(text: str, kept: str = "") -> str:
    """The text without what a terminal or a page would obey: white space as spaces, other characters as boxes.

    Args:
        text: anybody's.
        kept: characters that stay, such as line breaks.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in kept else " " if letter.isspace() else "□" for letter in text
    )


def short_reason(reason: object) -> str:
    """An error or its text as one line of at most 200 printable characters, to stand in a sentence.

    Libraries repeat what they read, and that may be anybody's.
    """
    text = "".join(character if character.isprintable() else " " for character in str(reason)[:1000])
    return " ".join(text.split())[:200] or type(reason).__name__
