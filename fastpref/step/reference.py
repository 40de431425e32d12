"""The frozen reference: the same model with its adapters off, a copy of it, or (`precompute.py`) its numbers."""

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
from fastpref.model.liger import take_kernels
from fastpref.model.load import Loaded, model_config, pretrained
from fastpref.model.policy import Policy
from fastpref.model.rope import fix_rope

Reference = Callable[[PreferenceBatch], Tensor]  # token log-probabilities [N], without gradient


@dataclass(frozen=True)
class ModelReference:
    """A reference that is computed when it is asked for."""

    policy: Policy
    adapters: peft.PeftModel | None  # which are off meanwhile
    autocast: Callable[..., Any]
    copy: PreTrainedModel | None = None  # the model, if it is held for this alone

    @torch.no_grad()
    def __call__(self, batch: PreferenceBatch) -> Tensor:
        training = self.policy.training
        self.policy.eval()  # a reference knows no dropout
        try:
            with self.autocast(), self.adapters.disable_adapter() if self.adapters is not None else nullcontext():
                return self.policy(batch).logp
        finally:
            self.policy.train(training)

    @property
    def nbytes(self) -> int:
        """What is held for it."""
        return 0 if self.copy is None else sum(p.nbytes for p in self.copy.parameters())


def make_reference(
    config: Config,
    loaded: Loaded,
    autocast: Callable[..., Any] = nullcontext,
    load: Callable[[Config, Loaded], PreTrainedModel] | None = None,
) -> tuple[ModelReference, str]:
    """The reference of `reference.mode`, and which one it is, in words. Call it before any training step.

    For "precompute" (and "auto" without adapters) it is the model itself, right only until the first step.
    `autocast` makes the mixed precision of the policy: a reference in another would differ from it before training.
    A copy in another dtype or other bits is loaded anew, from where the model came from, or as `load` says. Raises
    UserError for a copy that cannot be had.
    """
    adapters = loaded.wrapped if isinstance(loaded.wrapped, peft.PeftModel) else None
    if adapters is not None and config.reference.mode != "copy":
        what = "computed before training" if precomputes(config) else "the same weights with the adapters off"
        return ModelReference(loaded.policy, adapters, autocast), what
    if precomputes(config):
        return ModelReference(loaded.policy, None, autocast), "computed before training"
    other = copy_config(config, loaded.model)
    frozen = frozen_copy(loaded.model) if other is None else (load or load_copy)(other, loaded)
    frozen.requires_grad_(False).eval()
    bits = "" if other is None or other.model.quantization == "none" else f"{other.model.quantization} and "
    how = "" if other is None else f", in {bits}{other.model.dtype}"
    return ModelReference(loaded.policy.like(frozen), None, autocast, frozen), f"a frozen copy of the model{how}"


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model in evaluation mode, without gradients. States that modules keep of a call are cut off it."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(module)[name] = value.detach()
    return copy.deepcopy(model).requires_grad_(False).eval()


def precomputes(config: Config) -> bool:
    """Whether the reference's numbers are computed before training: a copy would take the model's memory again."""
    return config.reference.mode == "precompute" or (config.reference.mode == "auto" and config.lora is None)


def copy_config(config: Config, model: PreTrainedModel) -> Config | None:
    """The config that a frozen copy is loaded by, or None if it is in nothing different from the model.

    Raises UserError for a model whose weights are quantised already, if the copy's shall be otherwise.
    """
    wanted, own = config.reference, str(model.dtype).removeprefix("torch.")
    dtype = own if wanted.dtype == "auto" else wanted.dtype
    quantization = config.model.quantization if wanted.quantization == "auto" else wanted.quantization
    if wanted.quantization != "auto" and config.model.quantization == "none" and getattr(model, "is_quantized", False):
        raise UserError(
            f'reference.quantization = "{wanted.quantization}": the weights of {config.model.name} are quantised where '
            "they lie; leave the key out"
        )
    if (dtype, quantization) == (own, config.model.quantization):
        return None
    return config.but({"model.dtype": dtype, "model.quantization": quantization, "lora": None})


def load_copy(config: Config, loaded: Loaded) -> PreTrainedModel:
    """The model of `copy_config`, beside the one that is trained, with the same attention and kernels."""
    dtype = getattr(torch, config.model.dtype)
    model = pretrained(config.model, model_config(config.model), dtype, loaded.model.device)
    fix_rope(model, config.tokens.max_length)
    attention = loaded.model.config._attn_implementation
    if attention is not None and attention != model.config._attn_implementation:
        model.set_attn_implementation(attention)
    if loaded.liger:
        take_kernels(model)
    return model
