"""The comparison a user runs on their own machine: `python -m bench`, and its commands `compare` and `first-card`."""

import datetime
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(add_completion=False, no_args_is_help=False)
console = Console(stderr=True)
PARTS = ("head", "losses", "scaling", "steps")
PREFIXES, STREAMING = "prefixes", "streaming"  # profiles with one part, of their name


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    profile: Annotated[str, typer.Option(help="tiny, quick, full, gpu-quick, gpu, prefixes or streaming.")] = "quick",
    output: Annotated[Path, typer.Option(help="The folder of the results.")] = Path("bench-results"),
    only: Annotated[list[str] | None, typer.Option(help="head, losses, scaling or steps; may be repeated.")] = None,
    match: Annotated[str, typer.Option(help='Words that a case of the head must have: "Gemma-2-2B frozen".')] = "",
    base: Annotated[str | None, typer.Option(help="A revision of this repository, measured in turn with it.")] = None,
    gate: Annotated[float | None, typer.Option(help="Fail if fastpref's head takes more × the bare products.")] = None,
    model: Annotated[Path | None, typer.Option(help="For whole steps: a model's folder; by default random.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="For whole steps: a file of pairs; the default is the quickstart's.")
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="For whole steps: the pairs of a step.", min=1)] = None,
) -> None:
    """Measure a profile, and write JSON, a table and plots to a folder.

    Examples:

        python -m bench
        python -m bench --profile full --only head --base HEAD~1
        python -m bench --profile prefixes --data pairs.jsonl
        python -m bench --profile streaming --model models/llama --data pairs.jsonl
    """
    if context.invoked_subcommand is not None:
        return
    if profile in (PREFIXES, STREAMING):
        if only or match or base or gate is not None:
            _refuse(f"--profile {profile}: --only, --match, --base and --gate are for the other profiles")
        _write(_measure_steps(profile, model, data, pairs), output)
        return
    if model or data or pairs:
        _refuse(f"--profile {profile}: --model, --data and --pairs are for --profile prefixes and streaming")
    parts = tuple(only or PARTS)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        _refuse(f"--only {unknown[0]}: known are {', '.join(PARTS)}")
    result = _measure(profile, parts, base, match.split())
    _write(result, output)
    if gate is not None:
        _check(result, gate)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A results folder, or its results.json.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    threshold: Annotated[float, typer.Option(help="The growth of time or memory that is a regression.")] = 0.15,
) -> None:
    """Set fastpref's numbers of two results side by side; exit status 1 if one has regressed.

    Times are compared as multiples of the bare products of their own run, so that the machine cancels.

    Example:

        python -m bench compare bench-results-main bench-results --threshold 0.1
    """
    from bench.results import changes

    numbers = changes(_read(before), _read(after))
    if not numbers:
        _refuse(f"{before} and {after} have no case in common")
    table = Table("what", "unit", "before", "after", "×", "")
    regressed = [change for change in numbers if change.regressed(threshold)]
    for change in numbers:
        verdict = "regressed" if change in regressed else "within the spread" if change.within_spread else ""
        cells = f"{change.before:.2f}", f"{change.after:.2f}", f"{change.factor:.2f}"
        table.add_row(change.what, change.unit, *cells, verdict)
    Console().print(table)
    inside = sum(change.within_spread for change in numbers)
    print(f"{inside} of {len(numbers)} numbers differ by no more than the spread of their runs")
    if regressed:
        print(f"{len(regressed)} have grown by more than {threshold:.0%}")
        raise typer.Exit(1)


@app.command("first-card")
def first_card(
    minutes: Annotated[float, typer.Option(help="The most that all blocks take together.", min=0.1)] = 10.0,
    output: Annotated[Path, typer.Option(help="The folder of the results.")] = Path("first-card"),
) -> None:
    """Check on a GPU that all kernels are right, then measure how fast they are; exit status 1 if one is wrong.

    Nothing is downloaded. On a CPU, tiny sizes run to the end, which says nothing about a GPU.

    Example:

        python -m bench first-card --minutes 5
    """
    from bench.first_card.__main__ import first_card as run_all

    raise typer.Exit(run_all(minutes, output))


def _measure(name: str, parts: tuple[str, ...], base: str | None, words: list[str]) -> dict[str, Any]:
    import torch

    from bench.losses import LOSSES, LossCase, measure_loss
    from bench.measure import measure
    from bench.profiles import PROFILES
    from bench.results import head_record
    from bench.revision import Revision, UnknownRevision
    from bench.scaling import sweeps

    if name not in PROFILES:
        _refuse(f"--profile {name}: known are {', '.join(PROFILES)}, {PREFIXES}, {STREAMING}")
    profile = PROFILES[name]
    if profile.device == "cuda" and not torch.cuda.is_available():
        _refuse(f"--profile {name}: there is no GPU here; take quick or full")
    began = time.perf_counter()
    result = _circumstances(name, profile.device, profile.rule)
    with ExitStack() as stack:
        try:
            revisions = [stack.enter_context(Revision(name)) for name in (None, base)] if base else []
        except UnknownRevision as error:
            _refuse(f"--base {base}: {error}")
        if "head" in parts:
            for case in profile.cases(words):
                console.print(f"head: {case.name}")
                others = {f"fastpref, {other.name}": other.take(case) for other in revisions}
                result["head"].append(head_record(case, measure(case, profile.repeats, others=others)))
    if "losses" in parts:
        for name in LOSSES:
            console.print(f"loss: {name}")
            case = LossCase(name, *profile.losses, profile.device)
            result["losses"].append(measure_loss(case, profile.repeats))
    if "scaling" in parts:
        console.print(f"growth of the head of {profile.scaled}")
        shape = profile.shape(profile.scaled)
        result["scaling"] = list(sweeps(shape, profile.factors, profile.dtype, profile.device, profile.repeats))
    if "steps" in parts:
        from bench.trainers import compare_shape

        for shape in profile.steps:
            for method in profile.methods:
                console.print(f"steps: {method}, {shape.what}")
                result["steps"].append(compare_shape(shape, method))
    result["seconds"] = time.perf_counter() - began
    return result


def _measure_steps(profile: str, model: Path | None, data: Path | None, pairs: int | None) -> dict[str, Any]:
    from dataclasses import replace

    import torch

    from bench import profiles
    from bench.prefixes import compare_layouts
    from bench.streaming import compare_streaming

    if data is not None and not data.exists():
        _refuse(f"--data {data}: no such file or folder")
    if model is not None and not model.exists():
        _refuse(f"--model {model}: no such file or folder")
    began, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    sizes: Any = profiles.PREFIXES
    if profile == STREAMING:
        sizes = profiles.STREAMING if device == "cpu" else profiles.STREAMING_GPU
    if pairs is not None:
        sizes = replace(sizes, shape=replace(sizes.shape, batch=pairs))
    result = _circumstances(profile, device, sizes.rule)
    compare = compare_layouts if profile == PREFIXES else compare_streaming
    for record in compare(sizes, model, data):
        console.print(f"{profile}: {record['what']}, after {time.perf_counter() - began:.0f} s")
        result[profile].append(record)
    result["seconds"] = time.perf_counter() - began
    return result


def _circumstances(profile: str, device: str, rule: str) -> dict[str, Any]:
    """Return a result without numbers yet."""
    from bench import machine

    return {
        "profile": profile,
        "command": "python -m bench" + " ".join(["", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(device),
        "rule": rule,
    } | {part: [] for part in (*PARTS, PREFIXES, STREAMING)}


def _write(result: dict[str, Any], folder: Path) -> None:
    from bench.plots import draw
    from bench.results import markdown

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(result))
    draw(result, folder)
    console.print(f"{folder}: results.json, results.md and plots, after {result['seconds'] / 60:.1f} minutes")


def _check(result: dict[str, Any], limit: float) -> None:
    """Exit with 1 if a method or a first loss is wrong, or if even the best turn's ratio exceeds `limit`."""
    from bench.results import OURS, key, ratios, same_loss

    for record in result["head"]:
        wrong = [f"{row['method']}: {row['note']}" for row in record["rows"] if row["note"].startswith("wrong")]
        ratio = min(ratios(record, OURS), default=float("inf"))
        if ratio > limit or wrong:
            print(f"{key(record)}: fastpref took {ratio:.2f} × the bare products, at most {limit} are allowed; {wrong}")
            raise typer.Exit(1)
    for step in result["steps"]:
        base, *others = [engine for engine in step["engines"] if "note" not in engine]
        wrong = [f"{one['engine']}: {one['loss']:.4f}" for one in others if not same_loss(one, base)]
        if wrong:
            print(f"{step['method']}, {step['what']}: TRL's first loss is {base['loss']:.4f}, not that of {wrong}")
            raise typer.Exit(1)


def _read(path: Path) -> dict[str, Any]:
    file = path / "results.json" if path.is_dir() else path
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        return _refuse(f"{file}: not a result of python -m bench: {error}")


def _refuse(message: str) -> Any:
    console.print(f"bench: {message}", style="red", markup=False)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
