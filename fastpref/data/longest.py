"""Find the micro-batch that takes the most memory, from the lengths of the data or from `tokens.max_length` alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fastpref.config import Config
from fastpref.data.batch import Layout
from fastpref.data.example import Example, Origin
from fastpref.data.lengths import kept_prompt
from fastpref.data.order import data_order
from fastpref.data.plan import plan_step
from fastpref.data.table import Examples

STEPS = 1000  # first steps of a run that are searched


@dataclass(frozen=True)
class Microbatch:
    """A micro-batch of placeholder examples, in which only the lengths are meaningful."""

    examples: list[Example]
    further: bool  # whether its step has other micro-batches
    tokens: int  # that the micro-batch computes
    source: str  # the source of the lengths, in words


def longest_of(config: Config, examples: Examples, layout: Layout) -> Microbatch:
    """Return the micro-batch with the most tokens among the first steps of a run."""
    prompts, completions = _cut(config, examples.prompt_lengths, examples.completion_lengths)
    labels, contexts = examples.labels, examples.context_lengths
    largest: Microbatch | None = None
    steps = min(STEPS, config.train.steps or -(-len(examples) * config.train.epochs // config.train.batch))
    for places in islice(data_order(len(examples), config.train.batch, config.train.seed), int(steps)):
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
    """Return a micro-batch full of examples of `tokens.max_length`, whose tokens are all scored but the first."""
    longest, single = config.tokens.max_length, not config.loss.paired
    lengths = [longest - 1] * (1 if single else 2)
    size = 1 + sum(lengths)
    count = min(config.train.batch, max(1, config.tokens_per_microbatch // size))
    examples = [_of_lengths(1, lengths, bool(i % 2) if single else None) for i in range(count)]
    return Microbatch(examples, count < config.train.batch, count * size, f"tokens.max_length = {longest:,}")


def microbatches(
    config: Config, examples: Sequence[Example], layout: Layout, source: str = "the data"
) -> list[Microbatch]:
    """Return the micro-batches of a step, without KTO's mismatched completions, which the step adds."""
    trained = plan_step(config.loss, examples, layout, config.tokens_per_microbatch).trained
    several = len(trained.microbatches) > 1
    return [
        Microbatch([examples[i] for i in places], several, tokens, source)
        for places, tokens in zip(trained.microbatches, trained.tokens)
    ]


def _cut(config: Config, prompts: np.ndarray, completions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of texts after tokenising with a smaller `tokens.max_length`: prompts lose tokens first, down
    to half of it, then completions. Chats lose whole turns, so they keep at most as many tokens in all."""
    limit = config.tokens.max_length
    prompts = np.minimum(prompts, np.maximum(kept_prompt(limit), limit - completions.max(axis=1, initial=1)))
    return prompts, np.minimum(completions, (limit - prompts)[:, None])


def _of_lengths(
    prompt: int, completions: Sequence[int], label: bool | None, contexts: Sequence[int] | None = None
) -> Example:
    """Return an example of these lengths. `contexts` is the number of unscored tokens of each completion."""
    ids = tuple([0] * int(length) for length in completions)
    if contexts is None or not any(contexts):
        return Example([0] * prompt, ids, label, Origin(""))
    spans = tuple(((0, min(int(many), len(own) - 1)),) for many, own in zip(contexts, ids))
    return Example([0] * prompt, ids, label, Origin(""), spans)
