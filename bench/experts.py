"""Count the steps of a large mixture of experts in 16 and in 4 bits, for the table of docs/memory.md.

    python -m bench.experts

It needs no weights, data or GPU. The step is DPO on a pair of 2 × 2,048 tokens, whose completions share their first
token only, with adapters of rank 16 on attention or on all linear layers and experts. All layers are checkpointed.
Sizes are GiB, with half a GiB for the CUDA context. The architecture is that of the model's config.json.
"""

import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3MoeConfig

from fastpref.config import Config
from fastpref.memory.estimate import CONTEXT
from fastpref.memory.step import StepMemory, count_step
from fastpref.model.adapters.experts import unfuse_expert_lora
from fastpref.model.policy import Policy
from fastpref.sizes import GIB

LAYERS = 48
TARGETS: dict[str, Any] = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all linear layers and experts": "all-linear",
}
STEPS: tuple[tuple[str, bool], ...] = (("none", False), ("nf4", False), ("nf4", True))  # quantization, streaming


def counted(
    quantization: str, target: Any, *, streaming: bool = False, pefts: bool = False, layers: int = LAYERS
) -> StepMemory:
    """Count a step of Qwen3-30B-A3B, or of one with fewer layers, also with experts that PEFT's own code adapts."""
    sizes: dict[str, Any] = {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "max_position_embeddings": 40960, "tie_word_embeddings": False,
    }  # fmt: skip
    tables = {
        "model": {"name": "Qwen3-30B-A3B", "quantization": quantization, "streaming": streaming},
        "lora": {"rank": 16, "target": target},
        "loss": {"type": "dpo"},
        "data": [{"path": "none"}],
        "tokens": {"max_length": 2048},
        "train": {"checkpointing": True},
    }
    make = _by_pefts_code if pefts else Policy.of
    return count_step(
        Config.model_validate(tables), torch.device("cuda"), architecture=Qwen3MoeConfig(**sizes), make_policy=make
    )


def _by_pefts_code(model: PreTrainedModel) -> Policy:
    unfuse_expert_lora(model)
    return Policy.of(model)


def table(layers: int = LAYERS) -> Iterator[str]:
    """Yield the lines of the table in Markdown."""
    header = ("weights", "adapters on", "on the GPU", "weights on it", "adapters, gradients, moments", "rest", "host")
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    for quantization, streaming in STEPS:
        for name, target in TARGETS.items():
            kind = ("nf4" if quantization == "nf4" else "bfloat16") + (", streamed" if streaming else "")
            yield _row(kind, name, counted(quantization, target, streaming=streaming, layers=layers))
    name, target = list(TARGETS.items())[-1]
    yield _row("bfloat16, adapters by PEFT's code", name, counted("none", target, pefts=True, layers=layers))


def _row(kind: str, name: str, memory: StepMemory) -> str:
    trained = memory.adapters + memory.gradients + memory.optimizer
    rest = memory.total - memory.weights - trained + CONTEXT
    sizes = (memory.total + CONTEXT, memory.weights, trained, rest, memory.host)
    return f"| {kind} | {name} | {' | '.join(f'{size / GIB:.2f}' for size in sizes)} |"


def main() -> None:
    logging.disable(logging.WARNING)
    for line in table():
        print(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
