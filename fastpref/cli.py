"""The command line: each command is one function, in the order of `fastpref --help`. Heavy imports wait inside them."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastpref.commands.about import print_schema, print_version
from fastpref.config import load_config
from fastpref.config.losses import LOSSES
from fastpref.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_LOSSES = ", ".join(LOSSES)
_NAMES = ", ".join(options.__name__ for options in LOSSES.values())


def _argument(metavar: str, words: str) -> Any:
    return typer.Argument(metavar=metavar, help=words)


def _flag(name: str, words: str, metavar: str = "", **more: Any) -> Any:
    """Declare an option without a value. Without the empty metavar, its help would show a type."""
    return typer.Option(name, metavar=metavar, help=words, **more)


def _value(metavar: str, words: str, **more: Any) -> Any:
    """Declare an option with a value; its name is that of the parameter."""
    return typer.Option(metavar=metavar, help=words, **more)


ConfigFile = Annotated[Path, _argument("CONFIG", "The config, a TOML file; `fastpref schema` lists its keys.")]
Overrides = Annotated[
    list[str] | None, _argument("KEY=VALUE", "Replace keys of the config; values are TOML: train.steps=10.")
]
Offline = Annotated[bool, _flag("--offline", "Use local files and the hub's cache only.")]
NoCache = Annotated[bool, _flag("--no-cache", "Tokenize again, and do not keep the tokens.")]
AsJson = Annotated[bool, _flag("--json", "Print the result as one JSON object.")]
TrainedModel = Annotated[
    str, _argument("MODEL", "The folder of a run, a checkpoint, an adapter or a model; a name on the hub; or a config.")
]
_CONTINUE = "Continue the config's last run from its newest whole checkpoint, or the checkpoint or run in FOLDER."


@app.callback(help=f"Train language models on preferences ({_NAMES}) on one GPU, or more slowly on a CPU.")
def options(
    version: Annotated[
        bool, _flag("--version", "Show the version and exit.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options of `fastpref` itself."""


@app.command(epilog="Example: fastpref init --loss kto --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl")
def init(
    loss: Annotated[str | None, _value("LOSS", f"One of {_LOSSES} (default: dpo).")] = None,
    model: Annotated[str | None, _value("NAME", "The model: a folder, or a name on the hub.")] = None,
    data: Annotated[str | None, _value("PATH", "The rows: a file, or a data set on the hub.")] = None,
    from_axolotl: Annotated[
        Path | None, _value("CFG.YML", "Translate this Axolotl config, of `rl` or of supervised training.")
    ] = None,
    from_trl: Annotated[
        Path | None, _value("CFG.YML", "Translate this config of `trl dpo`, `trl kto` or `trl sft`; --loss says which.")
    ] = None,
    from_llamafactory: Annotated[
        Path | None, _value("CFG.YML", "Translate this LLaMA-Factory config, of the stage dpo, kto or sft.")
    ] = None,
    output: Annotated[
        str | None,
        _value(
            "FILE", "The file to write, or - to print it. The default is named after the loss or the translated config."
        ),
    ] = None,
    force: Annotated[bool, _flag("--force", "Replace the file if it exists.")] = False,
) -> None:
    """Write a commented config, or translate another trainer's."""
    from fastpref.commands.init import init as run

    sources = {"--from-axolotl": from_axolotl, "--from-trl": from_trl, "--from-llamafactory": from_llamafactory}
    run(loss, model, data, sources, output, force=force)


@app.command(epilog="Example: fastpref check my.toml")
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Report every mistake in a config, each with its line."""
    from fastpref.model.limits import foresee

    loaded = load_config(config, overrides or ())
    training = "the whole model" if loaded.lora is None else f"LoRA adapters of {loaded.lora.ranks}"
    if loaded.lora is not None and loaded.lora.start is not None:
        training = f"{training} on top of" if loaded.lora.stack else "the LoRA adapter"
        training = f"{training} {loaded.lora.start}"
    typer.echo(f"{config}: no mistakes. {loaded.loss.type.upper()} on {loaded.model.name}, training {training}.")
    for note in foresee(loaded):
        typer.echo(f"note: {note}")


@app.command(epilog="Example: fastpref preview my.toml --rows 2")
def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, _value("N", "Show this many rows.", min=1)] = 4,
    full: Annotated[bool, _flag("--full", "Show long texts in full.")] = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Show the tokens a run would train on, and statistics of the data."""
    loaded = load_config(config, overrides or ())
    _prepare(offline)
    from fastpref.preview.preview import preview as run

    run(loaded, rows=rows, full=full, cache=not no_cache)


@app.command(epilog="Example: fastpref estimate my.toml --card 12 tokens.max_length=1024")
def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    card: Annotated[
        float | None, _value("GB", "Memory of the GPU. The default is this machine's GPU, or 24 GB.", min=1)
    ] = None,
    compare: Annotated[bool, _flag("--compare", "Estimate the same step in TRL, too.")] = False,
    cpu: Annotated[bool, _flag("--cpu", "Estimate a run on a CPU instead of a GPU.")] = False,
    as_json: AsJson = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Estimate a step's memory before a run, and what makes it fit.

    This needs no GPU and no weights, only the model's config.json.
    """
    load_config(config, overrides or ())  # reports mistakes before the heavy imports
    _prepare(offline)
    import torch

    from fastpref.commands.estimate import estimate as run
    from fastpref.memory.estimate import Estimator

    device = torch.device("cpu" if cpu else "cuda")
    estimator = Estimator(lambda more: load_config(config, [*(overrides or ()), *more]), device, cache=not no_cache)
    run(estimator, card=card, compare=compare, as_json=as_json)


@app.command(epilog="Example: fastpref train my.toml train.steps=20")
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, _flag("--resume", _CONTINUE, metavar="[FOLDER]")] = False,
    force: Annotated[bool, _flag("--force", "Replace the run in output.dir.")] = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Train a model on preferences or completions, or continue a run."""
    # Typer has no option whose value is optional, so the checkpoint's folder arrives among the overrides.
    named = [word for word in overrides or () if resume and (Path(word).is_dir() or "=" not in word)]
    try:
        loaded = load_config(config, [word for word in overrides or () if word not in named])
        if len(named) > 1:
            raise UserError(f"--resume takes one checkpoint, not {len(named)}: {', '.join(named)}")
    except UserError as error:
        if "WORLD_SIZE" not in os.environ:
            raise
        from fastpref.processes import end_together  # the processes on other hosts wait for this one

        end_together(error)
    _prepare(offline)
    from fastpref.training.start import train as run

    checkpoint = named[0] if named else resume
    if run(loaded, force=force, resume=checkpoint, default_name=config.stem, cache=not no_cache).interrupted:
        raise typer.Exit(130)


@app.command(epilog="Example: fastpref report runs/my-dpo --open")
def report(
    run: Annotated[Path, _argument("RUN", "A run's folder, or TRL's output folder with its trainer_state.json.")],
    open_page: Annotated[bool, _flag("--open", "Open the page in the browser.")] = False,
    loss: Annotated[str | None, _value("LOSS", f"The loss of a TRL run, one of {_LOSSES}.")] = None,
    beta: Annotated[float | None, _value("BETA", "The β of a TRL run.")] = None,
) -> None:
    """Diagnose a run, and write its report.html."""
    from fastpref.health import examine
    from fastpref.report import read_run, write_report
    from fastpref.training.progress import Display

    source = read_run(run, loss, beta)
    display = Display(source.history.step)
    for note in source.notes:
        display.note(note)
    display.health(examine(source.history, source.known))
    page = write_report(source)
    display.note(f"report: {page}")
    if open_page:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


@app.command(
    "eval", epilog="Example: fastpref eval runs/my-dpo, or: fastpref eval my-adapter --data pairs.jsonl --json"
)
def evaluate(
    model: TrainedModel,
    overrides: Overrides = None,
    data: Annotated[
        str | None, _value("PATH", "Preferences to evaluate on, instead of the run's held-out rows.")
    ] = None,
    reference: Annotated[
        str | None, _value("MODEL", "The model to compare with, instead of the one that training started from.")
    ] = None,
    as_json: AsJson = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Evaluate a model on held-out rows: rewards or perplexity, and KL."""
    _prepare(offline)
    from fastpref.commands import evaluate as evaluation
    from fastpref.model.failure import told_of_memory
    from fastpref.run.trained import find_trained

    trained = find_trained(model, overrides or ())
    compared = None if reference is None else find_trained(reference)
    budget = trained.config.tokens_per_microbatch
    with told_of_memory(
        f"while {trained.weights} was evaluated", f"set train.tokens_per_microbatch, which is {budget:,}, to less"
    ):
        metrics = evaluation.evaluate(trained, data=data, reference=compared, cache=not no_cache, tell=_note)
    evaluation.show(metrics, trained.weights, as_json=as_json)


@app.command(epilog="Example: fastpref chat runs/my-dpo --compare")
def chat(
    model: TrainedModel,
    overrides: Overrides = None,
    compare: Annotated[bool, _flag("--compare", "Show the answers of the model before training, too.")] = False,
    system: Annotated[str | None, _value("TEXT", "Start with this system message.")] = None,
    max_tokens: Annotated[int, _value("N", "The length limit of an answer.", min=1)] = 512,
    temperature: Annotated[
        float | None, _value("T", "0 decodes greedily. The default is the model's setting.", min=0)
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
        f"while {trained.weights} answered",
        'set model.quantization="nf4", or limit the length of an answer with --max-tokens',
    ):
        run(trained, compare=compare, system=system, max_tokens=max_tokens, temperature=temperature, tell=_note)


@app.command(epilog="Example: fastpref merge runs/my-dpo --output my-model")
def merge(
    model: Annotated[str, _argument("RUN", "The folder of a run or of an adapter.")],
    output: Annotated[Path, _value("FOLDER", "The folder to write. It must not exist.")],
    overrides: Overrides = None,
    dequantized: Annotated[
        bool | None,
        _flag(
            "--dequantized/--original",
            "Merge into the dequantised 4-bit weights (the default for an nf4 run), or into the original weights.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, _value("DTYPE", "float32, bfloat16 or float16. The default is that of the files.")
    ] = None,
    verify: Annotated[
        bool, _flag("--verify/--no-verify", "Load the model before and after, and compare logits.")
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
    with told_of_memory(
        f"while {model} was merged",
        "with model.streaming=true the models that are compared stay in host memory; --no-verify loads none",
    ):
        merged = run(find_trained(model, overrides or ()), output, dequantized=dequantized, dtype=kind, verify=verify)
    head = ", the head untied from the embeddings" if merged.untied else ""
    typer.echo(f"{merged.folder}: {merged.tensors} tensors changed{head}; merged onto {merged.onto}.")
    if merged.lost is not None:
        typer.echo(f"Compared on a probe: of what the adapter changes in the logits, {merged.lost:.2%} is lost.")


@app.command(epilog="Example: fastpref export runs/my-dpo --gguf --quant q8_0")
def export(
    model: TrainedModel,
    overrides: Overrides = None,
    gguf: Annotated[
        bool, _flag("--gguf", "Write GGUF, which llama.cpp and Ollama read: the only format so far.")
    ] = False,
    quant: Annotated[
        str | None, _value("TYPE", "q8_0 (the default), q4_0, f16, bf16 or f32, in which an adapter is written.")
    ] = None,
    adapter: Annotated[
        bool, _flag("--adapter", "Write the adapter alone, for use with a GGUF file of its base model.")
    ] = False,
    output: Annotated[
        Path | None, _value("FILE", "The file to write. The default is named after the run, in a folder of its own.")
    ] = None,
    dequantized: Annotated[
        bool | None,
        _flag(
            "--dequantized/--original",
            "Merge into the dequantised 4-bit weights (the default for an nf4 run), or into the original weights.",
        ),
    ] = None,
    offline: Offline = False,
) -> None:
    """Write a model or an adapter as a GGUF file."""
    if not gguf:
        raise UserError("name a format: --gguf, for llama.cpp and Ollama")
    _prepare(offline)
    from fastpref.export import export_adapter, export_model
    from fastpref.model.failure import told_of_memory
    from fastpref.run.trained import find_trained

    trained = find_trained(model, overrides or ())
    with told_of_memory(
        f"while {model} was exported", "a layer's tensors are converted together, which takes the most"
    ):
        if adapter and (quant is not None or dequantized is not None):
            raise UserError("--adapter: an adapter is written in f32, and not merged: leave out the other option")
        options: Any = {} if adapter else {"quant": quant or "q8_0", "dequantized": dequantized}
        typer.echo((export_adapter if adapter else export_model)(trained, output, **options).summary)


@app.command(epilog="Example: fastpref push runs/my-dpo --to me/my-model")
def push(
    run: Annotated[str, _argument("RUN", "The folder of a run, a model or an adapter.")],
    to: Annotated[str | None, _value("USER/NAME", "The repository. The default is the run's output.push_to.")] = None,
    public: Annotated[bool, _flag("--public", "Make a new repository public.")] = False,
) -> None:
    """Upload a trained model to the hub, privately by default."""
    _prepare(offline=False)
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
    print_schema()


def _note(note: str) -> None:
    """Print a remark to stderr, which keeps stdout for the result."""
    typer.echo(note, err=True)


def _prepare(offline: bool) -> None:
    """Set up the environment and the libraries' messages before anything heavy is imported."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it warns of a kernel for 4-bit inference
    from fastpref.quiet import quiet_libraries

    quiet_libraries()


def main() -> None:
    """Run a command. A UserError is printed as one message and ends with status 2."""
    try:
        app()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        who = "fastpref" if rank == "0" else f"fastpref (process {rank})"
        typer.echo(f"{who}: {error}", err=True)
        sys.exit(2)
