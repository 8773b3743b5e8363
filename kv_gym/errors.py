"""The error for mistakes that the user can mend."""


class UserError(ValueError):
    """Something the user gave cannot be used: one sentence with what was seen, what was expected, what to do.

    The command line prints it on stderr and exits with code 2.
    """
