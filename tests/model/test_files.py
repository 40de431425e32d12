"""If a model cannot be loaded, the message names the file at fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fastpref.config import ModelConfig
from fastpref.errors import UserError
from fastpref.model.files import model_config
from fastpref.model.load import pretrained
from fastpref.model.tokenizer import load_tokenizer
from tests.support.paths import QUICKSTART_MODEL as QUICKSTART

SHARD, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(QUICKSTART).save_pretrained(folder, max_shard_size="600KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QUICKSTART / name, folder)
    return folder


def load(name: str) -> None:
    load_tokenizer(ModelConfig(name=name))
    pretrained(ModelConfig(name=name), model_config(ModelConfig(name=name)), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SHARD, INDEX])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_the_file_at_fault_is_named(sharded: Path, tmp_path: Path, name: str, how: str):
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    load(str(folder))
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if how == "missing":
        path.unlink()
    named = "model.safetensors" if (name, how) == (INDEX, "missing") else name
    with pytest.raises(UserError, match=f"{named}.*{how}" if named == name else named):
        load(str(folder))


def test_a_model_that_is_not_in_the_cache_offline(monkeypatch: pytest.MonkeyPatch):
    """Offline, the hub is not asked, and the first missing file is named."""
    with pytest.raises(UserError, match=r"tokenizer\.json is not in the cache \(.*\), and the hub is not asked"):
        load("someone/no-such-model")
    with pytest.raises(UserError, match=r"config\.json is not in the cache"):
        model_config(ModelConfig(name="someone/no-such-model"))


def write(folder: Path, **files: str) -> None:
    """Write files under their keyword names, in which `__` stands for a dot."""
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def an_adapter(folder: Path) -> None:
    """Save an adapter of the quickstart's model."""
    settings = peft.LoraConfig(r=3, target_modules=["q_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(QUICKSTART), settings).save_pretrained(str(folder))


def a_run(folder: Path) -> None:
    (folder / "final").mkdir()
    an_adapter(folder / "final")
    write(folder, config__toml="")


def without_weights(folder: Path) -> None:
    shutil.copy(QUICKSTART / "config.json", folder)


def a_shard(folder: Path) -> None:
    shutil.copy(QUICKSTART / "model.safetensors", folder / "model-00001-of-2.safetensors")


def files(**contents: str) -> Callable[[Path], None]:
    return lambda folder: write(folder, **contents)


def of_kind(kind: str) -> Callable[[Path], None]:
    return lambda folder: CONFIG_MAPPING[kind]().save_pretrained(folder)


NO_MODELS: dict[str, tuple[list[Callable[[Path], None]], tuple[str, ...]]] = {
    "adapter": ([an_adapter], ("an adapter (LORA, rank 3) of ", "quickstart", "fastpref merge ", "--output ")),
    "adapter and config.json": ([an_adapter, without_weights], ("an adapter (LORA", "fastpref merge ")),
    "adapter and model": (
        [an_adapter, without_weights, files(model__safetensors="")], ("beside a model", "move adapter_config.json")),
    "run": ([a_run], ("the folder of a run, whose result is an adapter", "fastpref merge ")),
    "diffusion": ([files(model_index__json="{}")], ("a diffusion pipeline",)),
    "sentence-transformers": ([files(modules__json="[]")], ("sentence-transformers", "embeddings")),
    "GGUF": ([files(model__Q4_K_M__gguf="")], ("GGUF (llama.cpp) files (model.Q4_K_M.gguf)",)),
    "GGUF and config.json": ([without_weights, files(model__gguf="")], ("GGUF (llama.cpp) files",)),
    "pickles": ([without_weights, files(pytorch_model__bin="")], ("pickled (pytorch_model.bin)", "save_pretrained")),
    "no weights": ([without_weights], ("model.safetensors is missing", "no weights")),
    "a shard without its index": (
        [without_weights, a_shard], ("model.safetensors is missing", "model-00001-of-2.safetensors")),
    "a maker's own format": ([files(params__json="{}", consolidated__00__pth="")], ("its maker's own format",)),
    "no model type": ([files(config__json="{}")], ("no model_type",)),
    "nothing": ([], ("config.json is missing",)),
    "vision-language, Mistral 3": ([of_kind("mistral3")], ("mistral3 is a vision-language model", "not trained here")),
    "vision-language, Qwen2.5-VL": ([of_kind("qwen2_5_vl")], ("qwen2_5_vl is a vision-language model",)),
    "encoder": ([of_kind("bert")], ("bert is an encoder",)),
    "encoder without a causal class": ([of_kind("modernbert")], ("modernbert is an encoder",)),
    "encoder-decoder": ([of_kind("t5")], ("t5 is an encoder-decoder",)),
    "speech": ([of_kind("wav2vec2")], ("wav2vec2 is a speech model",)),
    "image": ([of_kind("vit")], ("vit is an image model",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_is_no_causal_model_is_told(tmp_path: Path, kind: str):
    """One short message says what a folder holds instead of a causal model, and what to do."""
    parts, said = NO_MODELS[kind]
    for make in parts:
        make(tmp_path)
    options = ModelConfig(name=str(tmp_path))
    with pytest.raises(UserError) as error:
        pretrained(options, model_config(options), torch.float32, torch.device("cpu"))
    message = str(error.value)
    assert message.startswith(f"model.name = {str(tmp_path)!r}: ")
    for words in said:
        assert words in message, message
    assert len(message) < 900


def test_decoders_of_encoder_families_are_causal(tmp_path: Path):
    config: Any = CONFIG_MAPPING["bert"]()
    config.is_decoder = True
    config.save_pretrained(tmp_path)
    assert model_config(ModelConfig(name=str(tmp_path))).model_type == "bert"


def test_code_of_its_own_is_asked_for(tmp_path: Path):
    """A model whose own code names a causal class is not refused for its model type."""
    of_kind("mistral3")(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling_my.MyForCausalLM"}}
    path.write_text(json.dumps(content))
    assert model_config(ModelConfig(name=str(tmp_path))).model_type == "mistral3"
