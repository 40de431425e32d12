"""Reports of one run and of two in headless Chromium, with the widths of a phone and of desks, in light and dark."""

import json
from itertools import pairwise
from typing import Any

import pytest

from fastpref.report import read_run, write_comparison, write_report
from fastpref.run.history import FACTS
from tests.support.browser import BROKEN, CONTRASTS, CUT, SCHEMES, WIDTHS, browser, show
from tests.support.crafted import EVIL, facts, write_run

__all__ = ["browser"]  # a fixture
pytestmark = pytest.mark.browser

# Lines and bars, compared with the frame of their chart.
MARKS = r"""
return [...document.querySelectorAll("figure .line:not(.faint), figure .bar, figure .dot, figure .tick")].map(e => {
  const box = e.getBoundingClientRect(), svg = e.closest("svg").getBoundingClientRect();
  return [box.width > 0 || box.height > 0, box.left >= svg.left - 1 && box.right <= svg.right + 1,
          box.top >= svg.top - 1 && box.bottom <= svg.bottom + 1];
});
"""


@pytest.fixture(scope="module", params=["run", "comparison"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def page(kind: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of a page with a verdict of each kind, and with markup in all data."""
    about = facts(began="2026-11-26T09:05:00+01:00")
    about["rows"] = {"train": {"rows": 1000, "kept": 1000, "completions_cut": 300}, "heldout": {"rows": 80, "kept": 80}}
    about["tokens"] = {"train": {"prompt": [21, 220, 2300, 23000, 1_234_567], "chosen": [1, 2, 3, 4, 5]}}
    about["environment"] |= {"system": "Linux-6.18.44-x86_64-with-glibc2.36"}
    about["samples"] += [{"asked": "word " * 80, "before": "unbroken" * 200, "after": None}]
    wild = {"loss": lambda t: 0.69 + 30 * (t > 0.05), "kl": lambda t: t, "rewards/margins": lambda t: 1e4 * t - 2e4}
    folder = tmp_path_factory.mktemp("runs")
    run = write_run(folder / EVIL.replace("/", "|"), both=wild)
    (run / FACTS).write_text(json.dumps(about), encoding="utf-8")
    place = write_report(run)
    if kind == "comparison":
        other = write_run(folder / "another-run-with-a-long_name_for_a_column", evaluations=(0, 100))
        place = write_comparison([read_run(run), read_run(other)], folder / "page.html")
    return place.resolve().as_uri()


def test_the_console_is_silent(browser: Any, page: str):
    """The console has no error, no warning and no refusal, so the page used no network."""
    browser.get_log("browser")
    show(browser, page)
    assert browser.get_log("browser") == []
    resources = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in resources if not name.startswith("data:")] == []


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_every_plot_is_seen(browser: Any, page: str, kind: str, width: int):
    """Each chart has a size, lines inside its frame, a title, and legible text."""
    show(browser, page, width=width)
    charts = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(s => [s.getBoundingClientRect().width,"
        " s.getBoundingClientRect().height, s.querySelectorAll('.line, .bar, .dot').length,"
        " s.getAttribute('aria-label'),"
        " s.closest('figure').querySelector('figcaption').textContent])"
    )
    titles = [title for *_, title in charts]
    both = ["Rewards", "Log-probabilities"]
    own = [*both, "Margins of the held-out pairs"] if kind == "run" else [f"{name}, chosen" for name in both]
    assert {"Loss", "Accuracy", "Reward margin", "Gradient norm", "Learning rate", *own} <= set(titles)
    assert all(w > 250 and h > 100 and lines and label for w, h, lines, label, _ in charts)
    assert all(all(mark) for mark in browser.execute_script(MARKS))
    scale = "return [...document.querySelectorAll('.tick')].map(t => t.getBoundingClientRect().height)"
    assert min(browser.execute_script(scale)) >= 10


@pytest.mark.parametrize("width", [320, *WIDTHS.values()])
def test_nothing_scrolls_sideways(browser: Any, page: str, width: int):
    """The page is never wider than the screen, whatever the answers contain; wide tables scroll on their own."""
    show(browser, page, width=width)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return innerWidth") == width


@pytest.mark.parametrize("width", [320, *WIDTHS.values()])
def test_no_cell_is_cut(browser: Any, page: str, kind: str, width: int):
    """No word of a table is broken, and all tables of a run fit the screen; columns of many runs may scroll."""
    show(browser, page, width=width)
    assert browser.execute_script(BROKEN) == []
    assert browser.execute_script(CUT, kind == "comparison" or width < 390) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_can_be_read(browser: Any, page: str, scheme: str):
    """Every text has a contrast of at least 4.5 and a size of at least 12 pixels, in both colour schemes."""
    show(browser, page, scheme, 390)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    texts = browser.execute_script(CONTRASTS)
    assert len(texts) > 100
    assert [text for contrast, text, size in texts if contrast < 4.5 or size < 12] == []


def test_markup_in_data_stays_text(browser: Any, page: str, kind: str):
    """A script in an answer, a question, a name or a device neither runs nor becomes an element."""
    show(browser, page)
    assert browser.execute_script("return document.scripts.length + document.images.length") == 0
    texts = "return [...document.querySelectorAll('#answers ~ article .text')].map(e => e.textContent)"
    answers = browser.execute_script(texts)
    assert answers[:3] == [EVIL] * 3
    name = browser.execute_script("return document.querySelector('h1, .key a').textContent")
    assert name == (EVIL.replace("/", "|") if kind == "run" else "2 runs compared")
    first = "return document.querySelector('header .key li').textContent"
    assert kind == "run" or browser.execute_script(first) == EVIL.replace("/", "|")


def test_a_screen_reader_finds_its_way(browser: Any, page: str):
    """For a screen reader, there is one h1, no level is skipped, and every section, row and chart has a name."""
    show(browser, page)
    headings = "return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))"
    levels = browser.execute_script(headings)
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    unnamed = (
        "return [...document.querySelectorAll('section')].filter(s => !document.getElementById("
        "s.getAttribute('aria-labelledby'))).length"
        " + [...document.querySelectorAll('svg')].filter(s => s.getAttribute('role') !== 'img' || "
        "!s.getAttribute('aria-label') || !s.querySelector('title')).length"
        " + [...document.querySelectorAll('th')].filter(t => !t.scope).length"
        " + [...document.querySelectorAll('tbody tr')].filter(r => !r.querySelector('th[scope=row]')).length"
    )
    assert browser.execute_script(unnamed) == 0
    assert browser.execute_script("return document.documentElement.lang") == "en"
