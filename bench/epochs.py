"""Pairs a second of each pass over the rows: what remembering the reference's log-probabilities saves.

    python -m bench.epochs examples/quickstart.toml train.batch=16 data.0.rows=96

Trains two passes (--passes) without held-out rows, with an empty cache: once with `reference.mode = "auto"`, which
remembers what it has computed, and once with "adapter", which computes it in every step. The row of "adapter" shows how
much the passes differ by their order and by other load. The first step and steps that belong to two passes are left
out. On a CPU, time is that of the process, which other load disturbs less than the clock on the wall.
"""

import os
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table

import fastpref
from fastpref.config import load_config
from fastpref.data.cache import load_examples
from fastpref.model.tokenizer import load_tokenizer
from fastpref.training.progress import Display

MODES = ("auto", "adapter")


def speeds(config: Path, overrides: list[str], mode: str, passes: int) -> list[float]:
    """Train in a temporary folder with an empty cache, and return the pairs (or rows) a second of each pass."""
    settings = [f"reference.mode={mode}", f"train.epochs={passes}", "eval.data=[]", "eval={}"]
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTPREF_CACHE"] = f"{folder}/cache"
        options = load_config(config, [*overrides, *settings, f"output.dir={folder}/run"]).but({"train.steps": None})
        count, batch = len(load_examples(options, load_tokenizer(options.model)).train), options.train.batch
        ended = patch.object(Display, "step", lambda *_: ends.append(clock()))
        with Path(folder, "log").open("w") as log, redirect_stdout(log), ended:
            fastpref.train(options)
    seconds, pairs = [0.0] * passes, [0] * passes
    for step in range(1, len(ends)):  # without the first, which warms up
        first, last = step * batch, (step + 1) * batch - 1
        if first // count == last // count:
            seconds[first // count] += ends[step] - ends[step - 1]
            pairs[first // count] += batch
    return [number / time for number, time in zip(pairs, seconds, strict=True)]


def main(
    config: Annotated[Path, typer.Argument(help="a config with a [lora] table")],
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE")] = None,
    passes: Annotated[int, typer.Option(min=2)] = 2,
) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("pairs/s", *(f"pass {number + 1}" for number in range(passes)), "last / first"):
        table.add_column(column, justify="left" if column == "pairs/s" else "right")
    for mode in MODES:
        found = speeds(config, overrides or [], mode, passes)
        table.add_row(mode, *(f"{speed:.3g}" for speed in found), f"{found[-1] / found[0]:.2f} ×")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
