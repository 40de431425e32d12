"""`fastpref report` and `fastpref runs`: what runs have recorded."""

import json
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastpref.errors import UserError
from fastpref.report import read_run, write_comparison, write_report
from fastpref.report.source import Run, is_run
from fastpref.report.summary import Found, find_runs, summary
from fastpref.run.times import duration
from fastpref.training.progress import Display


def report(
    folders: Sequence[Path], loss: str | None, beta: float | None, output: Path | None, *, open_page: bool
) -> None:
    """Write the report of a run, or the page that compares several, and print what it says in short."""
    runs = _read(folders, loss, beta)
    if len(runs) == 1:
        if output is not None:
            raise UserError(f"--output: the report of one run is {runs[0].folder / 'report.html'}; leave it out")
        display = Display(runs[0].history.step)
        for note in runs[0].notes:
            display.note(note)
        display.health(runs[0].health)
        place, name = write_report(runs[0]), "report"
    else:
        place, name = write_comparison(runs, output), "comparison"
        _print([Found(run.folder, summary(run)) for run in runs])
    print(f"{name}: {place}")
    if open_page and not _opened(place):
        print(f"no browser opened it; its address is {place.resolve().as_uri()}")


def _read(folders: Sequence[Path], loss: str | None, beta: float | None) -> list[Run]:
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice; name each one once")
    if len(folders) == 1:
        return [read_run(folders[0], loss, beta)]
    if (loss, beta) != (None, None) and all(is_run(folder) for folder in folders):
        raise UserError("the config.toml of each run names its loss; leave --loss and --beta out")
    return [read_run(folder) if is_run(folder) else read_run(folder, loss, beta) for folder in folders]


def _opened(place: Path) -> bool:
    try:
        return webbrowser.open(place.resolve().as_uri())
    except webbrowser.Error:
        return False


def list_runs(folders: Sequence[Path], *, as_json: bool) -> None:
    """List the runs in folders, the newest first."""
    if not folders and not Path("runs").is_dir():
        raise UserError("there is no folder named runs here; name one that has runs in it")
    found = find_runs(folders or [Path("runs")])
    if as_json:
        listed = [
            {"folder": str(of.folder), "state": "unreadable", "why": of.refusal}
            if of.summary is None
            else of.summary.as_json()
            for of in found
        ]
        print(json.dumps(listed, indent=1))
    elif found:
        _print(found)
    else:
        print("no runs in " + " or ".join(map(str, folders or [Path("runs")])))


def _print(found: Sequence[Found]) -> None:
    """Print a line for each run, or two on a narrow terminal; as wide as it takes where there is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, 160))
    if console.width < _NARROW:
        for of in found:
            console.print(Text(str(of.folder), style="bold"))
            console.print(Text("  ") + Text(", ").join(cell for cell in _cells(of) if cell))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", overflow="fold", min_width=12)
    shown = _COLUMNS if console.width >= _WIDE else _COLUMNS[:-2]
    for name in shown:
        table.add_column(name, no_wrap=name not in ("state", "health"))
    for of in found:
        table.add_row(str(of.folder), *_cells(of)[: len(shown)])
    console.print(table)


_COLUMNS = ("loss", "steps", "state", "held out", "health", "begun", "time")
_NARROW, _WIDE = 76, 110  # columns of a terminal: below, each run has two lines; from then on, all columns are shown


def _cells(found: Found) -> list[Text]:
    """Return the cells of _COLUMNS."""
    of = found.summary
    if of is None:
        return [*(Text(), Text(), Text("unreadable"), Text(), Text(found.refusal)), Text(), Text()]
    accuracy, loss, planned = of.heldout("rewards/accuracies"), of.heldout("loss"), of.run.known.steps
    styles = {"alarm": "bold red", "warning": "yellow"}
    style = next((styles[kind] for kind in styles if any(v.severity == kind for v in of.verdicts)), "")
    return [
        Text(of.run.known.loss.type),
        Text(f"{of.run.history.step:,}" + (f"/{planned:,}" if planned else "")),
        Text(of.state),
        Text(f"{accuracy:.1%}" if accuracy is not None else "" if loss is None else f"loss {loss:.4g}"),
        Text(of.health, style),
        Text(f"{of.began:%Y-%m-%d %H:%M}" if of.began else ""),
        Text(duration(of.seconds) if of.seconds else ""),
    ]
