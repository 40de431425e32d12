"""The command line: each command is one function, by subject in the modules of this folder."""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from fastpref.cli.configs import check, estimate, init, preview, schema
from fastpref.cli.models import chat, evaluate, export, merge, push
from fastpref.cli.parameters import flag
from fastpref.cli.records import list_runs, report
from fastpref.cli.runs import train
from fastpref.cli.setup import leave, own_process
from fastpref.commands.about import print_version
from fastpref.errors import UserError
from fastpref.names import LOSS_TITLES

_NAMES = ", ".join(LOSS_TITLES.values())
# In the order of `fastpref --help`, which is that of their use; each with an example of its arguments.
_COMMANDS: dict[str, tuple[Callable[..., Any], str]] = {
    "init": (init, "--loss kto --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl"),
    "check": (check, "my.toml"),
    "preview": (preview, "my.toml --rows 2"),
    "estimate": (estimate, "my.toml --card 12 tokens.max_length=1024"),
    "train": (train, "my.toml train.steps=20"),
    "report": (report, "runs/my-dpo --open, or: fastpref report runs/a runs/b"),
    "runs": (list_runs, ""),
    "eval": (evaluate, "runs/my-dpo, or: fastpref eval my-adapter --data pairs.jsonl --json"),
    "chat": (chat, "runs/my-dpo --compare"),
    "merge": (merge, "runs/my-dpo --output my-model"),
    "export": (export, "runs/my-dpo --gguf --quant q8_0"),
    "push": (push, "runs/my-dpo --to me/my-model"),
    "schema": (schema, "train.batch"),
}


_LEFT = {  # what Ctrl-C leaves of these commands
    "train": " before the first step; no run was begun or changed",
    "merge": "; nothing was written",
    "export": "; nothing was written",
}


class _Plain:
    """A command in whose help flags show no type, `--help` among them."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)  # pyright: ignore[reportAttributeAccessIssue]
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class _Group(_Plain, TyperGroup):
    pass


class _Command(_Plain, TyperCommand):
    """A command that says what is left when Ctrl-C ends it, unless a run has said so (`StoppedAtOnce`)."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            if type(interrupt) is KeyboardInterrupt:
                typer.echo(f"fastpref: interrupted{_LEFT.get(self.name or '', '')}", err=True)
            raise


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(help=f"Train language models on preferences ({_NAMES}) on one GPU, or more slowly on a CPU.")
def options(
    version: Annotated[
        bool, flag("--version", "Show the version and exit.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options of `fastpref` itself."""


for _name, (_command, _example) in _COMMANDS.items():
    app.command(_name, cls=_Command, epilog=f"Example: fastpref {_name} {_example}".rstrip())(_command)


def console() -> None:
    """Run a command in a process of its own, and end it."""
    own_process()
    try:
        main()
    except SystemExit as ended:
        leave(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    leave(0)


def main() -> None:
    """Run a command. A UserError is printed as one message and ends with status 2."""
    try:
        app()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        who = "fastpref" if rank == "0" else f"fastpref (process {rank})"
        typer.echo(f"{who}: {error}", err=True)
        sys.exit(2)
