"""What `fastpref --help` and `fastpref --version` print."""

import pytest

from fastpref import __version__
from fastpref.cli import app
from tests.support.command_line import run_command, succeed
from tests.support.paths import ROOT

WORKFLOW = [
    "init", "check", "preview", "estimate", "train", "report", "runs", "eval", "chat", "merge", "export", "push",
    "schema",
]  # fmt: skip


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the width of the terminal to 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_commands_in_the_order_of_use(flag: str):
    """The commands are in the order of use, and each summary is a sentence on one line."""
    text = succeed(flag).out
    lines = [line.strip("│ ") for line in text[text.index("Commands") :].splitlines()[1:] if line.startswith("│")]
    assert [line.split()[0] for line in lines] == WORKFLOW
    assert all(line.endswith(".") for line in lines)


def test_the_version_is_that_of_the_package():
    assert succeed("--version").out == f"fastpref {__version__}\n"
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", WORKFLOW)
def test_options_are_shown_as_they_are_typed(command: str):
    """Options show a name for their value, flags show none, and overrides are KEY=VALUE."""
    text = succeed(command, "--help").out
    options = text[text.index("─ Options") :].splitlines()
    assert [line for line in options if "<" in line] == []
    if command in ("check", "preview", "estimate", "train", "eval", "chat", "merge", "export"):
        assert "[KEY=VALUE]..." in text


def test_every_command_has_help_with_an_example():
    """Each command's help has an example of that command."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert command.epilog is not None
        assert f"fastpref {name} " in f"{command.epilog} "
        assert command.callback.__doc__
        assert "Example: fastpref" in succeed(name, "--help").out


@pytest.mark.parametrize(
    ("key", "words"),
    {
        "train.batch": "train.batch  (whole number ≥ 1; default 16)\n    Sets how many examples",
        "loss.beta": 'loss.beta  (with type = "orpo", number ≥ 0; default 0.1)',
        "[lora]": "lora.rank  (whole number ≥ 1; default 16)",
        "data.path": "data.path  (text; required)",
    }.items(),
)
def test_a_key_is_explained(key: str, words: str):
    assert words in succeed("schema", key).out


def test_no_key_is_made_up():
    result = run_command("schema", "train.sed")
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("fastpref: schema train.sed: a config has no such key; its tables are model, ")
