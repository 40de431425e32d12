"""How far counted steps are from steps on real tensors, over many kinds of configs, for docs/estimate.md.

    python -m tests.support.counts

The models are small random ones of four families with the quickstart's tokenizer, the rows those of the quickstart, the
steps the first four of a run. A row of the table is the estimate of a run as `fastpref estimate --cpu` makes it, and
the peak of the same steps on real tensors.
"""

import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from fastpref.config import load_config
from fastpref.data.cache import load_examples
from fastpref.data.order import data_order
from fastpref.data.tokenize import use_chat_template
from fastpref.memory.estimate import Estimator
from fastpref.model.tokenizer import load_tokenizer
from tests.support.paths import QUICKSTART_MODEL, QUICKSTART_ROWS
from tests.support.real_steps import real_steps

LORA, CHECKPOINTED = "lora={rank=4}", "train.checkpointing=true"
SMALL = "train.tokens_per_microbatch=300"
NF4, INT8 = "model.quantization=nf4", "model.quantization=int8"
# family, overrides
CONFIGS: list[tuple[str, list[str]]] = [
    ("llama", [LORA]),
    ("llama", [LORA, CHECKPOINTED, "loss.type=orpo", "train.tokens_per_microbatch=150"]),
    ("llama", ["loss.type=simpo", CHECKPOINTED]),
    ("llama", [LORA, "loss.type=kto", "train.layout=padded"]),
    ("llama", ["reference.mode=copy", "train.layout=packed"]),
    ("llama", [LORA, "loss.type=sft", SMALL]),
    ("llama", [LORA, NF4, CHECKPOINTED]),
    ("llama", [LORA, NF4, "model.streaming=true", CHECKPOINTED, "loss.type=orpo"]),
    ("llama", [LORA, "model.streaming=true", CHECKPOINTED, "loss.type=simpo"]),
    ("llama", [LORA, CHECKPOINTED, "train.offload_activations=true", "loss.type=cpo"]),
    ("llama", ["train.optimizer=adafactor", "loss.type=orpo", SMALL]),
    ("qwen2", [LORA, SMALL]),
    ("qwen2", ["loss.type=ipo", "train.tokens_per_microbatch=150"]),
    ("qwen2", [LORA, "loss.type=cpo", "train.layout=packed", CHECKPOINTED]),
    ("qwen2", ["lora={rank=4, dora=true}", NF4]),
    ("qwen2", ["lora={rank=4, dora=true}", "loss.type=orpo"]),
    ("qwen2", [LORA, INT8, "loss.type=simpo"]),
    ("qwen2", ["loss.type=sft", CHECKPOINTED, "train.optimizer=lion"]),
    ("gemma2", [LORA, SMALL]),
    ("gemma2", ["loss.type=cpo", "train.layout=padded"]),
    ("gemma2", [LORA, "loss.type=kto", CHECKPOINTED]),
    ("gemma2", [LORA, NF4, "loss.type=ipo", "train.layout=packed"]),
    ("gemma2", ["lora={rank=4, dropout=0.1}", "loss.type=orpo", CHECKPOINTED]),
    ("mixtral", [LORA]),
    ("mixtral", ["loss.type=simpo", SMALL]),
    ("mixtral", [LORA, CHECKPOINTED, "loss.type=orpo", "train.layout=padded"]),
    ("mixtral", [LORA, NF4, "loss.type=sft"]),
]


def save_families(folder: Path) -> dict[str, Path]:
    """Save a small model of each family with the quickstart's tokenizer; return their folders."""
    shape: dict[str, Any] = {
        "vocab_size": AutoConfig.from_pretrained(QUICKSTART_MODEL).vocab_size, "hidden_size": 64,
        "num_hidden_layers": 3, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16,
    }  # fmt: skip
    narrow: dict[str, Any] = {**shape, "intermediate_size": 64}
    configs = [
        LlamaConfig(**shape),
        Qwen2Config(**shape, tie_word_embeddings=True),
        Gemma2Config(**shape, sliding_window=16, query_pre_attn_scalar=16),
        MixtralConfig(**narrow, num_local_experts=4, num_experts_per_tok=2),
    ]
    folders = {}
    for config in configs:
        folders[config.model_type] = path = folder / config.model_type
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(path)
    return folders


@dataclass(frozen=True)
class Comparison:
    """Bytes at the peak of a run's steps: as estimated, as real, and of the latter those held before the steps."""

    estimated: int
    real: int
    held: int

    @property
    def error(self) -> float:
        return self.estimated / self.real - 1


def compared(folder: Path, model: Path, overrides: list[str]) -> Comparison:
    """Estimate a run of a config and compute its steps on real tensors. The config is written to `folder`."""
    path = folder / "cfg.toml"
    path.write_text(
        f'[model]\nname = "{model.as_posix()}"\n[[data]]\npath = "{QUICKSTART_ROWS.as_posix()}"\nrows = 24\n'
        "[tokens]\nmax_length = 128\n[train]\nbatch = 6\nsteps = 4\n"
    )
    config = load_config(path, overrides)
    tokenizer = load_tokenizer(config.model)
    use_chat_template(tokenizer, config.tokens.chat_template)
    examples = load_examples(config, tokenizer).train
    order = islice(data_order(len(examples), config.train.batch, config.train.seed), config.train.steps)
    steps = [[examples[i] for i in places] for places in order]
    real, held = real_steps(config, steps, None if config.train.checkpointing is True else 0)
    estimated = Estimator(lambda more: load_config(path, [*overrides, *more]), torch.device("cpu")).take().total
    return Comparison(estimated, real, held)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folders = save_families(Path(name))
        print("| model | config | estimated | real | error |\n|---|---|---|---|---|")
        worst = []
        for family, overrides in CONFIGS:
            result = compared(Path(name), folders[family], overrides)
            sizes = f"{result.estimated / 2**20:.2f} | {result.real / 2**20:.2f} | {result.error:+.1%}"
            print(f"| {family} | `{' '.join(overrides)}` | {sizes} |", flush=True)
            worst.append(result.error)
        print(f"\nFrom {min(worst):+.1%} to {max(worst):+.1%} over {len(worst)} configs.")


if __name__ == "__main__":
    main()
