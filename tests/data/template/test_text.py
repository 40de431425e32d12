"""The end tokens of a model's answers: its own, and those of the trained completions."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from fastpref.data.template.text import TextRecord, add_text, read_text, save_generation_config, stop_at
from tests.support.tiny import model_config, save_model

# The model's own ends, the trained ends, and all of them: trained ends come first, unless the model has them already.
ENDS: dict[str, tuple[Any, list[int], Any]] = {
    "another": (2, [7], [7, 2]),
    "its own": (2, [2], 2),
    "one of its own": ([2, 7], [7], [2, 7]),
    "some": ([2, 7], [7, 9], [7, 9, 2]),
    "it has none": (None, [7], 7),
    "none was trained": (2, [], 2),
    "neither": (None, [], None),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_model_ends_at_all_ends(case: str, tmp_path: Path):
    """A model has all ends in memory, in the file saved with an adapter, and after merging."""
    own, trained, wanted = ENDS[case]
    model: Any = AutoModelForCausalLM.from_config(model_config("llama"))
    model.generation_config.eos_token_id = own
    known = own if isinstance(own, list) else [own]
    text = TextRecord(None, {}, date(2026, 11, 26), {f"t{token}": token for token in trained})
    (tmp_path / "base").mkdir()
    save_generation_config(tmp_path / "base", model.generation_config)

    assert stop_at(model, trained) == [token for token in trained if token not in known]
    assert model.generation_config.eos_token_id == wanted
    save_generation_config(tmp_path, model.generation_config)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == wanted

    add_text(tmp_path / "base", text, model.config)
    assert GenerationConfig.from_pretrained(tmp_path / "base").eos_token_id == wanted
    assert read_text(tmp_path / "base") == text
    (tmp_path / "bare").mkdir()
    model.config.eos_token_id = own
    add_text(tmp_path / "bare", text, model.config)
    assert GenerationConfig.from_pretrained(tmp_path / "bare").eos_token_id == wanted


def test_other_settings_stay(tmp_path: Path):
    """All other generation settings are kept, also those that transformers refuses to save or does not know."""
    save_model("llama", tmp_path)
    odd = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "mine": 3, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(odd))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    stop_at(model, [7])
    (tmp_path / "adapter").mkdir()
    save_generation_config(tmp_path / "adapter", model.generation_config)
    add_text(tmp_path, TextRecord(None, {}, date(2026, 1, 1), {"t": 7}), model.config)
    for folder in (tmp_path, tmp_path / "adapter"):
        content = json.loads((folder / "generation_config.json").read_text())
        assert content | odd | {"eos_token_id": [7, 2]} == content
    assert add_text(tmp_path / "nowhere", None, model.config) is None


def test_a_record_is_read_as_it_was_written(tmp_path: Path):
    """A record is read unchanged from the first folder that has one, with several templates and any characters."""
    several = {"default": "{{ 'é🎉' }}", "tool_use": "{{ tools }}"}
    text = TextRecord(
        several, {"effort": "low", "list": [1, {"a": None}]}, date(2026, 11, 26), {"<｜end｜>": 7, "</s>": 2}
    )
    (tmp_path / "run").mkdir()
    text.save(tmp_path / "run")
    assert read_text(tmp_path, tmp_path / "run") == text
    assert read_text(tmp_path) is None
