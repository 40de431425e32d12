"""The memory of a quantised checkpoint is counted as its library loads it, or else by the format's own sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen3MoeConfig

from fastpref.config import load_config
from fastpref.errors import UserError
from fastpref.memory.step import CPU, StepMemory, count_step
from fastpref.model.packed import bare_experts, lies_quantised, packing_of
from tests.support.families import tiny_config

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "dtype": "float32",
}  # fmt: skip
LINEAR = 2 * (4 * 256 * 256 + 3 * 256 * 512)  # number of weights in linear layers
OTHERS = 4 * (2 * 128 * 256 + 5 * 256)  # bytes of embeddings, head and norms


def counted(
    folder: Path, quantization: dict[str, Any] | None, *overrides: str, config: Any = None, device: Any = CPU
) -> StepMemory:
    """Count a step on a model of which only config.json exists."""
    config = config or LlamaConfig(**SIZES)
    raw = config.to_dict() | ({"quantization_config": quantization} if quantization else {})
    raw["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "cfg.toml").write_text('[model]\nname = "."\n[[data]]\npath = "none.jsonl"\n[tokens]\nmax_length = 16\n')
    given = overrides or ("lora={rank=2}",)
    return count_step(load_config(folder / "cfg.toml", given), device)


def bnb(**options: Any) -> dict[str, Any]:
    return BitsAndBytesConfig(**options).to_dict()


FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


KEYS: dict[str, dict[str, Any]] = {
    "nf4": {**FOUR, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("key", KEYS)
def test_bitsandbytes_counts_as_the_key_does(tmp_path: Path, key: str):
    """Every number of the step is that of the same model quantised while it is loaded."""
    own = bnb(**KEYS[key])
    assert counted(tmp_path, own) == counted(tmp_path, None, "lora={rank=2}", f"model.quantization={key}")
    assert counted(tmp_path, own) == counted(tmp_path, own, "lora={rank=2}", "model.quantization=nf4")  # the file wins


@pytest.mark.parametrize("nested", [True, False])
def test_scales_count_as_they_lie(tmp_path: Path, nested: bool):
    """The weights take as many bytes as those of a model that bitsandbytes quantised, doubly or not."""
    own = bnb(**FOUR, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype="float32")
    folder = tmp_path / "plain"
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(folder)
    options: Any = BitsAndBytesConfig(**FOUR, bnb_4bit_use_double_quant=nested)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, dtype=torch.float32)
    real = 0
    for parameter in model.parameters():
        real += parameter.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            real += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    assert counted(tmp_path, own).weights == pytest.approx(real, rel=0.03)  # code tables are left out
    assert (counted(tmp_path, own).weights - OTHERS) / LINEAR == pytest.approx(0.516 if nested else 0.5625, rel=0.06)


def test_modules_that_are_left_out_keep_their_dtype(tmp_path: Path):
    own = bnb(**FOUR, llm_int8_skip_modules=["lm_head", "down_proj"])
    kept = counted(tmp_path, own).weights - counted(tmp_path, bnb(**FOUR)).weights
    assert kept == pytest.approx(2 * 256 * 512 * (4 - 0.5625), rel=0.02)


PACKED: dict[str, tuple[dict[str, Any], float]] = {  # bytes per weight
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128 + 4 / 293),
    "gptq, a row a scale": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 1 + 3 / 320 + 4 / 293),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, 0.5 + 2.5 / 64),
    "fp8 by blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 1 + 4 / 128**2),
    "fp8 by rows": ({"quant_method": "fbgemm_fp8"}, 1 + 4 / 307),
    "mxfp4": ({"quant_method": "mxfp4"}, 0.5 + 1 / 32),
    "compressed-tensors, fp8": (
        {"quant_method": "compressed-tensors", "ignore": ["lm_head"],
         "config_groups": {"group_0": {"targets": ["Linear"],
                                       "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}},
        1 + 2 / 307,
    ),
    "compressed-tensors, w4a16": (
        {"quant_method": "compressed-tensors",
         "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
             "num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}}}},
        0.5 + 2 / 128,
    ),
    "quanto": ({"quant_method": "quanto", "weights": "int4"}, 0.5 + 2 / 307),
}  # fmt: skip


@pytest.mark.parametrize(("own", "each"), PACKED.values(), ids=PACKED)
def test_other_methods_count_by_their_bits(tmp_path: Path, own: dict[str, Any], each: float):
    """Bits, scales and zeros of linear layers count; all other weights and the rest of the step are unchanged."""
    found, plain = counted(tmp_path, own), counted(tmp_path, None)
    assert (found.weights - OTHERS) / LINEAR == pytest.approx(each, rel=5e-3)
    assert (found.adapters, found.gradients, found.activations) == (plain.adapters, plain.gradients, plain.activations)


def test_in_words():
    def form(own: dict[str, Any]) -> str | None:
        return lies_quantised(LlamaConfig(**SIZES, quantization_config=own))  # pyright: ignore[reportCallIssue]

    assert lies_quantised(LlamaConfig(**SIZES)) is None
    assert form(bnb(**FOUR)) == "bitsandbytes, nf4"
    assert form(bnb(load_in_8bit=True)) == "bitsandbytes, int8"
    assert form(PACKED["awq"][0]) == "awq, 4 bits"
    assert "not known here" in str(form({"quant_method": "new"}))
    assert packing_of({"quant_method": "new"}) is None


def test_whole_fine_tuning_of_quantised_weights_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"its weights are quantised; add a \[lora\] table"):
        counted(tmp_path, bnb(**FOUR), "loss.type=orpo")


def moe(tmp_path: Path, config: Any, *overrides: str) -> StepMemory:
    given = ['lora={rank=2,target=["q_proj"]}', *overrides]
    return counted(tmp_path, None, *given, config=config, device=torch.device("cuda"))


@pytest.mark.parametrize(("bits", "each"), [("nf4", 0.5 + 1 / 64 + 4 / 64 / 256), ("int8", 1.0)])
def test_experts_count_in_their_bits(tmp_path: Path, bits: str, each: float):
    """Experts take half a byte or a byte a weight, and their scales; none of them is left in 16 bits."""
    sizes: dict[str, Any] = SIZES | {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
    few, many = (moe(tmp_path, Qwen3MoeConfig(**sizes, num_experts=n), f"model.quantization={bits}") for n in (4, 36))
    added = 2 * 32 * 3 * 256 * 64  # weights of 32 experts
    scales = 2 * 32 * (128 + 256) * 4 if bits == "int8" else 0
    router = 2 * 32 * 256 * 2
    assert many.weights - few.weights - router == pytest.approx(each * added + scales, rel=1e-3)
    assert many.bare_experts == 0


@pytest.mark.parametrize("kind", ["llama4_text", "jetmoe", "dbrx", "mixtral", "gpt_oss"])
def test_experts_that_are_left(kind: str):
    """The size of all experts that are not loaded in few bits is known, also of those with code of their own."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
    experts = {name: p for name, p in model.named_parameters() if p.dim() == 3 or ".experts." in name}
    left = sum(p.nbytes for name, p in experts.items() if "bias" not in name and "router" not in name)
    assert left > 0
    assert bare_experts(model) == left


def test_qwen3_30b_a3b_in_nf4(tmp_path: Path):
    """A layer of Qwen3-30B-A3B takes about 0.3 GiB in nf4; 48 of them with embeddings and head are under 16 GiB."""
    sizes: dict[str, Any] = {
        "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "tie_word_embeddings": False,
    }  # fmt: skip
    one, two = (
        moe(tmp_path, Qwen3MoeConfig(**sizes, num_hidden_layers=layers), "model.quantization=nf4").weights
        for layers in (1, 2)
    )
    assert 15.4 < (one + 47 * (two - one)) / 2**30 < 15.7
