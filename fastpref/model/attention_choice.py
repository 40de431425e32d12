"""The choice of the attention that computes forests: FlexAttention, flash-attn, or SDPA, which needs no trial.

Whether a kernel works depends on the GPU, the head width and the versions of the packages. So each kernel is tried with
the arguments of the model's layers, and its outputs and gradients are compared with those of `tree_attention`, before a
model gets it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastpref.data.batch import Layout
from fastpref.data.forest import Forest, Node
from fastpref.errors import UserError
from fastpref.model import flex_attention, varlen_attention
from fastpref.model.attention import LayerCall, tree_attention


@dataclass(frozen=True)
class Kernel:
    """An attention over forests that only GPUs compute."""

    wanted: Literal["flex", "varlen"]  # the value of model.attention that asks for it
    name: str  # the name under which it is registered with transformers
    title: str  # its name in messages
    attend: Callable[..., tuple[Tensor, None]]
    # the reason why it cannot compute a model's layers on a GPU
    lacks: Callable[[Iterable[LayerCall], torch.dtype, torch.device], str | None]


FLEX = Kernel("flex", flex_attention.NAME, "FlexAttention", flex_attention.flex_tree_attention, flex_attention.lacks)
VARLEN = Kernel(
    "varlen", varlen_attention.NAME, "flash-attn", varlen_attention.varlen_tree_attention, varlen_attention.lacks
)


def choose_attention(
    wanted: Literal["auto", "flex", "varlen", "sdpa"],
    layout: Layout,
    why_padded: str | None,
    calls: Sequence[LayerCall],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Kernel | None, str | None]:
    """Return the kernel for a model, or None for SDPA, and what the user should see of the decision.

    `dtype` is that in which the attention computes. "auto" is the first kernel that works of FlexAttention and, where
    it is installed, flash-attn. Raises UserError if the config asks for a kernel that cannot be had.
    """
    kernels = [kernel for kernel in (FLEX, VARLEN) if wanted == kernel.wanted]
    if wanted == "auto" and device.type == "cuda" and layout != "padded":
        kernels = [FLEX, VARLEN] if varlen_attention.installed() else [FLEX]
    reasons: list[str] = []
    for kernel in kernels:
        if layout == "padded":
            why = f"it computes tree and packed rows only ({why_padded or 'train.layout = padded'})"
        else:
            why = why_not(kernel, calls, dtype, device)
        if why is None:
            return kernel, " ".join([f"attention: {kernel.title}", *(f"({reason})" for reason in reasons)])
        if wanted != "auto":
            raise UserError(f'model.attention = "{wanted}": {kernel.title} cannot be had: {why}; leave the key out')
        reasons.append(f"{kernel.title}: {why}")
    return None, f"attention: SDPA, a call a completion: {'; '.join(reasons)}" if reasons else None


def why_not(kernel: Kernel, calls: Sequence[LayerCall], dtype: torch.dtype, device: torch.device) -> str | None:
    """Return the reason why a kernel cannot compute a model's layers on a device, or None."""
    if device.type != "cuda":  # ROCm devices have this name too
        return f"it trains on GPUs only, and this is a {device.type} device"
    return kernel.lacks(calls, dtype, device) or fault(kernel, calls, dtype, device)


def fault(kernel: Kernel, calls: Iterable[LayerCall], dtype: torch.dtype, device: torch.device) -> str | None:
    """Compute a model's layers with a kernel, and compare outputs and gradients with those of `tree_attention`.

    Returns a message if the kernel fails or differs, or None. Training uses what is compiled here, with gradient and
    without.
    """
    for call in dict.fromkeys(calls):
        try:
            error = difference(kernel, call, dtype, device)
        except Exception as failure:  # compilers fail in many ways
            lines = [line for line in str(failure).splitlines() if line.strip()] or [""]
            return f"{type(failure).__name__}: {lines[0].strip()[:200]}"
        if not error < (1e-3 if dtype == torch.float32 else 5e-2):
            return f"its result differs by {error:.2g}"
    return None


def difference(kernel: Kernel, call: LayerCall, dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest difference of outputs and gradients from `tree_attention`, relative to its largest value."""
    # 150 tokens, then 90 or 70 (whose first 40 are shared by two sequences), and a second tree
    tree = Forest(
        (
            Node(0, 150, 0, None, 310),
            Node(150, 90, 150, 0, 240),
            Node(240, 40, 150, 0, 310),
            Node(280, 20, 190, 2, 300),
            Node(300, 10, 190, 2, 310),
            Node(310, 60, 0, None, 370),
        )
    )
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, width: int) -> Tensor:
        drawn = torch.randn(1, 370, heads, width, generator=generator).to(device, dtype)
        return drawn.transpose(1, 2).requires_grad_()

    inputs = [
        random(call.heads, call.width),
        random(call.kv_heads, call.width),
        random(call.kv_heads, call.value_width),
    ]
    sinks = torch.linspace(-1, 1, call.heads).to(device, dtype) if call.sinks else None
    options: dict[str, Any] = {"sliding_window": call.window, "softcap": call.softcap, "s_aux": sinks}

    def attend(function: Callable[..., Any]) -> Tensor:
        return function(nn.Identity(), *inputs, attention_mask=None, scaling=call.scaling, tree=tree, **options)[0]

    results = []
    for function in (kernel.attend, tree_attention):
        with torch.no_grad():
            alone = attend(function)
        out = attend(function)
        results.append([alone, out, *torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(1) / 370)])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))
