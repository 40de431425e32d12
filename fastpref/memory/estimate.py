"""What a run would take of a GPU's memory before it is started, which cards that fits, and what would make it fit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch

from fastpref.config import Config
from fastpref.data.batch import Layout
from fastpref.data.cache import load_examples
from fastpref.data.longest import Microbatch, longest_of, longest_possible
from fastpref.data.table import Examples
from fastpref.data.tokenize import use_chat_template
from fastpref.errors import UserError
from fastpref.memory.activations import MARGIN
from fastpref.memory.step import StepMemory, count_step
from fastpref.memory.trl import as_trl, trl_policy
from fastpref.model.limits import beyond_positions, compare, limits_of_config
from fastpref.model.load import load_tokenizer, model_config
from fastpref.model.packed import lies_quantised
from fastpref.step.order import data_order

GIB = 1 << 30
CARDS = (8, 12, 16, 24, 48, 80)  # GB as they are sold, which are GiB
CONTEXT = GIB // 2  # of CUDA and its libraries: assumed, not counted

Load = Callable[[Sequence[str]], Config]  # the config with further overrides
_SMALLEST = 512  # tokens.max_length, as far as it is proposed


@dataclass(frozen=True)
class Taken:
    """Bytes of a device at the peak of a step."""

    memory: StepMemory
    overhead: int

    @property
    def total(self) -> int:
        return self.memory.total + self.overhead

    def parts(self) -> dict[str, int]:
        """By component, in the order of a table."""
        names = ("weights", "adapters", "gradients", "optimizer", "activations", "head", "reference")
        return {name: getattr(self.memory, name) for name in names} | {"overhead": self.overhead}


@dataclass(frozen=True)
class Change:
    """Overrides with which a step fits."""

    overrides: tuple[str, ...]
    taken: Taken


@dataclass
class Estimator:
    """Counts steps of a config and of variants of it, each once."""

    load: Load
    device: torch.device
    cache: bool = True
    counted: Callable[[str], None] = lambda what: None  # told before each count
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = self.load(())
        self.architecture = model_config(self.config.model)
        self.quantised = lies_quantised(self.architecture)  # how its checkpoint lies, in words
        self._examples = self._lengths()
        self._known: dict[Any, Taken] = {}
        self._told_of_experts = False
        self._layouts: dict[str, Layout] = {}  # what the model takes of what a config asks for

    @property
    def checkpoints(self) -> bool:
        """Whether a run decides by its memory how many layers it checkpoints."""
        return self.config.train.checkpointing == "auto" and self.device.type != "cpu"

    def microbatch(self, config: Config) -> Microbatch:
        """The largest one of a run."""
        if self._examples is None:
            return longest_possible(config)
        order = data_order(len(self._examples), config.train.batch, config.train.seed)
        layout: Layout = "tree" if config.train.layout == "auto" else config.train.layout
        return longest_of(config, self._examples, order, layout)

    def take(self, *overrides: str, layers: int | None = None) -> Taken:
        """What a step takes with further overrides; `layers` of `count_step`."""
        if (overrides, layers) not in self._known:
            self.counted(" ".join(overrides) or "the step")
            config = self.load(overrides)
            self._known[overrides, layers] = self._count(config, layers, self.microbatch(config))
        return self._known[overrides, layers]

    def take_as_trl(self) -> Taken:
        """The same examples at once, layers checkpointed as in `take`, as TRL would compute them."""
        self.counted("the step as TRL makes it")
        config = as_trl(self.config)
        return self._count(config, None, self.microbatch(self.config), make_policy=trl_policy(config))

    def _count(self, config: Config, layers: int | None, largest: Microbatch, **options: Any) -> Taken:
        if self.device.type == "cpu" and config.train.checkpointing == "auto":
            layers = 0
        memory = count_step(
            config, self.device, layers=layers, examples=largest.examples, further=largest.further,
            architecture=self.architecture, layout=self._layouts.get(config.train.layout), **options,
        )  # fmt: skip
        self._layouts[config.train.layout] = memory.layout
        if memory.bare_experts and not self._told_of_experts:
            self._told_of_experts = True
            self.notes.append(
                f"{memory.bare_experts / GIB:.2f} GiB of the weights are experts in 16 bits or more: bitsandbytes "
                "quantises linear layers, and this model holds its experts as bare tensors"
            )
        return Taken(memory, 0 if self.device.type == "cpu" else CONTEXT)

    def _lengths(self) -> Examples | None:
        """The run's data, if they lie on this machine."""
        limits = limits_of_config(self.architecture.get_text_config().to_dict())
        if not all(Path(data.path).expanduser().exists() for data in self.config.data):
            self.notes.append("the data are not on this machine: every row counts as tokens.max_length long")
            if (too_long := beyond_positions(limits, self.config)) is not None:
                self.notes.append(too_long)
            return None
        try:
            tokenizer = load_tokenizer(self.config.model)
            use_chat_template(tokenizer, self.config.tokens.chat_template)
            data = load_examples(self.config, tokenizer, cache=self.cache)
        except UserError as error:
            said = str(error).splitlines()[0]
            self.notes.append(f"the data cannot be read, so every row counts as tokens.max_length long: {said}")
            return None
        try:
            self.notes += compare(limits, data.parts, tokenizer, self.config)
        except UserError as error:  # a step can be counted, but not computed
            self.notes.append(f"a run of this config ends before its first step: {error}")
        return data.train


def usable(card: float) -> int:
    """Bytes of a card of so many GiB that a run may take, the context among them."""
    return int((1 - MARGIN) * card * GIB)


def present_card() -> float | None:
    """GiB of the GPU that is here."""
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None


def changes(estimator: Estimator, card: float) -> Change | None:
    """The smallest changes with which a step fits a card, each counted; None if nothing known does.

    Changes are made in the order of what they cost, until it fits; then those that are not needed are taken back.
    """
    room = usable(card)
    made: list[str] = []
    saved: dict[str, int] = {}
    taken = estimator.take()
    quantised = estimator.quantised is not None
    for change in _by_cost(estimator.config, estimator.microbatch(estimator.config), quantised=quantised):
        if _at_most(change, taken.memory) < 0.01 * taken.total:
            continue
        tried = [*(c for c in made if _key(c) != _key(change)), change]
        found = _taken(estimator, tried)
        if found is None or found.total > 0.99 * taken.total:
            continue
        saved[change] = taken.total - found.total
        made, taken = tried, found
        if taken.total <= room:
            break
    if taken.total > room:
        return None
    for change in made[:-1]:
        if taken.total + saved[change] > 1.1 * room:
            continue
        left = [c for c in made if c != change]
        found = _taken(estimator, left)
        if found is not None and found.total <= room:
            made, taken = left, found
    return Change(tuple(made), taken)


def _taken(estimator: Estimator, overrides: Sequence[str]) -> Taken | None:
    try:
        return estimator.take(*overrides)
    except UserError:  # changes that do not go together
        return None


def _key(override: str) -> str:
    return override.partition("=")[0]


def _at_most(override: str, memory: StepMemory) -> int:
    """Bytes that a change could save: what is not worth counting is not counted."""
    return {
        "reference.mode": memory.reference,
        "train.optimizer": memory.optimizer,
        "model.quantization": memory.weights,
        "lora": memory.gradients + memory.optimizer,
    }.get(_key(override), memory.activations + memory.head)


def _by_cost(config: Config, largest: Microbatch, *, quantised: bool) -> Iterator[str]:
    """Overrides that take less memory: first those that change no result, then the others.

    A checkpoint that lies `quantised` cannot be quantised otherwise."""
    train = config.train
    if config.reference.mode == "copy":
        yield 'reference.mode="auto"'
    if train.layout != "auto":
        yield 'train.layout="auto"'
    if train.checkpointing is False:
        yield 'train.checkpointing="auto"'
    longest = max(len(e.prompt) + sum(map(len, e.completions)) for e in largest.examples)
    budget = config.tokens_per_microbatch
    while budget > longest:
        budget = max(budget // 2, longest)
        yield f"train.tokens_per_microbatch={budget}"
    if train.optimizer in ("adamw", "paged_adamw"):
        yield 'train.optimizer="adamw_8bit"'
    if not train.offload_activations:
        yield "train.offload_activations=true"
    if config.lora is None:
        yield "lora={}"
    if config.model.quantization != "nf4" and not quantised:
        yield 'model.quantization="nf4"'
    length = config.tokens.max_length
    while length > _SMALLEST:
        length = max(length // 2, _SMALLEST)
        yield f"tokens.max_length={length}"


# --- Cards -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Whether a step fits a card, and with how many checkpointed layers."""

    card: float
    fits: bool
    checkpointed: int | None  # about so many, where a run decides itself


def fits(most: Taken, least: Taken, cards: Sequence[float]) -> list[Fit]:
    """Each card, for a step without checkpointed layers (`most`) and one with all of them, which may be the same."""
    found = []
    for card in cards:
        room, layers = usable(card), least.memory.checkpointed
        if most is not least and least.total <= room:
            share = (most.total - room) / max(1, most.total - least.total)
            layers = min(layers, max(0, ceil(share * (layers - 1))))
        found.append(Fit(card, least.total <= room, layers if least.total <= room else None))
    return found
