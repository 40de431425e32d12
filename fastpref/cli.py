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
AsJson = Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")]
TrainedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run's folder, or one of a checkpoint, an adapter or a model; a name on the hub; a config.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the config's last run from its newest whole checkpoint, or from the checkpoint or the run's "
        "folder that is named after it.",
    ),
]


@app.command(epilog="Example: fastpref train my.toml train.steps=20")
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
    try:
        loaded = load_config(config, [word for word in overrides or () if word not in named])
        if len(named) > 1:
            raise UserError(f"--resume: one checkpoint, not {len(named)}: {', '.join(named)}")
    except UserError as error:
        if "WORLD_SIZE" not in os.environ:
            raise
        from fastpref.processes import end_together  # the processes of other hosts wait for this one

        end_together(error)
    if offline:
        _go_offline()
    _quiet_bitsandbytes()
    from fastpref.training.loop import train as run

    checkpoint = named[0] if named else resume
    if run(loaded, force=force, resume=checkpoint, default_name=config.stem, cache=not no_cache).interrupted:
        raise typer.Exit(130)


@app.command(epilog="Example: fastpref check my.toml")
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a config without training: every mistake with its line."""
    from fastpref.config import load_config
    from fastpref.model.limits import foresee

    loaded = load_config(config, overrides or ())
    training = "the whole model" if loaded.lora is None else f"LoRA adapters of rank {loaded.lora.rank}"
    typer.echo(f"{config}: no mistakes. {loaded.loss.type.upper()} on {loaded.model.name}, training {training}.")
    for note in foresee(loaded):
        typer.echo(f"note: {note}")


@app.command(epilog="Example: fastpref init --loss kto --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl")
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
    from fastpref.commands.init import check_loss, kept, template, write

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


@app.command(epilog="Example: fastpref preview my.toml --rows 2")
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
    from fastpref.preview.preview import preview as run

    run(loaded, rows=rows, full=full, cache=not no_cache)


@app.command(epilog="Example: fastpref report runs/my-dpo --open")
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
    """Say how healthy a run is, and write its report.html."""
    from fastpref.health import diagnose
    from fastpref.report import read_run, write_report
    from fastpref.training.progress import Display

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


@app.command(epilog="Example: fastpref schema")
def schema() -> None:
    """Print the JSON schema of a config: every key with its type, default and meaning."""
    import json

    from fastpref.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


@app.command(epilog="Example: fastpref estimate my.toml --card 12 tokens.max_length=1024")
def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    card: Annotated[
        float | None, typer.Option("--card", min=1, help="GB of the card it is for; the one that is here, or 24.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Beside it the same step as TRL would make it.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Of a run on a CPU instead of a GPU.")] = False,
    as_json: AsJson = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Say what a step takes of a GPU's memory, which cards it fits, and what would make it fit. Needs no GPU and no
    weights, only the model's config.json."""
    from fastpref.config import load_config

    given = list(overrides or ())
    load_config(config, given)
    _prepare(offline)
    import torch
    from rich.console import Console
    from rich.markup import escape

    from fastpref.commands import estimate_text
    from fastpref.memory.estimate import Estimator

    screen = Console(highlight=False)
    device = torch.device("cpu" if cpu else "cuda")
    estimator = Estimator(lambda more: load_config(config, [*given, *more]), device, cache=not no_cache)
    with Console(stderr=True).status("") as waiting:  # of a terminal only
        estimator.counted = lambda what: waiting.update(escape(f"counting {what}"))
        told = estimate_text.estimate(estimator, card=card, compare=compare, console=None if as_json else screen)
    if as_json:
        typer.echo(estimate_text.as_json(told))


@app.command(
    "eval", epilog="Example: fastpref eval runs/my-dpo, or: fastpref eval my-adapter --data pairs.jsonl --json"
)
def evaluate(
    model: TrainedModel,
    overrides: Overrides = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Preferences to judge it by, instead of what its run held out.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="The model to compare with, instead of the one it began with.")
    ] = None,
    as_json: AsJson = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Judge a model by held-out preferences: accuracy, margins, KL to the reference."""
    _prepare(offline)
    from rich.console import Console

    from fastpref.commands import evaluate as evaluation
    from fastpref.model.failure import told_of_memory
    from fastpref.model.trained import find_trained

    trained = find_trained(model, overrides or ())
    compared = None if reference is None else find_trained(reference)
    budget = trained.config.tokens_per_microbatch
    with told_of_memory(
        f"while {trained.weights} was judged", f"set train.tokens_per_microbatch, which is {budget:,}, to less"
    ):
        found = evaluation.evaluate(trained, data=data, reference=compared, cache=not no_cache, tell=_note)
    if as_json:
        typer.echo(evaluation.as_json(found))
    else:
        evaluation.show(found, trained.weights, Console(highlight=False))


@app.command(epilog="Example: fastpref chat runs/my-dpo --compare")
def chat(
    model: TrainedModel,
    overrides: Overrides = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Let the model that it was trained from answer too.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="The longest answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="0 for the likeliest words; else the model's own.")
    ] = None,
    offline: Offline = False,
) -> None:
    """Talk to a model, line by line, from a terminal or a pipe."""
    _prepare(offline)
    from fastpref.commands.chat import chat as run
    from fastpref.model.failure import told_of_memory
    from fastpref.model.trained import find_trained

    trained = find_trained(model, overrides or ())
    with told_of_memory(
        f"while {trained.weights} was talked to",
        'set model.quantization="nf4", or let answers be shorter: --max-tokens',
    ):
        run(trained, compare=compare, system=system, max_tokens=max_tokens, temperature=temperature, tell=_note)


@app.command(epilog="Example: fastpref merge runs/my-dpo --output my-model")
def merge(
    model: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or an adapter's.")],
    output: Annotated[Path, typer.Option("--output", help="The folder to write; it must not be there.")],
    overrides: Overrides = None,
    dequantized: Annotated[
        bool | None,
        typer.Option(
            "--dequantized/--original",
            help="Onto the 4-bit weights that an nf4 run was trained beside (the default then), or the model's own.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; as the model's files if left out.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Load both afterwards, in turn, and compare logits.")] = True,
    offline: Offline = False,
) -> None:
    """Add an adapter to the weights it was trained beside, and write a model that needs no peft."""
    _prepare(offline)
    import torch

    from fastpref.merge import merge as run
    from fastpref.model.failure import told_of_memory
    from fastpref.model.trained import find_trained

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: take float32, bfloat16 or float16")
    kind = None if dtype is None else getattr(torch, dtype)
    with told_of_memory(f"while {model} was merged", "--no-verify loads no model to compare with"):
        merged = run(find_trained(model, overrides or ()), output, dequantized=dequantized, dtype=kind, verify=verify)
    head = ", the head untied from the embeddings" if merged.untied else ""
    typer.echo(f"{merged.folder}: {merged.tensors} tensors changed{head}; merged onto {merged.onto}.")
    if merged.lost is not None:
        typer.echo(f"Compared on a probe: of what the adapter changes in the logits, {merged.lost:.2%} is lost.")


@app.command(epilog="Example: fastpref push runs/my-dpo --to me/my-model")
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or one of a model or an adapter.")],
    to: Annotated[
        str | None, typer.Option("--to", help='"user/name" on the hub; output.push_to of the run if left out.')
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see a repository that is made.")] = False,
) -> None:
    """Upload what a run has trained to the hub, into a private repository unless told otherwise."""
    _prepare(False)
    from fastpref.commands.push import push as upload
    from fastpref.model.trained import find_trained

    trained = find_trained(run)
    repository = to or trained.config.output.push_to
    if repository is None:
        raise UserError("name a repository, --to user/name, or set output.push_to")
    if not Path(trained.weights).is_dir():
        raise UserError(f"{run}: only a folder can be uploaded")
    typer.echo(f"{trained.weights} is at {upload(Path(trained.weights), repository, public=public)}")


def _note(note: str) -> None:
    """Print to stderr what is not the result."""
    typer.echo(note, err=True)


def _prepare(offline: bool) -> None:
    """Before anything heavy is imported."""
    if offline:
        _go_offline()
    _quiet_bitsandbytes()
    from fastpref.quiet import quiet_libraries

    quiet_libraries()


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
