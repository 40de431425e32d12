"""The command line: one function a command. Heavy imports wait inside them."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastpref.errors import UserError

app = typer.Typer(
    help="Preference training (DPO, IPO, KTO, ORPO, SimPO, CPO) on one GPU, or slower on any CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file; `fastpref schema` lists its keys.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's, as TOML: train.steps=10"),
]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the hub: only local files and its cache.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Tokenize anew, and keep the tokens for no other run.")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the config's last run from its newest whole checkpoint, or from the checkpoint or the run's "
        "folder that is named after it.",
    ),
]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that output.dir already holds.")] = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Train a model on preferences."""
    from fastpref.config import load_config

    # A command line has no options with a value that may be left out: it arrives among the overrides.
    named = [word for word in overrides or () if resume and (Path(word).is_dir() or "=" not in word)]
    loaded = load_config(config, [word for word in overrides or () if word not in named])
    if len(named) > 1:
        raise UserError(f"--resume: one checkpoint, not {len(named)}: {', '.join(named)}")
    if offline:
        _go_offline()
    _quiet_bitsandbytes()
    from fastpref.train.loop import train as run

    checkpoint = named[0] if named else resume
    if run(loaded, force=force, resume=checkpoint, default_name=config.stem, cache=not no_cache).interrupted:
        raise typer.Exit(130)


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a config without training: every mistake with its line."""
    from fastpref.config import load_config

    loaded = load_config(config, overrides or ())
    training = "the whole model" if loaded.lora is None else f"LoRA adapters of rank {loaded.lora.rank}"
    typer.echo(f"{config}: no mistakes. {loaded.loss.type.upper()} on {loaded.model.name}, training {training}.")


@app.command()
def init(
    loss: Annotated[
        str | None, typer.Option(help="dpo (if left out), ipo, kto, orpo, simpo or cpo; the file says which to choose.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A folder, or a model's name on the hub.")] = None,
    data: Annotated[str | None, typer.Option(help="A file of preferences, or a data set's name on the hub.")] = None,
    from_axolotl: Annotated[
        Path | None, typer.Option(metavar="CFG.YML", help="Translate an Axolotl config of a preference method.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(help="The file to write, - to print it; <loss>.toml here, or the name of the Axolotl config."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Write a commented config, for a loss or from an Axolotl config."""
    from fastpref.init import check_loss, kept, template, write

    chosen = check_loss(loss or "dpo")
    default = f"{from_axolotl.stem if from_axolotl else chosen}.toml"
    path = None if output == "-" else Path(output or default)
    folder = path.parent if path else Path()
    left_out: list[str] = []
    if from_axolotl is None:
        if model is None or data is None:
            raise UserError("init needs --model and --data (and takes --loss), or --from-axolotl with a .yml file")
        text = template(chosen, kept(model, folder), kept(data, folder))
    else:
        if loss or model or data:
            raise UserError("--from-axolotl takes the loss, the model and the data from its file; leave the others out")
        from fastpref.axolotl import translate

        translation = translate(from_axolotl, folder)
        text, left_out = translation.text, translation.left_out
    if path is None:
        typer.echo(text, nl=False)
    else:
        write(text, path, force=force)
        typer.echo(f"{path} is written. Next:")
        for name in ("check", "preview", "train"):
            typer.echo(f"  fastpref {name} {path}")
    if left_out:
        typer.echo("Not taken over:", err=path is None)
        for line in left_out:
            typer.echo(f"  {line}", err=path is None)


@app.command()
def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows to show.")] = 4,
    full: Annotated[bool, typer.Option("--full", help="Show long texts whole.")] = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Show what a run would train on: rows as their batch holds them, and the data in numbers."""
    from fastpref.config import load_config

    loaded = load_config(config, overrides or ())
    if offline:
        _go_offline()
    _quiet_bitsandbytes()
    from fastpref.preview import preview as run

    run(loaded, rows=rows, full=full, cache=not no_cache)


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, or one of TRL's with its trainer_state.json.")
    ],
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    loss: Annotated[
        str | None, typer.Option(help="Of a run of TRL's, which does not say: dpo, ipo, kto, orpo, simpo or cpo.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Of a run of TRL's: the β it was trained with.")] = None,
) -> None:
    """Say how healthy a run is, and write its report.html: fastpref report runs/my-dpo --open"""
    from fastpref.report import read_run, write_report
    from fastpref.train.health import diagnose
    from fastpref.train.progress import Display

    found = read_run(run, loss, beta)
    display = Display(found.history.step)
    for note in found.notes:
        display.note(note)
    display.health(diagnose(found.history, found.known))
    place = write_report(found)
    display.note(f"report: {place}")
    if open_page:
        import webbrowser

        webbrowser.open(place.resolve().as_uri())


@app.command()
def schema() -> None:
    """Print the JSON schema of a config: every key with its type, default and meaning."""
    import json

    from fastpref.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


def _go_offline() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"


def _quiet_bitsandbytes() -> None:
    """It warns at import about a CPU kernel that only 4-bit inference would use."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def main() -> None:
    """Run a command; a user's mistake ends in one message and status 2."""
    try:
        app()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        who = "fastpref" if rank == "0" else f"fastpref (process {rank})"
        typer.echo(f"{who}: {error}", err=True)
        sys.exit(2)
