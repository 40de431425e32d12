"""Count the memory of a training step, without weights, data or a GPU, for the table of docs/memory.md.

    python bench/step_memory.py

Shapes are those of Llama-3-8B; the step is one micro-batch of a pair of 2,048 tokens each that share their first.
"""

import logging
from collections.abc import Mapping

import torch
from transformers import LlamaConfig

from fastpref.config import Config
from fastpref.memory.step import StepMemory, count_step

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
BASE = {
    "model": {"name": "llama-3-8b", "quantization": "nf4"},
    "lora": {"rank": 16},
    "loss": {"type": "dpo"},
    "data": [{"path": "none"}],
    "tokens": {"max_length": 2048},
    "train": {"checkpointing": True},
}
ROWS: dict[str, dict[str, dict[str, object]]] = {
    "`checkpointing = false`": {"train": {"checkpointing": False}},
    "the same, `model.liger = false`": {"train": {"checkpointing": False}, "model": {"liger": False}},
    "`checkpointing = true`": {},
    "and `offload_activations = true`": {"train": {"offload_activations": True}},
    'and `optimizer = "adamw_8bit"`': {"train": {"offload_activations": True, "optimizer": "adamw_8bit"}},
    '`checkpointing = true`, `quantization = "none"`': {"model": {"quantization": "none"}},
}


def config(changes: Mapping[str, Mapping[str, object]]) -> Config:
    """Return the config of the table with further keys in its tables."""
    tables = {name: {**BASE.get(name, {}), **changes.get(name, {})} for name in {*BASE, *changes} - {"data"}}
    return Config.model_validate({**tables, "data": BASE["data"]})


def counted(changes: Mapping[str, Mapping[str, object]]) -> StepMemory:
    return count_step(config(changes), torch.device("cuda"), architecture=LLAMA_3_8B)


def main() -> None:
    logging.disable(logging.WARNING)  # hide a warning of bitsandbytes on a CPU
    parts = ("weights", "adapters", "gradients", "optimizer", "activations", "head", "total")
    print(f"| | {' | '.join(parts)} |")
    print("|---|" + "---|" * len(parts))
    for name, changes in ROWS.items():
        memory = counted(changes)
        print(f"| {name} | {' | '.join(f'{getattr(memory, part) / 1e9:.2f}' for part in parts)} |", flush=True)


if __name__ == "__main__":
    main()
