"""The pages of docs/: a site that builds without a warning, and a config reference that is the schema's."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from fastpref.config import Config
from fastpref.config.reference import reference
from tests.support.paths import DOCS, ROOT


def test_the_site_builds_without_a_warning(tmp_path: Path):
    """Every page is in the navigation, and every link leads somewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = [next(iter(page.values())) for page in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]]
    assert sorted(pages) == sorted(p.name for p in (DOCS).glob("*.md"))


def test_the_config_reference_is_the_schema():
    """docs/config.md is what its command writes."""
    page = (DOCS / "config.md").read_text(encoding="utf-8")
    assert page == reference(), "python -m fastpref.config.reference > docs/config.md"


def test_every_key_is_in_the_reference():
    """Under a heading of its table, with a default that the schema takes."""
    page = reference()
    for name, field in Config.model_fields.items():
        assert f"[{name}]" in page, name
        inner = getattr(field.annotation, "model_fields", {})
        assert all(f"| `{key}` |" in page for key in inner)
    defaults = re.findall(r"^\| `\w+` \| .*? \| `(.+?)` \| ", page, re.MULTILINE)
    assert len(defaults) > 40
    for default in defaults:
        tomllib.loads(f"x = {default}")
