"""Fused experts in few bits, and LoRA on them: the same as transformers' and PEFT's own, for every family."""

import copy
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name

from fastpref.model.adapters.fused import fuse_lora, unfuse_lora
from fastpref.model.experts import compute
from fastpref.model.experts.bits import pack, through_bits
from fastpref.model.experts.kinds import fused_experts, weight_names
from tests.support.families import FAMILIES, tiny_config

IDS = torch.arange(26).view(2, 13) * 7 % 140 + 3
_DENSE = ("flint", "gemma4", "gemma4_text", "gemma4_text+kvshared", "granitemoehybrid+dense")  # by their tiny configs
_MODELS = Path(transformers.__file__).parent / "models"


def _has_experts(kind: str) -> bool:
    folder = _MODELS / model_type_to_module_name(kind.partition("+")[0])
    texts = (path.read_text(encoding="utf-8") for path in folder.glob("modeling_*.py"))
    return kind not in _DENSE and any(re.search(r"^@use_experts_implementation", text, re.MULTILINE) for text in texts)


KINDS = [kind for kind in FAMILIES if _has_experts(kind)]


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def in_few_bits(model: nn.Module, bits: Any) -> tuple[Any, Any]:
    """Return the model with its experts through these bits, and a copy of it with its experts in them."""
    packed: Any = copy.deepcopy(model)
    for (_, whole), (_, few) in zip(list(fused_experts(model)), list(fused_experts(packed)), strict=True):
        few.forward = compute.forward.__get__(few)
        for name in weight_names(whole):
            weight, transposed = whole._parameters[name].data, whole.is_transposed
            whole._parameters[name].data = through_bits(weight, bits, transposed=transposed)
            few._parameters[name] = pack(weight, bits, transposed=transposed)
    return model, packed


def with_lora(model: Any, *, rslora: bool = False) -> Any:
    """Return a model with PEFT's adapters of all weights of its experts, which have an effect."""
    names = [f"{name}.{own}" for name, experts in fused_experts(model) for own in weight_names(experts)]
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=names, use_rslora=rslora)
    with warnings.catch_warnings(action="ignore"):
        wrapped: Any = get_peft_model(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return wrapped


def outcome(model: Any) -> dict[str, Tensor]:
    """Return the logits, and the gradients of the embeddings and of everything that is trained."""
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    model.train().zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert embeddings.grad is not None
    return {"logits": logits.detach(), **trained}


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor], within: float) -> None:
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (results[name] - tensor).norm() <= within * tensor.norm(), name


@cache
def of_peft(kind: str) -> dict[str, Tensor]:
    return outcome(with_lora(in_few_bits(tiny(kind), "nf4")[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_4_bits_compute_what_their_dequantised_weights_do(kind: str) -> None:
    """Experts in nf4 give, bit for bit, the logits and gradients of transformers' own code on the dequantised ones."""
    whole, packed = in_few_bits(tiny(kind), "nf4")
    expected, results = outcome(whole), outcome(packed)
    assert all(torch.equal(results[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h"])
def test_8_bits_compute_what_their_dequantised_weights_do(kind: str) -> None:
    whole, packed = in_few_bits(tiny(kind), "int8")
    assert_same(outcome(packed), outcome(whole), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_tokens_is_pefts_lora_on_weights(kind: str) -> None:
    """scaling · B(A(x)) of each expert's tokens is PEFT's product with the weights plus scaling · B·A."""
    wrapped = with_lora(in_few_bits(tiny(kind), "nf4")[0])
    fuse_lora(wrapped)
    assert_same(outcome(wrapped), of_peft(kind), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_4_bits_is_lora_on_the_dequantised_weights(kind: str) -> None:
    wrapped = with_lora(in_few_bits(tiny(kind), "nf4")[1])
    fuse_lora(wrapped)
    assert_same(outcome(wrapped), of_peft(kind), 1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_all_of_transformers_implementations_agree(kind: str, implementation: str) -> None:
    model = with_lora(tiny(kind), rslora=True)
    model.get_base_model().set_experts_implementation(implementation)
    expected = outcome(model)
    fuse_lora(model)
    assert_same(outcome(model), expected, 1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_that_are_off_leave_the_base(packed: bool) -> None:
    """The reference is the model without adapters, bit for bit."""
    base = in_few_bits(tiny("qwen3_moe"), "nf4")[packed]
    expected = outcome(base)
    wrapped = with_lora(base)
    fuse_lora(wrapped)
    with torch.no_grad(), wrapped.disable_adapter():
        assert torch.equal(wrapped(input_ids=IDS, use_cache=False).logits, expected["logits"])
    assert not torch.allclose(outcome(wrapped)["logits"], expected["logits"])


def test_two_adapters_add_up() -> None:
    model = with_lora(tiny("qwen3_moe"))
    model.add_adapter("second", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second." in name:
                parameter.normal_(std=0.1)
    model.base_model.set_adapter(["default", "second"])
    expected = outcome(model)
    fuse_lora(model)
    assert_same(outcome(model), expected, 1e-5)


def test_merged_adapters_and_unfused_ones_are_pefts() -> None:
    model = with_lora(tiny("qwen3_moe"))
    expected = outcome(model)
    fuse_lora(model)
    model.merge_adapter()
    assert_same({"logits": outcome(model)["logits"]}, {"logits": expected["logits"]}, 1e-5)
    model.unmerge_adapter()
    unfuse_lora(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert_same(outcome(model), expected, 1e-5)


def kept(model: Any) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without those of the model's own tensors."""
    model.get_input_embeddings().weight.requires_grad_()
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    storages: dict[int, Any] = {}

    def pack_hook(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        model.train()(input_ids=IDS, use_cache=False)
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


def test_nothing_dequantised_is_kept() -> None:
    """A forward pass keeps nothing but activations: as much with experts in nf4 as with their weights whole."""
    whole, packed = in_few_bits(tiny("qwen3_moe"), "nf4")
    assert kept(packed) <= kept(whole)


def test_lora_keeps_no_sum_of_weights() -> None:
    """PEFT keeps the summed weights of all experts for the backward pass; here they do not exist."""
    model = with_lora(tiny("qwen3_moe"))
    theirs = kept(model)
    fuse_lora(model)
    weights = sum(p.nbytes for _, experts in fused_experts(model) for p in experts.parameters())
    assert kept(model) < theirs - weights / 2


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_near_to_float32_as_pefts(autocast: bool) -> None:
    """In bfloat16 the products of tokens are no further from float32 than the products of summed weights."""

    def logits(model: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and model.dtype == torch.bfloat16), torch.no_grad():
            return model.eval()(input_ids=IDS, use_cache=False).logits.double()

    model = with_lora(tiny("mixtral", torch.bfloat16))
    exact = logits(copy.deepcopy(model).float())
    theirs = (logits(model) - exact).norm()
    fuse_lora(model)
    assert (logits(model) - exact).norm() <= 1.1 * theirs
