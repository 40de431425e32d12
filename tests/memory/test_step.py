"""Memory of a step counted on fake tensors, compared with real tensors and with what shapes imply."""

from pathlib import Path

import pytest
import torch

from bench.step_memory import LLAMA_3_8B
from fastpref.config import Config
from fastpref.config.losses import KTO
from fastpref.memory import step as step_memory
from fastpref.memory.activations import fewest_layers
from fastpref.memory.measured import as_loaded
from fastpref.memory.step import StepMemory, count_step
from fastpref.model import liger
from fastpref.model.attention_choice import FLEX, VARLEN
from fastpref.model.liger import kernels_not_run, take_kernels
from fastpref.model.load import load_model
from tests.support.real_steps import real_steps
from tests.support.tiny import config_for, examples, model_config, save_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LORA = "lora={rank=3}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "llama-tied", "gemma2")}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the config.json, without weights, of a model of eight layers that are large compared to its embeddings."""
    config = model_config("llama")
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 8, 256, 1024
    folder = tmp_path_factory.mktemp("deep")
    config.save_pretrained(folder)
    return folder


COMBINATIONS = [
    ("llama", 0, [LORA]),
    ("llama", 2, [LORA]),
    ("llama", 1, [LORA, "loss.type=orpo"]),
    ("llama", 2, ["loss.type=simpo"]),
    ("llama-tied", 0, ["loss.type=kto", "reference.mode=copy"]),
    ("llama", 2, [LORA, "loss.type=kto", "train.layout=padded"]),
    ("gemma2", 0, [LORA, "loss.type=cpo"]),
    ("llama", 0, ['lora={rank=3, target=["lm_head", "q_proj"]}', "loss.type=ipo"]),
    ("llama-tied", 1, ["reference.mode=copy"]),
    ("llama", 1, ['train.freeze=["embed_tokens", "layers.0"]', "loss.type=simpo"]),
    ("llama", 1, ['lora={rank=3, init="pissa", rank_pattern={q_proj=1}, layers=["1:"]}']),
    ("llama", 2, ["loss.type=simpo", "train.optimizer=muon"]),
    ("llama", 2, ["loss.type=orpo", "train.optimizer=schedule_free_adamw"]),
    ("llama", 0, [LORA, "train.optimizer=adafactor"]),
    ("llama-tied", 2, ["loss.type=simpo", "train.optimizer=lion"]),
]


@pytest.mark.parametrize(("kind", "layers", "overrides"), COMBINATIONS, ids=str)
def test_fake_tensors_take_what_real_ones_take(folders: dict[str, Path], kind: str, layers: int, overrides: list[str]):
    """The peaks on fake and on real tensors differ by at most 2 percent of what the step adds."""
    for budget in (40, 400):
        config = config_for(folders[kind], *overrides, f"train.tokens_per_microbatch={budget}")
        rows = examples(9, single=isinstance(config.loss, KTO))
        real, held = real_steps(config, [rows], layers)
        counted = count_step(config, CPU, layers=layers, examples=rows)
        assert counted.total - held == pytest.approx(real - held, rel=0.02)


AUTOCAST = [
    ("llama", ["loss.type=simpo"]),
    ("llama-tied", ["loss.type=orpo"]),
    ("llama", ["reference.mode=copy"]),
    ("gemma2", ["loss.type=cpo"]),
]


@pytest.mark.parametrize(("kind", "overrides"), AUTOCAST, ids=str)
def test_autocast_takes_what_it_takes_on_real_tensors(folders: dict[str, Path], kind: str, overrides: list[str]):
    """Full fine-tuning on a GPU, float32 weights that are multiplied in bfloat16, is counted as it is computed."""
    options = ["train.tokens_per_microbatch=400", "model.liger=false", "model.attention=sdpa"]
    config, rows = config_for(folders[kind], *overrides, *options), examples(9)
    real, held = real_steps(config, [rows], 0, autocast=torch.bfloat16)
    counted = count_step(config, CUDA, layers=0, examples=rows)
    assert counted.total - held == pytest.approx(real - held, rel=0.02)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_kernels_take_what_they_take_on_real_tensors(
    folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
):
    """With liger's kernels, which run in neither step here, the count agrees with real tensors, and is not larger than
    without them.

    It is not smaller in gated MLPs, which keep their gate and up with liger's kernels and with torch's.
    """
    config, rows = config_for(folders[kind], LORA, "train.tokens_per_microbatch=400"), examples(9)
    plain = count_step(config, CPU, layers=0, examples=rows)
    monkeypatch.setattr(step_memory, "wants_kernels", lambda *_: True)
    counted = count_step(config, CPU, layers=0, examples=rows)
    assert counted.activations <= plain.activations

    monkeypatch.setattr(liger, "wants_kernels", lambda *_: True)
    monkeypatch.setattr(liger, "give_kernels", lambda model, *_, **__: (True, take_kernels(model)))
    with kernels_not_run():
        real, held = real_steps(config, [rows], 0)
    assert counted.total - held == pytest.approx(real - held, rel=0.02)


def test_a_copy_in_other_bits_is_counted(deep: Path):
    """A frozen copy's weights count in its own dtype and bits, without the policy's adapters."""

    def reference(*overrides: str) -> int:
        config = config_for(deep, "tokens.max_length=8", "reference.mode=copy", *overrides)
        return count_step(config, CUDA).reference

    whole = reference()
    body, embeddings = 8 * 256 * (2 * 32 + 2 * 16 + 3 * 1024), 2 * 97 * 256
    assert whole == pytest.approx(4 * (body + embeddings), rel=0.1)
    assert reference("reference.dtype=bfloat16") == pytest.approx(whole / 2, rel=0.01)
    assert reference("reference.dtype=float16", LORA) == reference("reference.dtype=float16")
    nf4 = reference("reference.dtype=bfloat16", "reference.quantization=nf4")
    assert nf4 == pytest.approx(whole / 2 * 0.27, rel=0.15)
    plain = reference("model.quantization=nf4", LORA, "reference.quantization=none")
    assert plain == pytest.approx(whole / 2, rel=0.01)


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> StepMemory:
    """Count a step of Llama-3-8B with ORPO, nf4 and adapters of rank 16 in all linear layers: 2 · 2,048 tokens."""
    folder = tmp_path_factory.mktemp("llama3")
    overrides = ["model.quantization=nf4", "lora={rank=16}", "loss.type=orpo", "tokens.max_length=2048"]
    return count_step(config_for(folder, *overrides), CUDA, architecture=LLAMA_3_8B)


def test_llama_3_8b_has_no_float32_embeddings(qlora: StepMemory):
    """No tensor of a QLoRA step is as large as the embeddings in bfloat16, so there is no copy of them or of the
    head in any dtype, and there are no logits."""
    assert qlora.largest < 128256 * 4096 * 2


def test_llama_3_8b_takes_what_its_shapes_say(qlora: StepMemory):
    """Weights take half a byte, a one-byte scale per 64 weights and four bytes per 256 scales; embeddings and head
    two bytes per number; adapters, gradients and two moments are in float32."""
    hidden, inner, heads = 4096, 14336, 1024
    linear = [(hidden, hidden), (hidden, heads), (hidden, heads), (hidden, hidden), *[(hidden, inner)] * 3]
    body = 32 * sum(rows * columns for rows, columns in linear)
    weights = body // 2 + body // 64 + body // 64 // 256 * 4 + 2 * 128256 * hidden * 2 + 65 * hidden * 2
    tables = 32 * 7 * (16 + 256 + 1) * 4 + 2 * 64 * 4  # code tables of nf4 and of its scales, and RoPE's frequencies
    assert qlora.weights == weights + tables
    assert qlora.adapters == 32 * sum(16 * (rows + columns) for rows, columns in linear) * 4
    assert qlora.gradients == qlora.adapters
    assert qlora.optimizer - 2 * qlora.adapters <= 4 * 32 * 14  # and a step counter per adapter
    assert qlora.reference == 0


def test_what_the_options_save(deep: Path):
    """A checkpointed layer takes less, and less still if its input is moved; a copy takes as much as the model."""

    def total(*overrides: str, layers: int | None = None) -> int:
        return count_step(config_for(deep, "tokens.max_length=128", *overrides), CUDA, layers=layers).total

    some = [total(LORA, layers=layers) for layers in (0, 1, 4, 8)]
    assert some == sorted(some, reverse=True)
    assert len(set(some)) == 4
    assert total(LORA) == some[-1]
    assert total(LORA, "train.checkpointing=false") == some[0]
    inputs = 255 * 256 * 2  # of one layer, for 255 tokens of 256 bfloat16 numbers
    saved = some[-1] - total(LORA, "train.offload_activations=true")
    assert 6 * inputs <= saved <= 7 * inputs  # of all layers except one or two in use
    shallow = count_step(config_for(deep, LORA, "tokens.max_length=8"), CUDA)
    assert total(LORA, "reference.mode=copy") - some[-1] == shallow.weights + shallow.adapters


def test_flex_attention_keeps_keys_and_values_once(deep: Path):
    """On a GPU a step counts with FlexAttention's tensors, and with SDPA's copies of keys and values for each query
    head if the config or a dropout asks for that; so does the number of checkpointed layers that the memory needs."""

    def config(*overrides: str) -> Config:
        return config_for(deep, LORA, "loss.type=orpo", "tokens.max_length=128", *overrides)

    heads, kv_heads, width = 4, 2, model_config("llama").hidden_size // 4
    copies = 2 * 8 * 255 * (heads - kv_heads) * width * 2  # keys and values of 8 layers for 255 tokens in bfloat16
    flex, sdpa = (count_step(config(f"model.attention={kind}"), CUDA, layers=0) for kind in ("flex", "sdpa"))
    assert copies <= sdpa.total - flex.total <= 5 * copies  # and the chains' outputs, joined
    assert count_step(config(), CUDA, layers=0) == flex
    drops = model_config("llama")
    drops.num_hidden_layers, drops.hidden_size, drops.intermediate_size, drops.attention_dropout = 8, 256, 1024, 0.1
    assert count_step(config(), CUDA, layers=0, architecture=drops).total >= sdpa.total
    assert fewest_layers(config(), 8, CUDA, flex.total)[0] == 0
    assert fewest_layers(config("model.attention=sdpa"), 8, CUDA, flex.total)[0] > 0


def test_a_run_is_counted_with_the_attention_that_it_has(folders: dict[str, Path]):
    """The attention of a loaded model decides, whatever the config asks for: its GPU may have refused FlexAttention."""
    config = config_for(folders["llama"], LORA)
    loaded = load_model(config, CPU)
    assert as_loaded(config, loaded).model.attention == "sdpa"
    for kernel in (FLEX, VARLEN):
        loaded.model.set_attn_implementation(kernel.name)
        assert as_loaded(config, loaded).model.attention == kernel.wanted


def test_half_precision_keeps_no_copies_of_float32_weights(deep: Path):
    """In full fine-tuning with autocast, a checkpointed step never holds copies of all layers' weights."""
    counted = count_step(config_for(deep, "tokens.max_length=8", "loss.type=orpo"), CUDA)
    assert counted.activations < counted.weights / 2 / 4  # at most two of eight layers in half precision


def test_a_device_that_is_not_there_has_half_precision(folders: dict[str, Path]):
    """With adapters, weights are bfloat16 on a GPU and float32 on a CPU; moments are float32 on both."""
    config = config_for(folders["llama"], LORA, "loss.type=orpo")
    there, here = count_step(config, CUDA), count_step(config, CPU)
    assert there.weights == pytest.approx(here.weights / 2, rel=0.01)
    assert (there.adapters, there.optimizer) == (here.adapters, here.optimizer)
