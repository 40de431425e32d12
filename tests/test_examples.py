"""Every config in examples/ is valid, and a config for a GPU fits it by a count with its model's architecture, which
is copied here."""

import math
import shlex
import shutil
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

import fastpref.memory.estimate as estimates
from fastpref.config import Config, load_config
from fastpref.config.losses import KTO
from fastpref.memory.estimate import Estimator, usable
from fastpref.memory.step import StepMemory
from tests.support.command_line import succeed
from tests.support.paths import EXAMPLES
from tests.support.readme import commands as readme_commands
from tests.support.runs import rows

STAGES = EXAMPLES / "sft_then_dpo"

Make = Callable[[int | None], PretrainedConfig]  # takes a number of layers, or None for all


def qwen(hidden: int, inner: int, layers: int, heads: int, groups: int, tied: bool, vocabulary: int) -> Make:
    return lambda given: Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=given or layers, num_attention_heads=heads,
        num_key_value_heads=groups, tie_word_embeddings=tied, vocab_size=vocabulary, max_position_embeddings=32768,
    )  # fmt: skip


def llama(hidden: int, inner: int, layers: int, heads: int, size: int, tied: bool) -> Make:
    return lambda given: LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=given or layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=size, tie_word_embeddings=tied, vocab_size=128256,
        max_position_embeddings=131072,
    )  # fmt: skip


MODELS = {
    "Qwen/Qwen2.5-0.5B": qwen(896, 4864, 24, 14, 2, True, 151936),
    "Qwen/Qwen2.5-3B-Instruct": qwen(2048, 11008, 36, 16, 2, True, 151936),
    "Qwen/Qwen2.5-7B-Instruct": qwen(3584, 18944, 28, 28, 4, False, 152064),
    "Qwen/Qwen2.5-14B-Instruct": qwen(5120, 13824, 48, 40, 8, False, 152064),
    "meta-llama/Llama-3.2-1B": llama(2048, 8192, 16, 32, 64, True),
    "meta-llama/Llama-3.1-8B": llama(4096, 14336, 32, 32, 128, False),
    "meta-llama/Llama-3.1-8B-Instruct": llama(4096, 14336, 32, 32, 128, False),
    "meta-llama/Llama-3.3-70B-Instruct": llama(8192, 28672, 80, 64, 128, False),
}
CARDS = {
    "4gb": 4, "6gb": 6, "8gb": 8, "12gb": 12, "16gb": 16, "24gb": 24, "70b-24gb": 24, "qwen2-dpo": 12,
    "llama3-kto-qlora": 8,
}  # fmt: skip
STREAMED = {"4gb": 6, "6gb": 10, "70b-24gb": 50}  # GB of host memory that the comments of these examples name


def test_every_example_is_here():
    """These tests know every config in the folder."""
    assert {path.stem for path in EXAMPLES.glob("*.toml")} == {*CARDS, "quickstart"}
    assert {path.name for path in STAGES.iterdir()} == {"README.md", "sft.toml", "dpo.toml"}


def test_supervised_then_preferences(elsewhere: Path):
    """The commands of the example run one after the other, on few rows: DPO begins at ln 2, because its reference is
    the adapter that the first run saved, and it changes that adapter."""
    (elsewhere / "examples").mkdir()
    shutil.copytree(STAGES, "examples/sft_then_dpo")
    shutil.copytree(EXAMPLES / "quickstart", "examples/quickstart")
    for name in ("train", "heldout"):
        path = Path("examples", "quickstart", f"{name}.jsonl")
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:16]), encoding="utf-8")
    commands = readme_commands((STAGES / "README.md").read_text(encoding="utf-8"))
    assert [shlex.split(line)[1] for line in commands] == ["train", "train", "eval", "chat", "merge", "export"]
    for line in commands:
        words = shlex.split(line)[1:]
        short = ["train.steps=3", "eval.samples=0", "train.batch=8"] if words[0] == "train" else []
        short += ["--max-tokens", "2"] if words[0] == "chat" else []
        succeed(*words, *short, given="hello\n" if words[0] == "chat" else "")
    before, after = (load_file(Path("runs", name, "final", "adapter_model.safetensors")) for name in ("sft", "dpo"))
    assert evaluation_of(Path("runs/sft"), 3)["eval/perplexity"] > 1
    assert evaluation_of(Path("runs/dpo"), 0)["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert list(Path("my-model-gguf").glob("*.gguf"))


def evaluation_of(folder: Path, step: int) -> dict[str, float]:
    """Return the row of an evaluation of a run."""
    return next(row for row in rows(folder) if row["step"] == step and "eval/loss" in row)


@cache
def counted(name: str, layers: int) -> StepMemory:
    """Count a step of the longest micro-batch with all layers checkpointed, for this many layers."""
    path = EXAMPLES / f"{name}.toml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "model_config", lambda options: MODELS[options.name](layers))
        return Estimator(lambda more: load_config(path, more), torch.device("cuda")).take()


def extrapolated(name: str, layers: int | None = None) -> tuple[int, int]:
    """Return the bytes on the GPU and in host memory for this many layers, or for all, from two counts of few layers:
    from the third on, each layer adds the same."""
    architecture: Any = MODELS[load_config(EXAMPLES / f"{name}.toml").model.name](layers)
    (few, less), (more, most) = ((memory.total, memory.host) for memory in (counted(name, 3), counted(name, 4)))
    others = architecture.num_hidden_layers - 3
    return few + (more - few) * others, less + (most - less) * others


def test_a_few_layers_tell_of_all():
    """The extrapolation from a few layers equals the count with three times as many."""
    for name in ("llama3-kto-qlora", "4gb"):
        more = counted(name, 12)
        assert extrapolated(name, 12) == pytest.approx((more.total, more.host), rel=0.01)


@pytest.mark.parametrize("name", CARDS)
def test_an_example_fits_its_card(name: str):
    """A step with the longest micro-batch fits, at least with gradient checkpointing, and those that stream their
    weights take as much host memory as their comments say."""
    device, host = extrapolated(name)
    assert device <= usable(CARDS[name])
    assert round(host / 1e9) == STREAMED.get(name, 0)
    assert (host > 0) == (load_config(EXAMPLES / f"{name}.toml").model.streaming is True)


def settings(config: Config) -> dict[str, object]:
    train, lora = config.train, config.lora
    settings: dict[str, object] = {
        "model": config.model.name, "bits": config.model.quantization, "loss": config.loss.type,
        "rate": train.learning_rate, "batch": train.batch, "epochs": train.epochs, "tokens": config.tokens.max_length,
        "lora": None if lora is None else (lora.rank, lora.alpha),
    }  # fmt: skip
    if isinstance(config.loss, KTO):
        settings |= {"beta": config.loss.beta, "weight": config.loss.desirable_weight}
    return settings


def test_the_examples_of_the_reference():
    """Axolotl's DPO example has 2 × 4 rows per step for 4 epochs at 2e-4; its KTO example is QLoRA with β 0.5,
    desirable weight 0.2, rank 32, α 64, 2 rows per step at 2e-4."""
    assert settings(load_config(EXAMPLES / "qwen2-dpo.toml")) == {
        "model": "Qwen/Qwen2.5-0.5B", "bits": "none", "loss": "dpo", "rate": 2e-4, "batch": 8, "epochs": 4.0,
        "tokens": 2048, "lora": None,
    }  # fmt: skip
    assert settings(load_config(EXAMPLES / "llama3-kto-qlora.toml")) == {
        "model": "meta-llama/Llama-3.2-1B", "bits": "nf4", "loss": "kto", "rate": 2e-4, "batch": 2, "epochs": 1.0,
        "tokens": 2048, "lora": (32, 64.0), "beta": 0.5, "weight": 0.2,
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CARDS if name.endswith("gb")])
def test_an_example_tells_how_to_try_it(name: str):
    """The commands in an example's header name the file and the GPU's memory."""
    text = (EXAMPLES / f"{name}.toml").read_text(encoding="utf-8")
    assert f"fastpref estimate examples/{name}.toml --card {CARDS[name]}\n" in text
    assert f"fastpref train examples/{name}.toml\n" in text
    assert tomllib.loads(text)["data"]
