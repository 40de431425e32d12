"""Any error in a model's code becomes one message that says what failed and where; our own errors stay as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from fastpref.errors import UserError
from fastpref.model.failure import in_others_code, told_of_model
from fastpref.model.load import load_model
from tests.support.tiny import config_for, save_model

ERRORS = [ValueError("no"), TypeError("no"), AttributeError("no"), IndexError("no"), KeyError("no"), RuntimeError("no")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_a_model_raises_while_it_is_loaded_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    """An error of any type in the forward pass, which loading tries, becomes one message."""

    def forward(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(UserError, match=r"model\.name = '.*': .*no"):
        load_model(config_for(save_model("llama", tmp_path)), torch.device("cpu"))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("out of memory"), UserError("said")])
def test_what_is_said_better_elsewhere_passes(tmp_path: Path, error: Exception):
    @told_of_model("fails")
    def load(_: Any) -> None:
        raise error

    with pytest.raises(type(error)):
        load(config_for(save_model("llama", tmp_path)))


def test_whose_code_it_was():
    """The message names the innermost code that is neither torch's nor Python's own; our own code gives no message."""
    model: Any = LlamaForCausalLM.__new__(LlamaForCausalLM)
    torch.nn.Module.__init__(model)
    with pytest.raises(AttributeError) as theirs:
        LlamaForCausalLM.forward(model, input_ids=torch.zeros(1, 1, dtype=torch.int64))  # pyright: ignore[reportArgumentType]
    message = in_others_code(theirs.value)
    assert message is not None
    assert "has no attribute 'model'" in message or "AttributeError" in message
    with pytest.raises(AttributeError) as inside:
        load_model(None, torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    assert in_others_code(inside.value) is None
