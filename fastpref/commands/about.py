"""`fastpref --version` and `fastpref schema`."""

import json

import typer

from fastpref import __version__
from fastpref.config import Config


def print_version(value: bool) -> None:
    if value:
        typer.echo(f"fastpref {__version__}")
        raise typer.Exit


def print_schema() -> None:
    typer.echo(json.dumps(Config.model_json_schema(), indent=2))
