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
from tests.support.browser import browser, show
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


def test_every_page_is_in_the_navigation(site: Path):
    pages = [next(iter(page.values())) for page in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]]
    assert sorted(pages) == sorted(p.name for p in (DOCS).glob("*.md"))


# Tables that the screen cuts off, and tables of up to four columns that are wider than their box.
CUT_OFF = """
return [...document.querySelectorAll(".rst-content table")].filter(t => {
  const columns = Math.max(...[...t.rows].map(r => r.cells.length));
  return t.getBoundingClientRect().right > innerWidth || (columns < 5 && t.scrollWidth > t.clientWidth);
}).map(t => t.innerText.slice(0, 80));
"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
def test_tables_are_shown_whole(browser: Any, site: Path, width: int):
    """No page scrolls sideways, and a table of up to four columns fits its page, also on a phone."""
    for page in sorted(site.glob("*/index.html")):
        show(browser, page.as_uri(), width=width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, page
        assert browser.execute_script(CUT_OFF) == [], page


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
