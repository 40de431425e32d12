"""A model's tensors and those of its files must match one to one; otherwise there is one error."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastpref.errors import UserError
from fastpref.model.load import load_model
from fastpref.model.weights import find_renaming, from_files, loading_notes
from fastpref.quiet import quiet_libraries
from fastpref.step.reference import load_copy
from tests.support.tiny import config_for, save_model

CPU = torch.device("cpu")
Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch):
    """Silence the log of transformers, as the command line does."""
    quiet_libraries()


def changed(kind: str, folder: Path, change: Callable[[Weights], Weights]) -> Path:
    """Save a random model with changed tensors, and return its folder."""
    path = save_model(kind, folder / "model") / "model.safetensors"
    save_file({name: w.clone() for name, w in change(load_file(path)).items()}, path, metadata={"format": "pt"})
    return path.parent


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: w for name, w in weights.items() if part not in name}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {re.sub(old, new, name): w for name, w in weights.items()}


def beside(name: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.zeros(shape)}


def an_adapter(weights: Weights) -> Weights:
    weights = renamed(r"q_proj\.weight", "q_proj.base_layer.weight")(weights)
    return beside("model.layers.0.self_attn.q_proj.lora_A.default.weight", 2, 32)(weights)


LAYER = "model.layers.1."
FAULTS: dict[str, tuple[str, Callable[[Weights], Weights], list[str]]] = {
    "one is missing": ("llama", without(LAYER + "mlp.up_proj"), [f"1 tensor is missing.*{LAYER}mlp.up_proj.weight"]),
    "a layer is missing": ("llama", without(LAYER), ["9 tensors are missing", "missing or incomplete"]),
    "no head, not tied": ("llama", without("lm_head"), ["lm_head.weight", "tie_word_embeddings"]),
    "the base model alone": ("llama", lambda w: renamed(r"^model\.", "")(without("lm_head")(w)), ["lm_head.weight"]),
    "one more": ("llama", beside("extra.weight", 3), ["1 tensor is in the files without a place.*extra.weight"]),
    "a bias more": ("llama", beside("model.layers.0.self_attn.q_proj.bias", 32), ["q_proj.bias", "would be lost"]),
    "a layer more": ("llama", beside("model.layers.2.mlp.up_proj.weight", 48, 32), ["counts 2 layers"]),
    "a classifier": ("llama", lambda w: beside("score.weight", 1, 32)(without("lm_head")(w)), ["lm_head", "score"]),
    "a tied classifier": ("llama-tied", beside("score.weight", 1, 32), ["score.weight"]),
    "another width": ("llama", beside("model.norm.weight", 31), [r"in the file \[31\], in the model \[32\]"]),
    "another vocabulary": ("llama", beside("lm_head.weight", 99, 32), [r"\[99, 32\].*\[97, 32\]", "resized to 99"]),
    "other names": ("llama", renamed("mlp", "ffn"), ["mlp.down_proj", "ffn.down_proj", "another model"]),
    "an adapter inside": ("llama", an_adapter, ["unmerged", "merge_and_unload"]),
    "half of an expert": ("qwen3-moe", without("0.mlp.experts.1.up_proj"), ["layers.0.mlp.experts.gate_up_proj"]),
    "an expert is missing": ("qwen3-moe", without("0.mlp.experts.1."), [r"\[3, 32, 16\].*\[4, 32, 16\]"]),
    "an expert of another shape": (
        "qwen3-moe",
        beside("model.layers.0.mlp.experts.1.up_proj.weight", 17, 32),
        ["layers.0.mlp.experts.gate_up_proj"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_an_error(tmp_path: Path, fault: str):
    """The message starts with the config key, names the first tensors, and refers to no report of transformers."""
    kind, change, said = FAULTS[fault]
    with pytest.raises(UserError) as error:
        load_model(config_for(changed(kind, tmp_path, change)), CPU)
    assert str(error.value).startswith("model.name = ")
    for words in said:
        assert re.search(words, str(error.value)), str(error.value)
    assert "report" not in str(error.value)
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "qwen3-moe"])
@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "model.", "base_model.model.", "_orig_mod.module.", "student.net."]
)
def test_a_prefix_is_taken_off_and_told(tmp_path: Path, kind: str, prefix: str):
    """A superfluous prefix is removed from all names, with a note, and the weights are bit-identical."""
    folder = changed(kind, tmp_path, renamed("^", prefix))
    plain = AutoModelForCausalLM.from_pretrained(save_model(kind, tmp_path / "plain")).state_dict()
    loaded = load_model(config_for(folder), CPU)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in loaded.model.state_dict().items())
    native = prefix == "model." and kind != "gpt2"  # transformers itself removes the prefix of its base model
    assert native or any(f"`{prefix}`" in note for note in loaded.notes)


@pytest.mark.parametrize("outer", ["", "_orig_mod."])
def test_a_wrapper_in_the_middle_is_taken_off(tmp_path: Path, outer: str):
    """A wrapper's prefix inside names is removed: of layers compiled one by one, also in a compiled model."""
    folder = changed("llama", tmp_path, lambda w: renamed("^", outer)(renamed(r"(layers\.\d\.)", r"\1_orig_mod.")(w)))
    plain = AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path / "plain")).state_dict()
    own = load_model(config_for(folder), CPU).model.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in own.items())


FINE: dict[str, tuple[str, Callable[[Weights], Weights]]] = {
    "tied head": ("llama-tied", without("nothing")),
    "tied head and the base model alone": ("llama-tied", renamed(r"^model\.", "")),
    "angles of old versions": ("llama", beside("model.layers.0.self_attn.rotary_emb.inv_freq", 4)),
    "masks of old versions": ("gpt2", beside("transformer.h.0.attn.bias", 1, 1, 128, 128)),
    "GPT-2 as on the hub": ("gpt2", renamed(r"^transformer\.", "")),
}


@pytest.mark.parametrize("what", FINE)
def test_what_transformers_takes_is_taken(tmp_path: Path, what: str):
    kind, change = FINE[what]
    loaded = load_model(config_for(changed(kind, tmp_path, change)), CPU)
    plain = AutoModelForCausalLM.from_pretrained(save_model(kind, tmp_path / "plain")).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in loaded.model.state_dict().items())
    assert loading_notes(loaded.model) == []


@pytest.mark.parametrize("name", ["v_head.summary.weight", "mtp.layers.0.mlp.up_proj.weight"])
def test_a_head_beside_the_language_models_is_left_out_and_told(tmp_path: Path, name: str):
    loaded = load_model(config_for(changed("llama", tmp_path, beside(name, 1, 32))), CPU)
    assert any(name in note for note in loaded.notes)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_files(tmp_path: Path, bits: int):
    """A quantised layer's state belongs to its weight; without a quantization_config, the files are refused."""
    folder = save_model("llama", tmp_path / "whole")
    options = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=options).save_pretrained(tmp_path / "quantised")
    load = partial(AutoModelForCausalLM.from_pretrained, tmp_path / "quantised")
    assert loading_notes(from_files(load)) == []
    path = tmp_path / "quantised" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="no quantization_config"):
        from_files(load)


def test_a_reference_copy_is_checked(tmp_path: Path):
    """A reference copy is refused if the files have changed since the model was loaded."""
    folder = save_model("llama", tmp_path / "model")
    config = config_for(folder)
    loaded = load_model(config, CPU)
    path = folder / "model.safetensors"
    save_file(without("lm_head")(load_file(path)), path, metadata={"format": "pt"})
    copy = config.but({"model.dtype": "bfloat16"})
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        load_copy(copy, loaded)


def test_the_renaming_that_fits_most_is_taken():
    """Either one renaming applies to all tensors, or there is none."""
    own = ["model.layers.0.q.weight", "model.layers.1.q.weight", "lm_head.weight"]
    found = find_renaming(own, [f"model.language_model.{n.removeprefix('model.')}" for n in own[:2]])
    assert found is not None
    assert (found.old, found.new) == ("model.language_model.", "model.")
    assert find_renaming(own, ["student.lm_head.weight", "teacher.lm_head.weight"]) is None
    assert find_renaming([], ["a.b"]) is None
