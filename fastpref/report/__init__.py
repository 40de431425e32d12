"""report.html, a single page on a run, without scripts and without external files."""

from pathlib import Path

from fastpref.atomic import write_file
from fastpref.report.page import render
from fastpref.report.source import Run, read_run
from fastpref.run.history import REPORT

__all__ = ["Run", "read_run", "render", "write_report"]


def write_report(run: Run | Path) -> Path:
    """Write the report of a run into its folder. Raises UserError and WriteError."""
    run = read_run(run) if isinstance(run, Path) else run
    place = run.folder / REPORT
    write_file(place, render(run))
    return place
