"""Estimation of a run's GPU memory before it starts: by component, the GPUs it fits, and changes that make it fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastpref.config import Config
from fastpref.config.paths import matches
from fastpref.data.batch import Layout
from fastpref.data.cache import load_examples
from fastpref.data.longest import Microbatch, longest_of, longest_possible
from fastpref.data.plan import wanted_layout
from fastpref.data.table import Examples
from fastpref.data.tokenize import use_chat_template
from fastpref.errors import UserError
from fastpref.memory.fit import MARGIN, OversizedStep, Proposal, propose
from fastpref.memory.process import LIBRARIES, Card, Verdict, process
from fastpref.memory.step import StepMemory, count_step, heaviest
from fastpref.memory.streaming import StreamedStep
from fastpref.memory.trl import as_trl, trl_policy
from fastpref.memory.unsloth import as_unsloth, unsloth_policy
from fastpref.model.adapters.source import with_start
from fastpref.model.files import model_config
from fastpref.model.gradient_checkpointing import layers_needed
from fastpref.model.limits import beyond_positions, compare, limits_of_config, trained_dtype
from fastpref.model.packed import EXPERTS_LEFT, lies_quantised
from fastpref.model.streaming.room import obstacle
from fastpref.model.streaming.stream import Streaming
from fastpref.model.tokenizer import run_tokenizer
from fastpref.sizes import GIB, in_words

CARDS = (4, 6, 8, 12, 16, 24, 48, 80)  # GiB, which vendors call GB
CONTEXT = LIBRARIES.likely

Load = Callable[[Sequence[str]], Config]  # the config with further overrides


@dataclass
class Estimator:
    """A cache of the counted steps of a config and of variants of it."""

    load: Load
    device: torch.device
    cache: bool = True
    counted: Callable[[str], None] = lambda what: None  # called before each count
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = self._load(())
        self.architecture = model_config(self.config.model)
        self.quantised = lies_quantised(self.architecture)  # the checkpoint's quantization in words, or None
        if (note := trained_dtype(self.config)) is not None:
            self.notes.append(note)
        self._examples = self._lengths()
        self._known: dict[Any, StepMemory] = {}
        self._told_of_experts = False
        self._layouts: dict[str, Layout] = {}  # `train.layout` → the layout that the model supports

    def _load(self, overrides: Sequence[str]) -> Config:
        return with_start(self.load(overrides))

    @property
    def checkpoints(self) -> bool:
        """Whether a run chooses the number of checkpointed layers by the memory of its device, if none is streamed."""
        return (
            self.config.model.streaming is not True
            and self.config.train.checkpointing == "auto"
            and self.device.type != "cpu"
        )

    def microbatch(self, config: Config) -> Microbatch:
        """Return the largest micro-batch of a run."""
        return self._microbatches(config)[0]

    def _microbatches(self, config: Config) -> list[Microbatch]:
        if self._examples is None:
            return [longest_possible(config)]
        return longest_of(config, self._examples, wanted_layout(config))

    def take(self, *overrides: str, layers: int | None = None, streaming: Streaming | None = None) -> StepMemory:
        """Count the memory of a step with further overrides. `layers` and `streaming` are arguments of `count_step`."""
        key = overrides, layers, streaming
        if key not in self._known:
            self.counted(" ".join(overrides) or ("the step" if streaming is None else "the step with streamed layers"))
            config = self._load(overrides)
            self._known[key] = self._count(config, layers, self._microbatches(config), streaming=streaming)
        return self._known[key]

    def take_longest(self, *overrides: str) -> StepMemory:
        """Count the memory of a step with further overrides whose rows all have `tokens.max_length` tokens."""
        key = overrides, "longest"
        if key not in self._known:
            self.counted(" ".join(overrides))
            config = self._load(overrides)
            self._known[key] = self._count(config, None, [longest_possible(config)])
        return self._known[key]

    def take_streamed(self) -> StreamedStep | None:
        """Count the memory of a step that is streamed; None if the config or the model does not allow that."""
        if self.config.model.streaming is False or self.device.type == "cpu":
            return None
        if obstacle(self.config, self.architecture) is not None:
            return None
        try:
            return StreamedStep(self.take(streaming=Streaming()))
        except UserError:  # a model whose layers are not found
            return None

    def take_as_trl(self) -> StepMemory:
        """Count the memory of the same step as TRL computes it, with gradient checkpointing, its default."""
        self.counted("the step as TRL computes it")
        config = as_trl(self.config)
        return self._count(config, None, self._microbatches(self.config), make_policy=trl_policy(config))

    def take_as_unsloth(self) -> StepMemory:
        """Count the memory of the same step as Unsloth computes it, with its gradient checkpointing."""
        self.counted("the step as Unsloth computes it")
        config = as_unsloth(self.config)
        return self._count(config, None, self._microbatches(self.config), make_policy=unsloth_policy(config))

    def _count(self, config: Config, layers: int | None, largest: Sequence[Microbatch], **options: Any) -> StepMemory:
        if self.device.type == "cpu" and config.train.checkpointing == "auto":
            layers = 0

        def count(microbatch: Microbatch) -> StepMemory:
            layout = self._layouts.get(config.train.layout)
            return count_step(
                config, self.device, layers=layers, examples=microbatch.examples, further=microbatch.further,
                architecture=self.architecture, layout=layout, **options,
            )  # fmt: skip

        memory = heaviest(largest, count)
        self._layouts[config.train.layout] = memory.layout
        if memory.bare_experts and not self._told_of_experts:
            self._told_of_experts = True
            self.notes.append(f"{in_words(memory.bare_experts)} of the weights are {EXPERTS_LEFT}")
        return replace(memory, overhead=0 if self.device.type == "cpu" else CONTEXT)

    def _lengths(self) -> Examples | None:
        """Return the run's training examples, or None if the data are not on this machine or cannot be read."""
        limits = limits_of_config(self.architecture.get_text_config().to_dict())
        if not all(matches(data.path, Path()) for data in self.config.data):
            self.notes.append("the data are not on this machine: every row counts as tokens.max_length long")
            if (too_long := beyond_positions(limits, self.config)) is not None:
                self.notes.append(too_long)
            return None
        try:
            tokenizer = run_tokenizer(self.config)
            use_chat_template(tokenizer, self.config.tokens.chat_template)
            data = load_examples(self.config, tokenizer, cache=self.cache)
        except UserError as error:
            reason = str(error).splitlines()[0]
            self.notes.append(f"the data cannot be read, so every row counts as tokens.max_length long: {reason}")
            return None
        try:
            self.notes += compare(limits, data.parts, tokenizer, self.config)
        except UserError as error:  # the step can still be counted
            self.notes.append(f"a run of this config ends before its first step: {error}")
        return data.train


def usable(card: float) -> int:
    """Return the bytes that a run, including the CUDA context, may use of a GPU with `card` GiB."""
    return int((1 - MARGIN) * card * GIB)


def proposal(estimator: Estimator, card: Card) -> Proposal:
    """Return the smallest changes with which a step fits a GPU for certain. Each change is counted."""
    config, memory, quantised = estimator.config, estimator.take(), estimator.quantised is not None
    microbatch, capacity = estimator.microbatch(config), int(card.size * GIB)
    step = OversizedStep(config, memory, microbatch, estimator.device, capacity, quantised=quantised)
    return propose(step, lambda overrides: estimator.take(*overrides), card.low, lambda memory: process(memory).high)


@dataclass(frozen=True)
class CardFit:
    """Whether a step fits a GPU, and with how many checkpointed and streamed layers."""

    card: float
    verdict: Verdict
    checkpointed: int | None  # approximate if the run chooses the number; None if the step does not fit for certain
    streamed: int = 0
    host: int = 0  # bytes in host memory

    @property
    def fits(self) -> bool:
        return self.verdict is Verdict.FITS


def fit(most: StepMemory, least: StepMemory, card: Card, stream: StreamedStep | None = None) -> CardFit:
    """Return how a step fits a GPU, with no checkpointed layer and with all; one object if their number is set.

    With `stream` a step that the run itself would not place on the GPU has streamed layers, as many as it must.
    """
    room = usable(card.size)
    if not least.streamed and (stream is None or least.total <= room):
        verdict, layers = card.verdict(process(least)), least.checkpointed
        if verdict is Verdict.FITS and most is not least:
            layers = layers_needed(layers, most.total, least.total, room)
        return CardFit(card.size, verdict, layers if verdict is Verdict.FITS else None, host=least.host)
    step = least if stream is None else stream.least
    verdict = card.verdict(process(step))
    if stream is not None and verdict is Verdict.FITS:
        step = stream.at(stream.resident(room))
    layers = step.checkpointed if verdict is Verdict.FITS else None
    return CardFit(card.size, verdict, layers, step.streamed, step.host)
