"""Which models take trees, and how the others are handled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastpref.data.batch import collate
from fastpref.errors import UserError
from fastpref.model.head import Head, LogitSettings, check_logits
from fastpref.model.load import load_model
from tests.support.tiny import config_for, examples, save_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["llama-tied", "cohere", "gpt-oss", "gpt2"])
def test_models_on_the_attention_interface_take_trees(tmp_path: Path, kind: str):
    """Every layer gets the layout, sinks and logit scales: trees give what the model's padded forward pass gives."""
    loaded = load_model(config_for(save_model(kind, tmp_path)), CPU)
    assert (loaded.layout, loaded.why_padded) == ("tree", None)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    rows = examples(4)
    padded, tree = collate(rows, "padded"), collate(rows, "tree")
    with torch.no_grad():
        logits = plain(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits
        expected = logits.log_softmax(-1).flatten(0, 1)[padded.predictors].gather(1, padded.targets[:, None])[:, 0]
        found = loaded.policy(tree).logp
    for sequence in range(8):
        torch.testing.assert_close(
            found[tree.segments == sequence], expected[padded.segments == sequence], rtol=1e-4, atol=1e-4
        )


def test_other_models_fall_back_to_padded_and_say_why(tmp_path: Path):
    """A state-space model is trained on padded rows, with the reason unless that layout was set in the config."""
    folder = save_model("mamba", tmp_path)
    for overrides in ([], ["train.layout=tree"]):
        loaded = load_model(config_for(folder, *overrides), CPU)
        assert loaded.layout == "padded"
        assert "mamba" in str(loaded.why_padded)
    assert load_model(config_for(folder, "train.layout=padded"), CPU).why_padded is None


def test_generation_uses_the_models_own_masks(tmp_path: Path):
    """Greedy generation with a cache gives the tokens of eager attention, with softcap and window."""
    loaded = load_model(config_for(save_model("gemma2", tmp_path)), CPU)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.tensor([[5, 9, 3, 44, 21, 60, 13, 8, 30]])
    told: Any = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "use_cache": True}
    models: list[Any] = [loaded.model, plain]
    ours, theirs = (model.generate(ids, **told) for model in models)
    assert torch.equal(ours, theirs)


def test_unknown_changes_to_the_logits_are_refused(tmp_path: Path):
    """A head whose settings do not give the model's own logits is refused before training."""
    model = AutoModelForCausalLM.from_pretrained(save_model("cohere", tmp_path))
    head = Head(model)
    check_logits(model, model.model, head)
    head.settings = LogitSettings(scale=1.0)
    with pytest.raises(UserError, match="cohere"):
        check_logits(model, model.model, head)
