"""Commands on trained models: evaluate, use and pass them on. Heavy imports wait inside them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastpref.cli.parameters import AsJson, NoCache, Offline, Overrides, TrainedModel, argument, flag, value
from fastpref.cli.setup import loading, note
from fastpref.errors import UserError
from fastpref.places import require_place


def evaluate(
    model: TrainedModel,
    overrides: Overrides = None,
    data: Annotated[
        str | None, value("PATH", "Preferences to evaluate on, instead of the run's held-out rows.")
    ] = None,
    reference: Annotated[
        str | None, value("MODEL", "The model to compare with, instead of the one that training started from.")
    ] = None,
    as_json: AsJson = False,
    offline: Offline = False,
    no_cache: NoCache = False,
) -> None:
    """Evaluate a model on held-out rows: rewards or perplexity, and KL."""
    require_place(model)
    if reference is not None:
        require_place(reference)
    with loading(model, *([reference] if reference else []), offline=offline):
        from fastpref.commands import evaluate as evaluation
        from fastpref.model.failure import told_of_memory
        from fastpref.run.trained import find_trained

    trained = find_trained(model, overrides or ())
    compared = None if reference is None else find_trained(reference)
    budget = trained.config.tokens_per_microbatch
    with told_of_memory(
        f"while {trained.weights} was evaluated", f"set train.tokens_per_microbatch, which is {budget:,}, to less"
    ):
        metrics = evaluation.evaluate(trained, data=data, reference=compared, cache=not no_cache, tell=note)
    evaluation.show(metrics, trained.weights, as_json=as_json)


def chat(
    model: TrainedModel,
    overrides: Overrides = None,
    compare: Annotated[bool, flag("--compare", "Show the answers of the model before training, too.")] = False,
    system: Annotated[str | None, value("TEXT", "Start with this system message.")] = None,
    max_tokens: Annotated[int, value("N", "The length limit of an answer.", min=1)] = 512,
    temperature: Annotated[
        float | None, value("T", "0 decodes greedily. The default is the model's setting.", min=0)
    ] = None,
    offline: Offline = False,
) -> None:
    """Chat with a model in the terminal, or through a pipe."""
    require_place(model)
    with loading(model, offline=offline):
        from fastpref.commands.chat import chat as run
        from fastpref.model.failure import told_of_memory
        from fastpref.run.trained import find_trained

    trained = find_trained(model, overrides or ())
    with told_of_memory(
        f"while {trained.weights} answered",
        'set model.quantization="nf4", or limit the length of an answer with --max-tokens',
    ):
        run(trained, compare=compare, system=system, max_tokens=max_tokens, temperature=temperature, tell=note)


def merge(
    model: Annotated[str, argument("RUN", "The folder of a run or of an adapter.")],
    output: Annotated[Path, value("FOLDER", "The folder to write. It must not exist.")],
    overrides: Overrides = None,
    dequantized: Annotated[
        bool | None,
        flag(
            "--dequantized/--original",
            "Merge into the dequantised 4-bit weights (the default for an nf4 run), or into the original weights.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, value("DTYPE", "float32, bfloat16 or float16. The default is that of the files.")
    ] = None,
    verify: Annotated[
        bool, flag("--verify/--no-verify", "Load the model before and after, and compare logits.")
    ] = True,
    offline: Offline = False,
) -> None:
    """Merge an adapter into the weights, for use without PEFT."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: take float32, bfloat16 or float16")
    require_place(model)
    with loading(model, offline=offline):
        import torch

        from fastpref.commands.uses import of_merged
        from fastpref.merge import merge as run
        from fastpref.model.failure import told_of_memory
        from fastpref.run.trained import find_trained

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
    for line in of_merged(merged.folder):
        typer.echo(f"next: {line}")


def export(
    model: TrainedModel,
    overrides: Overrides = None,
    gguf: Annotated[
        bool, flag("--gguf", "Write GGUF, which llama.cpp and Ollama read: the only format so far.")
    ] = False,
    quant: Annotated[
        str | None, value("TYPE", "q8_0 (the default), q4_0, f16, bf16 or f32, in which an adapter is written.")
    ] = None,
    adapter: Annotated[
        bool, flag("--adapter", "Write the adapter alone, for use with a GGUF file of its base model.")
    ] = False,
    output: Annotated[
        Path | None, value("FILE", "The file to write. The default is named after the run, in a folder of its own.")
    ] = None,
    dequantized: Annotated[
        bool | None,
        flag(
            "--dequantized/--original",
            "Merge into the dequantised 4-bit weights (the default for an nf4 run), or into the original weights.",
        ),
    ] = None,
    offline: Offline = False,
) -> None:
    """Write a model or an adapter as a GGUF file."""
    if not gguf:
        raise UserError("name a format: --gguf, for llama.cpp and Ollama")
    require_place(model)
    with loading(model, offline=offline):
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


def push(
    run: Annotated[str, argument("RUN", "The folder of a run, a model or an adapter.")],
    to: Annotated[str | None, value("USER/NAME", "The repository. The default is the run's output.push_to.")] = None,
    public: Annotated[bool, flag("--public", "Make a new repository public.")] = False,
) -> None:
    """Upload a trained model to the hub, privately by default."""
    from fastpref.run.hub import check_login
    from fastpref.run.hub import push as upload

    require_place(run)
    if not Path(run).expanduser().exists():
        raise UserError(f"{run}: only a folder can be uploaded")
    if to is not None:
        check_login(to)
    with loading():
        from fastpref.run.trained import find_trained

    trained = find_trained(run)
    repository = to or trained.config.output.push_to
    if repository is None:
        raise UserError("name a repository, --to user/name, or set output.push_to")
    if not Path(trained.weights).is_dir():
        raise UserError(f"{run}: only a folder can be uploaded")
    typer.echo(f"{trained.weights} is at {upload(Path(trained.weights), repository, public=public)}")
