"""The first values of adapters: those of PEFT, on a model that stays the original one."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpref.data.batch import collate
from fastpref.errors import UserError
from fastpref.model.adapters.fresh import adapter_notes, with_adapters
from fastpref.model.adapters.trained import load_adapter
from fastpref.model.load import load_model
from fastpref.step.reference import make_reference
from tests.model.adapters.test_fresh import config, model
from tests.model.adapters.test_patterns import LINEAR
from tests.support.tiny import config_for, examples, save_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 27).view(2, 12)
INITS = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora")
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA, ranks": {"rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3.0}},
    "DoRA": {"dora": True},
    "the head": {"target": ["q_proj", "lm_head"]},
}


def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_model_begins_as_it_is(kind: str, init: str, form: str):
    """With fresh adapters and without them the model computes what it did, and its own weights are the same bits."""
    if kind == "gpt2" and form != "plain":
        pytest.skip("the forms are those of Llama's names")
    plain = model(kind)
    before, weights = logits(plain), {name: p.clone() for name, p in plain.named_parameters()}
    wrapped: Any = with_adapters(config(init=init, **FORMS[form]), plain)
    assert (logits(wrapped) - before).abs().max() <= 1e-5 * before.abs().max()
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), before)
    for name, parameter in plain.named_parameters():
        own = name.replace("base_layer.", "")
        assert own not in weights or torch.equal(parameter, weights[own]), name


def steps(wrapped: Any, count: int = 3) -> list[float]:
    """Take steps of plain gradient descent, and return the losses."""
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    losses = []
    for _ in range(count):
        loss = logits(wrapped).log_softmax(-1)[..., 7].mean()
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.sub_(0.5 * gradient)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rsLoRA"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_training_equals_that_of_peft(tmp_path: Path, init: str, rslora: bool):
    """Losses and the saved adapter equal PEFT's, which changes the weights and converts the adapter in the end."""
    kind: Any = init
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=LINEAR, init_lora_weights=kind, use_rslora=rslora)
    torch.manual_seed(3)
    theirs: Any = peft.get_peft_model(model("llama"), settings)
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's documentation saves the first values
    theirs.save_pretrained(str(tmp_path / "first"))
    theirs.peft_config["default"].init_lora_weights = kind
    expected = steps(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    torch.manual_seed(3)
    ours: Any = with_adapters(config(rank=2, alpha=6, init=init, rslora=rslora), model("llama"))
    assert steps(ours) == pytest.approx(expected, abs=1e-5)
    ours.save_pretrained(str(tmp_path / "ours"))
    own, converted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert own.keys() == converted.keys()
    for name, tensor in own.items():
        assert torch.allclose(tensor, converted[name], atol=2e-4), name
    again = load_adapter(model("llama"), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", INITS[1:])
def test_each_begins_otherwise(init: str):
    """No initialisation is the default one, whose steps differ from theirs."""
    torch.manual_seed(0)
    default = steps(with_adapters(config(), model("llama")))
    torch.manual_seed(0)
    assert steps(with_adapters(config(init=init), model("llama"))) != pytest.approx(default, abs=1e-6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("init", INITS[1:])
def test_quantised_weights_stay(llama: Path, init: str, bits: str):
    """The reference of a quantised model equals its policy at the start, in every layout."""
    options = config_for(llama, f'lora={{rank=2, init="{init}"}}', f"model.quantization={bits}")
    loaded = load_model(options, CPU)
    reference, _ = make_reference(options, loaded)
    small = 5e-2 if bits == "int8" else 2e-5  # int8 layers round their inputs too, to one or to the other side
    for layout in ("tree", "packed", "padded"):
        batch = collate(examples(3), layout)
        torch.testing.assert_close(loaded.policy(batch).logp, reference(batch), rtol=1e-5, atol=small)


def test_loftq_makes_up_for_rounding(llama: Path):
    """Logits are nearer to those of the whole model with than without the adapters, and a copy begins as the policy."""
    options = config_for(llama, 'lora={rank=8, alpha=4, init="loftq"}', "model.quantization=nf4", "reference.mode=copy")
    whole = logits(AutoModelForCausalLM.from_pretrained(llama))
    loaded: Any = load_model(options, CPU)
    with loaded.wrapped.disable_adapter():
        without = (logits(loaded.wrapped) - whole).norm()
    assert (logits(loaded.wrapped) - whole).norm() < 0.8 * without
    batch = collate(examples(3), "tree")
    reference, _ = make_reference(options, loaded)
    assert torch.equal(reference(batch), loaded.policy(batch).logp)


@pytest.mark.parametrize("override", ["reference.mode=auto", "reference.mode=precompute"])
def test_loftq_has_no_reference_without_adapters(llama: Path, override: str):
    """Without its adapters the model would be another one than the policy begins as."""
    with pytest.raises(UserError, match=r'lora\.init: "loftq" adapters are a part of the model at the start'):
        config_for(llama, 'lora={init="loftq"}', "model.quantization=nf4", override)


def test_loftq_is_the_best_of_its_rank(llama: Path):
    """Of all matrices of that rank, none is nearer to what a layer has lost (Eckart and Young)."""
    options = config_for(llama, 'lora={rank=3, init="loftq"}', "model.quantization=nf4", "loss.type=orpo")
    loaded, whole = load_model(options, CPU), AutoModelForCausalLM.from_pretrained(llama)
    layers: dict[str, Any] = {n: m for n, m in loaded.model.named_modules() if isinstance(m, LoraLayer)}
    assert layers
    for name, layer in layers.items():
        base = peft.utils.integrations.dequantize_module_weight(layer.base_layer)
        original: Any = whole.get_submodule(name)
        lost = original.weight - base
        rest = torch.linalg.svdvals(lost)[3:].norm()
        assert (lost - layer.get_delta_weight("default")).norm().item() == pytest.approx(float(rest), rel=1e-3)


def test_experts_begin_as_ever():
    """The parts are those of linear layers: "all-linear" leaves experts out, which the note says."""
    plain = model("mixtral")
    assert "PEFT's adapters of experts know no lora.init = 'pissa'" in adapter_notes(config(init="pissa"), plain)[0]
    with_adapters(config(init="gaussian"), plain)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a rank above the width": ({"init": "pissa", "rank": 33}, "lora.init: 'pissa' takes 33 directions of .* which has"),
    "embeddings": ({"init": "olora", "target": ["embed_tokens"]}, "lora.init: 'olora' is for linear layers, and"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_begin_so(fault: str):
    options, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        with_adapters(config(**options), model("llama"))
