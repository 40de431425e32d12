"""README.md and CONTRIBUTING.md: links have targets, every command is shown, and the preview is real."""

import re
import shlex

import pytest

from fastpref.cli import app
from fastpref.config.losses import DPO
from fastpref.health import RULES, Known
from tests.support.paths import DOCS, ROOT
from tests.support.readme import commands

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_of_the_help_is_in_the_readme():
    """The README shows each command at least once."""
    shown = {shlex.split(line)[1] for line in commands(README) if line.startswith("fastpref ")}
    assert shown == {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}


def test_the_preview_is_that_of_the_data_page():
    """The README's extract is part of docs/data.md, which another test compares with the command's output."""
    extract = re.search(r"--rows 1\n```\n+```text\n(.*?)```", README, re.DOTALL)
    assert extract
    assert extract[1] in (DOCS / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "docs/runs.md", "docs/comparison.md"])
def test_the_number_of_rules_is_right(name: str):
    """A page names how many rules there are, and a run of DPO asks those that are about it."""
    asked = sum(rule.concerns(Known(DPO())) for rule in RULES.values())
    told = re.findall(r"(health: )?(\d+) rules", (ROOT / name).read_text(encoding="utf-8"))
    assert told
    assert all(int(count) == (asked if of_a_run else len(RULES)) for of_a_run, count in told)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_relative_links_lead_to_files(name: str):
    """Links lead to existing files; for docs/, `mkdocs build --strict` tests this."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8"))
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
