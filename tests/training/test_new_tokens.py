"""Runs with new tokens: what they train, and what PEFT, transformers and the commands make of the result."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref.run.trained import find_trained, load_trained, trained_tokenizer
from tests.support.command_line import run_command, succeed
from tests.support.paths import QUICKSTART_MODEL
from tests.support.runs import last_evaluation, train_in

CPU = torch.device("cpu")
ADD = "tokens.add=['nine plus', '<think>']"
SHORT = ("train.steps=3", "eval.samples=0")
FIRST = 949  # the id of the first new token
TEXT = "What is nine plus one?<think> It is ten."


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("adapter"), ["lora={rank=4}", ADD, *SHORT])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("whole"), [ADD, *SHORT])


def ids_of(tokenizer: Any) -> Tensor:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert {FIRST, FIRST + 1} <= {*ids}
    return torch.tensor([ids])


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.float()


def own_logits(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the tokens of TEXT, and their logits by the model that `fastpref eval` and `chat` load."""
    trained = find_trained(str(folder / "out"))
    ids = ids_of(trained_tokenizer(trained))
    return ids, logits(load_trained(trained, CPU).wrapped, ids)


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL, dtype=torch.float32)


def test_peft_loads_the_adapter_on_the_grown_base(adapter: Path):
    """With the saved tokenizer's size; the first values of its new rows do not matter."""
    ids, own = own_logits(adapter)
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter / "out/final")
    model = base()
    model.resize_token_embeddings(len(tokenizer))
    loaded = peft.PeftModel.from_pretrained(model, str(adapter / "out/final"))
    torch.testing.assert_close(logits(loaded, ids_of(tokenizer)), own, atol=1e-5, rtol=1e-5)
    merged: Any = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), own, atol=1e-4, rtol=1e-4)


def test_only_the_new_rows_are_trained_and_saved(adapter: Path):
    saved = load_file(adapter / "out/final/adapter_model.safetensors")
    (rows,) = [tensor for name, tensor in saved.items() if "lora" not in name]
    assert rows.shape == (2, 128)
    before = base().get_input_embeddings().weight.mean(0)
    assert ((rows - before).abs().sum(1) > 1e-4).all()
    assert not torch.equal(rows[0], rows[1])


def test_merged_model(adapter: Path, tmp_path: Path):
    """transformers loads it as it is, with the same logits; its head is tied as before."""
    merged = tmp_path / "merged"
    succeed("merge", adapter / "out", "--output", merged, "--dtype", "float32")
    ids, own = own_logits(adapter)
    model: Any = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(model, ids), own, atol=1e-4, rtol=1e-4)
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == FIRST + 2
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(ids_of(AutoTokenizer.from_pretrained(merged)), ids)
    succeed("export", merged, "--gguf", "--output", tmp_path / "merged.gguf")


def test_the_whole_model_is_saved_with_the_rows(whole: Path):
    ids, own = own_logits(whole)
    model: Any = AutoModelForCausalLM.from_pretrained(whole / "out/final", dtype=torch.float32)
    assert len(model.get_input_embeddings().weight) == FIRST + 2
    torch.testing.assert_close(logits(model, ids), own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_eval_has_the_numbers_of_the_run(kind: str, request: pytest.FixtureRequest):
    """The reference of `fastpref eval` is loaded and grown again, and is the one of the run."""
    folder: Path = request.getfixturevalue(kind)
    printed = succeed("eval", folder / "out")
    expected = last_evaluation(folder / "out")["rewards/margins"]
    assert f"{expected:+.3f}" in printed.out


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "export --adapter": (("export", "{run}", "--gguf", "--adapter"), "Merge it with fastpref merge"),
    "lora.from": (
        ("train", "{config}", "lora={from='{run}'}", "output.dir=other"),
        "it has trained rows of new tokens",
    ),
    "stacked": (("train", "{config}", "lora={from='{run}', stack=true}", "output.dir=other"), "it has trained rows"),
    "reference.name": (
        ("train", "{config}", "lora={}", "reference.name={run}", "output.dir=other"),
        "has trained rows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_take_such_an_adapter(adapter: Path, case: str):
    words, message = REFUSED[case]
    places = {"{run}": str(adapter / "out"), "{config}": str(adapter / "cfg.toml")}
    result = run_command(*(re.sub(r"\{(run|config)\}", lambda mark: places[mark[0]], word) for word in words))
    assert (result.status, message in " ".join(result.err.split())) == (2, True), result.err
