"""What a command says while it computes does not mix with what it prints."""

import io
import re

import pytest
from rich.console import Console

from fastpref.commands.screen import Screen


def on(stream: io.StringIO) -> Console:
    return Console(file=stream, force_terminal=True, highlight=False, width=80)


def test_a_result_begins_on_a_line_of_its_own():
    """On a terminal, where stdout and stderr are the same, the line of what is computed is erased before a result is
    printed, and comes again with the next thing that is computed."""
    terminal = io.StringIO()
    with Screen() as screen:
        screen._results = screen._waiting = on(terminal)
        for number in range(3):
            screen.wait(f"counting {number}")
            screen.wait(f"counting [{number}]")
            screen.say(f"result [{number}]")
        screen.wait("counting the last")
    seen = terminal.getvalue()
    for number in range(3):
        before = seen[: seen.index(f"result [{number}]")]
        assert f"counting [{number}]" in before
        after = before[before.rindex("counting") :]
        assert re.search(r"\x1b\[2K", after)
        assert re.sub(r"\x1b\[[\d?]*\w|[\r\n]", "", after).strip() == f"counting [{number}]"
    last = seen[seen.rindex("counting the last") :]
    assert re.search(r"\x1b\[2K", last)


def test_a_quiet_screen_prints_no_results(capsys: pytest.CaptureFixture[str]):
    with Screen(quiet=True) as screen:
        screen.wait("counting")
        screen.say("result")
    assert capsys.readouterr().out == ""
