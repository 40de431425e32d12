"""How the parameters of commands are declared, and those that several commands have."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastpref.names import LOSS_TITLES

LOSS_NAMES = ", ".join(LOSS_TITLES)


def argument(metavar: str, words: str) -> Any:
    return typer.Argument(metavar=metavar, help=words)


def flag(name: str, words: str, metavar: str = "", **more: Any) -> Any:
    """Declare an option without a value. Without the empty metavar, its help would show a type."""
    return typer.Option(name, metavar=metavar, help=words, **more)


def value(metavar: str, words: str, **more: Any) -> Any:
    """Declare an option with a value; its name is that of the parameter."""
    return typer.Option(metavar=metavar, help=words, **more)


ConfigFile = Annotated[Path, argument("CONFIG", "The config, a TOML file; `fastpref schema` lists its keys.")]
Overrides = Annotated[
    list[str] | None, argument("KEY=VALUE", "Replace keys of the config; values are TOML: train.steps=10.")
]
Offline = Annotated[bool, flag("--offline", "Use local files and the hub's cache only.")]
NoCache = Annotated[bool, flag("--no-cache", "Tokenize again, and do not keep the tokens.")]
AsJson = Annotated[bool, flag("--json", "Print the result as one JSON object.")]
TrainedModel = Annotated[
    str, argument("MODEL", "The folder of a run, a checkpoint, an adapter or a model; a name on the hub; or a config.")
]
