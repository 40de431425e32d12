"""What a person types in a chat: questions and commands, on a terminal and through a pipe."""

import io
from pathlib import Path
from typing import Any

import pytest

from fastpref.commands.chat_lines import COMMANDS, Line, lines


class Typed(io.StringIO):
    """Lines of a terminal, one of which may be an interrupt."""

    def isatty(self) -> bool:
        return True

    def readline(self, *of: Any) -> str:
        line = super().readline(*of)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


CASES = [  # a line, what a person's becomes, and what a pipe's becomes; None is nothing
    ("hello", Line("hello"), Line("hello")),
    ("/clear", Line("", "/clear"), Line("", "/clear")),
    ("/retry", Line("", "/retry"), Line("", "/retry")),
    ("/system Be kind.", Line("Be kind.", "/system"), Line("Be kind.", "/system")),
    ("/helo", None, Line("/helo")),
    (" /clear", Line("/clear"), Line("/clear")),
    ("/etc/passwd is what?", Line("/etc/passwd is what?"), Line("/etc/passwd is what?")),
    ("/help", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("line", "person", "pipe"), CASES)
def test_commands_are_told_from_questions(line: str, person: Line | None, pipe: Line | None, tmp_path: Path):
    """A typing error in a command is not a question to the model; a pipe's lines are questions unless commands."""
    for source, wanted in ((Typed, person), (io.StringIO, pipe)):
        out = io.StringIO()
        seen = list(lines(source(f"{line}\nlast\n"), out, tmp_path / "history"))
        assert seen == [*([wanted] if wanted else []), Line("last")]
        assert ("is no command" in out.getvalue()) == (source is Typed and line == "/helo")
        assert all((name in out.getvalue()) == (line == "/help") for name in COMMANDS if name != "/help")


def test_the_conversation_ends_with_quit_and_not_with_an_interrupt(tmp_path: Path):
    out = io.StringIO()
    assert list(lines(Typed("one\n^C\ntwo\n/quit\nthree\n"), out, tmp_path / "history")) == [Line("one"), Line("two")]
    assert "(Ctrl-D or /quit ends)" in out.getvalue()
