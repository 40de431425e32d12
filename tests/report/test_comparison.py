"""The page that compares runs: all their numbers, curves and answers, on the same scale, for runs of any kind."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastpref.errors import UserError
from fastpref.report import read_run, render_comparison, write_comparison
from fastpref.report.figures import STYLES, compared
from fastpref.run.history import FACTS, HELDOUT
from tests.support.crafted import EVIL, METHODS, facts, write_run

SAME = "The losses have different options"
KINDS = "The runs minimise different losses"
ROWS = "drawn over training rows instead of steps"
OTHERS = "do not hold out the same rows"


def made(folder: Path, name: str, method: str = "dpo", settings: str = "", **of: Any) -> Path:
    """Write a run with more settings in its config."""
    run = write_run(folder / name, method, **of)
    with (run / "config.toml").open("a", encoding="utf-8") as file:
        file.write(settings)
    return run


def page_of(*runs: Path) -> str:
    return write_comparison([read_run(run) for run in runs]).read_text(encoding="utf-8")


def test_runs_of_every_method_are_compared(tmp_path: Path):
    """There is a chart of everything that a run has logged, with a line for each run that has it, and nothing else."""
    paths = [made(tmp_path, method, method) for method in METHODS]
    runs = [read_run(path) for path in paths]
    for prefix in ("", HELDOUT):
        for figure in compared(runs, prefix):
            drawn = {name for _, name in figure.keys}
            styles = [style for style, _ in figure.keys]
            assert len(styles) == len(set(styles))
            lines = len(re.findall(r'class="line run-', figure.svg))
            assert lines == len(drawn), figure.title
    losses = next(figure for figure in compared(runs, "") if figure.title == "Loss")
    assert {name for _, name in losses.keys} == set(METHODS)
    page = page_of(*paths)
    assert len(METHODS) > STYLES
    assert all(f"{name}/report.html" not in page for name in METHODS)  # none is written yet
    assert KINDS in page


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        (("", ""), set()),
        (('[output]\ndir = "a"\n', '[output]\ndir = "b"\n'), set()),
        (("[train]\nbatch = 16\n", "[train]\nbatch = 32\n"), {ROWS}),
        (("[eval]\nfraction = 0.1\n", "[eval]\nfraction = 0.2\n"), {OTHERS}),
        (('[[eval.data]]\npath = "h"\n', '[[eval.data]]\npath = "h"\n[train]\nseed = 3\n'), set()),
        (("", '[reference]\nmode = "adapter"\n'), set()),
    ],
)
def test_what_is_not_comparable_is_said(tmp_path: Path, settings: tuple[str, str], notes: set[str]):
    """Other batches, and other held-out rows, are named; other folders and settings are not."""
    page = page_of(*(made(tmp_path, name, settings=more) for name, more in zip("ab", settings)))
    assert {note for note in (SAME, KINDS, ROWS, OTHERS) if note in page} == notes


def test_options_of_the_same_loss(tmp_path: Path):
    one, other = made(tmp_path, "a"), made(tmp_path, "b")
    text = (other / "config.toml").read_text().replace('type = "dpo"', 'type = "dpo"\nbeta = 0.3')
    (other / "config.toml").write_text(text)
    assert SAME in page_of(one, other)


def test_equal_places_are_equal_amounts_of_training(tmp_path: Path):
    """Of two runs over the same rows, one with half the steps and twice the batch, the curves end at the same place."""
    few = made(tmp_path, "few", settings="[train]\nbatch = 32\n", steps=50)
    many = made(tmp_path, "many", settings="[train]\nbatch = 16\n", steps=100)
    (loss, *_) = compared([read_run(few), read_run(many)], "")
    ends = [points.split()[-1].split(",")[0] for points in re.findall(r'points="([^"]*)"', loss.svg)]
    assert ends[0] == ends[1] == "350.0"


def test_the_configs_are_compared(tmp_path: Path):
    """Only keys that differ are listed, and without output.dir, in which runs always differ."""
    one = made(tmp_path, "a", settings='[train]\nseed = 3\nbatch = 8\n[output]\ndir = "a"\n')
    other = made(tmp_path, "b", settings='[train]\nseed = 4\nbatch = 8\n[output]\ndir = "b"\n')
    page = page_of(one, other)
    rows = page.partition('id="differences"')[2].partition("</table>")[0]
    names = [re.sub("<wbr>", "", name) for name in re.findall(r'<th scope="row">(.*?)</th>', rows)]
    assert names == ["train.seed"]


def test_answers_are_beside_each_other(tmp_path: Path):
    """A prompt is shown once, with the answer before training once if it is the same, and the answer of each run."""
    for name, after in (("a", "kind"), ("b", None)):
        samples = [{"asked": "Who?", "before": "rude", "after": after}]
        made(tmp_path, name, about=facts(samples=samples))
    page = page_of(tmp_path / "a", tmp_path / "b")
    shown = page.partition('id="answers"')[2]
    assert re.findall(r'<p class="muted">(.*?)</p><p class="text">(.*?)</p>', shown) == [
        ("before", "rude"), ("a", "kind"), ("b", "not yet"),
    ]  # fmt: skip


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    page = page_of(made(tmp_path, "monday/dpo"), made(tmp_path, "tuesday/dpo"))
    assert "monday/dpo" in page
    assert "tuesday/dpo" in page


def test_a_comparison_is_escaped_and_needs_nothing_else(tmp_path: Path):
    """Names and answers stay text; links lead to the reports that there are, and only to them."""
    paths = [made(tmp_path, name) for name in ("a<b>&c", "d e")]
    (paths[1] / "report.html").write_text("")
    page = page_of(*paths)
    assert "<script" not in page
    assert "a<b>" not in page
    assert EVIL not in page
    assert re.findall(r'href="([^"]*)"', page) == ["data:,", "d%20e/report.html"]
    assert not re.findall(r"@import|url\(|https?://", page)


@pytest.mark.parametrize("name", [None, "new.html", "page.html", "notes.html", ".", "none/page.html"])
def test_no_other_file_is_replaced(tmp_path: Path, name: str | None):
    """A comparison replaces a comparison, and nothing else."""
    runs = [read_run(made(tmp_path, name)) for name in "ab"]
    (tmp_path / "page.html").write_text(render_comparison(runs, tmp_path / "page.html"))
    (tmp_path / "notes.html").write_text("mine")
    if name in ("notes.html", ".", "none/page.html"):
        with pytest.raises(UserError):
            write_comparison(runs, tmp_path / name)
    else:
        place = write_comparison(runs, None if name is None else tmp_path / name)
        assert place.resolve() == tmp_path / (name or "comparison.html")
    assert (tmp_path / "notes.html").read_text() == "mine"


def test_a_comparison_with_a_run_that_goes_on_reloads(tmp_path: Path):
    """It reloads, as the run's own page does; and facts of any kind do no harm."""
    from fastpref.run.lock import RunLock

    paths = [made(tmp_path, "a"), made(tmp_path, "b", about=facts(ended="going on"))]
    (paths[0] / FACTS).write_text(json.dumps({"heldout": {"step": "a"}, "seconds": None, "samples": 3}))
    assert 'http-equiv="refresh"' not in page_of(*paths)
    lock = RunLock(paths[1])
    lock.acquire()
    assert 'http-equiv="refresh"' in page_of(*paths)
    lock.release()
