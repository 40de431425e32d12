"""The frozen reference: the policy with other adapters or none, or a copy. `precompute.py` stores what it computes."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.config import Config
from fastpref.data.batch import PreferenceBatch
from fastpref.errors import UserError
from fastpref.model.adapters.source import reference_kind
from fastpref.model.adapters.switch import POLICY, only
from fastpref.model.files import model_config
from fastpref.model.liger import take_kernels
from fastpref.model.load import Loaded, load_model, pretrained
from fastpref.model.new_tokens import make_room
from fastpref.model.policy import Policy, PolicyOutput
from fastpref.model.rope import fix_rope
from fastpref.model.streaming.stream import stream_of
from fastpref.model.streaming.sweep import SharedSweep

ONCE = ", computed once for each completion and remembered"
Reference = Callable[[PreferenceBatch], Tensor]  # token log-probabilities [M], without gradient
PolicyPass = Callable[[], PolicyOutput]


@runtime_checkable
class Beside(Protocol):
    """A reference that may compute a batch during a pass of the policy."""

    def beside(self, policy_pass: PolicyPass, batch: PreferenceBatch) -> tuple[PolicyOutput, Tensor]:
        """Run the policy's pass. Return its result, and the log-probabilities [M] of calling the reference."""
        ...


def both(
    policy_pass: PolicyPass, reference: Reference | None, batch: PreferenceBatch
) -> tuple[PolicyOutput, Tensor | None]:
    """Run the policy's pass and the reference on a batch of its own, in one sweep over the weights if they stream."""
    if isinstance(reference, Beside):
        return reference.beside(policy_pass, batch)
    return policy_pass(), None if reference is None else reference(batch)


@dataclass(frozen=True)
class ModelReference:
    """A reference that computes its log-probabilities for every micro-batch."""

    policy: Policy
    adapters: tuple[str, ...]  # those that are on while the reference computes; the others are off
    autocast: Callable[..., Any]
    copy: PreTrainedModel | None = None  # a model that only the reference uses
    sweep: SharedSweep | None = None  # of a streamed model

    def __call__(self, batch: PreferenceBatch) -> Tensor:
        with self._state(self.policy):
            return self.policy(batch).logp

    def beside(self, policy_pass: PolicyPass, batch: PreferenceBatch) -> tuple[PolicyOutput, Tensor]:
        """Run the policy's pass, and compute the batch in the same sweep over the layers if the model streams."""
        if self.sweep is None or self.sweep.why_not is not None:
            return policy_pass(), self(batch)
        with self.sweep.shared(partial(self._body, batch), self._state) as states:
            output = policy_pass()
        if states.fault is not None:
            return output, self(batch)
        with states.behind_layers():
            return output, self(batch)

    def _body(self, batch: PreferenceBatch) -> None:
        with self._state(self.policy):
            self.policy.hidden_states(batch)

    @contextmanager
    def _state(self, module: nn.Module) -> Iterator[None]:
        """Put the policy, or a part of it, into the reference's state inside the block."""
        training = module.training
        module.eval()  # without dropout
        try:
            with torch.no_grad(), self.autocast(), only(module, self.adapters):
                yield
        finally:
            module.train(training)

    @torch.no_grad()
    def move(self, model: PreTrainedModel, mix: float) -> None:
        """Move the copy to mix · the model's weights + (1 − mix) · its own (TR-DPO, arXiv 2404.09656)."""
        assert self.copy is not None
        for own, trained in zip(self.copy.parameters(), model.parameters(), strict=True):
            own.mul_(1 - mix).add_(trained, alpha=mix)

    def weights(self) -> list[Tensor]:
        """Return the copy's weights, which share its storage."""
        return [] if self.copy is None else [parameter.detach() for parameter in self.copy.parameters()]

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
    stream, kind = stream_of(loaded.model), reference_kind(config)
    if kind == "model":
        return _another_model(config, loaded, autocast, load)
    if config.precomputes or config.reference.mode != "copy":
        sweep = None if stream is None else SharedSweep(stream)
        return ModelReference(loaded.policy, loaded.reference.names, autocast, sweep=sweep), described(config)
    if stream is not None:
        raise UserError(
            'reference.mode = "copy": the weights of a streamed model are not copied; leave the key out, then the '
            "reference is the model with its adapters off"
        )
    other = copy_config(config, loaded.model)
    frozen = frozen_copy(loaded.model) if other is None else (load or load_copy)(other, loaded)
    frozen.requires_grad_(False).eval()
    # Adapters that begin with what rounding has lost are a part of the model; others begin at zero.
    names = (POLICY,) if config.lora is not None and config.lora.init == "loftq" else ()
    return ModelReference(loaded.policy.like(frozen), names, autocast, frozen), f"{described(config)}{_form(other)}"


def _another_model(
    config: Config,
    loaded: Loaded,
    autocast: Callable[..., Any],
    load: Callable[[Config, Loaded], PreTrainedModel] | None,
) -> tuple[ModelReference, str]:
    """Return a reference that is a model of its own, `reference.name`."""
    name = config.reference.name
    if loaded.stream is not None:
        raise UserError(
            f"reference.name = {name!r}: a whole model would lie on the GPU, beside weights that are streamed; set "
            "model.streaming to false, or name an adapter of the same base model"
        )
    other = named_model(config, loaded)
    if load is not None:
        frozen = load(other, loaded).requires_grad_(False).eval()
        return ModelReference(loaded.policy.like(frozen), (), autocast, frozen), described(config)
    theirs = load_model(other, loaded.model.device, trained=True)
    if theirs.layout != loaded.layout:
        raise UserError(
            f"reference.name = {name!r}: {theirs.why_padded}, and {config.model.name} computes {loaded.layout} "
            f'rows; set train.layout = "{theirs.layout}"'
        )
    if theirs.policy.head.vocabulary != loaded.policy.head.vocabulary:
        raise UserError(
            f"reference.name = {name!r}: it has {theirs.policy.head.vocabulary:,} tokens and {config.model.name} "
            f"{loaded.policy.head.vocabulary:,}; only models with the same tokens can be compared"
        )
    theirs.model.requires_grad_(False)
    reference = ModelReference(theirs.policy.eval(), (), autocast, theirs.model)
    return reference, f"{described(config)}{_form(other)}"


def _form(other: Config | None) -> str:
    """Describe the form of a copy that is loaded."""
    if other is None:
        return ""
    bits = "" if other.model.quantization == "none" else f"{other.model.quantization} and "
    return f", in {bits}{other.model.dtype}"


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model in evaluation mode, without gradients.

    Tensors that modules keep from an earlier call are detached, because deepcopy refuses tensors that are not leaves.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(module)[name] = value.detach()
    return copy.deepcopy(model).requires_grad_(False).eval()


def remembers(config: Config) -> bool:
    """Return whether a reference with adapters keeps what it has computed, for later epochs, evaluations and runs."""
    return config.reference.mode == "auto" and config.lora is not None


def described(config: Config) -> str:
    """Describe the reference of a config whose loss has one."""
    kind = reference_kind(config)
    what = {
        "base": "the same weights with the adapters off",
        "start": f"the same weights with the adapter {config.lora and config.lora.start}",
        "adapter": f"the same weights with the adapter {config.reference.name}",
        "model": f"a frozen copy of {config.reference.name}",
    }[kind]
    if config.precomputes:
        return "computed before training" + ("" if kind == "base" else f", by {what}")
    if (sync := config.reference.sync) is not None:
        return f"a copy of the model, which moves every {sync.every} steps by {sync.mix:g} of the way to the policy"
    return "a frozen copy of the model" if kind == "base" and config.reference.mode == "copy" else what


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


def named_model(config: Config, loaded: Loaded) -> Config:
    """Return the config for loading the model of `reference.name`, by default in the form of the trained model."""
    wanted, own = config.reference, str(loaded.model.dtype).removeprefix("torch.")
    return config.but({
        "model.name": wanted.name,
        "model.revision": None,
        "model.dtype": own if wanted.dtype == "auto" else wanted.dtype,
        "model.quantization": config.model.quantization if wanted.quantization == "auto" else wanted.quantization,
        "model.streaming": False,
        "train.layout": loaded.layout,
        "lora": None,
    })  # fmt: skip


def load_copy(config: Config, loaded: Loaded) -> PreTrainedModel:
    """Load the model of `copy_config`, with the attention and the kernels of the trained model."""
    dtype = getattr(torch, config.model.dtype)
    model = pretrained(config.model, model_config(config.model), dtype, loaded.model.device)
    make_room(config, model)
    fix_rope(model, config.tokens.max_length)
    attention = loaded.model.config._attn_implementation
    if attention is not None and attention != model.config._attn_implementation:
        model.set_attn_implementation(attention)
    if loaded.liger:
        take_kernels(model)
    return model
