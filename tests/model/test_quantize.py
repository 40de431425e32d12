"""QLoRA: which weights are quantised, which are trained, and that a run with it works on a CPU."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoModelForCausalLM

import fastpref
from fastpref.data.batch import collate
from fastpref.errors import UserError
from fastpref.model.load import Loaded, load_model
from fastpref.step.reference import make_reference
from tests.support.paths import QUICKSTART
from tests.support.tiny import config_for, examples, model_config

CPU = torch.device("cpu")
KINDS = {"nf4": Linear4bit, "int8": Linear8bitLt}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random model whose rows are whole blocks of 64, and return its folder."""
    folder = tmp_path_factory.mktemp("llama64")
    config = model_config("llama")
    config.hidden_size, config.intermediate_size = 64, 128
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def load(folder: Path, kind: str, *overrides: str) -> Loaded:
    return load_model(config_for(folder, f"model.quantization={kind}", "lora={rank=2}", *overrides), CPU)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_quantised_and_what_is_trained(llama: Path, kind: str, dtype: str):
    """The body's linear layers are quantised; head, embeddings and norms keep the model's dtype; and only the
    adapters are trained, in float32."""
    loaded = load(llama, kind, f"model.dtype={dtype}")
    body = [m for name, m in loaded.model.model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
    assert len(body) == 14
    assert all(isinstance(module, KINDS[kind]) for module in body)
    for name, parameter in loaded.model.named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad
            assert parameter.dtype == torch.float32
        elif any(part in name for part in ("norm", "embed_tokens", "lm_head")):
            assert parameter.dtype == getattr(torch, dtype), name
        assert parameter.requires_grad == ("lora_" in name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["adapter", "copy"])
def test_the_reference_is_the_quantised_model(llama: Path, kind: str, mode: str):
    """With adapters off, or as a copy in the same bits, the reference gives the model's original log-probabilities."""
    loaded = load(llama, kind)
    reference, _ = make_reference(config_for(llama, "lora={rank=2}", f"reference.mode={mode}"), loaded)
    batch = collate(examples(3), "tree")
    with torch.no_grad():
        before = loaded.policy.eval()(batch).logp
        for name, parameter in loaded.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
        torch.testing.assert_close(reference(batch), before)
        assert not torch.allclose(loaded.policy.eval()(batch).logp, before, atol=1e-2)


def test_evaluating_does_not_change_four_bit_weights(llama: Path):
    """An evaluation leaves 4-bit weights as they are; bitsandbytes would repack them on some CPUs and lose bits."""
    loaded = load(llama, "nf4")
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    with torch.no_grad():
        loaded.policy.eval()(collate(examples(3), "padded"))
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_run_in_few_bits(kind: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The quickstart learns with quantised weights, and with an 8-bit optimizer state."""
    monkeypatch.chdir(tmp_path)
    overrides = [f"model.quantization={kind}", f"train.optimizer={optimizer}", "train.steps=5", "eval.samples=0"]
    result = fastpref.train(QUICKSTART, overrides)
    assert result.eval_metrics["eval/loss"] < 0.69
    assert (result.output_dir / "final" / "adapter_model.safetensors").exists()


def test_dora_in_8_bits_needs_a_gpu(llama: Path):
    """DoRA in 8 bits is refused on a CPU, where PEFT loses the scales of the weights; DoRA in 4 bits works."""
    with pytest.raises(UserError, match=r"lora.dora: PEFT loses the scales of weights in int8"):
        load(llama, "int8", "lora={dora=true}")
    load(llama, "nf4", "lora={dora=true}")


def test_quantised_weights_need_adapters(llama: Path):
    """Quantised weights cannot be trained, so a config without [lora] is refused when it is read."""
    with pytest.raises(UserError, match=r'model.quantization: "nf4" weights cannot be trained themselves'):
        config_for(llama, "model.quantization=nf4")


def test_paging_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a GPU, a paged optimizer is refused by its name."""
    monkeypatch.chdir(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="paged_adamw_8bit"):
            fastpref.train(QUICKSTART, ["train.optimizer=paged_adamw_8bit"])
