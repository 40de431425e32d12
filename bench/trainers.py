"""Pairs a second and peak memory of whole training steps: fastpref against TRL, on the same rows.

    python -m bench.trainers MODEL_FOLDER PAIRS_FILE --method dpo --method orpo

The settings are TRL 1.16's defaults (see `engines.py`): gradient checkpointing is on, rows have at most 1,024 tokens.
Takes the first rows that fit without a cut, and trains each engine on them in a process of its own, in turns: LoRA on
all linear layers, batches of --batch pairs, float32 on a CPU and bfloat16 on a GPU. KTO gets both completions of every
pair as rows of their own, two for a pair in each batch. All engines get the same tokens, so their first losses must be
the same; a table marks one that is not.
Speed is that of one pass over the rows, so that every engine has the same work, whatever its order; on a GPU a first
pass warms up. On a CPU a second is one of the process, which other load disturbs less than a second on the wall: set
OMP_NUM_THREADS=1, so that waiting threads do not count. Memory is the peak over what was held once the model was
loaded: resident memory on a CPU, allocated memory on a GPU. The small random models of `python -m bench` take less than
libraries do: there, on a CPU, it is the peak of all tensor storages that are made once the model is loaded, in a
further run that counts and is not timed.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.engines import ELSEWHERE, ENGINES, Job
from bench.results import first_loss, speedups, with_spread
from bench.step_data import (
    StepShape,
    as_text,
    choose_rows,
    count_tokens,
    make_rows,
    split_pairs,
    write_model,
    write_rows,
)

LIGER = "Liger's layer kernels need a GPU"


class EngineFailed(Exception):
    """A job whose process failed, with the last lines that it printed."""


def run_apart(job: Job) -> dict[str, Any]:
    """Run a job in a process of its own, so that peaks do not mix."""
    command = [sys.executable, "-m", "bench.engines", json.dumps(asdict(job))]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    if process.returncode:
        raise EngineFailed(process.stderr[-3000:])
    return json.loads(process.stdout.splitlines()[-1])


def compare(
    model: Path,
    texts: list[dict[str, str]],
    method: str,
    batch: int,
    max_length: int,
    *,
    turns: int = 1,
    checkpointing: bool = True,
    counted: bool = False,
    profiled: bool = False,
) -> list[dict[str, Any]]:
    """Run each engine in turn, TRL first, on rows of `as_text`. An engine that fails has a note instead of numbers."""
    import torch

    gpu = torch.cuda.is_available()
    tokens = count_tokens(str(model), texts)[1] / len(texts)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(split_pairs(texts) if method == "kto" else texts, file)
        job = Job(
            engine="trl",
            method=method,
            model=str(model.resolve()),
            rows=str(file),
            passes=2 if gpu else 1,
            steps=len(texts) // batch,
            batch=batch,
            max_length=max_length,
            checkpointing=checkpointing,
        )
        runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
        notes = {} if gpu else {"trl-liger": LIGER}
        for _ in range(turns):
            for engine in [engine for engine in ENGINES if engine not in notes]:
                try:
                    runs[engine].append(run_apart(replace(job, engine=engine)))
                except EngineFailed as error:
                    if engine in ("trl", "fastpref"):
                        raise
                    notes[engine] = f"failed: {str(error).strip().splitlines()[-1][:120]}"
        ran = [engine for engine in ENGINES if engine not in notes]
        further: dict[str, dict[str, Any]] = {engine: {} for engine in ran}
        for engine in ran:
            if counted:
                further[engine]["peak"] = run_apart(replace(job, engine=engine, counted=True))["peak"]
            if profiled:
                further[engine]["shares"] = run_apart(replace(job, engine=engine, profiled=True))["shares"]
    results = {engine: {"engine": engine, "note": note} for engine, note in notes.items()}
    for engine in ran:
        results[engine] = _record(job, engine, runs[engine], tokens) | further[engine]
    return [results[engine] for engine in ENGINES]


def _record(job: Job, engine: str, runs: list[dict[str, Any]], tokens_a_pair: float) -> dict[str, Any]:
    """Return an engine's numbers over its turns: its speeds, median speed, largest peak, and first loss."""
    speeds = [job.steps * job.batch / sum(run["seconds"][-job.steps :]) for run in runs]
    joules, pairs = runs[0]["joules"], job.passes * job.steps * job.batch
    return {
        "engine": engine,
        "speeds": speeds,
        "pairs_per_second": median(speeds),
        "tokens_per_second": median(speeds) * tokens_a_pair,
        "peak": max(run["peak"] for run in runs),
        "loss": runs[0]["loss"][0],
        "shares": runs[0]["shares"],
        "joules_a_pair": joules / pairs if joules else None,
    }


def compare_shape(shape: StepShape, method: str) -> dict[str, Any]:
    """Compare the engines on a random model and random rows of given sizes."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(shape, model)
        texts = as_text(str(model), make_rows(shape))
        counted = not torch.cuda.is_available()
        results = compare(model, texts, method, shape.batch, 2 * shape.length, counted=counted)
    return {"what": shape.what, "method": method, "engines": results}


def main(
    model: Annotated[str, typer.Argument(help="A model's folder.")] = "",
    pairs: Annotated[Path | None, typer.Argument(help="A .json or .jsonl file of pairs.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="dpo, ipo, kto, orpo or simpo; may be repeated.")] = None,
    rows: int = 8,
    batch: int = 2,
    max_length: Annotated[int, typer.Option(help="Longer rows are left out; TRL's default.")] = 1024,
    turns: Annotated[int, typer.Option(help="How often the engines run, one after the other.", min=1)] = 1,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing, TRL's default.")] = True,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show the shares of matrix products and attention, in a further run.")
    ] = False,
) -> None:
    """Compare the engines on a model and pairs of yours, and print a table."""
    if not model or pairs is None:
        raise typer.BadParameter("give a model's folder and a file of pairs")
    import torch

    from bench.machine import describe

    machine = describe("cuda" if torch.cuda.is_available() else "cpu")
    name = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    texts = as_text(model, choose_rows(model, pairs, rows, max_length))
    prompts, tokens = count_tokens(model, texts)
    where = f"{name}, {machine['threads']} threads, TRL {machine['versions'].get('trl')}"
    table = Table(
        title=f"the first {rows} pairs of at most {max_length:,} tokens ({tokens / rows / 2:,.0f} tokens a sequence, "
        f"{prompts / tokens:.0%} of them prompt), {batch} a step, LoRA of rank 16, gradient checkpointing "
        f"{'on' if checkpointing else 'off'}, {where}"
    )
    columns = ["method", "trainer", "pairs/s", "× TRL", "tokens/s", "peak over the model", "× TRL", "first loss"]
    for column in [*columns, *(["products", "attention"] if profile else [])]:
        table.add_column(column, justify="right")
    for one in method or ["dpo", "orpo"]:
        results = compare(
            Path(model), texts, one, batch, max_length, turns=turns, checkpointing=checkpointing, profiled=profile
        )
        base = results[0]
        for result in results:
            if "note" in result:
                table.add_row(one, ENGINES[result["engine"]], result["note"])
                continue
            table.add_row(
                one,
                ENGINES[result["engine"]],
                f"{result['pairs_per_second']:.3f}",
                with_spread(speedups(result, base)),
                f"{result['tokens_per_second']:.0f}",
                f"{result['peak'] / 1e9:.2f} GB",
                f"{result['peak'] / base['peak']:.2f}",
                first_loss(result, base),
                *(f"{share:.0%}" for share in result["shares"].values() if profile),
            )
    Console().print(table)
    for engine, why in ELSEWHERE.items():
        print(f"{engine}: {why}")


if __name__ == "__main__":
    typer.run(main)
