"""Pairs a second and peak memory of whole training steps: fastpref against TRL, on the same rows.

    python -m bench.trainers MODEL_FOLDER PAIRS_FILE --method dpo --method orpo

Takes the first rows that fit in --max-length without a cut, and trains each engine on them in a process of its own,
one after the other: LoRA on all linear layers, batches of --batch pairs, float32 on a CPU and bfloat16 on a GPU. KTO
gets both completions of every pair as rows of their own, two for a pair in each batch.
Speed is that of one pass over the rows, so that every engine has the same work, whatever its order; on a GPU a first
pass warms up. Memory is the peak over what was held once the model was loaded: resident memory on a CPU, allocated
memory on a GPU. The small random models of `python -m bench` take less than libraries do: there, on a CPU, it is the
peak of all tensor storages that are made once the model is loaded, in a further run that counts and is not timed.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.engines import ENGINES, Job
from bench.step_data import StepShape, choose_rows, count_tokens, make_rows, split_pairs, write_model, write_rows


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


def engines_for(method: str) -> list[str]:
    """Return the engines for a method. TRL's Liger path needs a GPU and supports only DPO and KTO."""
    import torch

    liger = torch.cuda.is_available() and method in ("dpo", "kto")
    return [engine for engine in ENGINES if liger or engine != "trl-liger"]


def compare(
    model: Path,
    pairs: list[dict[str, Any]],
    method: str,
    batch: int,
    max_length: int,
    *,
    checkpointing: bool = False,
    tokens_a_pair: float = 0.0,
    counted: bool = False,
    profiled: bool = False,
) -> list[dict[str, Any]]:
    """Run each engine in turn, TRL first. An engine that fails has a note instead of numbers."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(split_pairs(pairs) if method == "kto" else pairs, file)
        job = Job(
            engine="trl",
            method=method,
            model=str(model.resolve()),
            rows=str(file),
            passes=2 if torch.cuda.is_available() else 1,
            steps=len(pairs) // batch,
            batch=batch,
            max_length=max_length,
            checkpointing=checkpointing,
        )
        results = []
        for engine in engines_for(method):
            try:
                result = run_apart(replace(job, engine=engine))
                if counted:
                    result["peak"] = run_apart(replace(job, engine=engine, counted=True))["peak"]
                if profiled:
                    result["shares"] = run_apart(replace(job, engine=engine, profiled=True))["shares"]
            except EngineFailed as error:
                if engine in ("trl", "fastpref"):
                    raise
                results.append({"engine": engine, "note": f"failed: {str(error).strip().splitlines()[-1][:120]}"})
                continue
            speed = job.steps * batch / sum(result["seconds"][-job.steps :])
            results.append(
                {
                    "engine": engine,
                    "pairs_per_second": speed,
                    "tokens_per_second": speed * tokens_a_pair,
                    "peak": result["peak"],
                    "loss": result["loss"][0],
                    "shares": result["shares"],
                    "joules_a_pair": result["joules"] / (job.passes * job.steps * batch) if result["joules"] else None,
                }
            )
    return results


def compare_shape(shape: StepShape, method: str) -> dict[str, Any]:
    """Compare the engines on a random model and random rows of given sizes."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(shape, model)
        pairs = make_rows(shape)
        tokens, counted = count_tokens(str(model), pairs) / len(pairs), not torch.cuda.is_available()
        results = compare(model, pairs, method, shape.batch, 2 * shape.length, tokens_a_pair=tokens, counted=counted)
    return {"what": shape.what, "method": method, "engines": results}


def main(
    model: Annotated[str, typer.Argument(help="A model's folder.")] = "",
    pairs: Annotated[Path | None, typer.Argument(help="A .json or .jsonl file of pairs.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="dpo, ipo, kto, orpo or simpo; may be repeated.")] = None,
    rows: int = 8,
    batch: int = 2,
    max_length: int = 768,
    checkpointing: bool = False,
    prompts: Annotated[
        str, typer.Option(help="all rows, or the half with more (heavy) or less prompt (light).")
    ] = "all",
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
    chosen = choose_rows(model, pairs, rows, max_length, prompts)
    tokens = count_tokens(model, chosen) / len(chosen)
    table = Table(
        title=f"{rows} pairs of at most {max_length} tokens, prompts: {prompts}, {batch} a step, LoRA rank 16, {name}, "
        f"{machine['threads']} threads, TRL {machine['versions'].get('trl')}"
    )
    columns = ["method", "engine", "pairs/s", "× TRL", "tokens/s", "peak over the model", "× TRL", "first loss"]
    for column in [*columns, *(["products", "attention"] if profile else [])]:
        table.add_column(column, justify="right")
    for one in method or ["dpo", "orpo"]:
        results = compare(
            Path(model), chosen, one, batch, max_length, checkpointing=checkpointing, tokens_a_pair=tokens,
            profiled=profile,
        )  # fmt: skip
        base = results[0]
        for result in results:
            if "note" in result:
                table.add_row(one, ENGINES[result["engine"]], result["note"])
                continue
            table.add_row(
                one,
                ENGINES[result["engine"]],
                f"{result['pairs_per_second']:.3f}",
                f"{result['pairs_per_second'] / base['pairs_per_second']:.2f}",
                f"{result['tokens_per_second']:.0f}",
                f"{result['peak'] / 1e9:.2f} GB",
                f"{result['peak'] / base['peak']:.2f}",
                f"{result['loss']:.4f}",
                *(f"{share:.0%}" for share in result["shares"].values() if profile),
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
