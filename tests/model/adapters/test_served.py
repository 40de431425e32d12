"""vLLM's rules for adapters, by its own source, and what a run says of them."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open

from fastpref.model.adapters.served import RANKS, serving_note, vllm_obstacles, vllm_rank
from fastpref.model.load import load_model
from fastpref.run.weights import save_weights, serving
from tests.support.tiny import config_for, save_model

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})


@pytest.mark.parametrize(("settings", "obstacle"), [
    ({}, None),
    ({"use_rslora": True, "r": 64}, None),
    ({"use_dora": True}, "DoRA"),
    ({"modules_to_save": ["lm_head"]}, r"trained in full \(lm_head\)"),
    ({"bias": "all"}, "biases"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ({"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"q_proj": 16}}, None),
    ({"r": 600}, "rank 600 is above 512"),
    ({"use_rslora": True, "target_parameters": ["experts.down_proj"]}, "rsLoRA"),
], ids=str)  # fmt: skip
def test_settings(settings: dict[str, Any], obstacle: str | None):
    """Each setting that vLLM refuses, or reads otherwise than PEFT, is an obstacle, and no other."""
    found = vllm_obstacles(lora(**settings), [NAME])
    assert (found == []) if obstacle is None else (len(found) == 1 and re.search(obstacle, found[0]))


@pytest.mark.parametrize(("name", "known"), [
    (NAME, True),
    (NAME.replace("lora_A", "lora_B"), True),
    ("base_model.model.lm_head.lora_A.weight", True),
    ("base_model.model.model.embed_tokens.lora_embedding_A", True),
    ("base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight", True),
    (NAME.replace("lora_A.weight", "lora_A.default.weight"), False),
    ("base_model.model.model.layers.0.mlp.gate.weight", False),
    ("q_proj.lora_A.weight", False),
])  # fmt: skip
def test_names(name: str, known: bool):
    assert (vllm_obstacles(lora(), [name]) == []) == known


@pytest.mark.parametrize(("rank", "wanted"), [(1, 1), (2, 8), (16, 16), (17, 32), (300, 320), (512, 512)])
def test_the_rank_that_vllm_is_started_with(rank: int, wanted: int):
    assert vllm_rank(lora(r=rank)) == wanted
    assert wanted in RANKS
    note = serving_note(lora(r=rank), [NAME])
    assert (note is None) if wanted <= 16 else f"--max-lora-rank {wanted}" in str(note)


@pytest.mark.parametrize(("kind", "overrides", "note"), [
    ("llama", ["lora={rank=2}"], None),
    ("llama", ['lora={rank=2, target=["q_proj", "lm_head"]}'], None),
    ("mixtral", ["lora={rank=2}"], None),
    ("mixtral", ["lora={rank=12}"], "--max-lora-rank 32"),
    ("llama", ["lora={rank=2, dora=true}"], "DoRA"),
    ("llama", ['lora={rank=2, modules_to_save=["lm_head"]}'], "lm_head"),
], ids=str)  # fmt: skip
def test_what_is_saved(tmp_path: Path, kind: str, overrides: list[str], note: str | None):
    """A run's adapter needs no renaming; its adapter_config.json names the base model and its dtype."""
    base = save_model(kind, tmp_path / "base")
    save_weights(tmp_path / "final", load_model(config_for(base, *overrides), torch.device("cpu")), None)
    said = serving(tmp_path / "final")
    assert (said is None) if note is None else note in str(said)
    settings: Any = peft.PeftConfig.from_pretrained(str(tmp_path / "final"))
    assert (settings.base_model_name_or_path, settings.revision) == (str(base), None)
    assert settings.auto_mapping["dtype"] == "float32"
    assert (settings.inference_mode, settings.task_type) == (True, "CAUSAL_LM")
    with safe_open(tmp_path / "final" / "adapter_model.safetensors", "pt") as file:
        assert all(name.startswith("base_model.model.") for name in file.keys())  # noqa: SIM118
