"""The frozen reference: the policy with its adapters off, or a copy. `precompute.py` stores its log-probabilities."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastpref.config import Config
from fastpref.data.batch import PreferenceBatch
from fastpref.errors import UserError
from fastpref.model.files import model_config
from fastpref.model.liger import take_kernels
from fastpref.model.load import Loaded, pretrained
from fastpref.model.policy import Policy
from fastpref.model.rope import fix_rope

ONCE = ", computed once for each completion and remembered"
Reference = Callable[[PreferenceBatch], Tensor]  # token log-probabilities [M], without gradient


@dataclass(frozen=True)
class ModelReference:
    """A reference that computes its log-probabilities for every micro-batch."""

    policy: Policy
    adapters: peft.PeftModel | None  # turned off while the reference computes
    autocast: Callable[..., Any]
    copy: PreTrainedModel | None = None  # a model that only the reference uses

    @torch.no_grad()
    def __call__(self, batch: PreferenceBatch) -> Tensor:
        training = self.policy.training
        self.policy.eval()  # without dropout
        try:
            with self.autocast(), self.adapters.disable_adapter() if self.adapters is not None else nullcontext():
                return self.policy(batch).logp
        finally:
            self.policy.train(training)

    @property
    def nbytes(self) -> int:
        """The bytes of the frozen copy, or 0 if the reference shares the policy's weights."""
        return 0 if self.copy is None else sum(p.nbytes for p in self.copy.parameters())


def make_reference(
    config: Config,
    loaded: Loaded,
    autocast: Callable[..., Any] = nullcontext,
    load: Callable[[Config, Loaded], PreTrainedModel] | None = None,
) -> tuple[ModelReference, str]:
    """Return the reference of `reference.mode` and its description. Call this before any training step.

    For "precompute" (and "auto" without adapters) it is the model itself, which is right only until the first step.
    `autocast` must be the policy's mixed precision, or the reference would differ from the policy before training.
    `load` loads a copy with another dtype or quantization, by default from the model's own source. Raises UserError for
    a copy that cannot be loaded.
    """
    adapters = loaded.wrapped if isinstance(loaded.wrapped, peft.PeftModel) else None
    if precomputes(config) or config.reference.mode != "copy":
        return ModelReference(loaded.policy, adapters, autocast), described(config)
    other = copy_config(config, loaded.model)
    frozen = frozen_copy(loaded.model) if other is None else (load or load_copy)(other, loaded)
    frozen.requires_grad_(False).eval()
    bits = "" if other is None or other.model.quantization == "none" else f"{other.model.quantization} and "
    how = "" if other is None else f", in {bits}{other.model.dtype}"
    return ModelReference(loaded.policy.like(frozen), None, autocast, frozen), f"{described(config)}{how}"


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model in evaluation mode, without gradients.

    Tensors that modules keep from an earlier call are detached, because deepcopy refuses tensors that are not leaves.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(module)[name] = value.detach()
    return copy.deepcopy(model).requires_grad_(False).eval()


def precomputes(config: Config) -> bool:
    """Return whether reference log-probabilities are computed before training, to save the memory of a copy."""
    return config.reference.mode == "precompute" or (config.reference.mode == "auto" and config.lora is None)


def remembers(config: Config) -> bool:
    """Return whether a reference with adapters keeps what it has computed, for later epochs, evaluations and runs."""
    return config.reference.mode == "auto" and config.lora is not None


def described(config: Config) -> str:
    """Describe the reference of a config whose loss has one."""
    if precomputes(config):
        return "computed before training"
    return "a frozen copy of the model" if config.reference.mode == "copy" else "the same weights with the adapters off"


def summary(config: Config) -> str | None:
    """Describe the reference of a run in one process, and when it is computed; None if the loss has none."""
    if not config.loss.uses_reference:
        return None
    return f"{described(config)}{ONCE if remembers(config) else ''}"


def copy_config(config: Config, model: PreTrainedModel) -> Config | None:
    """Return the config for loading a frozen copy, or None if the copy has the model's own dtype and quantization.

    Raises UserError if the checkpoint is quantised already and the config asks for another quantization.
    """
    wanted, own = config.reference, str(model.dtype).removeprefix("torch.")
    dtype = own if wanted.dtype == "auto" else wanted.dtype
    quantization = config.model.quantization if wanted.quantization == "auto" else wanted.quantization
    if wanted.quantization != "auto" and config.model.quantization == "none" and getattr(model, "is_quantized", False):
        raise UserError(
            f'reference.quantization = "{wanted.quantization}": the checkpoint of {config.model.name} is quantised '
            "already; leave the key out"
        )
    if (dtype, quantization) == (own, config.model.quantization):
        return None
    return config.but({"model.dtype": dtype, "model.quantization": quantization, "lora": None})


def load_copy(config: Config, loaded: Loaded) -> PreTrainedModel:
    """Load the model of `copy_config`, with the attention and the kernels of the trained model."""
    dtype = getattr(torch, config.model.dtype)
    model = pretrained(config.model, model_config(config.model), dtype, loaded.model.device)
    fix_rope(model, config.tokens.max_length)
    attention = loaded.model.config._attn_implementation
    if attention is not None and attention != model.config._attn_implementation:
        model.set_attn_implementation(attention)
    if loaded.liger:
        take_kernels(model)
    return model
