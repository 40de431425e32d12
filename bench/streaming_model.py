"""A model, not a measurement, of streaming: `python -m bench.streaming_model` prints it as a section of the page."""

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from bench.markdown import filled
from fastpref.config import Config
from fastpref.model.skeleton import materialise, skeleton
from fastpref.model.streaming.pace import CARDS, LINKS, SHARE, LayerSize, layer_size, least_tokens
from fastpref.model.streaming.stream import streamable_layers


@dataclass(frozen=True)
class Model:
    """The sizes of a model from its config.json."""

    name: str
    kind: Any  # the class of its config
    hidden: int
    intermediate: int
    heads: int
    layers: int
    quantization: str = "nf4"

    def config(self, layers: int) -> PretrainedConfig:
        return self.kind(
            hidden_size=self.hidden, intermediate_size=self.intermediate, num_attention_heads=self.heads,
            num_key_value_heads=8, head_dim=128, num_hidden_layers=layers, vocab_size=64,
        )  # fmt: skip

    def layer(self) -> LayerSize:
        """Count a layer of the model as it would be streamed, without its weights."""
        config = Config.model_validate(
            {
                "model": {"name": self.name, "quantization": self.quantization},
                "data": [{"path": "none.jsonl"}],
                "lora": {"target": ["lm_head"]},  # layers are streamed without adapters
            }
        )
        made = skeleton(config, self.config(layers=1), torch.bfloat16).model
        with FakeTensorMode():
            materialise(made)
            return layer_size(streamable_layers(made)[0])


MODELS = (
    Model("Llama-3-8B", LlamaConfig, 4096, 14336, 32, 32),
    Model("Llama-3-8B", LlamaConfig, 4096, 14336, 32, 32, "none"),
    Model("Qwen3-14B", Qwen3Config, 5120, 17408, 40, 40),
    Model("Qwen3-32B", Qwen3Config, 5120, 25600, 64, 64),
    Model("Llama-3-70B", LlamaConfig, 8192, 28672, 64, 80),
)


def section() -> str:
    """Return the model as a section of the page."""
    links = ", ".join(f"{name.replace(' x', ' × ')} {speed:g}" for name, speed in LINKS.items())
    cards = "; ".join(f"{c.name} {c.tflops:g} TFLOP/s, {c.link.replace(' x', ' × ')}" for c in CARDS)
    lines = [
        "## A model of streaming",
        "",
        "Not measured. The table has the least tokens of a micro-batch at which the copy of a layer takes no longer "
        "than its forward pass, so that streaming costs no time. The backward pass computes twice as much with "
        "gradient checkpointing, so half the tokens are enough there, as they are in the forward pass where the "
        "reference computes in the same sweep. The number depends on the bytes a weight, not on the size of the model.",
        "",
        "- A layer's bytes and weights are counted from the code that streams it. A forward pass takes 2 operations a "
        "weight and token; attention, adapters and the unpacking of 4 bits are left out, so real layers compute for "
        "longer, and their copies hide at fewer tokens.",
        f"- Matrix products are assumed to reach {SHARE:.0%} of a card's public peak of dense bfloat16 products with "
        f"float32 sums: {cards}.",
        f"- PCIe is assumed to carry, in GB/s: {links}. A card in a slot with half the lanes needs twice the tokens.",
        "- A head in host memory is copied too, in bfloat16: with its forward and backward pass in one walk, it needs "
        "half as many scored tokens as the row of bf16 weights has.",
        "",
        "```bash",
        "python -m bench.streaming_model",
        "```",
        "",
        "| model | weights | MiB a layer | GiB in layers | " + " | ".join(card.name for card in CARDS) + " |",
        "|---|---|---:|---:|" + "---:|" * len(CARDS),
    ]
    for model in MODELS:
        size = model.layer()
        weights = "bf16" if model.quantization == "none" else model.quantization
        tokens = " | ".join(f"{least_tokens(size, card):,}" for card in CARDS)
        mib, gib = size.bytes / 2**20, size.bytes * model.layers / 2**30
        lines.append(f"| {model.name} | {weights} | {mib:.0f} | {gib:.1f} | {tokens} |")
    return filled("\n".join(lines) + "\n")


if __name__ == "__main__":
    print(section(), end="")
