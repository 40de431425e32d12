"""A step of the default training, with a random model on the device or streamed to it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.first_card.random_model import config_for, random_examples, random_model
from bench.first_card.sizes import Llama, Sizes
from bench.streaming import adapted_step
from fastpref.config import Config
from fastpref.data.example import Example
from fastpref.model.attention import NAME, give_attention, layers_reached
from fastpref.model.attention_choice import choose_attention
from fastpref.model.load import mixed_precision
from fastpref.model.policy import Policy
from fastpref.model.streaming.stream import Streaming, move_model, stream_weights
from fastpref.processes import start_processes


@dataclass(frozen=True)
class Step:
    """A training step that can be repeated, with what it computes."""

    take: Callable[[], float]  # which returns the loss
    config: Config
    examples: list[Example]
    note: str  # on its attention


def make_step(llama: Llama, sizes: Sizes, streaming: Streaming | None = None) -> Step:
    config, examples = config_for(llama, sizes), random_examples(llama, sizes)
    accelerator, _ = start_processes(config, mixed_precision(config))
    device = accelerator.device
    model = random_model(llama, config, device)
    stream = None
    if streaming is not None:
        move_model(model, torch.device("cpu"))
        stream = stream_weights(model, device, streaming)
    give_attention(model, NAME)
    calls = layers_reached(Policy.of(model).backbone)
    kernel, note = choose_attention(config.model.attention, "tree", None, calls, torch.bfloat16, device)
    if kernel is not None:
        model.set_attn_implementation(kernel.name)
    take, _ = adapted_step(config, model, stream, examples, accelerator, config.tokens_per_microbatch)
    return Step(take, config, examples, note or "attention: SDPA")
