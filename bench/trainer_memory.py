"""Count the memory of one step of an 8B model by method and trainer, for the table of docs/benchmarks.md.

    python -m bench.trainer_memory

It needs no weights, data or GPU, and none of the other trainers: their steps are models of their source, counted by
running fastpref's step on tensors without numbers with the rows, the head and the layers of theirs. Where a trainer's
code leaves a choice, the smaller number is taken, so that no other trainer takes less than is shown.

All train Llama-3-8B in nf4 with LoRA of rank 16 on all linear layers, AdamW and gradient checkpointing of all layers,
in bfloat16. A micro-batch is two pairs, whose completions have 512 tokens and share a prompt of 512: sequences of
1,024, TRL's default for the longest. KTO has the same completions, each as a row. Sizes are GiB, without the CUDA
context.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.cards import architecture
from fastpref.config import Config
from fastpref.data.example import Example, Origin
from fastpref.memory.step import count_step
from fastpref.memory.trl import FusedLogSoftmax, as_trl, trl_policy
from fastpref.memory.unsloth import as_unsloth, unsloth_policy
from fastpref.model.adapters.fused import unfuse_lora
from fastpref.model.body import body_of
from fastpref.model.head import Head
from fastpref.model.policy import Policy
from fastpref.model.router import RouterLoss
from fastpref.ops import TokenLogprobs
from fastpref.sizes import GIB

MODEL = "Llama-3-8B"
METHODS = {"dpo": "DPO", "ipo": "IPO", "kto": "KTO", "orpo": "ORPO", "simpo": "SimPO", "cpo": "CPO"}
PAIRS, PROMPT, COMPLETION = 2, 512, 512  # of a micro-batch; tokens
MakePolicy = Callable[[PreTrainedModel], Policy]


@dataclass(frozen=True)
class Trainer:
    """A trainer's step: the config of a step of fastpref that has its rows and layers, and its policy."""

    config: Callable[[Config], Config]
    policy: Callable[[Config], MakePolicy] = lambda _: Policy.of
    methods: tuple[str, ...] = tuple(METHODS)


def packed_policy(_: Config) -> MakePolicy:
    """Return a `make_policy` that gives a policy the head of ms-swift's packed rows, and PEFT's own LoRA layers."""

    def make(model: PreTrainedModel) -> Policy:
        unfuse_lora(model)
        body = body_of(model)
        head: Any = _ScoredLogits(model)
        return Policy(body, head, RouterLoss.of(model, body))

    return make


class _ScoredLogits(nn.Module):
    """The logits of scored tokens, which Accelerate copies to float32, and whose gradient is made whole."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.head = Head(model)

    def forward(self, hidden: Tensor, positions: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> TokenLogprobs:
        return TokenLogprobs(FusedLogSoftmax.apply(self.head.logits(hidden[positions])), None, None, None, None)


TRAINERS = {
    "TRL 1.16": Trainer(lambda config: as_trl(config).but({"model.liger": False}), trl_policy),
    "TRL 1.16 with Liger": Trainer(lambda config: as_trl(config).but({"model.liger": True}), trl_policy),
    "ms-swift 4.6, packed": Trainer(
        lambda config: config.but({"train.layout": "packed", "model.liger": False}),
        packed_policy,
        methods=("dpo", "ipo", "kto"),
    ),
    "Unsloth 2026.10": Trainer(as_unsloth, unsloth_policy),
    "fastpref": Trainer(lambda config: config),
    "fastpref, `offload_activations`": Trainer(lambda config: config.but({"train.offload_activations": True})),
}


def examples(method: str, pairs: int = PAIRS, prompt: int = PROMPT, completion: int = COMPLETION) -> list[Example]:
    """Return the micro-batch: pairs, or for KTO their completions as rows, which share nothing but their prompts."""

    def ids(first: int, count: int) -> list[int]:
        return [first, *[0] * (count - 1)]

    rows = [
        Example(ids(pair, prompt), (ids(1, completion), ids(2, completion)), None, Origin("")) for pair in range(pairs)
    ]
    if method != "kto":
        return rows
    return [Example(row.prompt, (side,), k == 0, row.row) for row in rows for k, side in enumerate(row.completions)]


def counted(method: str, trainer: str, layers: int | None = None, **sizes: int) -> int | None:
    """Return the bytes at the peak of a trainer's step, or None for a method that it has not."""
    theirs, rows = TRAINERS[trainer], examples(method, **sizes)
    if method not in theirs.methods:
        return None
    config = Config.model_validate(
        {
            "model": {"name": MODEL, "quantization": "nf4"},
            "lora": {"rank": 16},
            "loss": {"type": method},
            "data": [{"path": "none"}],
            "tokens": {"max_length": len(rows[0].prompt) + len(rows[0].completions[0])},
            "train": {"batch": len(rows), "checkpointing": True, "tokens_per_microbatch": sys.maxsize},
        }
    )
    config = theirs.config(config)
    memory = count_step(
        config, torch.device("cuda"), architecture=architecture(MODEL, layers), examples=rows, further=False,
        make_policy=theirs.policy(config),
    )  # fmt: skip
    return memory.total


def table(layers: int | None = None, **sizes: int) -> Iterator[str]:
    """Yield the lines of the table in Markdown, for a model with fewer layers or other sizes if they are given."""
    yield f"| trainer | {' | '.join(METHODS.values())} |"
    yield "|---|" + "---:|" * len(METHODS)
    for trainer in TRAINERS:
        numbers = [counted(method, trainer, layers, **sizes) for method in METHODS]
        yield f"| {trainer} | {' | '.join('–' if n is None else f'{n / GIB:.2f}' for n in numbers)} |"


def main() -> None:
    logging.disable(logging.WARNING)  # hide a warning of bitsandbytes on a CPU
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about checkpointing
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else None
    for line in table(layers):
        print(line, flush=True)


if __name__ == "__main__":
    main()
