"""Weights that full fine-tuning leaves as they are."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastpref
from fastpref.errors import UserError
from fastpref.model.load import load_model
from tests.support.paths import QUICKSTART_MODEL
from tests.support.tiny import config_for, save_model

CPU = torch.device("cpu")
ENTRIES: dict[str, tuple[str, set[str]]] = {  # an entry, and what is trained besides; `*` for all of a module
    "a module": ("embed_tokens", {"model.layers.", "model.norm", "lm_head"}),
    "a layer": ("layers.0", {"model.embed_tokens", "model.layers.1", "model.norm", "lm_head"}),
    "a parameter": ("norm.weight", {"model.embed_tokens", "model.layers.", "lm_head"}),
    "a pattern": (
        r"model\.layers\.\d+\.self_attn",
        {"model.embed_tokens", "mlp", "layernorm", "model.norm", "lm_head"},
    ),
    "several": ('["layers", "embed_tokens"]', {"model.norm", "lm_head"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "llama-tied")}


def freezing(entry: str) -> str:
    entries = entry if entry.startswith("[") else f"['{entry}']"
    return f"train.freeze={entries}"


@pytest.mark.parametrize("case", ENTRIES)
def test_what_an_entry_freezes(folders: dict[str, Path], case: str):
    entry, trained = ENTRIES[case]
    loaded = load_model(config_for(folders["llama"], freezing(entry)), CPU)
    names = {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert names
    assert all(any(part in name for part in trained) for name in names), names
    assert all(any(part in name for name in names) for part in trained)
    assert any(note.startswith("train.freeze: ") and "parameters are frozen" in note for note in loaded.notes)


def test_a_tied_weight_has_two_names(folders: dict[str, Path]):
    """Either name freezes it, and the note says that the other is frozen too."""
    for name, other in (("embed_tokens", "lm_head"), ("lm_head", "embed_tokens")):
        loaded = load_model(config_for(folders["llama-tied"], freezing(name)), CPU)
        assert not loaded.model.get_input_embeddings().weight.requires_grad
        assert any(f"so are {'model.' if 'embed' in other else ''}{other}.weight" in note for note in loaded.notes)


FAULTS: dict[str, tuple[str, str]] = {
    "unknown": ("embed_token", r"train\.freeze: .*'embed_token' \(did you mean 'embed_tokens'\?\)"),
    "an unknown pattern": (r".*\.attn", r"train\.freeze: this llama model has no layer .*attn'; a pattern is matched"),
    "without weights": ("act_fn", r"train\.freeze: act_fn names .*act_fn, which has no weights"),
    "twice": ('["layers", "q_proj"]', r"train\.freeze: q_proj changes nothing"),
    "everything": ('["model", "lm_head"]', r"train\.freeze: nothing is left to train"),
    "no regular expression": ("(a", r"train\.freeze: '\(a' is not a regular expression"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_entries_that_are_refused(folders: dict[str, Path], fault: str):
    entry, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        load_model(config_for(folders["llama"], freezing(entry)), CPU)


def test_adapters_freeze_everything_else(folders: dict[str, Path]):
    with pytest.raises(
        UserError, match=r"train\.freeze: with a \[lora\] table all weights but the adapters are frozen"
    ):
        config_for(folders["llama"], "lora={}", freezing("layers.0"))


def test_frozen_weights_keep_their_bits(config: Path):
    """Weight decay does not reach them either; all others change."""
    settings = ["train.steps=2", "train.weight_decay=0.1", "eval.data=[]", "eval={}", "output.save_every=9"]
    fastpref.train(config, [*settings, freezing('["embed_tokens", "layers.0"]')])
    before: dict[str, Any] = load_file(QUICKSTART_MODEL / "model.safetensors")
    for name, tensor in load_file("out/final/model.safetensors").items():
        frozen = "embed_tokens" in name or "layers.0." in name
        assert torch.equal(tensor, before[name].float()) == frozen, name


def test_rows_of_new_tokens_are_not_frozen(tmp_path: Path):
    """tokens.add trains rows of the embeddings and the head, which freezing these would silently keep as they began."""
    settings = ["tokens.add=['<think>']", "train.freeze=['embed_tokens']"]
    with pytest.raises(UserError, match=r"train\.freeze: it names embeddings or head, whose rows tokens\.add"):
        load_model(config_for(Path(shutil.copytree(QUICKSTART_MODEL, tmp_path / "model")), *settings), CPU)
