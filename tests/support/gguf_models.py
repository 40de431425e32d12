"""Tiny models of the families that can be written as GGUF, and what llama.cpp computes with a file."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from tests.support.paths import QUICKSTART_MODEL

HOW = "llama.cpp is not installed: pip install llama-cpp-python, which builds it from source"
needs_llama = pytest.mark.skipif(find_spec("llama_cpp") is None, reason=HOW)
IDS = [(7 * at) % 900 + 5 for at in range(40)]  # longer than the windows below

_SIZES: dict[str, Any] = {
    "vocab_size": 949, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_THETA = {"rope_theta": 10000.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_THETA,
           "original_max_position_embeddings": 16}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **_THETA}
_LINEAR = {"rope_type": "linear", "factor": 2.0, **_THETA}
_LAYERS = {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]}
_LOCAL = {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
          "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # what is tried → transformers' model_type, changes of the sizes
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one head per key": ("llama", {"num_key_value_heads": 4}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "llama, llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": _YARN}),
    "llama, linear": ("llama", {"rope_parameters": _LINEAR}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": _YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 48, "norm_topk_prob": False}),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "norm_topk_prob": True}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3_text": ("gemma3_text", {**_LAYERS, "tie_word_embeddings": True, "query_pre_attn_scalar": 16,
                    "sliding_window": 8, "rope_parameters": _LOCAL}),
    "phi3": ("phi3", {"sliding_window": None}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                "logits_scaling": 2.0}),
}  # fmt: skip


def save_model(name: str, folder: Path, **changes: Any) -> Path:
    """Save a random model of MODELS with the quickstart's tokenizer, and return its folder.

    Its weights are float16 numbers, so that a file in f16 holds exactly them.
    """
    kind, special = MODELS[name]
    config_class: Any = CONFIG_MAPPING[kind]
    sizes = _SIZES | special | changes
    if kind == "phi3":
        sizes.pop("head_dim")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config_class(**sizes), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight)).copy_(weight.half().float())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return the logits [len(IDS), V] that transformers computes in float32."""
    return model.eval()(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].float()


def llama_logits(file: Path, ids: Sequence[int] = IDS, **options: Any) -> Tensor:
    """Return the logits [len(ids), V] that llama.cpp computes with a GGUF file. Its cache is in float32, too."""
    model = llama(file, **options)
    model.eval(list(ids))
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


def llama(file: Path, **options: Any) -> Any:
    """Load a GGUF file into llama.cpp."""
    llama_cpp: Any = import_module("llama_cpp")

    whole = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    options = {"n_ctx": 128, "n_batch": 128, "n_threads": 1, "logits_all": True, "verbose": False} | whole | options
    return llama_cpp.Llama(str(file), **options)
