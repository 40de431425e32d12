"""The keys `train.checkpointing` and `train.offload_activations`, from the config to the layers of the model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OpenAIGPTConfig

import fastpref
from fastpref.errors import UserError
from fastpref.memory import activations
from fastpref.memory.step import count_step
from fastpref.model.gradient_checkpointing import decoder_layers
from fastpref.model.load import load_model
from tests.support.runs import LORA
from tests.support.tiny import config_for, save_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AS_LOADED = ("model.liger=false", "model.attention=sdpa")  # what a model has on a CPU


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def chosen(folder: Path, device: torch.device, *overrides: str) -> tuple[int, list[str]]:
    """Return the number of layers with gradient checkpointing, and the notes on it."""
    config = config_for(folder, LORA, "tokens.max_length=128", *overrides)
    loaded = load_model(config, CPU)
    notes = activations.checkpoint_activations(config, loaded, device)
    return sum(layer.gradient_checkpointing for layer in decoder_layers(loaded.model)), notes


def test_what_is_asked_for(llama: Path):
    """true checkpoints all layers and false none, on any device; "auto" none on a CPU, all if the memory is unknown."""
    for device in (CPU, CUDA):
        notes = ["gradient checkpointing: 2 of 2 layers"] if device == CPU else []  # which usually has none
        assert chosen(llama, device, "train.checkpointing=true") == (2, notes)
        assert chosen(llama, device, "train.checkpointing=false") == (0, [])
    assert chosen(llama, CPU) == (0, [])
    assert chosen(llama, torch.device("mps")) == (2, [])


def test_a_gpu_decides_by_what_a_step_takes(llama: Path, monkeypatch: pytest.MonkeyPatch):
    """A GPU checkpoints no layer if the step fits, else the fewest with which it fits, at most all."""
    config = config_for(llama, LORA, "tokens.max_length=128", *AS_LOADED)
    without, one, both = (count_step(config, CUDA, layers=layers).total for layers in (0, 1, 2))
    for available, count in ((without, 0), (one, 1), (both, 2), (both - 1, 2)):
        monkeypatch.setattr(activations, "available", lambda device, given=available: given)
        layers, (note,) = chosen(llama, CUDA)
        assert layers == count
        assert note.startswith(f"gradient checkpointing: {count} of 2 layers; ")


def test_a_model_that_cannot_be_counted_has_all_layers_checkpointed(llama: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("a value was asked for")

    monkeypatch.setattr(activations, "count_step", fails)
    monkeypatch.setattr(activations, "available", lambda device: 1)
    assert chosen(llama, CUDA) == (
        2, ["gradient checkpointing: 2 of 2 layers; the memory of a step cannot be counted beforehand (RuntimeError)"]
    )  # fmt: skip


def test_moving_needs_a_device_to_move_from(config: Path):
    """Offloading is refused on a CPU, and without gradient checkpointing, before anything is written."""
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"train\.offload_activations: on a CPU .* leave the key out"):
            fastpref.train(config, ["train.offload_activations=true"])
    with pytest.raises(UserError, match=r"train\.offload_activations: only gradient checkpointing has inputs to move"):
        fastpref.train(config, ["train.offload_activations=true", "train.checkpointing=false"])
    assert not Path("out").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", [[], ["train.offload_activations=true"]], ids=str)
def test_a_run_on_a_gpu(config: Path, overrides: list[str]):
    assert fastpref.train(config, [LORA, *overrides]).eval_metrics["eval/loss"] < 0.7


@pytest.fixture(scope="module")
def without_checkpointing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model of a family for which transformers has no gradient checkpointing, and return its folder."""
    folder = tmp_path_factory.mktemp("openai")
    config = OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("override", ["train.checkpointing=true", "train.offload_activations=true"])
def test_a_model_that_cannot_be_checkpointed_is_not_asked_to(without_checkpointing: Path, override: str):
    with pytest.raises(UserError, match=r"^train.*openai-gpt models have no gradient checkpointing"):
        chosen(without_checkpointing, CUDA, override)


def test_auto_leaves_it_off_where_there_is_none(without_checkpointing: Path):
    assert chosen(without_checkpointing, CPU) == (0, [])
    assert chosen(without_checkpointing, CUDA) == (
        0, ["gradient checkpointing: off, because openai-gpt models have no gradient checkpointing in transformers"]
    )  # fmt: skip
    count_step(config_for(without_checkpointing, LORA, "tokens.max_length=128"), CPU)
