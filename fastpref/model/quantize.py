"""Base weights in 4 or 8 bits by bitsandbytes, for training adapters on them (QLoRA, arXiv 2305.14314).

Only the body's linear layers and its fused experts (experts/) are quantised. Embeddings, head and norms stay in the
model's dtype: a norm computes in float32 whatever its weight is, and `prepare_model_for_kbit_training`'s float32 copies
of embeddings and head, which nothing here reads, would take 4 GB for Llama-3-8B.
"""

from typing import Literal

import torch
from bitsandbytes.nn import Linear4bit
from transformers import BitsAndBytesConfig, PreTrainedModel

from fastpref.model.experts.quantizer import with_experts

Quantization = Literal["none", "nf4", "int8"]


def quantization_config(kind: Quantization, compute: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the setting for transformers. 4-bit weights have quantised scales, and their products are in `compute`."""
    if kind == "none":
        return None
    if kind == "int8":
        return with_experts(BitsAndBytesConfig(load_in_8bit=True))
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    return with_experts(four_bits)


def keep_weights_as_loaded(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights.

    On some CPUs it does that in the first forward pass without gradient, and then quantises the scales again when the
    weight is saved or moved. In training, evaluations without gradient come between steps.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
