"""Count the steps of large models on small cards, with streamed layers, for the table of docs/memory.md.

    python -m bench.cards

It needs no weights, data or GPU. The step is DPO with nf4 weights and adapters of rank 16 on all linear layers; a
micro-batch is one pair, whose completions share their first token only. All layers are checkpointed and streamed.
Sizes are GiB, with half a GiB for the CUDA context. Architectures are those of the models' config.json.
"""

import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from fastpref.config import Config
from fastpref.memory.estimate import CONTEXT
from fastpref.memory.step import StepMemory, count_step
from fastpref.sizes import GIB

Sizes = tuple[int, int, int, int, int]  # hidden, inner, layers, heads, vocabulary
_LLAMA, _QWEN = 128256, 151936
MODELS: dict[str, tuple[type[LlamaConfig | Qwen3Config], Sizes]] = {
    "Llama-3-8B": (LlamaConfig, (4096, 14336, 32, 32, _LLAMA)),
    "Qwen3-14B": (Qwen3Config, (5120, 17408, 40, 40, _QWEN)),
    "Qwen3-32B": (Qwen3Config, (5120, 25600, 64, 64, _QWEN)),
    "Llama-3-70B": (LlamaConfig, (8192, 28672, 80, 64, _LLAMA)),
}
TOKENS = (2048, 512)
OPTIONS: dict[str, dict[str, Any]] = {
    "streamed": {},
    "and `offload_activations`": {"offload_activations": True},
    'and `"adamw_8bit"`': {"offload_activations": True, "optimizer": "adamw_8bit"},
}


def architecture(name: str, layers: int | None = None) -> PretrainedConfig:
    """Return the config of a model, with another number of layers if that is given."""
    kind, (hidden, inner, every, heads, vocabulary) = MODELS[name]
    return kind(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers or every, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=vocabulary, max_position_embeddings=8192,
        tie_word_embeddings=False,
    )  # fmt: skip


def counted(name: str, tokens: int, *, streaming: bool = True, layers: int | None = None, **train: Any) -> StepMemory:
    """Count a step of a model, for pairs of 2 × `tokens` tokens, with further keys of `[train]`."""
    tables = {
        "model": {"name": name, "quantization": "nf4", "streaming": streaming},
        "lora": {"rank": 16},
        "loss": {"type": "dpo"},
        "data": [{"path": "none"}],
        "tokens": {"max_length": tokens},
        "train": {"checkpointing": True, **train},
    }
    return count_step(Config.model_validate(tables), torch.device("cuda"), architecture=architecture(name, layers))


def row(name: str, tokens: int, layers: int | None = None) -> list[str]:
    """Return a row of the table: totals without streaming and with each of OPTIONS, and what the host does."""
    held = counted(name, tokens, streaming=False, layers=layers)
    steps = [counted(name, tokens, layers=layers, **options) for options in OPTIONS.values()]
    totals = [f"{(memory.total + CONTEXT) / GIB:.2f}" for memory in (held, *steps)]
    return [name, f"2 × {tokens:,}", *totals, f"{steps[-1].host / GIB:.1f}", f"{steps[-1].copied / GIB:.1f}"]


def table(layers: int | None = None) -> Iterator[str]:
    """Yield the lines of the table in Markdown, for models with fewer layers if that is given."""
    header = ["model", "tokens", "resident", *OPTIONS, "host memory", "copied a micro-batch"]
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    for tokens in TOKENS:
        for name in MODELS:
            yield f"| {' | '.join(row(name, tokens, layers))} |"


def main() -> None:
    logging.disable(logging.WARNING)  # hide a warning of bitsandbytes on a CPU
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else None
    for line in table(layers):
        print(line, flush=True)


if __name__ == "__main__":
    main()
