"""Commands on what runs have recorded. Heavy imports wait inside them."""

from pathlib import Path
from typing import Annotated

from fastpref.cli.parameters import LOSS_NAMES, argument, flag, value


def report(
    runs: Annotated[
        list[Path],
        argument("RUN", "The folder of a run, or TRL's output folder with its trainer_state.json; or several."),
    ],
    open_page: Annotated[bool, flag("--open", "Open the page in the browser.")] = False,
    output: Annotated[
        Path | None, value("FILE", "Where to write the comparison of several runs. The default is beside them.")
    ] = None,
    loss: Annotated[str | None, value("LOSS", f"The loss of TRL's runs, one of {LOSS_NAMES}.")] = None,
    beta: Annotated[float | None, value("BETA", "The β of TRL's runs.")] = None,
) -> None:
    """Diagnose a run and write its report.html, or compare runs."""
    from fastpref.commands.report import report as run

    run(runs, loss, beta, output, open_page=open_page)


def list_runs(
    folders: Annotated[
        list[Path] | None, argument("FOLDER", "Folders that have runs in them. The default is runs.")
    ] = None,
    as_json: Annotated[bool, flag("--json", "Print the list as JSON.")] = False,
) -> None:
    """List runs with their state, held-out result and health."""
    from fastpref.commands.report import list_runs as run

    run(folders or (), as_json=as_json)
