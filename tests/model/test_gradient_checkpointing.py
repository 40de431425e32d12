"""Gradient checkpointing of some layers, and moving their inputs to host memory, leave every number unchanged."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastpref.data.batch import collate
from fastpref.model.gradient_checkpointing import (
    Saving,
    all_checkpointed,
    checkpoint_layers,
    decoder_layers,
    in_host_memory,
    layers_needed,
)
from fastpref.model.load import load_model
from tests.support.tiny import config_for, examples, save_model

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "gemma2", "gpt2")}


def gradients(
    folder: Path, layers: int, *overrides: str, saving: Saving | None = None, device: torch.device = CPU
) -> dict[str, torch.Tensor]:
    """Return the loss and every gradient of one micro-batch, always from the same seed."""
    torch.manual_seed(3)
    loaded = load_model(config_for(folder, "model.dtype=float32", *overrides), device)
    for name, parameter in loaded.policy.named_parameters():
        if "lora_B" in name:  # while B is zero, the gradient of A is zero too
            torch.nn.init.normal_(parameter, std=0.1)
    assert checkpoint_layers(loaded.model, layers, saving=saving) == layers
    loaded.policy.train()
    torch.manual_seed(4)
    logp = loaded.policy(collate(examples(3), loaded.layout).to(device)).logp
    loss = logp.square().mean()
    loss.backward()
    grads = {name: p.grad for name, p in loaded.policy.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(expected) > 8
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("overrides", [[], ["lora={rank=2}"], ["lora={rank=2, dropout=0.4}"]], ids=str)
def test_some_layers_are_as_none(folders: dict[str, Path], kind: str, overrides: list[str]):
    """The loss and gradients are bit-identical for any number of checkpointed layers, also with dropout."""
    expected = gradients(folders[kind], 0, *overrides)
    for layers in (1, 2):
        assert_same(gradients(folders[kind], layers, *overrides), expected)


def test_dropout_is_drawn(folders: dict[str, Path]):
    """Dropout changes the loss, so that the test above compares random numbers too."""
    plain = gradients(folders["llama"], 1, "lora={rank=2}")
    dropped = gradients(folders["llama"], 1, "lora={rank=2, dropout=0.4}")
    assert plain["loss"] != dropped["loss"]


@pytest.mark.parametrize("overrides", [[], ["lora={rank=2, dropout=0.4}"]], ids=str)
def test_only_the_inputs_of_layers_are_moved(folders: dict[str, Path], overrides: list[str]):
    """Only one tensor per layer, its input [B, T, H], is moved, and the gradients stay bit-identical."""
    moved: list[torch.Tensor] = []

    @contextmanager
    def moving():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: moved.append(t) or t.clone(), lambda t: t):
            yield

    found = gradients(folders["llama"], 2, *overrides, saving=moving)
    assert_same(found, gradients(folders["llama"], 0, *overrides))
    tokens = collate(examples(3), "tree").tokens
    assert [t.shape for t in moved if t.numel()] == [(1, tokens, 32)] * 2


@pytest.mark.gpu
def test_a_gpu_holds_less_with_inputs_in_host_memory(folders: dict[str, Path]):
    """With layer inputs in host memory, a GPU needs less memory and gives the same bits."""

    def peak(saving: Saving | None) -> tuple[int, dict[str, torch.Tensor]]:
        torch.cuda.reset_peak_memory_stats()
        found = gradients(folders["llama"], 2, "lora={rank=2}", saving=saving, device=DEVICE)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), found

    (here, expected), (there, found) = peak(None), peak(in_host_memory(DEVICE))
    assert_same(found, expected)
    assert there < here


def test_the_first_layers_are_checkpointed(folders: dict[str, Path]):
    """The first layers are checkpointed, because their recomputation runs when later activations have been freed."""
    loaded = load_model(config_for(folders["llama"]), CPU)
    assert not all_checkpointed(loaded.model)
    checkpoint_layers(loaded.model, 1)
    assert [layer.gradient_checkpointing for layer in decoder_layers(loaded.model)] == [True, False]
    assert not all_checkpointed(loaded.model)
    assert checkpoint_layers(loaded.model) == 2
    assert all_checkpointed(loaded.model)


@pytest.mark.parametrize(
    ("without", "but_one", "available", "count"),
    [
        (100, 30, 100, 0),
        (100, 30, 99, 1),
        (100, 30, 90, 1),
        (100, 30, 89, 2),
        (100, 30, 31, 7),
        (100, 30, 30, 7),
        (100, 30, 29, 8),
        (100, 100, 50, 8),  # checkpointing saves nothing, so no number of layers is known to suffice
    ],
)
def test_as_few_layers_as_fit(without: int, but_one: int, available: int, count: int):
    """Of eight layers, the fewest are checkpointed that make the step fit; all of them if no number suffices."""
    assert layers_needed(8, without, but_one, available) == count
