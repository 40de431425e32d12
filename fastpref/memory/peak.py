"""The memory that a run's steps took, beside what it was estimated to be."""

import torch

from fastpref.config import Config
from fastpref.data.longest import longest_of
from fastpref.data.table import Examples
from fastpref.memory.activations import as_loaded
from fastpref.memory.step import count_step
from fastpref.model.gradient_checkpointing import decoder_layers
from fastpref.model.load import Loaded
from fastpref.step.order import data_order

GIB = 1 << 30


class StepPeak:
    """The most that was allocated on a GPU at once since the first step. Elsewhere nobody keeps account: it stays 0.

    Loading a model may take more. It is forgotten once only: `peak_memory` reads the same account.
    """

    def __init__(self, device: torch.device):
        self._device = device if device.type == "cuda" else None
        self.bytes = 0

    def start(self) -> None:
        if self._device is not None and not self.bytes:
            torch.cuda.reset_peak_memory_stats(self._device)

    def end(self) -> None:
        if self._device is not None:
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(self._device))

    def beside_estimate(self, config: Config, examples: Examples, loaded: Loaded) -> str:
        """What was measured, and what `count_step` says of the run's largest micro-batch."""
        order = data_order(len(examples), config.train.batch, config.train.seed)
        largest = longest_of(config, examples, order, loaded.layout)
        layers = sum(layer.gradient_checkpointing for layer in decoder_layers(loaded.model))
        measured = f"measured {self.bytes / GIB:.2f} GiB"
        try:
            counted = count_step(
                as_loaded(config, loaded),
                torch.device("cuda"),
                layers=layers,
                examples=largest.examples,
                further=largest.further,
            ).total
        except Exception as error:  # a model's code may ask for the values of tensors, which fake ones have not
            return f"memory of a step: {measured}; not estimated ({type(error).__name__})"
        return f"memory of a step: estimated {counted / GIB:.2f} GiB, {measured} ({self.bytes / counted - 1:+.1%})"
