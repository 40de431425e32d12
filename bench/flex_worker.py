"""Compile FlexAttention for a GPU that is not there, in a process of its own, for `flex_report.py`.

    python -m bench.flex_worker DEVICE ARCHITECTURE SHAPES

DEVICE is the library that `absent_gpu.device.build` makes, ARCHITECTURE a key of CARDS, and SHAPES a list of the fields
of `Shape` in JSON. Each shape's result is printed as a line of JSON, with the fields of `Result`.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from bench.absent_gpu.device import take_over
from bench.sass import disassembled

SUFFIX = {"flex_attention": "forward", "flex_attention_backward": "backward"}


def main() -> None:
    library, architecture, shapes = sys.argv[1:]
    take_over(Path(library))  # before anything imports torch

    from bench.absent_gpu.card import CARDS
    from bench.absent_gpu.pretend import pretend

    pretend(CARDS[int(architecture)])
    for shape in json.loads(shapes):
        print(json.dumps(_compiled(shape)), flush=True)


def _compiled(shape: dict[str, Any]) -> dict[str, Any]:
    """Compile a layer's forward and backward pass as the model's code calls it."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.absent_gpu.inductor import DEVICE, compiled_kernels
    from fastpref.data.forest import Forest, Node
    from fastpref.model.flex_attention import block_mask, flex_tree_attention
    from fastpref.model.flex_kernel import lacking

    torch._dynamo.reset()
    heads, kv_heads, width, dtype = shape["heads"], shape["kv_heads"], shape["width"], getattr(torch, shape["dtype"])
    if (why := lacking({width}, dtype, DEVICE)) is not None:
        return {"fault": why, "kernels": {}}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tree = Forest((Node(0, 150, 0, None, 310), Node(150, 90, 150, 0, 240), Node(240, 70, 150, 0, 310)))
    with fake:
        states = [
            torch.empty(1, tree.tokens, count, width, dtype=dtype, device=DEVICE).transpose(1, 2).requires_grad_()
            for count in (heads, kv_heads, kv_heads)
        ]
        block_mask(tree, None, DEVICE)  # which is made for the first layer of a model
    attend: Any = flex_tree_attention
    options = {"scaling": width**-0.5, "softcap": shape["softcap"]}
    dense = mock.patch.object(sys.modules["torch._higher_order_ops.flex_attention"], "math_attention", _refused)
    fault = None
    with compiled_kernels(fake) as kernels, dense:
        try:
            attend(torch.nn.Identity(), *states, None, tree=tree, **options)
        except Exception as failure:  # compilers fail in many ways
            fault = f"{type(failure).__name__}: {failure}"[:500]
    return {"fault": fault, "kernels": dict(filter(None, map(_read, kernels)))}


def _refused(*_: Any, **__: Any) -> None:
    raise AssertionError("FlexAttention was computed densely")


def _read(kernel: Any) -> tuple[str, dict[str, int]] | None:
    """Return which pass a kernel computes, with its figures, or None for a kernel of another operator."""
    found = re.fullmatch(r"triton_tem_fused_(\w+?)_\d+", kernel.metadata.name)
    if found is None or found[1] not in SUFFIX:
        return None
    said, code = disassembled(kernel.asm["cubin"])
    registers, *local = (sum(map(int, re.findall(rf"{name}:(\d+)", said))) for name in ("REG", "STACK", "LOCAL"))
    return SUFFIX[found[1]], {
        "shared": kernel.metadata.shared,
        "registers": registers,
        "spills": sum(local),
        "products": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCMMA)\b", code)),
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
    }


if __name__ == "__main__":
    main()
