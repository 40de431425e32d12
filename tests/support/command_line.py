"""Run commands of the command line, in this process or in a new one, and capture what they print."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastpref.cli import main

PROGRAM = [sys.executable, "-m", "fastpref"]
WIDE = {"COLUMNS": "300"}  # so that no message is wrapped


@dataclass(frozen=True)
class CommandResult:
    """The output of a command, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_command(*arguments: str | Path, given: str = "") -> CommandResult:
    """Run a command with this standard input. Any exception except SystemExit fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["fastpref", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(given))
        with pytest.raises(SystemExit) as ended:
            main()
    code = ended.value.code
    return CommandResult(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def succeed(*arguments: str | Path, given: str = "") -> CommandResult:
    """Run a command that must end with status 0."""
    result = run_command(*arguments, given=given)
    assert result.status == 0, result.err
    return result


def run_process(*arguments: str | Path, folder: Path | None = None) -> CommandResult:
    """Run a command in a new process, in this folder or in the current one."""
    command = [*PROGRAM, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | WIDE)
    return CommandResult(result.returncode, result.stdout, result.stderr)
