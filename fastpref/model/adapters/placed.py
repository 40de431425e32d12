"""The adapters of a run on its model: a fresh one or one that is continued, and with it that of the reference.

All of them share the base weights. The reference's adapter, and one that a new adapter is stacked on, are frozen.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.config import Config, LoraConfig
from fastpref.errors import UserError
from fastpref.model.adapters.agreement import adapted_parts, check_agreement, check_base, wanted_parts
from fastpref.model.adapters.experts import fuse_expert_lora
from fastpref.model.adapters.fresh import with_adapters
from fastpref.model.adapters.fused import fuse_lora
from fastpref.model.adapters.parts import short_names
from fastpref.model.adapters.source import AdapterFiles, Kind, read_adapter, reference_kind
from fastpref.model.adapters.switch import BELOW, POLICY, REFERENCE, adapter_weights, switch, train_only
from fastpref.model.adapters.trained import check_weights, put_weights, told_of_misfit
from fastpref.model.adapters.whole import train_in_float32
from fastpref.model.tokenizer import new_tokens


@dataclass(frozen=True)
class ReferenceAdapters:
    """The adapters that compute while the reference does; all others are off."""

    names: tuple[str, ...] = ()  # PEFT's names for them
    digest: str | None = None  # of what they are; None for the base model alone


BASE_ALONE = ReferenceAdapters()


@dataclass(frozen=True)
class Placed:
    """A model with its adapters."""

    wrapped: PreTrainedModel | peft.PeftModel
    reference: ReferenceAdapters = BASE_ALONE
    began: str | None = None  # a digest of the trained adapters that the run began with, if there are any
    notes: tuple[str, ...] = ()


def place_adapters(
    config: Config, model: PreTrainedModel, originals: Callable[[], nn.Module] | None = None, *, weights: bool = True
) -> Placed:
    """Put the adapters of a config on its model. Without `weights` only their shapes are right.

    `originals` loads the model without quantization, for `lora.init = "loftq"`. Raises UserError for an adapter that is
    not that of the model, or that contradicts the config.
    """
    lora = config.lora
    if lora is None:
        return Placed(model)
    kind: Kind = reference_kind(config) if config.loss.uses_reference else "base"
    files: dict[str, AdapterFiles] = {}
    if lora.start is not None:
        files[BELOW if lora.stack else POLICY] = read_adapter(lora.start, "lora.from")
        if lora.stack:
            _check_stack(lora, files[BELOW])
    if kind == "start" and not lora.stack and not config.precomputes:
        files[REFERENCE] = files[POLICY]
    if kind == "adapter":
        assert config.reference.name is not None
        files[REFERENCE] = read_adapter(config.reference.name, "reference.name")
    if not files:
        return Placed(with_adapters(config, model, originals, new_tokens(config)))
    notes = [note for adapter in {id(f): f for f in files.values()}.values() for note in check_base(config, adapter)]
    tensors = {adapter.folder: _read(adapter, model) for adapter in files.values()} if weights else {}
    wrapped: Any = (
        _continued(config, model, files[POLICY]) if POLICY in files else with_adapters(config, model, originals)
    )
    for name in (BELOW, REFERENCE):
        if name in files:
            _add(wrapped, files[name], name)
    train_only(wrapped, POLICY)
    train_in_float32(wrapped)
    for name, adapter in files.items() if weights else ():
        begin = f"{adapter.place}: this adapter cannot be put on {config.model.name}"
        with told_of_misfit(begin):
            put_weights(wrapped, tensors[adapter.folder], name, adapter.name, begin)
    policy = (BELOW, POLICY) if BELOW in files else (POLICY,)
    if BELOW in files:
        _start_modules_from_below(wrapped)
    switch(wrapped, policy)
    fuse_lora(wrapped)
    names = {"start": (REFERENCE,) if REFERENCE in files else (policy[0],), "adapter": (REFERENCE,)}.get(kind, ())
    digests = {name: _digest(files[name], tensors[files[name].folder]) for name in files} if weights else {}
    reference = ReferenceAdapters(names, "".join(digests[name] for name in names) or None if weights else None)
    began = " ".join(digests[name] for name in sorted(digests)) or None
    return Placed(wrapped, reference, began, tuple(notes))


def record_base(config: Config, model: PreTrainedModel, wrapped: Any, dtype: torch.dtype) -> None:
    """Write the base model, its revision and its dtype into the settings that PEFT saves with the trained adapter.

    PEFT has keys for the first two; the dtype, and a quantization, stand in its `auto_mapping`, a free table.
    """
    if not isinstance(wrapped, peft.PeftModel):
        return
    settings: Any = wrapped.peft_config[POLICY]
    settings.base_model_name_or_path = config.model.name
    settings.revision = getattr(model.config, "_commit_hash", None) or config.model.revision
    settings.auto_mapping = {
        "base_model_class": type(model).__name__,
        "parent_library": type(model).__module__,
        "dtype": str(dtype).removeprefix("torch."),
        **({} if config.model.quantization == "none" else {"quantization": config.model.quantization}),
    }


def place_reference(config: Config, wrapped: peft.PeftModel) -> ReferenceAdapters:
    """Put the adapter of the config's reference, if it is one, on a model that has its trained adapter already.

    For a loss without a reference it is what the training began with. Raises UserError as `place_adapters`.
    """
    kind = reference_kind(config)
    if kind not in ("start", "adapter"):
        return BASE_ALONE
    key, name = ("lora.from", config.lora and config.lora.start) if kind == "start" else (
        "reference.name", config.reference.name)  # fmt: skip
    assert name is not None
    files = read_adapter(name, key)
    begin = f"{files.place}: this adapter cannot be put on {config.model.name}"
    weights = load_file(files.weights_file())
    _add(wrapped, files, REFERENCE)
    with told_of_misfit(begin):
        put_weights(wrapped, weights, REFERENCE, files.name, begin)
    switch(wrapped, (POLICY,))
    fuse_expert_lora(wrapped)
    return ReferenceAdapters((REFERENCE,), _digest(files, weights))


def _check_stack(lora: LoraConfig, below: AdapterFiles) -> None:
    """Raise UserError for adapters whose sum is no LoRA adapter, which is what a run saves."""
    if below.settings.use_dora or lora.dora:
        which = f"the adapter of lora.from ({below.name})" if below.settings.use_dora else "the new adapter (lora.dora)"
        raise UserError(
            f"lora.stack: {which} is DoRA, which scales the base model's weights and not their sum with another "
            "adapter; merge the old one with fastpref merge, and name the result as model.name"
        )


def _read(adapter: AdapterFiles, model: PreTrainedModel) -> dict[str, Tensor]:
    """Read the weights of an adapter, which must be finite, and must change none of the model's own."""
    begin, file = f"{adapter.place}: this adapter cannot be continued", adapter.weights_file()
    try:
        weights = load_file(file)
    except Exception as error:  # safetensors has its own kind
        raise UserError(f"{adapter.place}: {file} is damaged: {error}") from None
    check_weights(adapter.settings, weights, model, begin)
    return weights


def _continued(config: Config, model: PreTrainedModel, start: AdapterFiles) -> peft.PeftModel:
    """Return the model with an adapter like that of `lora.from`, without its weights."""
    assert config.lora is not None
    wanted = wanted_parts(config.lora, model)  # before PEFT changes the model
    settings = _settings(start)
    if "dropout" in config.lora.model_fields_set:
        settings.lora_dropout = config.lora.dropout
    with told_of_misfit(f"{start.place}: this adapter cannot be put on {config.model.name}"):
        wrapped: Any = peft.get_peft_model(model, settings)
    check_agreement(config.lora, wrapped, start, wanted)
    return wrapped


def _add(wrapped: Any, adapter: AdapterFiles, name: str) -> None:
    """Add a frozen adapter like that of these files, without its weights."""
    settings, begin = _settings(adapter), f"{adapter.place}: this adapter cannot be put on the model"
    settings.target_parameters = _as_named_before(wrapped, settings.target_parameters)
    full = tuple(f".{name}" for name in settings.modules_to_save or ())
    if both := sorted(module for module in adapted_parts(wrapped).modules if f".{module}".endswith(full)):
        raise UserError(f"{begin}: it has {short_names(both)} in full, on which there is another adapter")
    with told_of_misfit(begin):
        wrapped.add_adapter(name, settings)
    for own, weights in adapter_weights(wrapped):
        if own == name:
            for parameter in weights:
                parameter.requires_grad_(False)


def _as_named_before(wrapped: Any, names: Collection[str] | None) -> list[str] | None:
    """Return the names of parameters as the model's adapter has them, if these are the same parameters.

    PEFT takes a second adapter of parameters only under the first one's names for them.
    """
    if not names:
        return None
    own = {part.replace("base_layer.", "") for part, _ in wrapped.base_model.model.named_parameters()}
    meant = {name for name in own if any(f".{name}".endswith(f".{end}") for end in names)}
    before = wrapped.peft_config[POLICY].target_parameters
    return list(before if before and meant == adapted_parts(wrapped).parameters else names)


def _settings(adapter: AdapterFiles) -> peft.LoraConfig:
    """Return the settings for an adapter whose weights are loaded afterwards."""
    settings = deepcopy(adapter.settings)
    settings.task_type = "CAUSAL_LM"  # pyright: ignore[reportAttributeAccessIssue]
    settings.inference_mode, settings.init_lora_weights = False, True
    settings.base_model_name_or_path = None  # which `record_base` sets; PEFT warns of another name
    return settings


@torch.no_grad()
def _start_modules_from_below(wrapped: nn.Module) -> None:
    """Let modules that a stacked adapter trains in full begin as the adapter below it has them."""
    for module in wrapped.modules():
        if isinstance(module, ModulesToSaveWrapper) and {BELOW, POLICY} <= set(module.modules_to_save):
            module.modules_to_save[POLICY].load_state_dict(module.modules_to_save[BELOW].state_dict())


def _digest(adapter: AdapterFiles, tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of what an adapter computes, which does not depend on where it lies."""
    settings = adapter.settings
    scaling = (settings.r, settings.lora_alpha, settings.use_rslora, settings.rank_pattern, settings.alpha_pattern)
    digest = hashlib.sha256(f"{scaling} {settings.use_dora}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
