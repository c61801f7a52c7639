"""Errors that the user can fix: printed as one line, exit code 2, no traceback."""


class UserError(Exception):
    """What is wrong, where, and what to do, in one line."""
