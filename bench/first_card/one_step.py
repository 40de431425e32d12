"""A step of the default training, with a random model on the device or streamed to it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.first_card.random_model import config_for, random_examples, random_model
from bench.first_card.sizes import Llama, Sizes
from bench.prefixes import fill_adapters
from fastpref.config import Config
from fastpref.data.example import Example
from fastpref.model.adapters.fresh import with_adapters
from fastpref.model.attention import NAME, give_attention, layers_reached
from fastpref.model.attention_choice import choose_attention
from fastpref.model.gradient_checkpointing import checkpoint_layers
from fastpref.model.load import Loaded, mixed_precision
from fastpref.model.policy import Policy
from fastpref.model.streaming.stream import Streaming, move_model, stream_weights
from fastpref.processes import start_processes
from fastpref.step.objective import Objective
from fastpref.step.optimizer import make_optimizer
from fastpref.step.reference import make_reference


@dataclass(frozen=True)
class Step:
    """A training step that can be repeated, with what it computes."""

    take: Callable[[], float]  # which returns the loss
    config: Config
    examples: list[Example]
    held: int  # bytes of the model on the device
    note: str  # on its attention


def make_step(llama: Llama, sizes: Sizes, streaming: Streaming | None = None) -> Step:
    config, examples = config_for(llama, sizes), random_examples(llama, sizes)
    accelerator, _ = start_processes(config, mixed_precision(config))
    device = accelerator.device
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
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
    wrapped = with_adapters(config, model)
    if stream is not None:
        stream.move_rest(model)
    fill_adapters(wrapped)
    checkpoint_layers(model)
    loaded = Loaded(model, wrapped, Policy.of(model), "tree", None, stream=stream)
    accelerator.prepare_model(loaded.policy, device_placement=False)
    reference, _ = make_reference(config, loaded, accelerator.autocast)
    budget = config.tokens_per_microbatch
    objective = Objective(loaded.policy, reference, config.loss, "tree", budget, 0, device)
    optimizer = make_optimizer(loaded.policy, config)
    trained = [parameter for parameter in loaded.policy.parameters() if parameter.requires_grad]

    def take() -> float:
        loaded.policy.train()
        metrics, _ = objective.step(examples, lambda loss: loss.backward())
        torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return metrics.result()["loss"]

    held = torch.cuda.memory_allocated() - before if device.type == "cuda" else 0
    return Step(take, config, examples, held, note or "attention: SDPA")
