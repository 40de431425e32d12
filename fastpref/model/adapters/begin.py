"""The values that fresh adapters begin with: `lora.init`.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) begin with a part B₀A₀ of the weight W, and PEFT trains BA on top
of W − scaling · B₀A₀. Here the model keeps W, and the adapter is [B, −B₀][A; A₀], whose second half stays. That is the
same function with the same gradients, but the model without adapters is the original one, which is the reference, and
the adapter is a plain one of twice the rank, which fits the original model, whatever its bits.
"""

from collections.abc import Callable
from typing import Any

import peft
import torch
import torch.nn.functional as F
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Linear8bitLt
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from peft.utils.loftq_utils import _low_rank_decomposition as decomposed
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpref.config import LoraConfig
from fastpref.errors import UserError
from fastpref.model.failure import is_out_of_memory, words

_NAME = "default"  # PEFT's name of the one adapter


class BegunHalf(nn.Module):
    """PEFT's lora_A or lora_B of twice the rank: one half is trained, the other stays as it began.

    It is saved and loaded as one weight, [2r, in] or [out, 2r].
    """

    bias = None
    fixed: Tensor

    def __init__(self, trained: Tensor, fixed: Tensor, dim: int):
        super().__init__()
        self.trained = nn.Parameter(trained)
        self.register_buffer("fixed", fixed)
        self.dim = dim

    @property
    def weight(self) -> Tensor:
        return torch.cat([self.trained, self.fixed], self.dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        """Copy both halves from a saved weight."""
        for own, saved in zip((self.trained, self.fixed), weight.chunk(2, self.dim), strict=True):
            own.copy_(saved)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        missing, unexpected = rest[2], rest[3]
        weight = state_dict.get(f"{prefix}weight")
        if weight is None:
            missing.append(f"{prefix}weight")
        else:
            self.take(weight)
        unexpected += [name for name in state_dict if name.startswith(prefix) and name != f"{prefix}weight"]


def halves(options: LoraConfig) -> int:
    """Return how many times the rank of the config the adapters have."""
    return 2 if _begins_with_a_part(options.init) else 1


def needs_layers(options: LoraConfig) -> bool:
    """Return whether the first values exist for linear layers only, and not for experts and embeddings."""
    return options.init not in ("default", "gaussian")


def begin(options: LoraConfig, wrapped: peft.PeftModel, originals: Callable[[], nn.Module] | None) -> None:
    """Give fresh adapters of `halves(options)` times the rank their first values.

    Args:
        originals: loads the model without quantization, for LoftQ.

    Raises UserError for a layer of fewer dimensions than its rank, and for one whose weight cannot be read.
    """
    if not needs_layers(options):
        return
    layers = {name: m for name, m in wrapped.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    whole = None
    if options.init == "loftq" and not any(_is_meta(layer) for layer in layers.values()):
        assert originals is not None
        whole = originals()
    for name, layer in layers.items():
        if isinstance(layer, ParamWrapper) or _NAME not in layer.lora_A:
            raise UserError(f"lora.init: {options.init!r} is for linear layers, and {name} is none; see lora.exclude")
        try:
            _begin(options.init, name, layer, whole)
        except UserError:
            raise
        except Exception as error:  # of PEFT, for weights that it cannot read
            if is_out_of_memory(error):
                raise
            message = f"{options.init!r} cannot begin with the weight of {name}: {words(error)}"
            raise UserError(f"lora.init: {message}") from None


def _begins_with_a_part(init: str) -> bool:
    return init == "olora" or init.startswith("pissa")


@torch.no_grad()
def _begin(init: str, name: str, layer: Any, whole: nn.Module | None) -> None:
    a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    parts = 2 if _begins_with_a_part(init) else 1
    rank = layer.r[_NAME] // parts
    if init != "orthogonal" and rank > min(a.shape[1], b.shape[0]):
        raise UserError(
            f"lora.init: {init!r} takes {rank} directions of {name}, which has {min(a.shape[1], b.shape[0])}; set a "
            "smaller rank for it in lora.rank_pattern"
        )
    if init == "orthogonal" and rank % 2:
        raise UserError(f"lora.init: 'orthogonal' needs even ranks, and that of {name} is {rank}")
    if _is_meta(layer):
        first, second = a[:rank], b[:, :rank]
    elif init == "loftq":
        assert whole is not None
        first, second = _rounded_off(layer, whole.get_submodule(name), rank)
    else:
        first, second = _by_peft(init, _dense(layer.get_base_layer()), rank, layer.scaling[_NAME])
    first, second = (value.to(a.device, torch.float32).contiguous() for value in (first, second))
    if parts == 1:
        a.data, b.data = first, second
    else:
        layer.lora_A[_NAME] = BegunHalf(first, first.clone(), 0)
        layer.lora_B[_NAME] = BegunHalf(second, -second, 1)


def _by_peft(init: str, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return PEFT's A [r, in] and B [out, r] for a weight [out, in], in float32, which PEFT would change."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    kind: Any = init
    settings = peft.LoraConfig(r=rank, lora_alpha=scaling * rank, init_lora_weights=kind, target_modules=["layer"])  # pyright: ignore[reportArgumentType]
    holder = nn.ModuleDict({"layer": layer})
    adapted: Any = peft.inject_adapter_in_model(settings, holder)
    return adapted["layer"].lora_A[_NAME].weight, adapted["layer"].lora_B[_NAME].weight


def _rounded_off(layer: Any, original: Any, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r] that add most of what rounding a layer to 4 bits has lost.

    PEFT's `replace_lora_weights_loftq` computes them in the same way, but for a scaling of 1.
    """
    base = _dense(layer.get_base_layer())
    lost = _dense(original).to(base.device) - base
    parts = decomposed(lost, reduced_rank=rank)
    share = layer.scaling[_NAME] ** -0.5
    return parts["R"] * share, parts["L"] * share


def _dense(base: Any) -> Tensor:
    """Return a copy of a layer's weight, [out, in] float32, on the GPU if there is one."""
    if isinstance(base, Linear8bitLt):  # whose scales PEFT loses on a CPU
        scales: Any = getattr(base.weight, "SCB", None)
        scales = base.state.SCB if scales is None else scales
        weight = int8_vectorwise_dequant(base.weight.data, scales)
    else:
        weight = dequantize_module_weight(base).detach()
    weight = weight.to("cuda" if torch.cuda.is_available() else weight.device, torch.float32, copy=True)
    return weight.t().contiguous() if isinstance(base, Conv1D) else weight


def _is_meta(layer: Any) -> bool:
    return layer.get_base_layer().weight.device.type == "meta"
