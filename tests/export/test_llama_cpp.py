"""llama.cpp itself computes what transformers computes, with the files that `fastpref export` writes.

These tests need llama-cpp-python, which is not among the dependencies of the tests.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref.export import export_adapter, export_model
from fastpref.run.trained import find_trained
from tests.support.gguf_models import IDS, MODELS, llama, llama_logits, logits, needs_llama, save_model

pytestmark = [pytest.mark.slow, needs_llama]
_GELU = 1e-3  # llama.cpp reads GELU from a table in float16
_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_a_family(name: str, tmp_path: Path):
    """In float32, the logits of both are equal up to the rounding of sums."""
    folder = save_model(name, tmp_path / "model")
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    file = export_model(find_trained(str(folder)), tmp_path / "out" / "model.gguf", quant="f32").file
    allowed = _GELU if name.startswith("gemma") else 2e-5
    assert (llama_logits(file) - expected).abs().max() <= allowed * expected.abs().max()


@pytest.mark.parametrize(("quant", "allowed"), [("f16", 0.01), ("bf16", 0.05), ("q8_0", 0.1), ("q4_0", 0.8)])
def test_each_type_is_read(quant: str, allowed: float, tmp_path: Path):
    """llama.cpp reads every type, and its logits are as near as that type's rounding lets them be."""
    folder = save_model("llama", tmp_path / "model")
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    file = export_model(find_trained(str(folder)), tmp_path / "out" / "model.gguf", quant=quant).file
    lost = (llama_logits(file) - expected).norm() / expected.norm()
    assert 0 < lost < allowed


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "ranks of their own": {"rank_pattern": {"v_proj": 2, "q_proj": 6}, "alpha_pattern": {"k_proj": 3}},
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("name", ["llama", "llama, one head per key", "qwen3", "gemma2", "phi3", "granite", *_EXPERTS])
def test_an_adapter_beside_its_base(name: str, options: dict[str, Any], tmp_path: Path):
    """A base in GGUF with the adapter in GGUF gives the logits of PEFT."""
    folder = save_model(name, tmp_path / "model")
    adapter = save_adapter(folder, tmp_path / "adapter", experts=name in _EXPERTS and not options, **options)
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    file = export_model(find_trained(str(folder)), tmp_path / "out" / "model.gguf", quant="f32").file
    added = export_adapter(find_trained(str(adapter)), tmp_path / "out" / "adapter.gguf").file
    error = (llama_logits(file, lora_path=str(added)) - expected).abs().max()
    assert (expected - before).abs().max() > 0.1 * before.abs().max()
    assert error <= (_GELU if name.startswith("gemma") else 5e-5) * expected.abs().max()


def save_adapter(model: Path, folder: Path, *, experts: bool = False, **options: Any) -> Path:
    """Save a PEFT adapter that has an effect, and return its folder."""
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    fused = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]} if experts else {}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if experts else "all-linear"
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **fused, **options)
    torch.manual_seed(1)
    wrapped = get_peft_model(base, settings)
    with torch.no_grad():
        for part, parameter in wrapped.named_parameters():
            if "lora_" in part:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(str(folder))
    return folder


TEXTS = [
    "Hello world, it's 2024! I'LL we're 12345.67\n\n  x = 1\t\n ünïcødé 漢字 🙂\u00a0…",
    " leading and trailing spaces  ", "\n\n\n", "a", "don't DON'T ''s 's", "1234567 ١٢٣ Ⅷ ²",
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_tokens_of_texts(name: str, tmp_path: Path):
    """llama.cpp makes the tokenizer's own tokens of texts and of a conversation with special tokens."""
    folder = save_model(name, tmp_path / "model")
    file = export_model(find_trained(str(folder)), tmp_path / "out" / "model.gguf", quant="f16").file
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reader = llama(file, vocab_only=True)
    talk = [{"role": "user", "content": TEXTS[0]}]
    chat: Any = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    for text in (*TEXTS, chat):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert reader.tokenize(text.encode(), add_bos=False, special=True) == expected, text
    assert reader.detokenize(IDS, special=True).decode(errors="replace") == tokenizer.decode(IDS)
