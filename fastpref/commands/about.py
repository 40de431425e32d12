"""`fastpref --version`, `fastpref schema`, and a config in one sentence."""

import json
import shutil
from textwrap import fill
from typing import TYPE_CHECKING

import typer

from fastpref import __version__
from fastpref.errors import UserError

if TYPE_CHECKING:  # help needs no schema of a config
    from fastpref.config import Config


def print_version(value: bool) -> None:
    if value:
        typer.echo(f"fastpref {__version__}")
        raise typer.Exit


def print_schema() -> None:
    from fastpref.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


def print_key(key: str) -> None:
    """Print the type, default and meaning of a key, or of every key of a table. Raises UserError for none."""
    from fastpref.config import Config
    from fastpref.config.reference import explain_keys

    lines = explain_keys(key.strip("[]"))
    if not lines:
        tables = ", ".join(Config.model_fields)
        raise UserError(
            f"schema {key}: a config has no such key; its tables are {tables}, and `fastpref schema` has all"
        )
    width = min(shutil.get_terminal_size().columns, 120)
    for line in lines:
        name, meaning = line.split("\n")
        typer.echo(name)
        typer.echo(
            fill(meaning.strip(), width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
        )


def in_one_sentence(config: "Config") -> str:
    """Return what a config trains, without a full stop: "DPO on a model, training LoRA adapters of rank 16"."""
    training = "the whole model" if config.lora is None else f"LoRA adapters of {config.lora.ranks}"
    if config.lora is not None and config.lora.start is not None:
        training = f"{training} on top of" if config.lora.stack else "the LoRA adapter"
        training = f"{training} {config.lora.start}"
    return f"{config.loss.title} on {config.model.name}, training {training}"


def names_of(config: "Config") -> list[str]:
    """Return the names of a config's models and adapters, and of its data."""
    start = None if config.lora is None else config.lora.start
    names = (config.model.name, start, config.reference.name)
    return [*(name for name in names if name is not None), *(d.path for d in (*config.data, *config.eval.data))]
