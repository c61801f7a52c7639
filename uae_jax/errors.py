"""Errors that the user can fix: printed as one line, exit code 2, no traceback."""


class UserError(Exception):
    """What is wrong, where, and what to do, in one line."""


def shown(text: object) -> str:
    """`str(text)` as one line in which nothing steers a terminal: what cannot be printed stands escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
