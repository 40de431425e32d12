"""What a command that computes for a while prints: results, and meanwhile what it waits for."""

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.status import Status


class Screen:
    """Prints results to stdout, and on a terminal a line to stderr that says what is computed.

    The line is taken away before a result is printed, because both are on the same terminal. A quiet screen prints no
    results.
    """

    def __init__(self, *, quiet: bool = False):
        self._results = Console(highlight=False, quiet=quiet)
        self._waiting = Console(stderr=True)
        self._status: Status | None = None

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def wait(self, what: str) -> None:
        """Say what is computed from now on."""
        if self._status is None:
            self._status = self._waiting.status(escape(what))
            self._status.start()
        else:
            self._status.update(escape(what))

    def say(self, result: RenderableType) -> None:
        """Print a result. Text is not read as markup."""
        self._stop()
        self._results.print(result, markup=False, soft_wrap=isinstance(result, str))

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
