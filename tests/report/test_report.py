"""The report: one small self-contained page for any run, in which all data are escaped."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastpref.config.losses import IPO, title_of
from fastpref.errors import UserError
from fastpref.health import diagnose
from fastpref.health.bands import Band
from fastpref.report import read_run, render, write_report
from fastpref.report.figures import CHARTS, figures
from fastpref.report.heldout import HeldOut, held_out
from fastpref.report.source import trl_row
from fastpref.report.summary import summary
from fastpref.report.svg import POINTS, Axis, Line, line_chart, number
from fastpref.run.history import FACTS, METRICS, REPORT, Series
from fastpref.run.lock import RunLock
from tests.support.crafted import METHODS, facts, rows, write_run
from tests.support.paths import DOCS

ESCAPED = "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;&lt;img src=x onerror=alert(2)&gt;"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_page(tmp_path: Path, method: str):
    """The page has a chart of everything that was logged, each with a title and a description for screen readers.

    The speed is in the loss's own unit: pairs, KTO's completions, or lists.
    """
    run = write_run(tmp_path / method, method)
    with (run / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 101, "pairs_per_second": 3.0}) + "\n")
    place = write_report(run)
    assert place == run / REPORT
    page = place.read_text(encoding="utf-8")
    charts = [figure.title for figure in figures(read_run(run))]
    supervised = METHODS[method].supervised
    of_pairs, of_text = {"Accuracy", "Reward margin", "Rewards", "Log-probabilities"}, {"Supervised loss", "Perplexity"}
    assert {"Loss", "Gradient norm"} | (of_text if supervised else of_pairs) <= set(charts)
    assert not supervised or not of_pairs & set(charts)
    assert ("KTO's KL" in charts, "Log odds" in charts) == (method == "kto", method == "orpo")
    # one more for the histogram of held-out margins, if there are any
    assert len(re.findall(r'<svg role="img" [^>]*aria-label="[^"]{20,}"><title>', page)) == len(charts) + (
        not supervised
    )
    assert "rules found nothing wrong" in page
    units = [unit for unit in ("pair", "list", "completion") if f"{unit}s a second" in page]
    assert units == [METHODS[method].unit]


def test_a_page_needs_nothing_else(tmp_path: Path):
    """The page uses no script, link, font or image from elsewhere, and its policy forbids them."""
    page = write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.findall(r"<(?:script|iframe|object|embed|img)\b", page)
    assert not re.findall(r"""(?:src|href)=["'](?!data:,")""", page)
    assert not re.findall(r"@import|url\(|https?://", page)


def test_what_comes_from_data_is_escaped(tmp_path: Path):
    """Questions, answers, and the names of the run and of its device are escaped."""
    page = write_report(write_run(tmp_path / "a<b>&c")).read_text(encoding="utf-8")
    assert page.count(ESCAPED) == 4
    assert "<script" not in page
    assert "<h1>a&lt;b&gt;&amp;c</h1>" in page


def test_verdicts_are_at_the_top(tmp_path: Path):
    """The verdicts come before everything else."""
    wild = {"loss": lambda t: 0.69 + 30 * (t > 0.05)}
    page = write_report(write_run(tmp_path / "run", both=wild)).read_text(encoding="utf-8")
    assert "Alarm: learning rate high" in page
    assert page.index("Alarm: learning rate high") < page.index('id="heldout"') < page.index('id="curves"')


def test_a_run_of_100_000_steps_stays_small(tmp_path: Path):
    """The page of a long run is small and has every chart, in which a spike of a single step is visible."""
    run = write_run(tmp_path / "run", about=facts(100_000))
    some = [{k: v for k, v in row.items() if k != "step"} for row in rows(evaluations=(50,))]
    logged = ({"step": 1000 * block + at} | row for block in range(100) for at, row in enumerate(some * 10, 1))
    with (run / METRICS).open("w", encoding="utf-8") as file:
        for row in logged:
            if row["step"] == 70_000:
                row["grad_norm"] = 400.0
            file.write(json.dumps(row) + "\n")
    page = write_report(run).read_text(encoding="utf-8")
    assert len(page.encode()) < 300_000
    assert "100,000 steps" in page
    (norms,) = (figure for figure in figures(read_run(run)) if figure.title == "Gradient norm")
    (area,) = re.findall(r'polygon class="area[^>]*points="([^"]*)"', norms.svg)
    assert min(float(y) for y in re.findall(r",([\d.]+)", area)) < 25


@pytest.mark.parametrize("wrong", ["words", 7, [1], {"a": 1}], ids=str)
def test_facts_of_another_type_are_left_out(tmp_path: Path, wrong: Any):
    """A run.json that was changed by hand costs what it changes, and no report."""
    of_type = {
        name: wrong if type(value) is not type(wrong) else {"train": wrong} for name, value in facts(100).items()
    }
    assert 'id="curves"' in render(read_run(write_run(tmp_path / "run", about=of_type)))


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"samples": "x", "rows": None, "heldout": {"chosen": [1.0], "rejected": []}},
        {"heldout": {"step": "a"}},
        {"heldout": {"step": 9, "paired": True, "chosen": [math.nan], "rejected": [1.0]}},
    ],
    ids=["nothing", "of another kind", "damaged", "not finite"],
)
def test_a_run_without_facts_has_a_page(tmp_path: Path, about: dict[str, Any]):
    """If run.json lacks facts (a killed run, or an older version), the page omits them."""
    page = write_report(write_run(tmp_path / "run", about=about)).read_text(encoding="utf-8")
    assert 'id="curves"' in page
    assert "80 pairs" not in page
    assert "Margins of the held-out pairs" not in page
    (tmp_path / "run" / FACTS).write_text("{half")
    assert write_report(tmp_path / "run").exists()


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path):
    run = write_run(tmp_path / "run", about={})
    (run / METRICS).write_text("")
    page = write_report(run).read_text(encoding="utf-8")
    assert "No rule could be asked yet" in page
    assert 'verdict fine"' not in page
    assert summary(read_run(run)).health == "not asked yet"


@pytest.mark.parametrize(("ended", "held"), [("going on", True), ("going on", False), ("finished", False)])
def test_the_page_of_a_run_that_goes_on_reloads(tmp_path: Path, ended: str, held: bool):
    """A page reloads while a process trains the run. A killed run is called so, and its page is still."""
    run = write_run(tmp_path / "run", about=facts(ended=ended, began="2026-11-26T09:05:00+01:00"))
    lock = RunLock(run)
    if held:
        lock.acquire()
    page = write_report(run).read_text(encoding="utf-8")
    assert ('http-equiv="refresh"' in page, "reloads every" in page, "so far" in page) == (held,) * 3
    assert ("it was killed" in page) == (ended == "going on" and not held)
    assert "begun on 26 November 2026, 09:05 UTC+01:00; 1 h 2 min" in page
    assert RunLock(run).held == held
    lock.release()


def test_the_learning_rate_is_drawn_as_it_was_set(tmp_path: Path):
    """The highest point of its curve is the highest rate, and it has one line, without a running mean."""
    peak = {"learning_rate": lambda t: 1e-4 * (1 - abs(2 * t - 1))}
    run = read_run(write_run(tmp_path / "run", training=peak))
    (chart,) = (figure for figure in figures(run) if figure.title == "Learning rate")
    (points,) = re.findall(r'<polyline class="line training" points="([^"]*)"', chart.svg)
    highest = min(float(pair.split(",")[1]) for pair in points.split())
    rates = run.history["learning_rate"].values
    axis = re.findall(r'x="48" y="([\d.]+)">(\d+e-5|0)<', chart.svg)  # ticks with their places
    (zero,) = (float(y) - 4 for y, tick in axis if tick == "0")
    (one,) = (float(y) - 4 for y, tick in axis if tick == "5e-5")
    assert (zero - highest) / (zero - one) == pytest.approx(rates.max() / 5e-5, abs=0.01)


@pytest.mark.parametrize("evaluations", [(0,), (0, 100), (0, 50, 100)], ids=len)
def test_two_evaluations_are_no_curve(tmp_path: Path, evaluations: tuple[int, ...]):
    """Each evaluation is a point, and a line joins them if there are at least three."""
    run = read_run(write_run(tmp_path / "run", evaluations=evaluations))
    for figure in figures(run):
        held = "heldout" in str(figure.keys)
        assert len(re.findall(r'<circle class="dot heldout"', figure.svg)) == held * len(evaluations)
        assert len(re.findall(r'<polyline class="line heldout"', figure.svg)) == (held and len(evaluations) > 2)
        assert ("heldout points" in str(figure.keys)) == (held and len(evaluations) < 3)


def test_numbers_for_ticks_and_tables():
    assert [number(v) for v in (0, 0.25, -1.5, 12345.6, 9999.97, 0.00075, 2e-6, 1.5e9, 99.999, math.nan)] == [
        "0", "0.25", "-1.5", "12,346", "10,000", "7.5e-4", "2e-6", "1.5e9", "100", "nan",
    ]  # fmt: skip


@pytest.mark.parametrize(("low", "high"), [(0, 40), (-0.61, 0.02), (0.3, 0.69), (1e-6, 2e-6), (-3, 1e5)])
def test_ticks_are_few_and_round(low: float, high: float):
    ticks = Axis(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 6
    assert all(low <= tick <= high * (1 + 1e-9) for tick in ticks)


def test_steps_are_whole_numbers():
    """The axis of one step has no half of it."""
    for steps in (1, 2, 3):
        svg = line_chart("words", [Line(Series(np.arange(steps), np.zeros(steps)), "training")], steps=steps)
        assert re.findall(r'y="202">([^<]*)<', svg) == [str(step) for step in range(steps + 1)]


@pytest.mark.parametrize("values", [[0.0], [0.69315, 0.69312], [0.0, 1e-9], [-2e5, -2e5]])
def test_ticks_have_different_numbers(values: list[float]):
    """If values hardly differ, the axis is wide enough for ticks that do."""
    svg = line_chart("words", [Line(Series(np.arange(len(values)), np.array(values)), "training")], steps=2)
    ticks = re.findall(r'text-anchor="end" x="48" y="[^"]*">([^<]*)<', svg)
    assert len(ticks) == len(set(ticks)) >= 3


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [float(v) for v in range(1000)], [1e-9, 1e9]], ids=len)
def test_a_chart_of_any_series_stays_in_its_frame(values: list[float]):
    """For one value, equal values, many values and values of any size, all points are finite and inside the picture."""
    series = Series(np.arange(1, len(values) + 1), np.array(values))
    for positive in (False, True):
        svg = line_chart("words", [Line(series, "training")], Band(0.01, 10.0), steps=len(values), positive=positive)
        points = re.findall(r'points="([^"]*)"', svg)
        pairs = [tuple(map(float, p.split(","))) for group in points for p in group.split()]
        assert len(pairs) <= 4 * POINTS
        assert all(0 <= x <= 360 and 0 <= y <= 210 for x, y in pairs)
        assert "nan" not in svg


# --- held out -------------------------------------------------------------------------------------------------------


def scores_of(chosen: list[float], rejected: list[float], *, paired: bool = True) -> HeldOut:
    scores = held_out({"heldout": {"step": 1, "paired": paired, "chosen": chosen, "rejected": rejected}})
    assert scores is not None
    return scores


def test_intervals_hold_the_mean_and_narrow_with_more_pairs():
    few, many = (scores_of([0.5, -0.3, 0.9, 0.1] * n, [0.0] * 4 * n) for n in (5, 100))
    for scores in (few, many):
        assert scores.accuracy.mean == 0.75
        assert scores.margin.mean == pytest.approx(0.3)
        assert scores.accuracy.low < 0.75 < scores.accuracy.high
        assert scores.margin.low < 0.3 < scores.margin.high
    assert many.accuracy.high - many.accuracy.low < 0.4 * (few.accuracy.high - few.accuracy.low)
    # with 400 pairs, the normal interval is as good
    error = np.sqrt(0.75 * 0.25 / 400)
    assert many.accuracy.low == pytest.approx(0.75 - 1.96 * error, abs=0.01)


def test_an_accuracy_of_all_or_nothing_is_not_certain():
    """If all pairs are right, the interval has the width of the rule of three; resampling would give it no width."""
    all_right = scores_of([1.0] * 80, [0.0] * 80)
    assert all_right.accuracy.low == pytest.approx(0.955, abs=1e-3)
    assert all_right.accuracy.high == 1.0


def test_single_completions_are_compared_with_all_others():
    """For KTO, accuracy counts all pairs of a good and a bad completion, as its metric does; a tie counts half."""
    scores = scores_of([0.5, -1.0, 2.0], [0.5, -2.0], paired=False)
    assert scores.accuracy.mean == pytest.approx((0.5 + 1 + 0 + 1 + 1 + 1) / 6)
    assert scores.margin.mean == pytest.approx(0.5 + 0.75)
    assert scores.count == 5


# --- TRL ------------------------------------------------------------------------------------------------------------


def trl_log(method: str, **of: Any) -> list[dict[str, Any]]:
    """Return the same rows as TRL's trainers log them."""
    logged = []
    for row in rows(method, **of):
        entry = {name.replace("eval/", "eval_"): value for name, value in row.items()}
        ours = ("nll_loss", "eval_nll_loss", "perplexity", "eval_perplexity") if method == "sft" else ()
        for name in ("rewards/length_correlation", *ours):
            entry.pop(name, None)
        entry |= {"eval_runtime": 1.0, "eval_samples_per_second": 2.0} if "eval_loss" in entry else {"epoch": 0.1}
        if method in ("simpo", "cpo") and "loss" in entry:  # TRL's reward is β · the logged log-probability
            beta = METHODS[method].beta
            entry |= {f"logps/{side}": entry[f"rewards/{side}"] / beta for side in ("chosen", "rejected")}
        logged.append(entry)
    return [*logged, {"step": 100, "train_runtime": 12.0, "train_loss": 0.5}]


def write_trl(folder: Path, method: str, **of: Any) -> Path:
    folder.mkdir(parents=True)
    state = {"global_step": 100, "max_steps": 100, "train_batch_size": 2, "log_history": trl_log(method, **of)}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize("method", [name for name, loss in METHODS.items() if not loss.listwise])  # TRL has no lists
def test_a_run_of_trls_is_read(tmp_path: Path, method: str):
    """The logged metrics reveal the method, a healthy run has no verdict, and the page is saved next to the log."""
    run = read_run(write_trl(tmp_path / "out", method))
    assert run.known.loss.type == method
    assert diagnose(run.history, run.known) == []
    assert len(run.history["loss"]) == 100
    assert len(run.history["eval/loss"]) == 3
    assert title_of(method) in render(run)
    assert write_report(run) == tmp_path / "out" / REPORT


def test_a_run_of_trls_is_diagnosed(tmp_path: Path):
    """A run is read from its folder, its file, or the newest checkpoint in a folder that has only checkpoints."""
    wild = {"loss": lambda t: 0.69 + 30 * (t > 0.05)}
    write_trl(tmp_path / "out" / "checkpoint-9", "dpo")
    newest = write_trl(tmp_path / "out" / "checkpoint-100", "dpo", both=wild)
    for path in (tmp_path / "out", newest, newest / "trainer_state.json"):
        run = read_run(path)
        assert [v.rule for v in diagnose(run.history, run.known)] == ["learning_rate_high"]
        assert run.folder == (path.parent if path.is_file() else path)
    assert read_run(newest, "ipo", 0.5).known.loss == IPO(beta=0.5)


def test_trls_names():
    row = trl_row({"eval_rewards/chosen": 1.0, "eval_loss": 2.0, "step": 3, "eval_runtime": 9.0})
    assert row == {"eval/rewards/chosen": 1.0, "eval/loss": 2.0, "step": 3}
    assert trl_row({"train_loss": 2.0, "step": 3}) is None


TRL_STATE = {"trainer_state.json": '{"log_history": [{"step": 1, "loss": 1.0}]}'}


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("none", None, (), "there is no such folder"),
        ("empty", {}, (), "not a run's folder"),
        ("state", {"trainer_state.json": "[]"}, (), "not a trainer_state.json"),
        ("state", {"trainer_state.json": '{"log_history": []}'}, (), "no row with a loss"),
        ("own", {"config.toml": "[model]", METRICS: ""}, ("dpo",), "leave --loss and --beta out"),
        ("own", {"config.toml": "[model]", METRICS: ""}, (), "config.toml"),
        ("trl", TRL_STATE, ("ppo",), "--loss ppo: not one of"),
        ("trl", TRL_STATE, ("sft", 0.1), "sft has no β; leave it out"),
        ("trl", TRL_STATE, ("dpo", -1.0), "must be above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(
    tmp_path: Path, name: str, content: dict[str, str] | None, options: Any, message: str
):
    """There is one message, and nothing is written."""
    folder = tmp_path / name
    if content is not None:
        folder.mkdir()
        for file, text in content.items():
            (folder / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_run(folder, *options)
    assert sorted(p.name for p in folder.glob("*")) == sorted(content or {})


def test_every_chart_is_of_a_known_metric():
    """Charts use only metrics of docs/metrics.md."""
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    assert [name for names in CHARTS.values() for name in names if f"`{name}`" not in page] == []
