"""The one exception for a user's mistake."""


class UserError(Exception):
    """What happened, where, and what to do about it; the command line prints it alone and exits with status 2."""
