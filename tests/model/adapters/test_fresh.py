"""Which modules get an adapter (by names, patterns or "all-linear"), and which trained adapters are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3Config, PretrainedConfig, PreTrainedModel

from fastpref.config import Config, make_config
from fastpref.errors import UserError
from fastpref.model.adapters.fresh import adapter_notes, with_adapters
from fastpref.model.adapters.trained import load_adapter
from fastpref.model.load import load_model
from tests.support.tiny import MAMBA, SIZES, VISION, VOCABULARY, config_for, save_model

CPU = torch.device("cpu")
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
    "phimoe": EXPERTS,
    "gpt_oss": EXPERTS,
    "jetmoe": EXPERTS | {"kv_channels": 8},
    "llama4_text": EXPERTS | {"intermediate_size_mlp": 32},
    "qwen3_next": EXPERTS | {
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "shared_expert_intermediate_size": 16,
    },
    "falcon_h1": MAMBA,
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8},
    "mamba": {"state_size": 4},
    "gemma3": {},
    "modernbert-decoder": {"local_attention": 6},
}  # fmt: skip
LAGUNA: dict[str, Any] = EXPERTS | {"shared_expert_intermediate_size": 16, "mlp_layer_types": ["sparse", "dense"]}


def architecture(kind: str, count: int = 2) -> PretrainedConfig:
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        text = SIZES | {"sliding_window": 5, "layer_types": layers, "model_type": "gemma3_text"}
        images: dict[str, Any] = {
            "image_token_index": 96, "boi_token_index": 95, "eoi_token_index": 94, "mm_tokens_per_image": 4
        }  # fmt: skip
        return Gemma3Config(text_config=text, vision_config=VISION | {"num_hidden_layers": 2}, **images)
    sizes: dict[str, Any] = SIZES | KINDS.get(kind, LAGUNA) | ({} if count == 2 else {"num_hidden_layers": count})
    return CONFIG_MAPPING[kind](**sizes)


def model(kind: str, device: str = "cpu", *, layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(architecture(kind, layers), dtype=torch.float32).eval()


def config(**lora: Any) -> Config:
    return make_config({"model": {"name": "m"}, "data": [{"path": "d"}], "lora": {"rank": 2} | lora})


def adapted(wrapped: Any) -> set[str]:
    """Return the names of adapted layers and of adapted expert parameters, with `*` for layer numbers."""
    layers = {name: m for name, m in wrapped.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    names = {f"{name.replace('.base_layer', '')}.{getattr(m, 'parameter_name', '')}" for name, m in layers.items()}
    return {re.sub(r"\.\d+\.", ".*.", name.removesuffix(".")) for name in names}


def move(wrapped: Any) -> Any:
    """Move an adapter's weights away from those of a fresh one, which has no effect."""
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapped


LEFT_OUT: dict[str, tuple[str, ...]] = {  # what "all-linear" leaves out of the linear layers and experts
    "llama": (),
    "gpt2": (),
    "mixtral": ("mlp.gate.weight (routers",),
    "qwen2_moe": ("mlp.shared_expert_gate (routers", "mlp.experts.gate_up_proj (PEFT counts the experts"),
    "phimoe": ("mlp.router (routers", "(PEFT counts the experts"),
    "gpt_oss": ("(PEFT counts the experts",),
    "jetmoe": ("router.layer (routers", "(PEFT counts the experts"),
    "llama4_text": ("feed_forward.router (routers", "(PEFT counts the experts"),
    "qwen3_next": ("mlp.gate.weight", "mlp.shared_expert.up_proj (PEFT takes their names for the experts')"),
    "falcon_h1": ("mamba.out_proj (",),
    "mamba2": ("mixer.out_proj (",),
    "mamba": ("mixer.dt_proj, backbone.layers.*.mixer.out_proj",),
    "modernbert-decoder": ("lm_head.dense (outside of the language model",),  # it lies between the body and the head
    "gemma3": ("vision_tower.encoder.layers.*.mlp.fc1", "(outside of the language model"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_is_what_can_be_adapted(kind: str):
    """The default works for every family, each adapter gets a gradient, and one note lists the rest with reasons.

    `estimate`, which uses a model on the meta device, counts the same adapters.
    """
    plain = model(kind)
    notes = adapter_notes(config(), plain)
    wrapped = with_adapters(config(), plain)
    assert len(notes) == bool(LEFT_OUT[kind])
    for words in LEFT_OUT[kind]:
        assert words in notes[0], notes[0]
    names = adapted(wrapped)
    assert not any(re.search(r"router|vision|(^|\.)gate($|\.weight)|lm_head|shared_expert_gate", n) for n in names)
    assert adapted(with_adapters(config(), model(kind, "meta"))) == names
    ids = torch.arange(48).view(2, 24) % VOCABULARY
    wrapped.train()(input_ids=ids).logits.square().sum().backward()
    dead = [n for n, p in wrapped.named_parameters() if p.requires_grad and "lora_B" in n and p.grad is None]
    assert not dead


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"dora": True}], ids=["dropout", "DoRA"])
def test_experts_are_left_out_where_options_forbid_them(options: dict[str, Any]):
    plain = model("mixtral")
    assert "PEFT's adapters of experts know no " in adapter_notes(config(**options), plain)[0]
    assert adapted(with_adapters(config(**options), plain)) == {f"{LAYER}{x}_proj" for x in "qkvo"}


GEMMA = r"model.language_model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj"  # Axolotl's
LAYER = "model.layers.*.self_attn."
TARGETS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("llama", {"target": ["q_proj", "v_proj"]}, {f"{LAYER}q_proj", f"{LAYER}v_proj"}),
    ("llama", {"target": ["self_attn.q_proj"]}, {f"{LAYER}q_proj"}),
    ("llama", {"target": r".*\.(q|v)_proj"}, {f"{LAYER}q_proj", f"{LAYER}v_proj"}),
    ("llama", {"target": [r".*self_attn.*", "lm_head"]}, {f"{LAYER}{x}_proj" for x in "qkvo"} | {"lm_head"}),
    ("llama", {"target": ["all-linear", "lm_head"], "exclude": ["mlp", "k_proj"]},
     {f"{LAYER}{x}_proj" for x in "qvo"} | {"lm_head"}),
    ("llama", {"exclude": [r".*\.(q|k|v|o)_proj", "down_proj"]},
     {f"model.layers.*.mlp.{x}_proj" for x in ("gate", "up")}),
    ("llama", {"target": ["q_proj", "k_proj"], "exclude": ["k_proj"]}, {f"{LAYER}q_proj"}),
    ("mixtral", {"target": [r".*k_proj", "q_proj"]}, {f"{LAYER}q_proj", f"{LAYER}k_proj"}),
    ("mixtral", {"target": ["w1", "w2", "w3"]}, {f"model.layers.*.mlp.experts.{x}_proj" for x in ("gate_up", "down")}),
    ("mixtral", {"target": ["experts.gate_up_proj", "q_proj"]}, {"model.layers.*.mlp.experts.gate_up_proj",
                                                                 f"{LAYER}q_proj"}),
    ("mixtral", {"exclude": ["experts.down_proj", "self_attn"]}, {"model.layers.*.mlp.experts.gate_up_proj"}),
    ("gpt_oss", {"target": ["experts"]}, {f"model.layers.*.mlp.experts.{x}_proj" for x in ("gate_up", "down")}),
    ("gpt_oss", {"target": ["all-linear", "gate_up_proj"]},
     {f"{LAYER}{x}_proj" for x in "qkvo"} | {"model.layers.*.mlp.experts.gate_up_proj"}),
    ("qwen2_moe", {"target": [r".*experts\.down_proj"]}, {"model.layers.*.mlp.experts.down_proj"}),
    ("qwen2_moe", {"target": ["shared_expert.down_proj"]}, {"model.layers.*.mlp.shared_expert.down_proj"}),
    ("llama4_text", {"target": ["experts"]},
     {f"model.layers.*.feed_forward.experts.{x}_proj" for x in ("gate_up", "down")}),
    ("gemma3", {"target": ["q_proj"]}, {"model.language_model.layers.*.self_attn.q_proj"}),
    ("gemma3", {"target": GEMMA, "exclude": ["mlp", "o_proj"]}, {f"model.language_{LAYER}{x}_proj" for x in "qkv"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "wanted"), TARGETS)
def test_names_and_patterns(kind: str, options: dict[str, Any], wanted: set[str]):
    assert adapted(with_adapters(config(**options), model(kind))) == wanted


def test_a_pattern_may_mean_some_layers_of_a_mixture():
    """A pattern can select single layers, though PEFT reduces patterns of a mixture to suffixes common to all."""
    wrapped: Any = with_adapters(config(target=r".*layers\.1\..*(q_proj|experts.*)"), model("mixtral"))
    named = {n for n, m in wrapped.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert named
    assert all(".layers.1." in name for name in named)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"target": ["q_prj"]}, r"lora\.target: this .* has no layer 'q_prj' \(did you mean 'q_proj'\?\)"),
    ("llama", {"target": ["q_proj", "v_prj"]}, "'v_prj'.*'v_proj'.*linear modules are .*down_proj"),
    ("llama", {"target": [".*qq"]}, r"no layer '\.\*qq'; a pattern is matched with the whole name"),
    ("llama", {"target": ["mlp"]}, "mlp is no linear layer; name the layers in it: down_proj, gate_proj, up_proj"),
    ("llama", {"exclude": ["visoin_tower"]}, r"lora\.exclude: this llama model has no layer"),
    ("llama", {"exclude": ["layers"]}, "nothing is left to adapt"),
    ("llama", {"modules_to_save": ["lm_haed"]}, r"lora\.modules_to_save: .*'lm_haed' \(did you mean 'lm_head'\?\)"),
    ("gemma3", {"target": [".*vision_tower.*"]}, "outside of the language model"),
    ("gemma3", {"modules_to_save": ["vision_tower"]}, "outside of the language model"),
    ("falcon_h1", {"target": ["q_proj", "out_proj"]}, r"out_proj names model\.layers\.\*\.mamba\.out_proj"),
    ("phimoe", {"target": ["router"]}, "PhimoeTopKRouter computes something else than a linear layer"),
    ("mixtral", {"target": ["w1"]}, "without also targeting w3"),
    ("gpt_oss", {"target": ["gate_up_prj"]}, r"has no layer 'gate_up_prj' \(did you mean 'gate_up_proj'\?\)"),
    ("gpt_oss", {"target": ["experts"], "dropout": 0.1}, "dropout"),
    ("gpt_oss", {"target": ["experts"], "dora": True}, "DoRA"),
    ("mixtral", {"target": ["w1", "w2", "w3"], "dropout": 0.1}, "dropout.*linear modules are k_proj, lm_head, o_proj"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "said"), REFUSED)
def test_what_cannot_be_adapted_is_one_message(kind: str, options: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        with_adapters(config(**options), model(kind))
    assert re.search(said, str(error.value)), str(error.value)
    assert "base_layer" not in str(error.value)


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no"), AttributeError("no"), RuntimeError("no")])
def test_whatever_peft_raises_is_one_message(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(peft, "get_peft_model", fail)
    with pytest.raises(UserError, match=r"^lora: .*no\. This model's linear modules are down_proj"):
        with_adapters(config(), model("llama"))


# --- trained adapters -------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """Save a model and an adapter that changes its output, and return both folders."""
    base = save_model("llama", tmp_path / "base")
    wrapped = with_adapters(config(modules_to_save=["lm_head"]), AutoModelForCausalLM.from_pretrained(base))
    move(wrapped).save_pretrained(str(tmp_path / "adapter"))
    return base, tmp_path / "adapter"


Weights = dict[str, torch.Tensor]


def edited(change: Callable[[Weights], Weights]) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        save_file({name: w.clone() for name, w in change(load_file(path)).items()}, path, {"format": "pt"})

    return edit


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return edited(lambda weights: {re.sub(old, new, name): w for name, w in weights.items()})


def set_key(**changes: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def logits(base: Path, adapter: Path) -> torch.Tensor:
    loaded = load_model(config_for(base), CPU, trained=True, adapter=adapter)
    with torch.no_grad():
        return loaded.wrapped(input_ids=torch.arange(12)[None]).logits


@pytest.mark.parametrize(
    ("old", "new"), [(r"model\.layers", "model.language_model.layers"), (r"(model\.layers\.\d)", r"\1._orig_mod")]
)
def test_an_adapter_with_one_prefix_too_much_is_read_without_it(trained: tuple[Path, Path], old: str, new: str):
    base, adapter = trained
    before = logits(base, adapter)
    renamed(old, new)(adapter)
    torch.testing.assert_close(logits(base, adapter), before, rtol=0, atol=0)
    notes = load_model(config_for(base), CPU, trained=True, adapter=adapter).notes
    assert any(str(adapter) in note and "tensors" in note for note in notes)


def test_an_adapter_of_another_width(trained: tuple[Path, Path]):
    wider = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**{**SIZES, "hidden_size": 64}))
    with pytest.raises(UserError, match=r"of another shape: .*in the file \[\d+, \d+\].*another size"):
        load_adapter(wider, trained[1])


def test_virtual_tokens_are_refused(tmp_path: Path):
    """Virtual tokens are refused, because we run the model's body without PEFT and would silently drop them."""
    base = AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path / "base"))
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(base, settings).save_pretrained(str(tmp_path / "adapter"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="PROMPT_TUNING adds tokens to prompts"):
        load_adapter(again, tmp_path / "adapter")


def pickled(adapter: Path) -> None:
    """Replace the weights by a pickle, which PEFT would load."""
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "names of another model": (renamed("self_attn", "attention"), "missing in the files.*without a place in the model"),
    "half of the names": (renamed(r"layers\.1\.mlp", "layers.1.ffn"), r"layers\.1\.ffn"),
    "one layer more": (renamed(r"layers\.1", "layers.2"), r"layers\.2"),
    "another rank": (set_key(r=3), r"rank 2 and its adapter_config\.json says 3"),
    "another kind": (set_key(peft_type="XYZ"), "XYZ"),
    "initialised by PiSSA": (set_key(init_lora_weights="pissa_niter_4"), "changes the model's own weights too"),
    "initialised by OLoRA": (set_key(init_lora_weights="olora"), "changes the model's own weights too"),
    "a head in place of the model's": (
        edited(lambda w: w | {"base_model.model.model.norm.weight": torch.randn(32)}),
        "another model.norm.weight in place of the model's",
    ),
    "no numbers": (edited(lambda w: {name: t * torch.nan for name, t in w.items()}), "not finite"),
    "a whole module is missing": (
        edited(lambda w: {name: t for name, t in w.items() if "lm_head" not in name}),
        "1 tensor is missing in the files: .*lm_head",
    ),
    "no weights": (
        lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors is missing",
    ),
    "pickled weights": (pickled, "its weights are pickled"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_does_not_fit_is_refused(trained: tuple[Path, Path], fault: str):
    """An adapter is refused if a model with it, or without it as reference, would not be the intended one.

    With fresh adapters instead, results would be the base's: 50 %, KL 0.
    """
    base, adapter = trained
    change, message = FAULTS[fault]
    change(adapter)
    with pytest.raises(UserError, match=f"^{adapter}: this adapter cannot be put on {base}: .*{message}"):
        logits(base, adapter)


@pytest.mark.parametrize("kind", [*KINDS, "laguna"])
@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
def test_what_is_saved_is_loaded_again(kind: str, head: bool, tmp_path: Path):
    """Every family's adapters are loaded from their files with the values that were saved."""
    plain = model(kind)
    plain.save_pretrained(tmp_path / "base")
    heads = [name for name, module in plain.named_modules() if module is plain.get_output_embeddings()]
    options = config(modules_to_save=heads) if head else config()
    wrapped = move(with_adapters(options, AutoModelForCausalLM.from_pretrained(tmp_path / "base")).eval())
    wrapped.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    again = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    own, loaded = (peft.get_peft_model_state_dict(m, save_embedding_layers=False) for m in (wrapped, again))
    assert own.keys() == loaded.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, loaded[name]), name


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_next"])
def test_routers_can_be_trained_as_a_whole(kind: str):
    """A router cannot have an adapter, but modules_to_save trains it: it gets a gradient."""
    wrapped = with_adapters(config(modules_to_save=["gate"]), model(kind)).train()
    wrapped(input_ids=torch.arange(3, 15)[None]).logits.sum().backward()
    routers = {n: p for n, p in wrapped.named_parameters() if ".gate.modules_to_save" in n and p.requires_grad}
    assert routers
    assert all(p.grad is not None for p in routers.values())


def test_adapters_that_nothing_passes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A note names adapted layers that the model's code never calls; if it calls none, the adapters are refused."""
    base = save_model("llama", tmp_path)

    def without_last_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(x @ self.up_proj.weight.t()))

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", without_last_mlp)
    notes = load_model(config_for(base, 'lora.target=["gate_proj","down_proj"]'), CPU).notes
    assert any("no gradient reaches the adapters on layers.*.mlp.gate_proj; lora.exclude" in note for note in notes)
    with pytest.raises(UserError, match=r"no gradient reaches the adapters on layers\.\*\.mlp\.gate_proj"):
        load_model(config_for(base, 'lora.target=["gate_proj"]'), CPU)
