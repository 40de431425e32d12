"""Find the micro-batch that takes the most memory, from the data or from `tokens.max_length` alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from fastpref.config import Config
from fastpref.data.batch import Layout
from fastpref.data.example import Example, Origin
from fastpref.data.lengths import cut, kept_prompt
from fastpref.data.order import data_order
from fastpref.data.plan import plan_step
from fastpref.data.table import Examples

STEPS = 1000  # first steps of a run that are searched
LIST = 4  # completions of a row that are assumed for a loss of lists, if no data says how many there are


@dataclass(frozen=True)
class Microbatch:
    """A micro-batch, of placeholder examples if its source is no data."""

    examples: list[Example]
    further: bool  # whether it follows another of its step, whose gradients exist meanwhile
    tokens: int  # that the micro-batch computes
    source: str  # the source of the lengths, in words


def longest_of(config: Config, examples: Examples, layout: Layout) -> list[Microbatch]:
    """Return the micro-batch with the most tokens among the first steps of a run.

    If it is the first of its step, the longest one that follows another comes second, if there is any: it may take more
    memory, because there are gradients beside it.
    """
    prompts, completions = _cut(config, examples.prompt_lengths, examples.completion_lengths)
    counts = examples.completions
    largest: dict[bool, Microbatch] = {}  # by whether it follows another
    steps = min(STEPS, config.train.steps or -(-len(examples) * config.train.epochs // config.train.batch))
    for places in islice(data_order(len(examples), config.train.batch, config.train.seed), int(steps)):
        step = [_shortened(examples[i], int(prompts[i]), completions[i, : counts[i]].tolist()) for i in places]
        for part in microbatches(config, step, layout, f"the data, {len(examples):,} rows"):
            if part.further not in largest or part.tokens > largest[part.further].tokens:
                largest[part.further] = part
    by_tokens = sorted(largest.values(), key=lambda part: (-part.tokens, not part.further))
    return by_tokens[:1] if by_tokens[0].further else by_tokens


def longest_possible(config: Config) -> Microbatch:
    """Return a micro-batch full of examples of `tokens.max_length`, whose tokens are all scored but the first."""
    longest, single, ranked = config.tokens.max_length, not config.loss.paired, config.loss.listwise
    completions = 1 if single else LIST if ranked else 2
    size = 1 + completions * (longest - 1)
    count = min(config.train.batch, max(1, config.tokens_per_microbatch // size))
    examples = [
        # The first tokens differ, so that no two sequences share more than their prompt.
        Example(
            [i],
            tuple([i * completions + k] + [0] * (longest - 2) for k in range(completions)),
            bool(i % 2) if single and not config.loss.supervised else None,
            Origin(""),
            scores=tuple(map(float, range(completions))) if ranked else (),
        )
        for i in range(count)
    ]
    source = f"tokens.max_length = {longest:,}" + f" and {LIST} completions a row" * ranked
    return Microbatch(examples, count < config.train.batch, count * size, source)


def microbatches(
    config: Config, examples: Sequence[Example], layout: Layout, source: str = "the data"
) -> list[Microbatch]:
    """Return the micro-batches of a step, without KTO's mismatched completions, which the step adds."""
    trained = plan_step(config.loss, examples, layout, config.tokens_per_microbatch).trained
    return [
        Microbatch([examples[i] for i in places], number > 0, tokens, source)
        for number, (places, tokens) in enumerate(zip(trained.microbatches, trained.tokens))
    ]


def _cut(config: Config, prompts: np.ndarray, completions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of texts after tokenising with a smaller `tokens.max_length`: prompts lose tokens first, down
    to half of it, then completions. Chats lose whole turns, so they keep at most as many tokens in all."""
    limit = config.tokens.max_length
    prompts = np.minimum(prompts, np.maximum(kept_prompt(limit), limit - completions.max(axis=1, initial=1)))
    return prompts, np.minimum(completions, (limit - prompts)[:, None])


def _shortened(example: Example, prompt: int, completions: Sequence[int]) -> Example:
    """Return an example with the last `prompt` tokens of its prompt, and the first tokens of its completions."""
    if prompt == len(example.prompt) and list(map(len, example.completions)) == completions:
        return example
    parts = [cut(ids, example.context(k), room) for k, (ids, room) in enumerate(zip(example.completions, completions))]
    contexts = tuple(context for _, context in parts)
    return replace(
        example,
        prompt=example.prompt[len(example.prompt) - prompt :],
        completions=tuple(ids or [0] for ids, _ in parts),
        contexts=contexts if any(contexts) else (),
    )
