"""Train, or continue a run. Heavy imports wait inside the command."""

import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from fastpref.cli.parameters import ConfigFile, NoCache, Offline, Overrides, flag
from fastpref.cli.setup import loading
from fastpref.commands.about import in_one_sentence, names_of
from fastpref.errors import UserError

_CONTINUE = "Continue the config's last run from its newest whole checkpoint, or the checkpoint or run in FOLDER."


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, flag("--resume", _CONTINUE, metavar="[FOLDER]")] = False,
    force: Annotated[bool, flag("--force", "Replace the run in output.dir.")] = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Train a model on preferences or completions, or continue a run."""
    from fastpref.checks import look
    from fastpref.config import load_config
    from fastpref.run.folder import RunFolder

    # Typer has no option whose value is optional, so the checkpoint's folder arrives among the overrides.
    named = [word for word in overrides or () if resume and (Path(word).is_dir() or "=" not in word)]
    try:
        loaded = load_config(config, [word for word in overrides or () if word not in named])
        if len(named) > 1:
            raise UserError(f"--resume takes one checkpoint, not {len(named)}: {', '.join(named)}")
        if not resume:  # whose checkpoint is looked for first
            look(loaded).require()
            RunFolder.choose(loaded, config.stem, force=force)
        if loaded.output.push_to is not None:
            from fastpref.run.hub import check_login

            check_login(loaded.output.push_to)
    except UserError as error:
        if "WORLD_SIZE" not in os.environ:
            raise
        from fastpref.processes import end_together  # the processes on other hosts wait for this one

        end_together(error)
    if sys.stdout.isatty():
        words, width = f"{config}: {in_one_sentence(loaded)}", shutil.get_terminal_size().columns
        typer.echo(textwrap.fill(words, width, break_long_words=False, break_on_hyphens=False))
    with loading(*names_of(loaded), offline=offline):
        from fastpref.training.start import train as run

    checkpoint = named[0] if named else resume
    if run(loaded, force=force, resume=checkpoint, default_name=config.stem, cache=not no_cache).interrupted:
        raise typer.Exit(130)
