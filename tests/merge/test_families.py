"""The law of `fastpref merge`, for many models, file formats and adapters: loaded by transformers alone, the merged
folder computes what PEFT's adapter computes on the model, and its tensors have the names of the model's."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import fastpref
from fastpref.errors import UserError
from fastpref.merge import merge, merge_fault, plan
from fastpref.merge.checkpoint import Checkpoint
from fastpref.model.adapters.experts import fuse_expert_lora
from fastpref.model.quantize import keep_weights_as_loaded, quantization_config
from fastpref.run.trained import Trained, find_trained
from fastpref.training import loop
from tests.support.paths import EXAMPLES, QUICKSTART_MODEL
from tests.support.tiny import VISION

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
IDS = torch.arange(3, 40)[None]
SIZES: dict[str, Any] = {
    "vocab_size": 949, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
EXPERTS: dict[str, Any] = SIZES | {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
TEXT = SIZES | {
    "model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)
CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n"
    "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}
AUTO = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@dataclass(frozen=True)
class Kind:
    """A model, and how its files are made from those that transformers saves."""

    model_type: str
    sizes: dict[str, Any]
    then: Callable[[Path], None] = lambda folder: None
    dtype: torch.dtype = torch.float32
    shard: str = "5GB"
    experts: bool = False  # DoRA does not support them
    trust: bool = False
    nf4: bool = False  # quantised while it is loaded


def _quantise(settings: BitsAndBytesConfig) -> Callable[[Path], None]:
    def then(folder: Path) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
        keep_weights_as_loaded(model)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(str(folder))

    return then


def _as_on_the_hub(folder: Path) -> None:
    """Remove the prefix of the model in memory from GPT-2's tensor names, and add masks that it does not have."""
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    save_file(tensors | masks, folder / "model.safetensors", metadata={"format": "pt"})


def _set(folder: Path, **changes: Any) -> None:
    """Change keys of a model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _own_code(folder: Path) -> None:
    _set(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=AUTO)
    for name, text in CODE.items():
        (folder / name).write_text(text)


GPT2: dict[str, Any] = {"vocab_size": 949, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
KINDS = {
    "llama": Kind("llama", SIZES),
    "tied": Kind("llama", SIZES | {"tie_word_embeddings": True}),
    "tied, with another head in its files": Kind("llama", SIZES, lambda folder: _set(folder, tie_word_embeddings=True)),
    "in shards": Kind("llama", SIZES, shard="100KB"),
    "bfloat16": Kind("llama", SIZES, dtype=torch.bfloat16),
    "gpt2": Kind("gpt2", GPT2),
    "gpt2 as on the hub": Kind("gpt2", GPT2, _as_on_the_hub),
    "mixtral": Kind("mixtral", SIZES | {"num_local_experts": 3}, experts=True),
    "mixtral in shards": Kind("mixtral", SIZES | {"num_local_experts": 3}, shard="60KB", experts=True),
    "qwen3_moe": Kind("qwen3_moe", EXPERTS | {"num_experts": 3}, experts=True),
    "olmoe": Kind("olmoe", EXPERTS | {"num_experts": 3}, experts=True),
    "deepseek_v3": Kind(
        "deepseek_v3",
        EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8,
                   "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                   "v_head_dim": 8, "num_key_value_heads": 4},
        experts=True,
    ),
    "gemma3 with vision": Kind(
        "gemma3", {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 948,
                   "boi_token_index": 947, "eoi_token_index": 946}
    ),
    "in 4 bits on disk": Kind("llama", SIZES, _quantise(FOUR_BITS)),
    "gpt2 in 4 bits on disk": Kind("gpt2", GPT2, _quantise(FOUR_BITS)),
    "gpt2 in 8 bits on disk": Kind("gpt2", GPT2, _quantise(EIGHT_BITS)),
    "in 8 bits on disk": Kind("llama", SIZES, _quantise(EIGHT_BITS)),
    "with its own code": Kind("llama", SIZES, _own_code, trust=True),
    "trained in nf4": Kind("llama", SIZES, nf4=True),
    "gpt2 trained in nf4": Kind("gpt2", GPT2, nf4=True),
    "mixtral trained in nf4": Kind("mixtral", SIZES | {"num_local_experts": 3}, experts=True, nf4=True),
    "qwen3_moe trained in nf4": Kind("qwen3_moe", EXPERTS | {"num_experts": 3}, experts=True, nf4=True),
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "and a head trained whole": {"modules_to_save": ["lm_head"]},
}
CASES = [
    pytest.param(kind, adapter, id=f"{kind}, {adapter}")
    for kind in KINDS
    for adapter in ADAPTERS
    if not (KINDS[kind].experts and adapter == "DoRA")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes the folder of a kind once, and returns it."""

    @cache
    def folder(name: str) -> Path:
        kind, place = KINDS[name], tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind.model_type](**kind.sizes))
        model.to(kind.dtype).save_pretrained(str(place), max_shard_size=kind.shard)
        AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(str(place))
        kind.then(place)
        return place

    return folder


@pytest.fixture
def llama(models: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a copy of the Llama, which a test may change."""
    return shutil.copytree(models("llama"), tmp_path / "model")


def _load(folder: Path, kind: Kind = KINDS["llama"]) -> Any:
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": kind.trust}
    options |= {"quantization_config": quantization_config("nf4", torch.float32)} if kind.nf4 else {}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    keep_weights_as_loaded(model)
    return model.eval()


def _with_adapter(base: Any, folder: Path, **options: Any) -> Any:
    """Put a PEFT adapter that has an effect on a model, save it in a folder, and return both as one."""
    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    wrapped = get_peft_model(base, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            elif "modules_to_save" in name or "magnitude" in name:
                parameter.mul_(1.1)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return wrapped


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def _names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            names |= set(opened.keys())
    return names


def _find(adapter: Path, kind: Kind = KINDS["llama"]) -> Trained:
    overrides = ["lora={}", *["model.trust_remote_code=true"] * kind.trust, *['model.quantization="nf4"'] * kind.nf4]
    return find_trained(str(adapter), overrides)


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_the_merged_model_computes_what_the_adapter_does(
    name: str, adapter: str, models: Callable[[str], Path], tmp_path: Path
):
    """The merged model computes what the adapter does, up to rounding of float32 or of bfloat16 files."""
    kind, base = KINDS[name], models(name)
    wrapped = _with_adapter(_load(base, kind), tmp_path / "adapter", **ADAPTERS[adapter])
    trained = _find(tmp_path / "adapter", kind)
    assert merge_fault(trained.config, wrapped.get_base_model()) is None
    merged = merge(trained, tmp_path / "merged", verify=False)

    model = _load(base, kind)
    on_disk = json.loads((base / "config.json").read_text()).get("quantization_config")
    model = model.dequantize(dtype=torch.float32) if on_disk else model
    before = _logits(model)
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    fuse_expert_lora(adapted)  # PEFT's own code cannot read experts in 4 bits
    expected = _logits(adapted)
    effect = (expected - before).norm()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        merged.folder, dtype=torch.float32, trust_remote_code=kind.trust, output_loading_info=True
    )
    reloaded, report = loaded
    lost = (_logits(reloaded) - expected).norm() / effect

    assert effect > 0.1 * before.norm()
    assert lost < (0.05 if kind.dtype == torch.bfloat16 else 1e-4 if kind.nf4 else 1e-5)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    prefix = "language_model." if any(name.startswith("language_model.") for name in _names(base)) else ""
    head = {f"{prefix}lm_head.weight"} if merged.untied else set()
    statistics = {n for n in _names(base) if any(s in n for s in (".absmax", ".quant_", ".nested_", "SCB", "_format"))}
    assert _names(merged.folder) == _names(base) - statistics | head
    config = json.loads((merged.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert {p.name for p in base.glob("*.py")} == {p.name for p in merged.folder.glob("*.py")}
    assert AutoTokenizer.from_pretrained(merged.folder).chat_template


@pytest.mark.parametrize(
    "name", ["mixtral", "with its own code", "in 4 bits on disk", "in 8 bits on disk", "gpt2 trained in nf4"]
)
def test_merge_compares_for_itself(name: str, models: Callable[[str], Path], tmp_path: Path):
    """The default comparison of merge works for kinds that need more than a plain load."""
    kind, base = KINDS[name], models(name)
    _with_adapter(_load(base, kind), tmp_path / "adapter")
    merged: Any = merge(_find(tmp_path / "adapter", kind), tmp_path / "merged")
    assert merged.lost < 1e-4


def test_code_of_its_own_needs_trust(models: Callable[[str], Path], tmp_path: Path):
    """Without trust, none of a model's own code runs, and nothing is written."""
    kind, base = KINDS["with its own code"], models("with its own code")
    _with_adapter(_load(base, kind), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"model\.trust_remote_code = true"):
        merge(find_trained(str(tmp_path / "adapter")), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_experts_of_a_layer_lie_in_several_files(models: Callable[[str], Path]):
    """One of the models above has a layer whose experts are in several files."""
    base = models("mixtral in shards")
    places = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file for name, file in places.items() if ".layers.0." in name and "experts" in name}
    assert len(files) > 1


RUN = """
[model]
name = "{model}"
[lora]
rank = 4
[[data]]
path = "{examples}/quickstart/train.jsonl"
rows = 8
[tokens]
max_length = 48
[train]
learning_rate = 1e-2
steps = 2
batch = 4
[output]
dir = "{folder}/run"
"""


def _run(model: Path, folder: Path) -> Path:
    """Write the config of a run, and return its path."""
    config = folder / "cfg.toml"
    config.write_text(RUN.format(model=model, examples=EXAMPLES.as_posix(), folder=folder.as_posix()))
    return config


def test_a_run_of_a_mixture_of_experts(models: Callable[[str], Path], tmp_path: Path, capsys: Any):
    """A mixture of experts can be trained and merged with a comparison, and the run does not say that it cannot."""
    fastpref.train(_run(models("qwen3_moe"), tmp_path))
    assert "merge" not in capsys.readouterr().out
    merged: Any = merge(find_trained(str(tmp_path / "run")), tmp_path / "merged")
    assert merged.lost < 1e-4


def test_a_run_says_at_its_start_what_cannot_be_merged(
    llama: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    """Before the first step, a note gives the same reason for which merge later fails."""
    monkeypatch.setattr(Checkpoint, "method", property(lambda self: "gptq"))
    monkeypatch.setattr(plan, "_lies_plain", lambda *_: False)
    monkeypatch.setattr(loop.TrainingRun, "go", lambda *_: 1 / 0)  # stops after the notes
    with pytest.raises(ZeroDivisionError):
        fastpref.train(_run(llama, tmp_path))
    reason = "its weights lie quantised by gptq"
    assert reason in " ".join(capsys.readouterr().out.split())
    _with_adapter(_load(llama), tmp_path / "adapter")
    with pytest.raises(UserError, match=reason):
        merge(find_trained(str(tmp_path / "adapter")), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_tensor_that_the_files_do_not_hold(llama: Path, tmp_path: Path):
    """Both the run and merge name a tensor that is missing in the files."""
    wrapped = _with_adapter(_load(llama), tmp_path / "adapter")
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    trained = _find(tmp_path / "adapter")
    assert f"none of its files holds {name}" in str(merge_fault(trained.config, wrapped.get_base_model()))
    with pytest.raises(UserError, match=f"none of its files holds {name}"):
        merge(trained, tmp_path / "merged", verify=False)


def test_files_with_a_wrappers_prefix(llama: Path, tmp_path: Path):
    """Files with a wrapper's prefix are merged as loading reads them, and transformers alone loads the result."""
    _with_adapter(_load(llama), tmp_path / "adapter")
    tensors = load_file(llama / "model.safetensors")
    renamed = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, llama / "model.safetensors", metadata={"format": "pt"})
    merged: Any = merge(_find(tmp_path / "adapter"), tmp_path / "merged")
    assert merged.lost < 1e-5
    assert _names(merged.folder) == set(tensors)
