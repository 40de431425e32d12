"""The micro-batch that takes the most memory, from the lengths of the data or from `tokens.max_length` alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fastpref.config import Config
from fastpref.data.batch import Layout
from fastpref.data.example import Example, Origin
from fastpref.data.lengths import kept_prompt
from fastpref.data.plan import plan_step
from fastpref.data.table import Examples

STEPS = 1000  # of a run that are looked through


@dataclass(frozen=True)
class Microbatch:
    """Examples whose lengths alone mean something."""

    examples: list[Example]
    further: bool  # whether its step has other micro-batches
    tokens: int  # computed at once
    source: str  # where the lengths are from, in words


def longest_of(config: Config, examples: Examples, order: Iterator[list[int]], layout: Layout) -> Microbatch:
    """The one with the most tokens of the first steps of a run, whose examples come in `order`."""
    prompts, completions = _cut(config, examples.prompt_lengths, examples.completion_lengths)
    labels, contexts = examples.labels, examples.context_lengths
    largest: Microbatch | None = None
    steps = min(STEPS, config.train.steps or -(-len(examples) * config.train.epochs // config.train.batch))
    for places in islice(order, int(steps)):
        step = [
            _of_lengths(int(prompts[i]), completions[i], None if labels is None else bool(labels[i]), contexts[i])
            for i in places
        ]
        for part in microbatches(config, step, layout, f"the data, {len(examples):,} rows"):
            if largest is None or part.tokens > largest.tokens:
                largest = part
    assert largest is not None
    return largest


def longest_possible(config: Config) -> Microbatch:
    """As many examples of `tokens.max_length` as fill a micro-batch, all their tokens but the first scored."""
    longest, single = config.tokens.max_length, not config.loss.paired
    lengths = [longest - 1] * (1 if single else 2)
    size = 1 + sum(lengths)
    count = min(config.train.batch, max(1, config.tokens_per_microbatch // size))
    examples = [_of_lengths(1, lengths, bool(i % 2) if single else None) for i in range(count)]
    return Microbatch(examples, count < config.train.batch, count * size, f"tokens.max_length = {longest:,}")


def microbatches(
    config: Config, examples: Sequence[Example], layout: Layout, source: str = "the data"
) -> list[Microbatch]:
    """The micro-batches of a step of these examples, without KTO's mismatched completions, which the step adds."""
    trained = plan_step(config.loss, examples, layout, config.tokens_per_microbatch).trained
    several = len(trained.microbatches) > 1
    return [
        Microbatch([examples[i] for i in places], several, tokens, source)
        for places, tokens in zip(trained.microbatches, trained.tokens)
    ]


def _cut(config: Config, prompts: np.ndarray, completions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths as tokenising with a smaller `tokens.max_length` leaves those of text: prompts lose tokens first, down to
    half of it, then completions. Chats, whose turns go whole, are left no more tokens than that in all."""
    limit = config.tokens.max_length
    prompts = np.minimum(prompts, np.maximum(kept_prompt(limit), limit - completions.max(axis=1, initial=1)))
    return prompts, np.minimum(completions, (limit - prompts)[:, None])


def _of_lengths(
    prompt: int, completions: Sequence[int], label: bool | None, contexts: Sequence[int] | None = None
) -> Example:
    """`contexts`: how many tokens of each completion are not scored."""
    made = tuple([0] * int(length) for length in completions)
    if contexts is None or not any(contexts):
        return Example([0] * prompt, made, label, Origin(""))
    spans = tuple(((0, min(int(many), len(ids) - 1)),) for many, ids in zip(contexts, made))
    return Example([0] * prompt, made, label, Origin(""), spans)
