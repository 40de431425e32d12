"""RoPE whose frequencies depend on the length of a call: a run uses one set, whatever its micro-batches."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastpref.data.batch import Layout, collate
from fastpref.model.load import load_model
from fastpref.step.reference import make_reference
from tests.support.tiny import config_for, examples, save_model

CPU = torch.device("cpu")
KINDS = ("llama-dynamic", "phi3-longrope")  # both with an original length of 30 tokens


@pytest.mark.parametrize("length", [24, 48])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_numbers_in_any_company(kind: str, length: int, tmp_path: Path):
    """A row's log-probabilities depend neither on the other rows of its micro-batch nor on the layout."""
    loaded = load_model(config_for(save_model(kind, tmp_path), f"tokens.max_length={length}"), CPU)
    assert loaded.layout == "tree"
    rows = [e for e in examples(30) if len(e.prompt) + max(map(len, e.completions)) <= length][:8]
    rows.sort(key=lambda e: len(e.prompt))
    with torch.no_grad():
        alone = [loaded.policy(collate([row], "padded")).logp for row in rows]
        layouts: tuple[Layout, ...] = ("tree", "packed", "padded")
        for layout in layouts:
            batch = collate(rows, layout)
            logp = loaded.policy(batch).logp
            for e, truth in enumerate(alone):
                parts = torch.cat([logp[batch.segments == k * len(rows) + e] for k in range(2)])
                torch.testing.assert_close(parts, truth, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_short_limits_keep_the_models_own_frequencies(kind: str, tmp_path: Path):
    """If no row may exceed the original length, the results are those of plain transformers, without a note."""
    loaded = load_model(config_for(save_model(kind, tmp_path), "tokens.max_length=30"), CPU)
    assert not any("RoPE" in note for note in loaded.notes)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_longer_limits_take_the_frequencies_of_max_length(kind: str, tmp_path: Path):
    """Above the original length, frequencies are those of transformers for max_length tokens, and a note says so."""
    loaded = load_model(config_for(save_model(kind, tmp_path), "tokens.max_length=60"), CPU)
    assert any("RoPE" in note and "max_length = 60" in note for note in loaded.notes)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = (torch.arange(60) % 90 + 3)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("override", ["reference.mode=copy", 'reference={mode="copy", dtype="bfloat16"}'])
def test_a_copy_has_the_same_frequencies(override: str, tmp_path: Path):
    config = config_for(save_model("phi3-longrope", tmp_path), "tokens.max_length=60", override)
    loaded = load_model(config, CPU)
    reference, _ = make_reference(config, loaded)
    batch = collate(examples(3), "tree")
    with torch.no_grad():
        margin = 0.3 if "bfloat16" in override else 1e-5
        torch.testing.assert_close(reference(batch), loaded.policy(batch).logp, rtol=0, atol=margin)
