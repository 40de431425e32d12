"""The pages of docs/: the site builds without a warning, and the config reference is generated from the schema."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpref.config import Config
from fastpref.config.reference import reference
from tests.support.browser import BROKEN, CONTRASTS, SCHEMES, WIDTHS, browser, show
from tests.support.paths import DOCS, ROOT

__all__ = ["browser"]  # a fixture


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site; a warning fails the build. Every page is in the navigation, and every link has a target."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


def navigation() -> list[str]:
    """Return the files of the pages in the order of the navigation, whose parts are subjects."""
    subjects = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    return [file for subject in subjects for pages in subject.values() for page in pages for file in page.values()]


def test_every_page_is_in_the_navigation(site: Path):
    pages = navigation()
    assert sorted(pages) == sorted(p.name for p in (DOCS).glob("*.md"))


# Tables of up to four columns that are wider than their box, and tables that the screen cuts off.
CUT_OFF = """
return [...document.querySelectorAll(".rst-content table")].filter(t => {
  const columns = Math.max(...[...t.rows].map(r => r.cells.length));
  return t.getBoundingClientRect().right > innerWidth || (columns < 5 && t.scrollWidth > t.clientWidth);
}).map(t => t.innerText.slice(0, 80));
"""


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS.values())
def test_tables_are_shown_whole(browser: Any, site: Path, width: int):
    """No page scrolls sideways, a table of up to four columns fits its page, and no word of a table is broken."""
    for page in sorted(site.glob("**/index.html")):
        show(browser, page.as_uri(), width=width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, page
        assert browser.execute_script(CUT_OFF) == [], page
        assert browser.execute_script(BROKEN) == [], page


@pytest.mark.browser
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["index.html", "data/index.html", "config/index.html"])
def test_pages_can_be_read(browser: Any, site: Path, name: str, scheme: str):
    """The text of a page, its code in colours and its tables have a contrast of at least 4.5 in both schemes."""
    show(browser, (site / name).as_uri(), scheme)
    texts = browser.execute_script(CONTRASTS.replace('"body *"', '".document *"'))
    assert len(texts) > 30
    assert [text for contrast, text, _ in texts if contrast < 4.5] == []


def test_code_is_coloured_without_another_site(site: Path):
    """Pygments colours labelled code when the site is built; no page loads code or styles from elsewhere."""
    page = (site / "data" / "index.html").read_text(encoding="utf-8")
    assert re.search(r'<div class="codehilite"><pre>.*?<span class="s2">', page, re.DOTALL)
    assert not re.findall(r'(?:src|href)="https?://[^"]*\.(?:js|css)"', page)


def test_every_page_is_on_the_start_page():
    """The start page's table lists every other page, in the order of the navigation."""
    listed = re.findall(r"^\| \[[^]]*\]\((\w+\.md)\)", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    pages = navigation()
    assert listed == [page for page in pages if page != "index.md"]


def test_the_config_reference_is_the_schema():
    """docs/config.md is the output of its command.

    The page also freezes the options: a change of a key, type, bound or default, of a table or of a loss, must
    change the page in the same commit.
    """
    page = (DOCS / "config.md").read_text(encoding="utf-8")
    assert page == reference(), "python -m fastpref.config.reference > docs/config.md"


def test_every_key_is_in_the_reference():
    """Every key is under its table's heading, with a default that is valid TOML."""
    page = reference()
    for name, field in Config.model_fields.items():
        assert f"[{name}]" in page, name
        inner = getattr(field.annotation, "model_fields", {})
        assert all(f"| `{key}` |" in page for key in inner)
    defaults = re.findall(r"^\| `\w+` \| .*? \| `(.+?)` \| ", page, re.MULTILINE)
    assert len(defaults) > 40
    for default in defaults:
        tomllib.loads(f"x = {default}")
