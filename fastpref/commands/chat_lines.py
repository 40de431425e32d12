"""What a person types in `fastpref chat`: lines with editing and a history, and commands."""

import atexit
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

COMMANDS = {
    "/clear": "forgets the conversation",
    "/retry": "asks the last question again",
    "/system": "TEXT sets the system message, or removes it, and forgets the conversation",
    "/help": "lists the commands",
    "/quit": "ends, as Ctrl-D does",
}
GREETING = "Ctrl-C stops an answer, Ctrl-D ends, /help lists the commands."
_REMEMBERED = 1000  # lines of the history


@dataclass(frozen=True)
class Line:
    """A question, or a command with its argument."""

    text: str
    command: str | None = None


def lines(given: TextIO, out: TextIO, history: Path) -> Iterator[Line]:
    """Yield the lines of a terminal, on which a prompt is printed, or of a pipe; /help is answered here.

    A word with a slash that is no command is refused on a terminal, and is a question in a pipe. A line that begins
    with a space is always a question.
    """
    person = given.isatty()
    if person and given is sys.stdin:
        _edit(history)
    while (line := _read(given, out, person)) is not None:
        if not line.strip():
            continue
        word, _, rest = line.strip().partition(" ")
        if not re.fullmatch(r"/[a-z]+", word) or line[0].isspace():
            yield Line(line.strip())
        elif word == "/help":
            width = max(map(len, COMMANDS))
            print("\n".join(f"{name:{width}}  {words}" for name, words in COMMANDS.items()), file=out)
        elif word == "/quit":
            return
        elif word in COMMANDS:
            yield Line(rest.strip(), word)
        elif person:
            print(f"{word} is no command; /help lists them. Begin with a space to say it to the model.", file=out)
        else:
            yield Line(line.strip())


def _read(given: TextIO, out: TextIO, person: bool) -> str | None:
    """Return the next line, or None at the end. Ctrl-C empties a line that is being typed."""
    while True:
        try:
            if person and given is sys.stdin:
                return input("> ")
            return given.readline() or None
        except KeyboardInterrupt:
            if not person:
                return None
            print("\n(Ctrl-D or /quit ends)", file=out)
        except EOFError:
            print(file=out)
            return None


def _edit(history: Path) -> None:
    """Give `input` the arrow keys and the lines of earlier conversations, where Python has readline."""
    try:
        import readline
    except ImportError:  # Windows, whose terminal edits lines by itself
        return
    with suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(_REMEMBERED)

    def keep() -> None:
        with suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)
            history.chmod(0o600)

    atexit.register(keep)
