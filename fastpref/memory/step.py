"""The memory of an optimizer step, counted on fake tensors: the real code runs, without numbers, memory or a device."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from fastpref.config import Config
from fastpref.data.batch import Layout
from fastpref.data.example import Example
from fastpref.data.longest import Microbatch, longest_possible
from fastpref.errors import UserError
from fastpref.memory.allocations import PeakStorage
from fastpref.memory.caching_allocator import replayed
from fastpref.memory.fake_stream import Copies, stream_fakes
from fastpref.model import flex_attention
from fastpref.model.adapters.begin import BegunHalf
from fastpref.model.adapters.source import reference_kind
from fastpref.model.adapters.switch import REFERENCE, adapter_weights
from fastpref.model.attention import NAME, give_attention, layers_reached
from fastpref.model.failure import told_of_model
from fastpref.model.files import model_config
from fastpref.model.gradient_checkpointing import checkpoint_layers, decoder_layers
from fastpref.model.liger import kernels_not_run, wants_kernels
from fastpref.model.load import Loaded, weight_dtype
from fastpref.model.packed import own_quantization
from fastpref.model.policy import Policy
from fastpref.model.skeleton import Skeleton, materialise, skeleton
from fastpref.model.streaming.room import obstacle
from fastpref.model.streaming.stream import Streaming
from fastpref.model.trial import Choice, choose_layout
from fastpref.step.objective import Objective
from fastpref.step.optimizer import make_optimizer, training_weights
from fastpref.step.reference import Reference, copy_config, make_reference, named_model

CPU = torch.device("cpu")

# The parts of a step's memory, in the order of the printed table, with the names that users see.
PARTS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "head": "head workspace",
    "reference": "reference",
    "overhead": "overhead, assumed",
}


@dataclass(frozen=True)
class StepMemory:
    """The bytes in use at the memory peak of an optimizer step, by purpose."""

    weights: int  # of the model, without its adapters
    adapters: int  # the weights that are trained in addition to the model's
    gradients: int  # of the whole step
    optimizer: int  # the moments, and temporary tensors of the update
    reference: int  # a frozen copy
    activations: int  # tensors that the forward pass saves and the backward pass makes
    head: int  # tensors that the head's operators make: scratch tiles, and the gradient that they keep
    largest: int  # the largest tensor that the step makes, which is part of the others
    layers: int  # decoder layers of the model; not bytes
    checkpointed: int  # how many of them have gradient checkpointing
    layout: Layout  # the layout that its attention supports
    bare_experts: int = 0  # the part of the weights in experts that stay as they are in a quantised model
    overhead: int = 0  # of the device's libraries: assumed, not counted
    host: int = 0  # in host memory, not on the device: streamed weights, and inputs of layers that are moved there
    copied: int = 0  # streamed weights that the examples of the step copy to the device; no memory
    streamed: int = 0  # how many decoder layers are streamed; not bytes
    layer: int = 0  # the bytes of one of them, on average
    rounding: int = 0  # by which the allocator's blocks are larger than their tensors, at the peak
    gaps: int = 0  # by which the memory that the allocator takes is larger than the tensors at the peak

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    @property
    def held(self) -> int:
        """The bytes in use between the micro-batches, whatever their size."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.reference

    def parts(self) -> dict[str, int]:
        """Return the bytes of each of PARTS."""
        return {name: getattr(self, name) for name in PARTS}


class _Fake(FakeTensorMode):
    """A FakeTensorMode for what experts call: grouped products in any dtype, and counts of at least their number.

    torch has a fake of these products for bfloat16 only, and none of `bincount`, whose length depends on numbers; the
    experts that a router chooses are never more than there are.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            a, b = args[:2]
            offsets: Any = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
            groups = [len(offsets)] if a.dim() == b.dim() == 2 else [len(a)] if a.dim() == b.dim() == 3 else []
            return a.new_empty([*groups, a.shape[-2], b.shape[-1]])
        if func is torch.ops.aten.bincount.default:
            least = (kwargs or {}).get("minlength") or (args[2] if len(args) > 2 else 0)
            return args[0].new_empty(least, dtype=torch.int64)
        return super().__torch_dispatch__(func, types, args, kwargs)


def heaviest(longest: Sequence[Microbatch], count: Callable[[Microbatch], StepMemory]) -> StepMemory:
    """Return the memory of the micro-batch that takes the most, of those that `longest_of` returns.

    The last one, which has gradients beside it, is counted first. The other is counted only if what they compute, in
    proportion to their tokens, could be more than the gradients.
    """
    last = longest[-1]
    memory = count(last)
    for other in longest[:-1]:
        more = (memory.activations + memory.head) * (other.tokens / last.tokens - 1)
        if more > 0.9 * memory.gradients:
            memory = max(memory, count(other), key=lambda counted: counted.total)
    return memory


@told_of_model("the memory of a step cannot be counted without its weights")
def count_step(
    config: Config,
    device: torch.device,
    *,
    layers: int | None = None,
    examples: Sequence[Example] | None = None,
    further: bool | None = None,
    architecture: PretrainedConfig | None = None,
    layout: Layout | None = None,
    make_policy: Callable[[PreTrainedModel], Policy] = Policy.of,
    streaming: Streaming | None = None,
) -> StepMemory:
    """Count the memory of a step of a config on a type of device, which this machine need not have.

    Args:
        layers: how many decoder layers have gradient checkpointing; by default all, or none if `train.checkpointing`
            is false.
        examples: the examples of the step; by default those of the longest micro-batch.
        further: whether these examples follow another micro-batch of the step, whose gradients exist meanwhile; by
            default whether the longest micro-batch is only a part of a step.
        architecture: the model's config.json, which is read by default.
        layout: the layout that the model's attention supports; by default a forward pass determines it.
        make_policy: makes the policy, for another head than ours (`trl.py`).
        streaming: how much of the frozen weights stays in host memory; by default all layers if `model.streaming` is
            true, else none.

    Raises UserError for a model that does not exist, that cannot be streamed, or whose code cannot run on fake tensors.

    All tensors are fake CPU tensors, with the dtypes and the mixed precision of `device`. Memory that bitsandbytes and
    the device's libraries allocate inside one operation is not counted. The head's tiles are the torch backend's, and
    the two buffers of a head in host memory are those of a GPU.
    """
    dtype = weight_dtype(config, device)
    half = torch.float16 if dtype == torch.float16 else torch.bfloat16
    mixed = device.type == "cuda" and config.model.dtype != "float32"
    autocast = partial(torch.autocast, "cpu", dtype=half, cache_enabled=False) if mixed else nullcontext
    architecture = architecture or model_config(config.model)
    if own_quantization(architecture) is not None and config.lora is None:
        raise UserError(f"model.name = {config.model.name!r}: its weights are quantised; add a [lora] table")
    if streaming is None and config.model.streaming is True:
        streaming = Streaming()
    if streaming is not None and (why := obstacle(config, architecture)):
        raise UserError(f"model.streaming: {why}")
    kernels = wants_kernels(config.model.liger, device.type, architecture)
    bones = skeleton(config, architecture, dtype, kernels=kernels)
    frozen = _copy(config, bones, architecture, kernels=kernels)
    count, fake = PeakStorage(), _Fake(allow_non_fake_inputs=True)
    saving = partial(_elsewhere, count) if config.train.offload_activations else None
    checkpointed = checkpoint_layers(bones.model, 0 if config.train.checkpointing is False else layers, saving=saving)
    sizes_alone = kernels_not_run if kernels else nullcontext
    with fake, count:
        copies = _materialised(config, bones, count, streaming)
        with count.labelled("weights"):  # those that another trainer casts
            policy = make_policy(bones.model)
    with fake, sizes_alone():
        choice = Choice(layout) if layout else choose_layout(bones.model, policy, config.train.layout, compare=False)
        attention = _attention(config, device, bones.model, policy, choice.layout)
    parts: dict[str, Any] = {"reference": bones.reference}
    loaded = Loaded(bones.model, bones.wrapped, policy, choice.layout, choice.why_padded, **parts)
    with fake, count, count.labelled("reference"):
        reference = _reference(config, loaded, frozen, attention, autocast)
    # Paging needs a GPU, so paged moments count as if they stayed there.
    unpaged = config.but({"train.optimizer": config.train.optimizer.removeprefix("paged_")})
    optimizer = make_optimizer(loaded.policy, unpaged)  # not fake: bitsandbytes computes tables of numbers
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with fake, count, sizes_alone(), copies.of_head() if streaming else nullcontext():
        with count.labelled("gradients"):
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        with count.labelled("optimizer"), training_weights(optimizer):
            optimizer.step()  # makes the moments
        if examples is None:
            longest = longest_possible(config)
            examples, further = longest.examples, longest.further if further is None else further
        if not further:
            optimizer.zero_grad(set_to_none=True)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(partial(_relabel_gradient, count))
        objective = _objective(config, loaded, reference, autocast)
        objective.policy.train()
        count.start_again()
        trace = count.record()
        copies.bytes = 0
        with training_weights(optimizer):
            with count.labelled("activations"):
                objective.step(examples, lambda loss: loss.backward())
                torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
            with count.labelled("optimizer"):
                optimizer.step()
    parts: dict[str, Any] = {"head": count.at_peak[PeakStorage.INSIDE], "largest": count.largest} | count.at_peak
    parts["weights"] = parts.get("weights", 0) - bones.packed
    parts |= {"bare_experts": bones.bare_experts, "host": count.host_peak, "copied": copies.bytes}
    parts |= {"streamed": len(copies.layers), "layer": sum(copies.layers) // max(1, len(copies.layers))}
    allocator = replayed(trace, fixed=_weight_sizes(bones.model))
    parts |= {"rounding": allocator.peak - count.peak, "gaps": allocator.reserved - count.peak}
    parts |= {"layers": max(1, len(decoder_layers(bones.model))), "checkpointed": checkpointed, "layout": choice.layout}
    return StepMemory(**{field.name: parts.get(field.name, 0) for field in fields(StepMemory)})


def _weight_sizes(model: PreTrainedModel) -> set[int]:
    """Return the bytes of the model's matrices in 16 and in 32 bits: dequantised, cast, and as gradients."""
    sizes = {module.in_features * module.out_features for module in model.modules() if isinstance(module, nn.Linear)}
    return {width * size for size in sizes for width in (2, 4)}


def _materialised(config: Config, bones: Skeleton, count: PeakStorage, streaming: Streaming | None) -> Copies:
    """Give the skeleton's model fake tensors, and stream its layers. Return what the stream will copy."""
    model = bones.model
    with count.labelled("weights"):
        materialise(model)
        copies = Copies() if streaming is None else stream_fakes(model, streaming, count)
    if config.lora is not None:
        for name, weights in adapter_weights(model):
            for parameter in weights:
                count.relabel(parameter, "reference" if name == REFERENCE else "adapters")
        for parameter in model.parameters():
            if parameter.requires_grad:
                count.relabel(parameter, "adapters")
        for module in model.modules():
            if isinstance(module, BegunHalf):
                count.relabel(module.fixed, "adapters")
    return copies


def _copy(config: Config, bones: Skeleton, architecture: PretrainedConfig, *, kernels: bool) -> PreTrainedModel | None:
    """Return the model of a frozen reference if a run would load it, instead of copying the policy; else None."""
    if not config.loss.uses_reference or config.precomputes:
        return None
    if reference_kind(config) == "model":
        loaded: Any = SimpleNamespace(model=bones.model, layout=config.train.layout)
        other = named_model(config, loaded)
        architecture = model_config(other.model)
    else:
        other = copy_config(config, bones.model) if config.reference.mode == "copy" else None
    if other is None:
        return None
    return skeleton(other, architecture, getattr(torch, other.model.dtype), kernels=kernels).model


def _attention(
    config: Config, device: torch.device, model: PreTrainedModel, policy: Policy, layout: Layout
) -> str | None:
    """Give a model the attention that it would have on a device; return its name, or None for the model's own.

    FlexAttention keeps no copies of keys and values, and SDPA one for each query head. That of flash-attn is counted as
    SDPA's, which is more.
    """
    if layout == "padded":
        return None
    give_attention(model, NAME)
    wanted = device.type == "cuda" and config.model.attention in ("auto", "flex")
    if wanted and not any(call.dropout for call in layers_reached(policy.backbone)):
        give_attention(model, flex_attention.NAME)
        return flex_attention.NAME
    return NAME


def _reference(
    config: Config,
    loaded: Loaded,
    frozen: PreTrainedModel | None,
    attention: str | None,
    autocast: Callable[..., Any],
) -> Reference | None:
    if not config.loss.uses_reference:
        return None
    if config.precomputes:
        return lambda batch: torch.zeros(len(batch.segments))

    def load(*_: Any) -> PreTrainedModel:
        assert frozen is not None
        materialise(frozen)
        if attention is not None:
            give_attention(frozen, attention)
        return frozen

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # from copying a model
        return make_reference(config, loaded, autocast, load)[0]


def _objective(config: Config, loaded: Loaded, reference: Reference | None, autocast: Callable[..., Any]) -> Objective:
    policy = loaded.policy
    policy.forward = autocast()(policy.forward) if autocast is not nullcontext else policy.forward
    router = policy.router.coefficient if policy.router is not None else 0.0
    return Objective(
        policy=policy,
        reference=reference,
        options=config.loss,
        layout=loaded.layout,
        budget=config.tokens_per_microbatch,
        pad_token_id=0,
        device=CPU,
        router_coefficient=router,
    )


def _relabel_gradient(count: PeakStorage, parameter: Tensor) -> None:
    assert parameter.grad is not None
    count.relabel(parameter.grad, "gradients")


@contextmanager
def _elsewhere(count: PeakStorage) -> Iterator[None]:
    """Keep tensors that are saved for the backward pass inside the block in host memory until it needs them."""

    def moved(tensor: Tensor) -> Tensor:
        with count.labelled(PeakStorage.HOST):
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    with torch.autograd.graph.saved_tensors_hooks(moved, torch.empty_like):
        yield
