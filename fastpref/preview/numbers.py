"""Compute the statistics of a preview: lengths, shares, and the tokens of a step in each layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from fastpref.config import Config
from fastpref.data.batch import Layout
from fastpref.data.example import Example
from fastpref.data.plan import plan_step
from fastpref.data.table import Examples

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PERCENTILES = (5, 50, 95, 100)
_STEPS = 50  # the tokens of a step are averaged over this many steps


@dataclass(frozen=True)
class Lengths:
    """Percentiles of one part's token counts: the least counts that 5, 50, 95 and 100 % of the rows do not exceed."""

    name: str
    percentiles: tuple[int, ...]


@dataclass(frozen=True)
class StepTokens:
    """The mean number of tokens that a step computes in each layout, over the first `steps` steps in data order."""

    rows: int  # rows per step
    steps: int
    tokens: dict[Layout, float]


def lengths(examples: Examples) -> list[Lengths]:
    """Return the percentiles of the lengths of prompts and of each kind of completion, and how many lists have."""
    parts = {"prompt": examples.prompt_lengths}
    if examples.ranked:
        every = examples.completion_lengths.ravel()
        parts |= {"completion": every[every > 0], "completions a row": examples.completions}
    else:
        columns = examples.completion_lengths.T
        parts |= zip(("completion",) if len(columns) == 1 else ("chosen", "rejected"), columns)
    return [
        Lengths(name, tuple(int(n) for n in np.percentile(counts, PERCENTILES, method="inverted_cdf")))
        for name, counts in parts.items()
    ]


def prompt_share(examples: Examples) -> float:
    """Return the share of prompts in all tokens, with each prompt counted once."""
    prompts = int(examples.prompt_lengths.sum())
    return prompts / (prompts + int(examples.completion_lengths.sum()))


def good_share(examples: Examples) -> float | None:
    """Return the share of good completions for KTO's data, and None for pairs."""
    labels = examples.labels
    return None if labels is None else float(labels.mean())


def step_tokens(examples: Sequence[Example], config: Config) -> StepTokens:
    """Count the tokens that steps of `train.batch` consecutive rows compute."""
    rows = min(config.train.batch, len(examples))
    steps = min(_STEPS, len(examples) // rows)
    totals = dict.fromkeys(LAYOUTS, 0)
    for step in range(steps):
        chunk = examples[step * rows : (step + 1) * rows]
        for layout in LAYOUTS:
            totals[layout] += _one_step(chunk, config, layout)
    return StepTokens(rows, steps, {layout: total / steps for layout, total in totals.items()})


def _one_step(examples: Sequence[Example], config: Config, layout: Layout) -> int:
    return plan_step(config.loss, examples, layout, config.tokens_per_microbatch).tokens
