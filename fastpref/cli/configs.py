"""Commands that write a config, and that tell what it would do. Heavy imports wait inside them."""

from pathlib import Path
from typing import Annotated

import typer

from fastpref.cli.parameters import (
    LOSS_NAMES,
    AsJson,
    ConfigFile,
    NoCache,
    Offline,
    Overrides,
    argument,
    flag,
    value,
)
from fastpref.cli.setup import loading
from fastpref.commands.about import in_one_sentence, names_of, print_key, print_schema


def init(
    loss: Annotated[str | None, value("LOSS", f"One of {LOSS_NAMES} (default: dpo).")] = None,
    model: Annotated[str | None, value("NAME", "The model: a folder, or a name on the hub.")] = None,
    data: Annotated[str | None, value("PATH", "The rows: a file, or a data set on the hub.")] = None,
    from_axolotl: Annotated[
        Path | None, value("CFG.YML", "Translate this Axolotl config, of `rl` or of supervised training.")
    ] = None,
    from_trl: Annotated[
        Path | None, value("CFG.YML", "Translate this config of `trl dpo`, `trl kto` or `trl sft`; --loss says which.")
    ] = None,
    from_llamafactory: Annotated[
        Path | None, value("CFG.YML", "Translate this LLaMA-Factory config, of the stage dpo, kto or sft.")
    ] = None,
    output: Annotated[
        str | None,
        value(
            "FILE", "The file to write, or - to print it. The default is named after the loss or the translated config."
        ),
    ] = None,
    force: Annotated[bool, flag("--force", "Replace the file if it exists.")] = False,
) -> None:
    """Write a commented config, or translate another trainer's."""
    from fastpref.commands.init import init as run

    sources = {"--from-axolotl": from_axolotl, "--from-trl": from_trl, "--from-llamafactory": from_llamafactory}
    run(loss, model, data, sources, output, force=force)


def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Report every mistake in a config, and in what it names."""
    from fastpref.checks import look
    from fastpref.config import load_config
    from fastpref.model.limits import foresee

    loaded = load_config(config, overrides or ())
    findings = look(loaded)
    findings.require()
    typer.echo(f"{config}: no mistakes. {in_one_sentence(loaded)}.")
    for note in (*findings.notes, *foresee(loaded)):
        typer.echo(note if note.startswith("warning") else f"note: {note}")


def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, value("N", "Show this many rows.", min=1)] = 4,
    full: Annotated[bool, flag("--full", "Show long texts in full.")] = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Show the tokens a run would train on, and statistics of the data."""
    from fastpref.config import load_config

    loaded = load_config(config, overrides or ())
    with loading(*names_of(loaded), offline=offline):
        from fastpref.preview.preview import preview as run

    run(loaded, rows=rows, full=full, cache=not no_cache)


def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    card: Annotated[
        float | None, value("GB", "Memory of the GPU. The default is this machine's GPU, or 24 GB.", min=1)
    ] = None,
    compare: Annotated[bool, flag("--compare", "Estimate the same step in TRL and in Unsloth, too.")] = False,
    largest: Annotated[
        bool, flag("--largest", "Find the largest tokens.max_length and micro-batch that fit the GPU.")
    ] = False,
    cpu: Annotated[bool, flag("--cpu", "Estimate a run on a CPU instead of a GPU.")] = False,
    as_json: AsJson = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Estimate a step's memory before a run, and what makes it fit.

    This needs no GPU and no weights, only the model's config.json.
    """
    from fastpref.config import load_config

    loaded = load_config(config, overrides or ())  # reports mistakes before the heavy imports
    with loading(*names_of(loaded), offline=offline):
        import torch

        from fastpref.commands.estimate import estimate as run
        from fastpref.memory.estimate import Estimator

    device = torch.device("cpu" if cpu else "cuda")
    estimator = Estimator(lambda more: load_config(config, [*(overrides or ()), *more]), device, cache=not no_cache)
    run(estimator, card=card, compare=compare, largest=largest, as_json=as_json)


def schema(
    key: Annotated[
        str | None, argument("[KEY]", "Show this key or table of a config as text, such as train.batch.")
    ] = None,
) -> None:
    """Print the JSON schema of a config, or what a key of it means."""
    if key is None:
        print_schema()
    else:
        print_key(key)
