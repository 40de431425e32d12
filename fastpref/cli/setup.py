"""What a command does before its heavy imports."""

import logging
import os

import typer


def prepare(offline: bool) -> None:
    """Set up the environment and the libraries' messages before anything heavy is imported."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it warns of a kernel for 4-bit inference
    from fastpref.quiet import quiet_libraries

    quiet_libraries()


def note(text: str) -> None:
    """Print a remark to stderr, which keeps stdout for the result."""
    typer.echo(text, err=True)
