"""A model that cannot be loaded: the message names the file."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastpref.config import ModelConfig
from fastpref.errors import UserError
from fastpref.model.load import load_tokenizer, model_config, pretrained

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
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
    """Nothing is asked of the hub (the tests are offline), and the first file that is missing is named."""
    with pytest.raises(UserError, match=r"tokenizer\.json is not in the cache \(.*\), and the hub is not asked"):
        load("someone/no-such-model")
    with pytest.raises(UserError, match=r"config\.json is not in the cache"):
        model_config(ModelConfig(name="someone/no-such-model"))
