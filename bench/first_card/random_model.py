"""Llamas with random weights, made on the device where they compute: no files, no download."""

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import LlamaConfig

from bench.first_card.sizes import Llama, Sizes
from fastpref.config import Config
from fastpref.data.example import Example, Origin
from fastpref.model.liger import wants_kernels
from fastpref.model.load import weight_dtype
from fastpref.model.skeleton import skeleton


def architecture(llama: Llama) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=llama.hidden, intermediate_size=llama.inner, num_hidden_layers=llama.layers,
        num_attention_heads=llama.heads, num_key_value_heads=llama.kv_heads, vocab_size=llama.vocabulary,
        head_dim=llama.hidden // llama.heads, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip


def config_for(llama: Llama, sizes: Sizes) -> Config:
    """Return the config of the default step: QLoRA with all layers checkpointed."""
    length = sizes.prompt + sizes.completion
    return Config.model_validate(
        {
            "model": {"name": llama.name, "quantization": "nf4"},
            "lora": {"rank": 16, "alpha": 32},
            "loss": {"type": "dpo"},
            "data": [{"path": "none"}],
            "tokens": {"max_length": length},
            "train": {"batch": sizes.pairs, "checkpointing": True},
        }
    )


def random_examples(llama: Llama, sizes: Sizes) -> list[Example]:
    """Return pairs of random tokens, whose prompts have nothing in common."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(llama.vocabulary, (count,), generator=generator).tolist()

    return [
        Example(ids(sizes.prompt), (ids(sizes.completion), ids(sizes.completion)), None, Origin(f"random, row {row}"))
        for row in range(sizes.pairs)
    ]


def random_model(llama: Llama, config: Config, device: torch.device) -> Any:
    """Return the model that a run would load, without adapters, with random weights on the device."""
    described = architecture(llama)
    kernels = wants_kernels(config.model.liger, device.type, described)
    bare = config.model_copy(update={"lora": None})
    model = skeleton(bare, described, weight_dtype(config, device), kernels=kernels).model
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name in ("W_q", "dequantize"):  # with which a skeleton counts DoRA
            vars(module).pop(name, None)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _weight(module, name, parameter, device, generator)
        for name, child in module.named_children():
            if any(buffer.is_meta for buffer in child._buffers.values() if buffer is not None):
                made: Any = type(child)
                setattr(module, name, made(model.config).to(device))  # rotary embeddings
    return model


def _weight(
    module: nn.Module, name: str, parameter: nn.Parameter, device: torch.device, generator: torch.Generator
) -> nn.Parameter:
    if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
        return _four_bits(module, parameter, device, generator)
    if parameter.dim() == 1:
        weight = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
    else:
        weight = torch.empty(parameter.shape, dtype=parameter.dtype, device=device).normal_(
            0, 0.02, generator=generator
        )
    return nn.Parameter(weight, requires_grad=False)


def _four_bits(module: Any, parameter: Any, device: torch.device, generator: torch.Generator) -> nn.Parameter:
    """Return a weight of a `Linear4bit` in 4 bits."""
    shape = (module.out_features, module.in_features)
    weight = torch.empty(shape, dtype=module.compute_dtype, device=device).normal_(0, 0.02, generator=generator)
    params: Any = bnb.nn.Params4bit
    settings = {name: getattr(parameter, name) for name in ("quant_type", "compress_statistics")}
    return params(weight, requires_grad=False, module=module, **settings).to(device)  # which quantises it
