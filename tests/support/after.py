"""Running a command on what a run has left."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastpref.cli import main
from tests.support.runs import EXAMPLES

QUICKSTART_DATA = str(EXAMPLES / "quickstart" / "heldout.jsonl")


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path, given: str = ""
) -> Ran:
    """A command with its standard input."""
    monkeypatch.setattr(sys, "argv", ["fastpref", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return Ran(ended.value.code if isinstance(ended.value.code, int) else 0, said.out, said.err)
