"""Whatever is trained is float32, and trains in a model of half precision as it would in one of float32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.data.batch import collate
from fastpref.errors import UserError
from fastpref.memory.step import count_step
from fastpref.model.limits import foresee
from fastpref.model.load import Loaded, load_model
from fastpref.step.optimizer import make_optimizer
from tests.support.tiny import config_for, examples, save_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = ["bfloat16", "float16"]
TRAINED = {  # what is trained → the overrides
    "adapters": ["lora={rank=2}"],
    "DoRA": ["lora={rank=2, dora=true}"],
    "head": ['lora={rank=2, modules_to_save=["lm_head"]}'],
    "adapted and trained head": ['lora={rank=2, target=["q_proj", "lm_head"], modules_to_save=["embed_tokens"]}'],
    "embeddings": ['lora={rank=2, modules_to_save=["embed_tokens"]}'],
    "norms": ['lora={rank=2, modules_to_save=["norm", "input_layernorm"]}'],
    "a block": ['lora={rank=2, target=["q_proj"], modules_to_save=["mlp"]}'],
    "everything of these": ['lora={rank=2, modules_to_save=["embed_tokens", "lm_head", "norm", "down_proj"]}'],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "llama-tied", "gemma2", "gpt2")}


def dtypes(loaded: Loaded, *, trained: bool) -> set[torch.dtype]:
    return {p.dtype for p in loaded.policy.parameters() if p.requires_grad == trained}


def step(loaded: Loaded, autocast: torch.dtype | None) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the log-probabilities and the gradients of a batch."""
    batch = collate(examples(4), loaded.layout)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False):
        logp = loaded.policy.train()(batch).logp
    (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
    return logp.detach(), {name: p.grad for name, p in loaded.policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("what", TRAINED)
def test_all_that_is_trained_is_float32(folders: dict[str, Path], what: str, dtype: str):
    """Trained parameters and their gradients are float32, and the others have the dtype of the config, with which the
    step agrees with that of a float32 model, with and without autocast."""
    wanted = getattr(torch, dtype)
    loaded = load_model(config_for(folders["llama"], f"model.dtype={dtype}", *TRAINED[what]), CPU)
    assert dtypes(loaded, trained=True) == {torch.float32}
    assert dtypes(loaded, trained=False) == {wanted}
    whole = load_model(config_for(folders["llama"], *TRAINED[what]), CPU)
    with torch.no_grad():
        for parameter, other in zip(loaded.policy.parameters(), whole.policy.parameters(), strict=True):
            other.copy_(parameter)
    truth, wanted_grads = step(whole, None)
    for autocast in (None, wanted):
        loaded.policy.zero_grad()
        logp, grads = step(loaded, autocast)
        assert (logp - truth).norm() <= 0.05 * truth.norm()
        for name, grad in grads.items():
            assert grad.dtype == torch.float32, name
            expected = wanted_grads[name]
            assert (grad - expected).norm() <= 0.1 * expected.norm() + 1e-3, name


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma2", "gpt2"])
def test_full_fine_tuning_is_in_float32(folders: dict[str, Path], kind: str):
    """Without a [lora] table every weight is float32, whatever model.dtype; check and the run say so."""
    config = config_for(folders[kind], "model.dtype=bfloat16")
    loaded = load_model(config, CPU)
    assert dtypes(loaded, trained=True) == {torch.float32}
    (note,) = (note for note in loaded.notes if "model.dtype" in note)
    assert note in foresee(config)
    assert "all weights are trained, so they are float32" in note


def test_a_model_that_is_not_trained_keeps_its_dtype(folders: dict[str, Path]):
    """For evaluation, weights have the dtype of the config."""
    for dtype in HALF:
        config = config_for(folders["llama"]).but({"model.dtype": dtype})
        loaded = load_model(config, CPU, trained=True)
        assert {p.dtype for p in loaded.policy.parameters()} == {getattr(torch, dtype)}
        assert not [note for note in loaded.notes if "model.dtype" in note]


def test_float16_weights_are_not_trained(folders: dict[str, Path]):
    """Full fine-tuning in float16 is refused by name, before anything is loaded; with adapters it is not."""
    with pytest.raises(UserError, match=r'model\.dtype: "float16" weights cannot be trained.*add a \[lora\] table'):
        config_for(folders["llama"], "model.dtype=float16")
    config_for(folders["llama"], "model.dtype=float16", "lora={}")


def test_small_steps_are_not_lost(folders: dict[str, Path]):
    """A hundred steps of a size below half of bfloat16's spacing move a trained head as far as in float32."""
    moved = {}
    for dtype in ("bfloat16", "float32"):
        overrides = [f"model.dtype={dtype}", *TRAINED["head"], "train.learning_rate=1e-5", "train.weight_decay=0.0"]
        config = config_for(folders["llama"], *overrides)
        loaded = load_model(config, CPU)
        weight = next(p for name, p in loaded.policy.named_parameters() if "modules_to_save" in name)
        before, optimizer = weight.detach().clone(), make_optimizer(loaded.policy, config)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[dtype] = before.double() - weight.detach().double()
    torch.testing.assert_close(moved["bfloat16"], torch.full_like(moved["bfloat16"], 1e-3), rtol=1e-2, atol=0)
    torch.testing.assert_close(moved["bfloat16"], moved["float32"], rtol=1e-2, atol=0)


def test_the_estimate_counts_them_in_float32(folders: dict[str, Path]):
    """A trained copy counts four bytes a number as a weight, a gradient and each of two moments."""
    plain, with_head = (
        count_step(config_for(folders["llama"], "model.dtype=bfloat16", *TRAINED[what]), CUDA)
        for what in ("adapters", "head")
    )
    head = 97 * 32 * 4
    assert with_head.adapters - plain.adapters == head
    assert with_head.gradients - plain.gradients == head
    assert with_head.optimizer - plain.optimizer == pytest.approx(2 * head, abs=64)
    half, auto = (count_step(config_for(folders["llama"], f"model.dtype={d}"), CUDA) for d in ("bfloat16", "auto"))
    assert half == auto
