"""The command line: one function a command. Heavy imports wait inside them."""

import logging
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
    offline: Annotated[
        bool, typer.Option("--offline", help="Never ask the hub: only local files and its cache.")
    ] = False,
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
    # bitsandbytes warns at import about a CPU kernel that only 4-bit inference would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from fastpref.train.loop import train as run

    checkpoint = named[0] if named else resume
    if run(loaded, force=force, resume=checkpoint, default_name=config.stem).interrupted:
        raise typer.Exit(130)


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a config without training: every mistake with its line."""
    from fastpref.config import load_config

    loaded = load_config(config, overrides or ())
    training = "the whole model" if loaded.lora is None else f"LoRA adapters of rank {loaded.lora.rank}"
    typer.echo(f"{config}: no mistakes. {loaded.loss.type.upper()} on {loaded.model.name}, training {training}.")


@app.command()
def schema() -> None:
    """Print the JSON schema of a config: every key with its type, default and meaning."""
    import json

    from fastpref.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


def _go_offline() -> None:
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    """Run a command; a user's mistake ends in one message and status 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"fastpref: {error}", err=True)
        sys.exit(2)
