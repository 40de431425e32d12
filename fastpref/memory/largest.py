"""The search for the longest rows and the largest micro-batches that fit a GPU."""

from collections.abc import Callable
from dataclasses import dataclass

from fastpref.data.longest import longest_possible
from fastpref.memory.estimate import Estimator
from fastpref.memory.process import Card, process
from fastpref.memory.step import StepMemory
from fastpref.model.limits import limits_of_config

_LONGEST = 1 << 17  # tokens: of a model of which no length is known
_UNIT = 64  # tokens: the shortest rows that are tried, and the precision


@dataclass(frozen=True)
class Largest:
    """The answer of a search: the override that says it, and the memory of its step.

    Attributes:
        amount: tokens of a row, or examples of a micro-batch.
        limited: whether not the GPU sets the limit, but the model or the batch.
    """

    amount: int
    overrides: tuple[str, ...]
    memory: StepMemory
    limited: bool


def longest_rows(estimator: Estimator, card: Card) -> Largest | None:
    """Return the largest `tokens.max_length` with which a step fits for certain, one example at a time.

    It ends at the length that the model was made for. None if not even the shortest rows fit.
    """
    limits = limits_of_config(estimator.architecture.get_text_config().to_dict())
    most = limits.positions or limits.made_for or _LONGEST

    def overrides(length: int) -> tuple[str, ...]:
        return f"tokens.max_length={length}", f"train.tokens_per_microbatch={_tokens(estimator, length)}"

    def count(length: int) -> StepMemory:
        return estimator.take_longest(*overrides(length))

    amount = search(lambda length: _room(count(length), card), _UNIT, most)
    return None if amount is None else Largest(amount, overrides(amount), count(amount), amount == most)


def largest_microbatch(estimator: Estimator, card: Card) -> Largest | None:
    """Return the largest micro-batch of rows of `tokens.max_length` with which a step fits for certain.

    It ends at `train.batch`. None if not even one example fits.
    """
    size = _tokens(estimator, estimator.config.tokens.max_length)

    def count(examples: int) -> StepMemory:
        return estimator.take_longest(f"train.tokens_per_microbatch={examples * size}")

    most = estimator.config.train.batch
    amount = search(lambda examples: _room(count(examples), card), 1, most)
    if amount is None:
        return None
    return Largest(amount, (f"train.tokens_per_microbatch={amount * size}",), count(amount), amount == most)


def search(room: Callable[[int], float], least: int, most: int) -> int | None:
    """Return nearly the largest number from `least` to `most` with room ≥ 0, or None. Room falls, almost in a line.

    Each guess is where the line through the two closest known numbers has no room, or halfway between them. The result
    is a number with room, and there is none at the next, which is `least` further on, or a sixty-fourth of the result
    if that is more.
    """
    known: dict[int, float] = {}
    fits, fails = 0, most + 1
    guess = least
    while guess < fails and guess <= most:
        known[guess] = room(guess)
        fits, fails = (guess, fails) if known[guess] >= 0 else (fits, guess)
        if fits in (0, most):
            break
        unit = max(least, fits // 64)
        if fails - fits <= unit:
            break
        before = fails if fails in known else max((number for number in known if number < fits), default=None)
        if before is None:
            guess = min(most, 8 * least)
            continue
        if fails in known and len(known) % 2:  # in case it is no line
            guess = fits + max(unit, (fails - fits) // 2 // unit * unit)
            guess = min(guess, fails - unit)
            continue
        slope = (known[fits] - known[before]) / (before - fits)  # the room that each further number costs
        further = int(known[fits] / slope) if slope > 0 else most
        guess = fits + max(unit, further // unit * unit)
        guess = min(guess, most if fails > most else fails - unit)
    return fits or None


def _room(memory: StepMemory, card: Card) -> float:
    return float(card.low - process(memory).high)


def _tokens(estimator: Estimator, length: int) -> int:
    """Return the tokens of one example whose completions have `length` tokens with the prompt."""
    one = estimator.config.but({"tokens.max_length": length, "train.batch": 1})
    return longest_possible(one).tokens
