"""Models and tokenizers from a folder or the hub, with adapters, ready for the layouts."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fastpref.config import Config, ModelConfig
from fastpref.data.batch import Layout, collate
from fastpref.data.example import Example, Origin
from fastpref.errors import UserError
from fastpref.kernels.device import with_index
from fastpref.model import liger
from fastpref.model.adapters.fresh import adapter_notes
from fastpref.model.adapters.parts import short_names
from fastpref.model.adapters.placed import (
    BASE_ALONE,
    Placed,
    ReferenceAdapters,
    place_adapters,
    place_reference,
    record_base,
)
from fastpref.model.adapters.trained import load_adapter
from fastpref.model.adapters.whole import train_in_float32
from fastpref.model.attention_choice import choose_attention
from fastpref.model.body import body_of
from fastpref.model.failure import is_out_of_memory, told_of_model, words
from fastpref.model.files import explained, hub_options, model_config
from fastpref.model.freeze import freeze
from fastpref.model.head import Head, OwnLogits, find_head
from fastpref.model.limits import trained_dtype
from fastpref.model.new_tokens import make_room
from fastpref.model.packed import EXPERTS_LEFT, bare_experts
from fastpref.model.policy import Policy
from fastpref.model.quantize import keep_weights_as_loaded, quantization_config
from fastpref.model.rope import fix_rope
from fastpref.model.streaming.room import check_before_loading, check_buffers, weights_nbytes
from fastpref.model.streaming.stream import Streaming, WeightStream, stream_of, stream_weights
from fastpref.model.trial import Choice, choose_layout
from fastpref.model.weights import from_files, loading_notes
from fastpref.sizes import in_words


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to train."""

    model: PreTrainedModel  # the causal language model itself
    wrapped: PreTrainedModel | peft.PeftModel  # the model with its adapters, or `model` itself: this is saved
    policy: Policy
    layout: Layout
    why_padded: str | None  # the reason for padded rows that the config did not ask for
    notes: tuple[str, ...] = ()  # further decisions for this model and device
    liger: bool = False  # whether its body has liger-kernel's kernels
    stream: WeightStream | None = None  # of the layers whose weights lie in host memory
    reference: ReferenceAdapters = BASE_ALONE
    began: str | None = None  # a digest of the trained adapters that the run began with, if there are any


@told_of_model("its code fails while it is loaded and tried")
def load_model(
    config: Config,
    device: torch.device,
    *,
    sharded: bool = False,
    trained: bool = False,
    adapter: str | Path | None = None,
    reference: bool = False,
    streaming: Streaming | None = None,
) -> Loaded:
    """Load the model of a config on a device, with fresh adapters if the config has a [lora] table.

    A model that will be `sharded` stays in host memory until then, with the dtype for the device. A `trained` model
    gets the `adapter` of a folder or of the hub, or none, and with `reference` that of the config's reference. With
    `streaming` the weights stay in host memory, and layers are copied to the device as they compute; adapters and
    everything else that is trained are on the device.

    Raises UserError for a model that does not exist, is no causal language model, or has no safetensors, and for one
    that cannot be streamed, or not in the host's free memory.
    """
    device, architecture = with_index(device), model_config(config.model)
    kernels = liger.wants_kernels(config.model.liger, device.type, architecture)
    dtype = weight_dtype(config, device, trains=not trained)
    place = torch.device("cpu") if sharded or streaming is not None else device
    if streaming is not None:
        with _named(config):
            check_before_loading(config, architecture, dtype)
    model = pretrained(config.model, architecture, dtype, place)
    if getattr(model, "is_quantized", False) and config.lora is None and not trained:
        raise UserError(f"model.name = {config.model.name!r}: its weights are quantised; add a [lora] table")
    with _named(config):
        added = make_room(config, model)
        stream = _streamed(model, device, streaming)
        notes = [*added, *loading_notes(model), *_left_whole(model), *fix_rope(model, config.tokens.max_length)]
        head, note = _head(config, model)
        if stream is not None:
            _check_reached(model, stream)
            notes.append(_described(model, stream))
        policy = Policy(body_of(model), head)
        choice = choose_layout(model, policy, config.train.layout, max_length=config.tokens.max_length)
    if sharded and isinstance(head, OwnLogits):
        raise UserError(f"model.name = {config.model.name!r}: FSDP cannot shard it: {note}")
    notes += [*choice.notes, *([note] if note else []), *_attention(config, model, choice, device)]
    if kernels:
        trial = None if sharded else partial(_precision, config, device)  # a sharded model is not on the device yet
        must = config.model.liger is True
        kernels, kernel_notes = liger.give_kernels(model, policy.backbone, must=must, trial=trial)
        notes += kernel_notes
    if trained:
        wrapped = model if adapter is None else load_adapter(model, adapter)
        placed = Placed(wrapped)
        if reference and isinstance(wrapped, peft.PeftModel):
            placed = Placed(wrapped, place_reference(config, wrapped))
    else:
        notes += adapter_notes(config, model)
        placed = place_adapters(config, model, partial(_originals, config, architecture))
        wrapped, notes = placed.wrapped, [*notes, *placed.notes, *freeze(config, model)]
        record_base(config, model, wrapped, dtype)
        train_in_float32(wrapped)  # a model's own code may choose other dtypes
        notes += [note] if (note := trained_dtype(config)) else []
    if stream is not None:
        stream.move_rest(model)
    policy = policy.like(model)  # PEFT may have wrapped the head
    if config.train.neftune_alpha is not None and not trained:
        policy.make_noise(model, config.train.neftune_alpha)
        _try_noise(policy, choice.layout, model.config.model_type, device)
    if wrapped is not model:
        notes += loading_notes(wrapped)
        if not trained and not sharded:
            notes += _try_adapters(config, policy, choice.layout, model.config.model_type, device)
    return Loaded(
        model, wrapped, policy, choice.layout, choice.why_padded, tuple(notes), kernels, stream, placed.reference,
        placed.began,
    )  # fmt: skip


@contextmanager
def _named(config: Config) -> Iterator[None]:
    """Begin the message of a UserError inside the block with the model's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"model.name = {config.model.name!r}: {error}") from None


def weight_dtype(config: Config, device: torch.device, *, trains: bool = True) -> torch.dtype:
    """Return the dtype in which a model is loaded: float32 if its own weights are trained, else `model.dtype`.

    Half precision would lose the small steps of training. "auto" is float32 on a CPU, too.
    """
    if trains and config.lora is None:
        return torch.float32
    if config.model.dtype != "auto":
        return getattr(torch, config.model.dtype)
    if device.type == "cpu" or config.lora is None:
        return torch.float32
    # A GPU that is not on this machine is assumed to have bfloat16.
    old = device.type == "cuda" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False)
    return torch.float16 if old else torch.bfloat16


def mixed_precision(config: Config) -> Literal["no", "bf16", "fp16"]:
    """Return the mixed precision for Accelerate: half precision on a GPU, none on a CPU, where float32 is faster."""
    if not torch.cuda.is_available() or config.model.dtype == "float32":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(False) and config.model.dtype != "float16" else "fp16"


def _half(config: Config) -> torch.dtype | None:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision(config))


def _precision(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    half = _half(config)
    return nullcontext() if half is None else torch.autocast(device.type, half, cache_enabled=False)


def pretrained(
    options: ModelConfig, architecture: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load the model of `[model]`, for training or as a reference, without a KV cache."""
    load: dict[str, Any] = {"config": architecture, "dtype": dtype, "device_map": {"": device}} | hub_options(options)
    quantization = quantization_config(options.quantization, dtype)
    make = partial(AutoModelForCausalLM.from_pretrained, options.name, use_safetensors=True, **load)
    try:
        model = from_files(make, quantization_config=quantization)
    except UserError as error:  # the weights do not fit the model
        raise UserError(f"model.name = {options.name!r}: {error}") from None
    except Exception as error:  # for example missing weights or an unknown architecture
        if is_out_of_memory(error):
            raise
        raise UserError(f"model.name = {options.name!r}: cannot be loaded: {explained(options, error)}") from None
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"model.name = {options.name!r}: it is an adapter, not a model; merge it first")
    keep_weights_as_loaded(model)
    model.config.use_cache = False
    return model.eval()


def _originals(config: Config, architecture: PretrainedConfig) -> PreTrainedModel:
    """Load the model without quantization into host memory."""
    options = config.but({"model.quantization": "none"}).model
    dtype: Any = architecture.get_text_config().dtype or torch.float32
    return pretrained(options, architecture, dtype, torch.device("cpu"))


def _head(config: Config, model: PreTrainedModel) -> tuple[Head | OwnLogits, str | None]:
    try:
        return find_head(model, body_of(model))
    except UserError as error:
        if stream_of(model) is not None:
            advice = "Its code may read weights without calling their layers: set model.streaming to false"
            raise UserError(f"{str(error).rstrip('.')}. {advice}") from None
        if config.model.quantization == "none":
            raise
        advice = f"cannot have them in {config.model.quantization}: leave model.quantization out"
        raise UserError(f"{str(error).rstrip('.')}. Code that reads weights by itself {advice}") from None


def _left_whole(model: PreTrainedModel) -> list[str]:
    """Return a note on the experts of a quantised model that are not quantised."""
    size = bare_experts(model) if getattr(model, "is_quantized", False) else 0
    return [f"model.quantization: {in_words(size)} of the weights are {EXPERTS_LEFT}"] if size else []


def _streamed(model: PreTrainedModel, device: torch.device, streaming: Streaming | None) -> WeightStream | None:
    if streaming is None:
        return None
    check_buffers(model)
    return stream_weights(model, device, streaming)


def _check_reached(model: PreTrainedModel, stream: WeightStream) -> None:
    """Raise UserError for layers that have not computed in the passes so far, and whose weights nothing copies."""
    layers = [layer for place, layer in enumerate(stream.modules) if place not in stream.reached]
    if layers:
        names = short_names(name for name, module in model.named_modules() if module in layers)
        raise UserError(
            f"model.streaming: {names} cannot be streamed, because the code of {model.config.model_type} models does "
            "not call them; set it to false"
        )


def _described(model: PreTrainedModel, stream: WeightStream) -> str:
    count, every = len(stream.layers), len(stream.decoder_layers)
    tables = in_words(weights_nbytes(model) - sum(map(weights_nbytes, stream.decoder_layers)))
    size = in_words(max(map(len, stream.slots)))
    return (
        f"streaming: {count} of {every} layers ({in_words(stream.nbytes)}) are in host memory and computed in "
        f"{len(stream.slots)} slots of at most {size}; embeddings and head ({tables}) are in host memory too"
    )


def _attention(config: Config, model: PreTrainedModel, choice: Choice, device: torch.device) -> list[str]:
    """Give the model the attention that the config allows and that works. Return notes on the decision."""
    dtype = _half(config) or model.dtype
    wanted = config.model.attention
    kernel, note = choose_attention(wanted, choice.layout, choice.why_padded, choice.calls, dtype, device)
    if kernel is not None:
        model.set_attn_implementation(kernel.name)
    return [note] if note else []


@torch.no_grad()
def _try_noise(policy: Policy, layout: Layout, model_type: str, device: torch.device) -> None:
    """Raise UserError if the model's embeddings get no noise in training mode, or are not those of a row."""
    example = Example([3, 4, 5], ([4, 3], [5]), None, Origin("a trial"))
    assert policy.noise is not None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            policy.train().hidden_states(collate([example], layout).to(device))
        finally:
            policy.eval()
    if not policy.noise.added:
        raise UserError(f"train.neftune_alpha: the code of {model_type} models does not call its embeddings")


def _try_adapters(config: Config, policy: Policy, layout: Layout, model_type: str, device: torch.device) -> list[str]:
    """Run a step of a few tokens in training mode. Raise UserError if it fails with the adapters.

    An adapter fails only in such a step if its module returns more than a tensor, or if the model's code reads the
    module's weight directly. Returns a note about adapters that get no gradient.
    """
    example = Example([3, 4, 5], ([4, 3], [5]), None, Origin("a trial"))
    batch = collate([example], layout).to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            with _precision(config, device):
                logp = policy.train()(batch).logp
            if logp.requires_grad:
                logp.sum().backward()
            trained = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
        except Exception as error:
            if is_out_of_memory(error):
                raise
            kind, advice = f"this {model_type} model", "Name fewer modules"
            if config.model.quantization != "none":
                kind, advice = f"{kind} in {config.model.quantization}", f"{advice}, or leave model.quantization out"
            message = f"{kind} cannot be trained with adapters on all that it names: {words(error)}. {advice}"
            raise UserError(f"lora.target: {message}") from None
        finally:
            policy.zero_grad(set_to_none=True)
            policy.eval()
    # A single expert has a gradient only if one of these tokens is routed to it.
    idle = [name for name, gradient in trained.items() if gradient is None and "expert" not in name]
    if not idle:
        return []
    names = short_names(re.sub(r"^backbone\.|\.lora_.*|\.modules_to_save.*", "", name) for name in idle)
    if len(idle) == len(trained):
        message = f"no gradient reaches the adapters on {names}: the model's code does not call them"
        raise UserError(f"lora.target: {message}")
    return [f"lora: no gradient reaches the adapters on {names}; lora.exclude leaves them out"]
