"""The command line: each command is one function, in the order of `fastpref --help`. Heavy imports wait inside them."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastpref.config.losses import LOSSES
from fastpref.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The config, a TOML file; `fastpref schema` lists its keys.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Replace keys of the config; values are TOML: train.steps=10."),
]
Offline = Annotated[bool, typer.Option("--offline", metavar="", help="Use local files and the hub's cache only.")]
NoCache = Annotated[bool, typer.Option("--no-cache", metavar="", help="Tokenize again, and do not keep the tokens.")]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print the result as one JSON object.")]
TrainedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The folder of a run, a checkpoint, an adapter or a model; a name on the hub; or a config.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        metavar="[FOLDER]",
        help="Continue the config's last run from its newest whole checkpoint, or continue the checkpoint or run in "
        "FOLDER.",
    ),
]


def _print_version(value: bool) -> None:
    if value:
        from fastpref import __version__

        typer.echo(f"fastpref {__version__}")
        raise typer.Exit


_NAMES = ", ".join(options.__name__ for options in LOSSES.values())


@app.callback(help=f"Train language models on preferences ({_NAMES}) on one GPU, or more slowly on a CPU.")
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", help="Show the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Take the options of `fastpref` itself."""


@app.command(epilog="Example: fastpref init --loss kto --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl")
def init(
    loss: Annotated[
        str | None, typer.Option(metavar="LOSS", help=f"One of {', '.join(LOSSES)} (default: dpo).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model: a folder, or a name on the hub.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="The preferences: a file, or a data set on the hub.")
    ] = None,
    from_axolotl: Annotated[
        Path | None,
        typer.Option(metavar="CFG.YML", help="Translate this Axolotl config, whose `rl` is a preference method."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The file to write, or - to print it. The default is named after the loss or the Axolotl config.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a commented config, or translate one of Axolotl's."""
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


@app.command(epilog="Example: fastpref check my.toml")
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Report every mistake in a config, each with its line."""
    from fastpref.config import load_config
    from fastpref.model.limits import foresee

    loaded = load_config(config, overrides or ())
    training = "the whole model" if loaded.lora is None else f"LoRA adapters of rank {loaded.lora.rank}"
    typer.echo(f"{config}: no mistakes. {loaded.loss.type.upper()} on {loaded.model.name}, training {training}.")
    for note in foresee(loaded):
        typer.echo(f"note: {note}")


@app.command(epilog="Example: fastpref preview my.toml --rows 2")
def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=1, help="Show this many rows.")] = 4,
    full: Annotated[bool, typer.Option("--full", metavar="", help="Show long texts in full.")] = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Show the tokens a run would train on, and statistics of the data."""
    from fastpref.config import load_config

    loaded = load_config(config, overrides or ())
    if offline:
        _go_offline()
    _quiet_bitsandbytes()
    from fastpref.preview.preview import preview as run

    run(loaded, rows=rows, full=full, cache=not no_cache)


@app.command(epilog="Example: fastpref estimate my.toml --card 12 tokens.max_length=1024")
def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    card: Annotated[
        float | None,
        typer.Option(
            "--card", min=1, metavar="GB", help="Memory of the GPU. The default is this machine's GPU, or 24 GB."
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", metavar="", help="Estimate the same step in TRL, too.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", metavar="", help="Estimate a run on a CPU instead of a GPU.")] = False,
    as_json: AsJson = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Estimate a step's memory before a run, and what makes it fit.

    This needs no GPU and no weights, only the model's config.json.
    """
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
    with Console(stderr=True).status("") as waiting:  # shown on a terminal only
        estimator.counted = lambda what: waiting.update(escape(f"counting {what}"))
        told = estimate_text.estimate(estimator, card=card, compare=compare, console=None if as_json else screen)
    if as_json:
        typer.echo(estimate_text.as_json(told))


@app.command(epilog="Example: fastpref train my.toml train.steps=20")
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = False,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace the run in output.dir.")] = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Train a model on preferences, or continue a run."""
    from fastpref.config import load_config

    # Typer has no option whose value is optional, so the checkpoint's folder arrives among the overrides.
    named = [word for word in overrides or () if resume and (Path(word).is_dir() or "=" not in word)]
    try:
        loaded = load_config(config, [word for word in overrides or () if word not in named])
        if len(named) > 1:
            raise UserError(f"--resume: one checkpoint, not {len(named)}: {', '.join(named)}")
    except UserError as error:
        if "WORLD_SIZE" not in os.environ:
            raise
        from fastpref.processes import end_together  # the processes on other hosts wait for this one

        end_together(error)
    if offline:
        _go_offline()
    _quiet_bitsandbytes()
    from fastpref.training.start import train as run

    checkpoint = named[0] if named else resume
    if run(loaded, force=force, resume=checkpoint, default_name=config.stem, cache=not no_cache).interrupted:
        raise typer.Exit(130)


@app.command(epilog="Example: fastpref report runs/my-dpo --open")
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, or TRL's output folder with its trainer_state.json.")
    ],
    open_page: Annotated[bool, typer.Option("--open", metavar="", help="Open the page in the browser.")] = False,
    loss: Annotated[
        str | None, typer.Option(metavar="LOSS", help=f"The loss of a TRL run, one of {', '.join(LOSSES)}.")
    ] = None,
    beta: Annotated[float | None, typer.Option(metavar="BETA", help="The β of a TRL run.")] = None,
) -> None:
    """Diagnose a run, and write its report.html."""
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


@app.command(
    "eval", epilog="Example: fastpref eval runs/my-dpo, or: fastpref eval my-adapter --data pairs.jsonl --json"
)
def evaluate(
    model: TrainedModel,
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PATH", help="Preferences to evaluate on, instead of the run's held-out rows."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="The model to compare with, instead of the one that training started from.",
        ),
    ] = None,
    as_json: AsJson = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Evaluate a model on held-out preferences: accuracy, margins, KL."""
    _prepare(offline)
    from rich.console import Console

    from fastpref.commands import evaluate as evaluation
    from fastpref.model.failure import told_of_memory
    from fastpref.run.trained import find_trained

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
        bool, typer.Option("--compare", metavar="", help="Show the answers of the model before training, too.")
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="Start with this system message.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="The length limit of an answer.")
    ] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", metavar="T", min=0, help="0 decodes greedily. The default is the model's setting."
        ),
    ] = None,
    offline: Offline = False,
) -> None:
    """Chat with a model in the terminal, or through a pipe."""
    _prepare(offline)
    from fastpref.commands.chat import chat as run
    from fastpref.model.failure import told_of_memory
    from fastpref.run.trained import find_trained

    trained = find_trained(model, overrides or ())
    with told_of_memory(
        f"while {trained.weights} was talked to",
        'set model.quantization="nf4", or let answers be shorter: --max-tokens',
    ):
        run(trained, compare=compare, system=system, max_tokens=max_tokens, temperature=temperature, tell=_note)


@app.command(epilog="Example: fastpref merge runs/my-dpo --output my-model")
def merge(
    model: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run or of an adapter.")],
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="The folder to write. It must not exist.")],
    overrides: Overrides = None,
    dequantized: Annotated[
        bool | None,
        typer.Option(
            "--dequantized/--original",
            metavar="",
            help="Merge into the dequantised 4-bit weights (the default for an nf4 run), or into the original weights.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="DTYPE", help="float32, bfloat16 or float16. The default is that of the files."
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option(metavar="", help="Load the model before and after, and compare logits.")
    ] = True,
    offline: Offline = False,
) -> None:
    """Merge an adapter into the weights, for use without PEFT."""
    _prepare(offline)
    import torch

    from fastpref.merge import merge as run
    from fastpref.model.failure import told_of_memory
    from fastpref.run.trained import find_trained

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
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run, a model or an adapter.")],
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="USER/NAME", help="The repository. The default is the run's output.push_to."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", metavar="", help="Make a new repository public.")] = False,
) -> None:
    """Upload a trained model to the hub, privately by default."""
    _prepare(False)
    from fastpref.run.hub import push as upload
    from fastpref.run.trained import find_trained

    trained = find_trained(run)
    repository = to or trained.config.output.push_to
    if repository is None:
        raise UserError("name a repository, --to user/name, or set output.push_to")
    if not Path(trained.weights).is_dir():
        raise UserError(f"{run}: only a folder can be uploaded")
    typer.echo(f"{trained.weights} is at {upload(Path(trained.weights), repository, public=public)}")


@app.command(epilog="Example: fastpref schema")
def schema() -> None:
    """Print the JSON schema of a config: every key, type and default."""
    import json

    from fastpref.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


def _note(note: str) -> None:
    """Print a remark to stderr, which keeps stdout for the result."""
    typer.echo(note, err=True)


def _prepare(offline: bool) -> None:
    """Set up the environment and the libraries' messages before anything heavy is imported."""
    if offline:
        _go_offline()
    _quiet_bitsandbytes()
    from fastpref.quiet import quiet_libraries

    quiet_libraries()


def _go_offline() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"


def _quiet_bitsandbytes() -> None:
    """Silence a warning at import about a CPU kernel that only 4-bit inference uses."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def main() -> None:
    """Run a command. A UserError is printed as one message and ends with status 2."""
    try:
        app()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        who = "fastpref" if rank == "0" else f"fastpref (process {rank})"
        typer.echo(f"{who}: {error}", err=True)
        sys.exit(2)
