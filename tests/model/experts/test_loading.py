"""Experts in few bits as a run loads them: what they are, that they are loaded one by one, and where they stay."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpref.data.batch import collate
from fastpref.errors import UserError
from fastpref.model.adapters.trained import load_adapter
from fastpref.model.experts import quantizer
from fastpref.model.experts.bits import pack, through_bits, unpacked
from fastpref.model.experts.kinds import fused_experts, weight_names
from fastpref.model.load import Loaded, load_model
from fastpref.model.precision import in_float32
from fastpref.model.streaming.room import weights_nbytes
from fastpref.step.reference import make_reference
from tests.support.families import tiny_config
from tests.support.tiny import config_for, examples, save_model

CPU = torch.device("cpu")
IDS = torch.arange(24).view(2, 12) * 5 % 90 + 3
EXPERTS = 'lora={rank=2, target=["q_proj", "experts"]}'


def load(folder: Path, bits: str, *overrides: str, **options: Any) -> Loaded:
    return load_model(config_for(folder, f"model.quantization={bits}", *(overrides or (EXPERTS,))), CPU, **options)


def weights(model: Any) -> dict[str, Any]:
    return {f"{n}.{own}": m._parameters[own] for n, m in fused_experts(model) for own in weight_names(m)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


@pytest.fixture(params=["qwen3-moe", "gpt-oss"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_model(request.param, tmp_path / "model")


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_loaded_expert_is_that_of_the_files(folder: Path, bits: Any) -> None:
    """A run's experts are those of its files through the bits, each expert by itself."""
    plain, few = (load(folder, kind, 'lora={rank=2, target=["q_proj"]}').model for kind in ("none", bits))
    transposed = next(experts for _, experts in fused_experts(plain)).is_transposed
    assert weights(plain).keys() == weights(few).keys()
    for name, weight in weights(plain).items():
        found = unpacked(weights(few)[name])
        assert torch.equal(found, through_bits(weight.data, bits, transposed=transposed))
        alone = [through_bits(own[None], bits, transposed=transposed)[0] for own in weight.data]
        assert torch.equal(found, torch.stack(alone))
        assert 0 < (found - weight).norm() < (0.1 if bits == "nf4" else 0.01) * weight.norm()


def test_one_tensor_is_whole_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a model is loaded, the weights of one layer are quantised and let go before those of the next are read."""
    alive: list[weakref.ref[Tensor]] = []

    def watched(tensor: Tensor, *args: Any, **options: Any) -> Any:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(tensor))
        return pack(tensor, *args, **options)

    monkeypatch.setattr(quantizer, "pack", watched)
    load(save_model("mixtral", tmp_path / "model"), "nf4")
    assert len(alive) == 4


def test_experts_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = save_model("gpt-oss", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.down_proj"))
    save_file(tensors | {name: tensors[name][:, :, :-1].contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"down_proj has the shape \[2, 48, 31\] in the files and \[2, 48, 32\]"):
        load(folder, "nf4")


@pytest.mark.parametrize("kind", ["llama4_text", "mixtral"])
def test_a_run_names_experts_that_stay_whole(kind: str, tmp_path: Path) -> None:
    """Experts that compute by code of their own stay as they are, and a note says how much they take."""
    if kind == "mixtral":
        assert not [n for n in load(save_model(kind, tmp_path), "nf4").notes if "not quantised" in n]
        return
    AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32).save_pretrained(tmp_path)
    (note,) = [n for n in load(tmp_path, "nf4", 'lora={rank=2, target=["q_proj"]}').notes if "not quantised" in n]
    assert note.startswith("model.quantization: ")
    assert "MiB of the weights are experts" in note


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("mode", ["adapter", "copy"])
def test_the_reference_is_the_quantised_model(folder: Path, bits: str, mode: str) -> None:
    """With adapters off, or as a copy, the reference gives the log-probabilities before training."""
    loaded = load(folder, bits)
    config = config_for(folder, EXPERTS, f"model.quantization={bits}", f"reference.mode={mode}")
    reference, _ = make_reference(config, loaded)
    batch = collate(examples(3), "tree")
    with torch.no_grad():
        before = loaded.policy.eval()(batch).logp
        for name, parameter in loaded.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
        assert torch.equal(reference(batch), before)
        assert not torch.allclose(loaded.policy.eval()(batch).logp, before, atol=1e-2)


def test_a_saved_adapter_is_the_trained_one(folder: Path, tmp_path: Path) -> None:
    """An adapter on experts in nf4 gives the same logits after it has been saved and put on the model again."""
    loaded = load(folder, "nf4")
    with torch.no_grad():
        for parameter in loaded.wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    loaded.wrapped.save_pretrained(str(tmp_path / "adapter"))
    bare = load(folder, "nf4", trained=True).model
    assert not torch.allclose(logits(bare), logits(loaded.wrapped), atol=1e-2)
    assert torch.equal(logits(load_adapter(bare, tmp_path / "adapter")), logits(loaded.wrapped))


def test_half_precision_and_float32(folder: Path) -> None:
    """A model in bfloat16 computes with float32 products of its experts' bits where it is compared in float32."""
    half = load(folder, "nf4", EXPERTS, "model.dtype=bfloat16")
    assert all(p.quant_state.dtype == torch.bfloat16 for p in weights(half.model).values())
    before = {name: p.data.clone() for name, p in weights(half.model).items()}
    rounded = logits(half.model)
    with in_float32(half.model) as whole:
        assert whole
        exact = logits(half.model)
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()
    assert all(torch.equal(before[name], p.data) for name, p in weights(half.model).items())
    assert torch.equal(logits(half.model), rounded)


def test_copies_and_moves_keep_the_scales(folder: Path) -> None:
    model: Any = load(folder, "nf4", trained=True).model
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(model.to(CPU)), expected)


def test_a_model_takes_half_a_byte_a_weight(folder: Path) -> None:
    """The experts of a loaded model take the bytes of their bits and scales, as streaming and estimates count them."""
    model = load(folder, "nf4", trained=True).model
    for _, experts in fused_experts(model):
        whole = sum(p.ds_shape.numel() for p in (experts._parameters[name] for name in weight_names(experts)))
        count = experts.num_experts
        scales = whole / 64 + count * 2 * 4 * 2  # and of each weight of an expert one scale of scales and a mean
        tables = 2 * (16 + 256) * 4
        biases = sum(p.nbytes for name, p in experts.named_parameters() if "bias" in name)
        assert weights_nbytes(experts) == whole / 2 + scales + tables + biases
