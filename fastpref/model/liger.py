"""Kernels of liger-kernel (arXiv 2410.10989) for a model's body: RMSNorm, RoPE, SwiGLU and GeGLU, one launch each.

liger's own functions, one per model type, decide which module gets which kernel, with which offset and which casts.
They also replace classes and functions in transformers' modules, for models that are made later. That is undone here,
so that only the modules of this one model change: their `forward`, bound to the instance. Attention finds RoPE in the
globals of its Python module, so it gets a copy of its `forward` with other globals, inside the same decorators.

The names that liger replaces in transformers' modules also show which kernels to expect for the model's type. If no
module of the model gets one of these kernels, a note says so, with the reason, when the model is loaded.

Two things are not used: liger's losses, because the head is fused here in its own way; and its kernel for the experts
of a mixture, because transformers groups their products itself and liger's kernel ignores autocast.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fastpref.errors import UserError, one_line

_ROPE = "rotary"  # is in the name of every function of transformers that liger replaces
_KINDS = {"RMSNorm": "RMSNorm", "LayerNorm": "LayerNorm", "GEGLU": "GeGLU", "SwiGLU": "SwiGLU", "ReLUSquared": "ReLU²"}
_TRIED = 16  # tokens of the trial


def wants_kernels(wanted: Literal["auto"] | bool, device_type: str, architecture: PretrainedConfig) -> bool:
    """Return whether to give a model of this architecture the kernels.

    Raises UserError if the config says `true` and they are not available.
    """
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
    trial: Callable[[], Any] | None,  # the mixed precision of a run, for the trial of the kernels; None: no trial
) -> tuple[bool, list[str]]:
    """Give a model its kernels if they compute the same as its own code. Return whether they do, and notes.

    Raises UserError if they differ or fail and the model `must` have them.
    """
    before = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]
    missing: dict[str, str] = {}
    try:
        expected = None if trial is None else _outcome(model, backbone, trial)
        taken, missing = take_kernels(model)
        why = None if taken else "no module of it is of the kind that liger-kernel knows"
        if expected is not None and trial is not None and taken:
            why = _difference(_outcome(model, backbone, trial), expected)
    except Exception as error:  # from liger, Triton's compiler or the model's code
        taken, why = [], one_line(error, named=True)
    if why is None:
        models = f"{model.config.model_type} models"
        absent = [f"liger-kernel: its {kind} for {models} is not taken: {reason}" for kind, reason in missing.items()]
        return True, [f"liger-kernel: {', '.join(taken)}", *absent]
    for module, values, children in before:
        vars(module).clear()
        vars(module).update(values)
        module._modules.clear()
        module._modules.update(children)
    if must:
        raise UserError(f"model.liger = true: cannot be had for this model here: {why}; leave the key out")
    return False, [f"liger-kernel: not taken: {why}"]


class Kernels(NamedTuple):
    """The kinds of liger's kernels that a model has, and those for its type that it does not have."""

    taken: list[str]  # kinds
    missing: dict[str, str]  # kind → reason


def take_kernels(model: PreTrainedModel) -> Kernels:
    """Replace the `forward` of this model's modules, and nothing else. Return the kinds of kernels.

    Call this before adapters wrap its layers. Raises liger's errors for a model that it does not support.
    """
    apply = _known()[model.config.model_type]
    # Without any kernel `apply` only imports the modules that it changes, so that they can be restored.
    own = {module: vars(module)["forward"] for module in model.modules() if "forward" in vars(module)}
    kernels = [o.name for o in inspect.signature(apply).parameters.values() if isinstance(o.default, bool)]
    apply(model=None, **dict.fromkeys(kernels, False))
    with _transformers_as_it_is() as changes:
        apply(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    taken: set[str] = set()
    other_activation = False
    for module in model.modules():
        kernel = _kind(module)
        if kernel is None:
            continue
        same_activation = _same_activation(module, kernel)
        other_activation |= not same_activation
        if kernel in _KINDS.values() and same_activation:
            taken.add(kernel)
        else:
            for name in ("forward", "extra_repr", "_get_name"):
                vars(module).pop(name, None)
            if module in own:  # that of experts in few bits
                vars(module)["forward"] = own[module]
    ropes = [change for change in changes if _ROPE in change.name]
    if ropes and _give_rope(model, ropes):
        taken.add("RoPE")
    functions = " or ".join(sorted({change.name for change in ropes}))
    reasons = {"RoPE": f"its layers call no {functions} that can be replaced"}
    if other_activation:
        reasons |= dict.fromkeys(("SwiGLU", "GeGLU"), "the config names another activation")
    missing = sorted(_expected(model, changes) - taken)
    return Kernels(sorted(taken), {kind: reasons.get(kind, "liger-kernel gave it to no module") for kind in missing})


@contextmanager
def kernels_not_run() -> Iterator[None]:
    """Make launches of liger's kernels do nothing inside the block: of fake tensors only the sizes matter."""
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


class _Replaced(NamedTuple):
    """A name that liger has replaced in a module of transformers."""

    home: ModuleType
    name: str
    before: Any  # None: there was no such name
    after: Any


@contextmanager
def _transformers_as_it_is() -> Iterator[list[_Replaced]]:
    """Restore the names of transformers' modules after the block, and list those that liger replaced in it."""
    names = [name for name in sys.modules if name.startswith("transformers.models.")]
    modules = [module for module in map(sys.modules.get, names) if isinstance(module, ModuleType)]
    before = [(module, dict(vars(module))) for module in modules]
    changes: list[_Replaced] = []
    try:
        yield changes
    finally:
        for module, values in before:
            for name, value in list(vars(module).items()):
                old = values.get(name)
                if value is old:
                    continue
                ligers = (getattr(value, "__module__", None) or "").startswith("liger_kernel")
                if ligers:
                    changes.append(_Replaced(module, name, old, value))
                if name in values:
                    setattr(module, name, old)
                elif ligers:
                    delattr(module, name)


def _expected(model: PreTrainedModel, changes: list[_Replaced]) -> set[str]:
    """Return the kinds of kernels that liger has for this model's type, except those for classes it does not use.

    If the model has no module of a class that liger replaces, such as the MLP of a mixture whose layers are all sparse,
    its kernel is not expected. If transformers has no such class, liger was written for another version of
    transformers, and its kernel is expected.
    """
    names = {type(module).__name__ for module in model.modules()}
    homes = {type(module).__module__ for module in model.modules()}
    expected = set()
    for change in changes:
        if _ROPE in change.name:
            expected.add("RoPE")
        elif change.before is None or change.name in names or change.home.__name__ not in homes:
            expected |= {kind for word, kind in _KINDS.items() if word in change.after.__name__}
    return expected


# --- one module ------------------------------------------------------------------------------------------------------


def _kind(module: nn.Module) -> str | None:
    """Return the kind of a module's kernel: a value of _KINDS, liger's name for a kernel not used here, or None."""
    forward = vars(module).get("forward")
    code = type(module) if forward is None else getattr(forward, "__func__", forward)
    if not getattr(code, "__module__", "").startswith("liger_kernel"):  # a head in host memory has a `partial`
        return None
    return next((ours for theirs, ours in _KINDS.items() if theirs in code.__qualname__), code.__qualname__)


def _same_activation(module: nn.Module, kind: str) -> bool:
    """Return whether a module's activation is the kernel's: liger goes by the model type, a config may name another."""
    expected = {"SwiGLU": F.silu, "GeGLU": lambda x: F.gelu(x, approximate="tanh")}.get(kind)
    activation = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    if expected is None or activation is None:
        return True
    x = torch.linspace(-4, 4, 17, device="cpu")
    return torch.allclose(activation(x), expected(x), atol=1e-6)


def _give_rope(model: PreTrainedModel, changes: list[_Replaced]) -> bool:
    """Give modules copies of their methods that call liger's functions. Return whether any module calls one."""
    called = False
    homes = {id(change.home): change.home for change in changes}.values()
    methods: dict[type[nn.Module], dict[str, FunctionType]] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in methods:
            methods[kind] = {}
            for home in homes:
                new = {change.name: change.after for change in changes if change.home is home}
                for name, method in _own_methods(kind).items():
                    copied = _with_globals(methods[kind].get(name, method), home, new)
                    if copied is not None:
                        methods[kind][name] = copied
        for name, method in methods[kind].items():
            vars(module)[name] = MethodType(method, module)
            called = True
        for change in changes:  # a module may hold the function itself
            for name, value in list(vars(module).items()):
                if value is not None and value is change.before:
                    vars(module)[name] = change.after
                    called = True
    return called


def _own_methods(kind: type[nn.Module]) -> dict[str, FunctionType]:
    """Return the methods of a class, except torch's."""
    methods: dict[str, FunctionType] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith(("torch.", "builtins")):
            functions = {name: value for name, value in vars(base).items() if isinstance(value, FunctionType)}
            methods |= {name: value for name, value in functions.items() if not name.startswith("__")}
    return methods


def _with_globals(function: FunctionType, home: ModuleType, new: dict[str, Any]) -> FunctionType | None:
    """Return a copy that finds `new` among the globals of the module `home`, or None if it uses none of them.

    A decorator's function holds the decorated one in a closure cell, so it is copied too, around the copy. So are the
    module's own functions that the function calls.
    """
    copies: dict[int, FunctionType | None] = {}

    def copied(value: Any) -> FunctionType | None:
        if isinstance(value, FunctionType) and id(value) not in copies:
            copies[id(value)] = None  # ends the recursion if functions call each other
            copies[id(value)] = rebuilt(value)
        return copies.get(id(value))

    def rebuilt(function: FunctionType) -> FunctionType | None:
        names: dict[str, Any] = {}
        if function.__globals__ is vars(home):
            for name in _global_names(function.__code__) & vars(home).keys():
                value = vars(home)[name]
                own = getattr(value, "__module__", None) == home.__name__
                other = new[name] if name in new else copied(value) if own else None
                if other is not None:
                    names[name] = other
        cells = [_rebuilt_cell(cell, copied) for cell in function.__closure__ or ()]
        if not names and not any(cells):
            return None
        closure = tuple(cell or own for cell, own in zip(cells, function.__closure__ or (), strict=True))
        scope = {**function.__globals__, **names} if names else function.__globals__
        copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure or None)
        functools.update_wrapper(copy, function)
        copy.__kwdefaults__ = function.__kwdefaults__
        inner = vars(function).get("__wrapped__")
        del copy.__wrapped__
        if inner is not None:
            copy.__wrapped__ = copied(inner) or inner
        return copy

    return copied(function)


def _rebuilt_cell(cell: CellType, copied: Callable[[Any], FunctionType | None]) -> CellType | None:
    """Return a closure cell with the copy of the function in this one, or None if that has no copy."""
    try:
        content = cell.cell_contents
    except ValueError:  # empty
        return None
    copy = copied(content)
    return None if copy is None else CellType(copy)


def _global_names(code: CodeType) -> set[str]:
    """Return the names of globals and attributes that code uses, including its inner functions."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_global_names, inner))


# --- the trial -------------------------------------------------------------------------------------------------------


def _outcome(model: PreTrainedModel, backbone: nn.Module, precision: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Return hidden states [T, H] of a few tokens, and the gradient [T, H] of their weighted sum for the embeddings."""
    embeddings: Any = model.get_input_embeddings()
    leaves: list[Tensor] = []

    def as_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    ids = torch.arange(_TRIED, device=model.device)[None] % embeddings.weight.shape[0]
    hook = embeddings.register_forward_hook(as_leaf)
    try:
        with torch.enable_grad(), precision():
            hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    weights = torch.arange(hidden.numel(), device=hidden.device).view_as(hidden).cos()
    (gradient,) = torch.autograd.grad((hidden.float() * weights).sum(), leaves)
    return hidden.detach().float()[0], gradient.float()[0]


def _difference(outcome: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str | None:
    """Return a message if the outcomes differ by more than rounding, or None.

    The kernels round at other points, which shows in half precision. The errors of a wrong kernel are much larger.
    """
    for what, ours, theirs in zip(("hidden states", "gradients"), outcome, expected, strict=True):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error <= 0.2:
            return f"its {what} differ from those of the model's own code by {error:.2g} of their size"
    return None
