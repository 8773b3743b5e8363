"""The error for mistakes that the user can mend."""


class UserError(ValueError):
    """Something the user gave cannot be used: one sentence with what was seen, what was expected, what to do.

    The command line prints it on stderr and exits with code 2.
    """


def short_reason(reason: object) -> str:
    """An error or its text as one line of at most 200 printable characters, to stand in a sentence.

    Libraries repeat what they read, and that may be anybody's.
    """
    text = "".join(character if character.isprintable() else " " for character in str(reason))
    return " ".join(text[:1000].split())[:200] or type(reason).__name__
