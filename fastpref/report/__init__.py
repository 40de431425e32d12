"""report.html, a single page on a run, and the page that compares runs: without scripts and without external files."""

import os
from collections.abc import Sequence
from pathlib import Path

from fastpref.atomic import write_file
from fastpref.errors import UserError
from fastpref.report.comparison import common_folder, render_comparison
from fastpref.report.page import render
from fastpref.report.source import Run, read_run
from fastpref.run.history import REPORT

__all__ = ["Run", "read_run", "render", "render_comparison", "write_comparison", "write_report"]
COMPARISON = "comparison.html"


def write_report(run: Run | Path) -> Path:
    """Write the report of a run into its folder. Raises UserError and WriteError."""
    run = read_run(run) if isinstance(run, Path) else run
    place = run.folder / REPORT
    write_file(place, render(run))
    return place


def write_comparison(runs: Sequence[Run], place: Path | None = None) -> Path:
    """Write the page that compares runs, by default comparison.html in the folder that they have in common.

    Raises UserError if a file is in the way that is no such page, and WriteError.
    """
    place = place or Path(os.path.relpath(common_folder(runs))) / COMPARISON
    if place.is_dir() or (place.exists() and not _ours(place)):
        raise UserError(f"{place}: this is no page of fastpref's, so it is not replaced; name another file by --output")
    if not place.parent.is_dir():
        raise UserError(f"{place}: there is no folder {place.parent}")
    write_file(place, render_comparison(runs, place))
    return place


def _ours(place: Path) -> bool:
    with place.open("rb") as file:
        return b'<meta name="generator" content="fastpref">' in file.read(1000)
