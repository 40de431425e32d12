"""Plan a step of a loss: its examples, their mismatched completions, and the micro-batches.

Terms that compare examples of the whole step (KTO's KL, the sorting variants of DPO) need all of them before any
gradient. If the step is one micro-batch, they are computed with it; otherwise, in a separate pass before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastpref.config import Config
from fastpref.config.losses import DPO, LossOptions, compares_neighbours
from fastpref.data.batch import Layout, computed_tokens, plan_microbatches
from fastpref.data.example import Example
from fastpref.data.mismatched import with_mismatched


@dataclass(frozen=True)
class Pass:
    """A pass of examples through the model, in micro-batches."""

    examples: Sequence[Example]
    microbatches: list[list[int]]  # indices of the examples
    layout: Layout

    @property
    def groups(self) -> list[list[Example]]:
        """Return the examples of each micro-batch."""
        return [[self.examples[i] for i in places] for places in self.microbatches]

    @property
    def tokens(self) -> list[int]:
        """Return the number of tokens that each micro-batch computes, padding included."""
        return [computed_tokens(group, self.layout) for group in self.groups]


@dataclass(frozen=True)
class StepPlan:
    """The passes of a step."""

    trained: Pass  # with gradient
    first: Pass | None = None  # before it, without gradient, for the terms that compare the whole step
    later: Sequence[Example] = ()  # other completions of the trained prompts, which follow them without gradient

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the step computes in all passes, padding included."""
        first = [] if self.first is None else self.first.tokens
        return sum(self.trained.tokens) + sum(first) + sum(1 + len(example.completions[0]) for example in self.later)


def plan_step(loss: LossOptions, examples: Sequence[Example], layout: Layout, budget: int, count: int = 1) -> StepPlan:
    """Return the passes of a step, in micro-batches of at most `budget` tokens, for `count` processes."""
    trained = plan_pass(examples, layout, budget, count)
    if compares_neighbours(loss, len(examples)):
        mismatched = [example.with_completions([(example, 1)]) for example in with_mismatched(examples)]
        if layout == "tree" and len(trained.microbatches) == count == 1:
            return StepPlan(trained, later=mismatched)
        return StepPlan(trained, first=plan_pass(mismatched, layout, budget, count))
    sorts = isinstance(loss, DPO) and loss.sorts_step and len(trained.microbatches) > 1
    return StepPlan(trained, first=trained if sorts else None)


def plan_pass(examples: Sequence[Example], layout: Layout, budget: int, count: int = 1) -> Pass:
    """Return one pass of the examples, in micro-batches of at most `budget` tokens, for `count` processes."""
    return Pass(examples, plan_microbatches(examples, layout, budget, count), layout)


def compared(loss: LossOptions, examples: Sequence[Example]) -> Sequence[Example]:
    """Return the examples of a step with every completion that it computes, not divided into micro-batches."""
    return with_mismatched(examples) if compares_neighbours(loss, len(examples)) else examples


def wanted_layout(config: Config) -> Layout:
    """Return the layout that a config asks for. Whether the model takes it is only known once it is loaded."""
    return "tree" if config.train.layout == "auto" else config.train.layout
