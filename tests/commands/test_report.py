"""`fastpref report` with one run or several, and `fastpref runs`."""

import json
import os
import re
import webbrowser
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import run_command, succeed
from tests.support.crafted import METHODS, facts, write_run

WILD = {"loss": lambda t: 0.69 + 30 * (t > 0.05)}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(text: str) -> dict[str, list[str]]:
    """Return the lines of a list of runs, without its head, by the name of the run."""
    cut = [line.split() for line in text.splitlines()[1:]]
    return {words[0]: words[1:] for words in cut if words}


def test_runs_of_every_method_are_listed():
    """A run of each method is a line with its loss, steps, state, held-out result and health, the newest first."""
    for at, method in enumerate(METHODS):
        run = write_run(Path("runs") / method, method)
        os.utime(run / "metrics.jsonl", (at, at))
    listed = lines(succeed("runs").out)
    assert list(listed) == [f"runs/{method}" for method in reversed(METHODS)]
    for method, loss in METHODS.items():
        name, steps, state, *result = listed[f"runs/{method}"]
        assert (name, steps, state) == (method, "100/100", "finished")
        assert result[0] == "loss" if loss.supervised else result[0].endswith("%")
        assert "nothing found" in " ".join(result)
    assert [run["loss"] for run in json.loads(succeed("runs", "--json").out)] == list(reversed(METHODS))


def test_every_state_of_a_run():
    """Stopped, failed and killed runs are told apart, a broken one is listed with its fault, and alarms are counted."""
    for state in ("stopped", "ended by a fault", "going on"):
        write_run(Path("runs/deep") / state.replace(" ", "-"), about=facts(ended=state))
    write_run(Path("runs/wild"), both=WILD)
    write_run(Path("runs/broken"))
    Path("runs/broken/config.toml").write_text("[model")
    Path("runs/trl").mkdir()
    Path("runs/trl/trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 0.69}]}))
    Path("runs/notes").mkdir()
    text = succeed("runs").out
    listed = lines(text)
    assert "stopped" in listed["runs/deep/stopped"]
    assert listed["runs/deep/ended-by-a-fault"][2] == "failed"
    assert "killed" in listed["runs/deep/going-on"]
    assert " ".join(listed["runs/wild"][4:6]) == "1 alarm"
    assert listed["runs/broken"][0] == "unreadable"
    assert "not valid TOML" in text
    assert listed["runs/trl"][:2] == ["sft", "1"]
    assert "runs/notes" not in listed
    listed_json = {run["folder"]: run for run in json.loads(succeed("runs", "runs/deep", "runs/wild", "--json").out)}
    assert len(listed_json) == 4
    assert listed_json["runs/wild"]["verdicts"] == [{"rule": "learning_rate_high", "severity": "alarm"}]


def test_folders_without_runs():
    """An empty folder has no runs, and a missing one is an error."""
    result = run_command("runs")
    assert (result.status, "no folder named runs here" in result.err) == (2, True)
    Path("runs").mkdir()
    assert succeed("runs").out == "no runs in runs\n"
    assert succeed("runs", "--json").out == "[]\n"
    result = run_command("runs", "nothere")
    assert (result.status, "nothere: there is no such folder" in result.err) == (2, True)


@pytest.mark.parametrize("width", [120, 80, 40])
def test_the_list_fits_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int):
    """On a terminal no line is wider than it, and no word of the result is broken."""
    write_run(Path("runs/smollm2-135m-dpo-first-try-of-many"), about=facts(ended="ended by a fault"))
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = re.sub(r"\x1b\[[\d;]*m", "", succeed("runs").out)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert all(words in " ".join(text.split()) for words in ("failed", "100/100", "75.0%", "nothing found"))


def test_runs_are_compared():
    """The page is written beside the runs, or where --output says, and the runs are listed in the given order."""
    for name in "abc":
        write_run(Path("runs") / name)
    result = succeed("report", "runs/c", "runs/a", "runs/b")
    assert list(lines(result.out))[:3] == ["runs/c", "runs/a", "runs/b"]
    assert "comparison: runs/comparison.html" in result.out
    assert "3 runs compared" in Path("runs/comparison.html").read_text(encoding="utf-8")
    assert not Path("runs/a/report.html").exists()
    assert "comparison: mine.html" in succeed("report", "runs/a", "runs/b", "--output", "mine.html").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/a", "runs/a"], "named twice"),
        (["runs/a", "runs/a/."], "named twice"),
        (["runs/a", "none"], "none: there is no such folder"),
        (["runs/a", "runs"], "not a run's folder"),
        (["runs/a", "runs/b", "--loss", "dpo"], "leave --loss and --beta out"),
        (["runs/a", "--output", "x.html"], "leave it out"),
        (["runs/a", "runs/b", "--output", "none/x.html"], "there is no folder none"),
    ],
)
def test_what_cannot_be_compared_is_said(arguments: list[str], message: str):
    """There is one message and status 2, and nothing is written."""
    for name in "ab":
        write_run(Path("runs") / name)
    result = run_command("report", *arguments)
    assert (result.status, message in result.err) == (2, True), result.err
    assert not list(Path().rglob("*.html"))


@pytest.mark.parametrize("opens", [True, False])
def test_a_browser_that_does_not_open_is_said(monkeypatch: pytest.MonkeyPatch, opens: bool):
    """Without a browser, the page's address is printed."""
    asked: list[Any] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: asked.append(address) or opens)
    text = succeed("report", write_run(Path("runs/a")), "--open").out
    (address,) = asked
    assert ("no browser" in text, address in text) == (not opens, not opens)
