"""Compare counts with memory that other people measured on known GPUs and published, for the table of docs/estimate.md.

    python -m bench.published

The step that is counted is theirs as far as it is described. For fitcheck-llm's runs that is a model of transformers
with PEFT's adapters, prepared for training in few bits by PEFT, whose head makes all logits. For torchtune's it is our
supervised step, whose head makes none, as torchtune's makes them in chunks. A count of a whole model is extended from
counts with two and with three layers.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from fastpref.config import Config
from fastpref.memory.step import StepMemory, count_step
from fastpref.model.adapters.fused import unfuse_lora
from fastpref.model.body import body_of
from fastpref.model.policy import Policy
from fastpref.ops import TokenLogprobs
from fastpref.sizes import GIB

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Published:
    """A measurement, and the step that it is of.

    Attributes:
        measured: bytes that torch had allocated at the peak.
        logits: whether the head makes the logits of all tokens, as models of transformers do.
        source: who published it, in words.
    """

    model: str
    rows: int
    tokens: int
    rank: int
    target: list[str]
    quantization: str
    checkpointing: bool
    logits: bool
    measured: float
    source: str

    @property
    def step(self) -> str:
        weights = "bf16" if self.quantization == "none" else self.quantization
        kept = "" if self.checkpointing else ", no gradient checkpointing"
        return f"{self.rows} × {self.tokens:,} tokens, {weights}, LoRA of rank {self.rank}{kept}"


def _shape(kind: type[LlamaConfig | Qwen2Config], *sizes: int, tied: bool = False) -> Callable[[int], PretrainedConfig]:
    hidden, inner, heads, kv_heads, vocabulary = sizes
    return lambda layers: kind(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=8192,
    )  # fmt: skip


# By name: the number of layers, and the architecture with a number of layers.
MODELS: dict[str, tuple[int, Callable[[int], PretrainedConfig]]] = {
    "TinyLlama-1.1B": (22, _shape(LlamaConfig, 2048, 5632, 32, 4, 32000)),
    "SmolLM2-1.7B": (24, _shape(LlamaConfig, 2048, 8192, 32, 32, 49152, tied=True)),
    "Qwen2.5-1.5B": (28, _shape(Qwen2Config, 1536, 8960, 12, 2, 151936, tied=True)),
    "Llama-3.1-8B": (32, _shape(LlamaConfig, 4096, 14336, 32, 8, 128256)),
}
_MIB = 1 << 20
_FITCHECK = "fitcheck-llm 0.2.0, Tesla T4"
_TORCHTUNE = "torchtune 0.4, RTX 4090"
MEASURED = [
    *(
        Published(model, rows, tokens, 32, ATTENTION, "nf4", True, True, mib * _MIB, _FITCHECK)
        for model, rows, tokens, mib in [
            ("TinyLlama-1.1B", 2, 512, 1847), ("TinyLlama-1.1B", 2, 1024, 2528), ("TinyLlama-1.1B", 2, 2048, 3897),
            ("SmolLM2-1.7B", 4, 1024, 5281), ("Qwen2.5-1.5B", 2, 1024, 6823),
        ]
    ),
    Published("Llama-3.1-8B", 2, 2048, 8, [*ATTENTION, *MLP], "none", True, False, 16.2 * GIB, _TORCHTUNE),
    Published("Llama-3.1-8B", 2, 2048, 8, [*ATTENTION, *MLP], "nf4", True, False, 7.4 * GIB, _TORCHTUNE),
    Published(
        "Llama-3.1-8B", 2, 2048, 8, [*ATTENTION, *MLP], "none", False, False, 30.3 * GIB, "torchtune 0.4, RTX A6000"
    ),
]  # fmt: skip


class _AllLogits(nn.Module):
    """The head and the loss of transformers' models: float32 logits of all tokens, which the model's output keeps."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        head: Any = model.get_output_embeddings()
        self._weight: Any = head.weight
        self._output: Tensor | None = None

    def forward(self, hidden: Tensor, positions: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> TokenLogprobs:
        with torch.autocast("cpu", enabled=False):
            self._output = logits = functional.linear(hidden.float(), self._weight)  # [B·T, V]
        losses = functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="none")
        return TokenLogprobs(-losses[positions], None, None, None, None)


def _policy(model: PreTrainedModel) -> Policy:
    """Return the policy of a model prepared by PEFT's `prepare_model_for_kbit_training`: embeddings, head and norms,
    and with them the states between layers, are in float32."""
    unfuse_lora(model)
    cast: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16):
                if id(parameter) not in cast:
                    cast[id(parameter)] = nn.Parameter(parameter.detach().float(), requires_grad=False)
                module._parameters[name] = cast[id(parameter)]
    head: Any = _AllLogits(model)
    return Policy(body_of(model), head)


def counted(row: Published) -> StepMemory:
    """Count the step of a measurement."""
    tables: dict[str, Any] = {
        "model": {"name": row.model, "quantization": row.quantization, "attention": "sdpa", "liger": False},
        "lora": {"rank": row.rank, "target": row.target},
        "loss": {"type": "sft"},
        "data": [{"path": "none"}],
        "tokens": {"max_length": row.tokens},
        "train": {
            "checkpointing": row.checkpointing, "layout": "padded", "batch": row.rows,
            "tokens_per_microbatch": row.rows * row.tokens,
        },
    }  # fmt: skip
    options: dict[str, Any] = {"make_policy": _policy} if row.logits else {}
    layers, architecture = MODELS[row.model]
    few, more = (
        count_step(Config.model_validate(tables), torch.device("cuda"), architecture=architecture(n), **options)
        for n in (2, 3)
    )
    sizes = {f.name: getattr(few, f.name) for f in fields(few) if isinstance(getattr(few, f.name), int)}
    further = {name: size + (getattr(more, name) - size) * (layers - 2) for name, size in sizes.items()}
    return replace(few, **further)


def main() -> None:
    logging.disable(logging.WARNING)  # hide a warning of bitsandbytes on a CPU
    print("| model | step | measured | counted | error | published by |\n|---|---|---|---|---|---|")
    for row in MEASURED:
        total = counted(row).total
        sizes = f"{row.measured / GIB:.2f} | {total / GIB:.2f} | {total / row.measured - 1:+.1%}"
        print(f"| {row.model} | {row.step} | {sizes} | {row.source} |", flush=True)


if __name__ == "__main__":
    main()
