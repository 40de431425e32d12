"""Kernels of liger-kernel (arXiv 2410.10989) for a model's body: RMSNorm, RoPE, SwiGLU and GeGLU, a launch each.

Which module gets which kernel, with which offset and which casts, is liger's own knowledge, by model type. Its
functions also set classes and functions of transformers' modules, for models that are made later. That is undone
here, so that nothing but the modules of the one model changes: their `forward`, bound to the instance. RoPE, which
attention takes from its module's globals, comes by a copy of attention's `forward` that has other globals.

Not taken: the losses, because the head is fused here in its own way; and the kernel for a mixture's experts, because
transformers groups their products itself and liger's does not follow autocast.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fastpref.errors import UserError

_ROPE = "apply_rotary_pos_emb"  # its name in transformers' modules
_KINDS = {"RMSNorm": "RMSNorm", "LayerNorm": "LayerNorm", "GEGLU": "GeGLU", "SwiGLU": "SwiGLU", "ReLUSquared": "ReLU²"}
_TRIED = 16  # tokens


def wants_kernels(wanted: Literal["auto"] | bool, device_type: str, architecture: PretrainedConfig) -> bool:
    """Whether a model of this architecture shall have the kernels. Raises UserError where `true` asks in vain."""
    if wanted is False:
        return False
    why = None if device_type == "cuda" else "they run on GPUs only"
    if why is None and architecture.model_type not in _known():
        why = f"liger-kernel knows no {architecture.model_type} models"
    if why is not None and wanted is True:
        raise UserError(f"model.liger = true: {why}; leave the key out")
    return why is None


def give_kernels(
    model: PreTrainedModel,
    backbone: nn.Module,
    *,
    must: bool,
    trial: Callable[[], Any] | None,  # the mixed precision of a run, in which the kernels are tried; None: they are not
) -> tuple[bool, list[str]]:
    """Give a model its kernels if they do there what its own code does. Whether it has them, and what to tell of it.

    Raises UserError instead of going without them if it `must` have them.
    """
    before = _state(model)
    try:
        expected = None if trial is None else _outcome(model, backbone, trial)
        taken = take_kernels(model)
        why = None if taken else "no module of it is of the kind that liger-kernel knows"
        if expected is not None and trial is not None and taken:
            why = _difference(_outcome(model, backbone, trial), expected)
    except Exception as error:  # of liger, of Triton's compiler, of the model's code
        taken, why = [], f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if why is None:
        return True, [f"liger-kernel: {', '.join(taken)}"]
    _restore(model, before)
    if must:
        raise UserError(f"model.liger = true: cannot be had for this model here: {why}; leave the key out")
    return False, [f"liger-kernel: not taken: {why}"]


def take_kernels(model: PreTrainedModel) -> list[str]:
    """Replace the forward of this model's modules, and nothing else; the kinds of those that were.

    To be called before adapters are put around its layers. Raises what liger raises for a model it does not know.
    """
    apply = _known()[model.config.model_type]
    home = sys.modules[type(model).__module__]
    own = vars(home).get(_ROPE)
    with _transformers_as_it_is():
        apply(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
        theirs = vars(home).get(_ROPE)
    kinds: set[str] = set()
    for module in model.modules():
        kernel = _kind(module)
        if kernel is not None and (kernel not in _KINDS.values() or not _same_activation(module, kernel)):
            _own_forward(module)
        elif kernel is not None:
            kinds.add(kernel)
    if theirs is not own and _give_rope(model, home, theirs):
        kinds.add("RoPE")
    return sorted(kinds)


@contextmanager
def kernels_not_run() -> Iterator[None]:
    """Inside, launching liger's kernels does nothing: for fake tensors, whose sizes are all that counts."""
    from liger_kernel.ops import geglu, layer_norm, relu_squared, rms_norm, rope, swiglu
    from triton.runtime.jit import KernelInterface

    modules = (geglu, layer_norm, relu_squared, rms_norm, rope, swiglu)
    kernels = {id(k): k for module in modules for k in vars(module).values() if isinstance(k, KernelInterface)}
    for kernel in kernels.values():
        vars(kernel)["run"] = lambda *args, **options: None
    try:
        yield
    finally:
        for kernel in kernels.values():
            del vars(kernel)["run"]


def _known() -> dict[str, Callable[..., None]]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN


@contextmanager
def _transformers_as_it_is() -> Iterator[None]:
    """Whatever is set in a module of transformers inside is what it was afterwards."""
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and isinstance(module, ModuleType)
    ]
    before = [(module, dict(vars(module))) for module in modules]
    try:
        yield
    finally:
        for module, values in before:
            now = vars(module)
            now.update({name: value for name, value in values.items() if now.get(name) is not value})


# --- one module ------------------------------------------------------------------------------------------------------


def _kind(module: nn.Module) -> str | None:
    """What liger has made of a module: one of ours, its own word for what is not taken, None for nothing."""
    forward = vars(module).get("forward")
    name = type(module).__name__ if forward is None else forward.__func__.__qualname__
    home = type(module).__module__ if forward is None else forward.__func__.__module__
    if not home.startswith("liger_kernel"):
        return None
    return next((ours for theirs, ours in _KINDS.items() if theirs in name), name)


def _same_activation(module: nn.Module, kind: str | None) -> bool:
    """Liger goes by the model type alone; a config may name another activation than the type's usual one."""
    expected = {"SwiGLU": F.silu, "GeGLU": lambda x: F.gelu(x, approximate="tanh")}.get(kind or "")
    activation = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    if expected is None or activation is None:
        return True
    x = torch.linspace(-4, 4, 17, device="cpu")
    return torch.allclose(activation(x), expected(x), atol=1e-6)


def _own_forward(module: nn.Module) -> None:
    for name in ("forward", "extra_repr", "_get_name"):
        vars(module).pop(name, None)


def _give_rope(model: PreTrainedModel, home: ModuleType, rope: Any) -> bool:
    """A forward that finds `rope` where its module's globals have their own. False if no layer asks for that."""
    found = False
    forwards: dict[type[nn.Module], FunctionType] = {}
    for module in model.modules():
        kind, plain = type(module), type(module).forward
        if not isinstance(plain, FunctionType) or plain.__globals__ is not vars(home):
            continue
        if _ROPE not in plain.__code__.co_names:
            continue
        if kind not in forwards:
            names = {**plain.__globals__, _ROPE: rope}
            copied = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
            copied.__kwdefaults__, copied.__annotations__ = plain.__kwdefaults__, plain.__annotations__
            forwards[kind] = copied
        vars(module)["forward"] = MethodType(forwards[kind], module)
        found = True
    return found


# --- the trial -------------------------------------------------------------------------------------------------------


def _outcome(model: PreTrainedModel, backbone: nn.Module, precision: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """A few tokens' hidden states [T, H], and the gradient [T, H] by the embeddings of a weighted sum of them."""
    embeddings: Any = model.get_input_embeddings()
    leaves: list[Tensor] = []

    def as_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    ids = torch.arange(_TRIED, device=embeddings.weight.device)[None] % embeddings.weight.shape[0]
    hook = embeddings.register_forward_hook(as_leaf)
    try:
        with torch.enable_grad(), precision():
            hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    weights = torch.arange(hidden.numel(), device=hidden.device).view_as(hidden).cos()
    (gradient,) = torch.autograd.grad((hidden.float() * weights).sum(), leaves)
    return hidden.detach().float()[0], gradient.float()[0]


def _difference(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str | None:
    """What is not as it was. Kernels round in other places, which half precision shows; a wrong one is off by far."""
    margin = 0.2
    for what, ours, theirs in zip(("hidden states", "gradients"), found, expected, strict=True):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error <= margin:
            return f"its {what} differ from those of the model's own code by {error:.2g} of their size"
    return None


# --- to and fro ------------------------------------------------------------------------------------------------------


def _state(model: PreTrainedModel) -> list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]:
    return [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]


def _restore(model: PreTrainedModel, before: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]) -> None:
    for module, values, children in before:
        vars(module).clear()
        vars(module).update(values)
        module._modules.clear()
        module._modules.update(children)
