"""The one exception for a user's mistake, and how a message quotes any other exception."""

_LIMIT = 400  # characters


class UserError(Exception):
    """What happened, where, and what to do about it; the command line prints it alone and exits with status 2."""


def one_line(error: BaseException, *, named: bool = False) -> str:
    """Return an exception's message on one line of at most 400 characters, or its type's name if it has no message.

    With `named` the type's name stands before the message, for exceptions whose messages are no sentences.
    """
    message = " ".join(str(error).split())[:_LIMIT]
    name = type(error).__name__
    return f"{name}: {message}" if message and named else message or name
