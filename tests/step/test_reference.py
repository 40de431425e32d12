"""A frozen copy of the model as reference, in its own dtype and quantisation."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpref.data.batch import collate
from fastpref.errors import UserError
from fastpref.model.load import Loaded, load_model
from fastpref.step import reference as reference_module
from fastpref.step.reference import ModelReference, make_reference
from tests.support.tiny import config_for, examples, model_config

CPU = torch.device("cpu")
COPY = "reference.mode=copy"
BATCH = collate(examples(4), "tree")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save random weights in whole blocks of 64, large enough for distinct log-probabilities, and return the folder."""
    folder = tmp_path_factory.mktemp("llama64")
    config = model_config("llama")
    config.hidden_size, config.intermediate_size, config.initializer_range = 64, 128, 0.1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def referred(folder: Path, *overrides: str) -> tuple[Loaded, ModelReference, str]:
    config = config_for(folder, COPY, *overrides)
    loaded = load_model(config, CPU)
    return loaded, *make_reference(config, loaded)


def logps(folder: Path, *overrides: str) -> Tensor:
    return referred(folder, *overrides)[1](BATCH).float()


OPTIONS = {  # override: the largest and the smallest error that its rounding makes
    "reference.dtype=bfloat16": (0.1, 1e-4),
    "reference.dtype=float16": (0.02, 1e-6),
    "reference.quantization=int8": (0.5, 1e-4),
    "reference.quantization=nf4": (2.0, 1e-2),
}


@pytest.mark.parametrize("lora", [[], ["lora={rank=2}"]], ids=["whole", "lora"])
@pytest.mark.parametrize("override", OPTIONS)
def test_a_copy_is_the_model_rounded(llama: Path, override: str, lora: list[str]):
    """A copy's log-probabilities differ from the model's own by the rounding of its dtype or bits, and by no more."""
    expected = logps(llama)
    most, least = OPTIONS[override]
    error = (logps(llama, override, *lora) - expected).abs().max().item()
    assert least < error < most


@pytest.mark.parametrize("lora", [[], ["lora={rank=2}"]], ids=["whole", "lora"])
def test_the_model_itself_is_untouched(llama: Path, lora: list[str]):
    """A frozen copy in other bits changes neither the model's weights nor its trained parameters nor its results."""
    loaded, reference, what = referred(llama, "reference.dtype=bfloat16", "reference.quantization=nf4", *lora)
    assert what == "a frozen copy of the model, in nf4 and bfloat16"
    alone = load_model(config_for(llama, *lora), CPU)
    assert {n: (p.dtype, p.requires_grad) for n, p in loaded.policy.named_parameters()} == {
        n: (p.dtype, p.requires_grad) for n, p in alone.policy.named_parameters()
    }
    assert torch.equal(loaded.policy.eval()(BATCH).logp, alone.policy.eval()(BATCH).logp)
    assert reference.copy is not None
    assert not any(p.requires_grad for p in reference.copy.parameters())
    assert not any("lora" in name for name, _ in reference.copy.named_parameters())


def test_a_copy_of_quantised_weights_can_be_whole(llama: Path):
    """With a model in 4 bits, "none" gives a copy of the unquantised files, and "auto" one with the same bits."""
    nf4 = ["model.quantization=nf4", "lora={rank=2}"]
    _, whole, what = referred(llama, *nf4, "reference.quantization=none")
    assert what == "a frozen copy of the model, in float32"
    assert not any(isinstance(m, Linear4bit) for m in whole.policy.modules())
    torch.testing.assert_close(whole(BATCH), logps(llama))
    _, same, _ = referred(llama, *nf4)
    assert sum(isinstance(m, Linear4bit) for m in same.policy.modules()) == 14
    _, eight, _ = referred(llama, *nf4, "reference.quantization=int8")
    assert sum(isinstance(m, Linear8bitLt) for m in eight.policy.modules()) == 14


def test_what_is_the_same_is_not_read_again(llama: Path, monkeypatch: pytest.MonkeyPatch):
    """If the dtype is the model's own, the copy is made in memory and is bit-identical."""
    monkeypatch.setattr(reference_module, "load_copy", None)
    loaded, reference, what = referred(llama, "reference.dtype=float32", "reference.quantization=none")
    assert what == "a frozen copy of the model"
    with torch.no_grad():
        assert torch.equal(reference(BATCH), loaded.policy.eval()(BATCH).logp)


@pytest.mark.parametrize(
    ("override", "share"), [("reference.dtype=bfloat16", 0.5), ("reference.quantization=nf4", 0.45)]
)
def test_a_copy_takes_what_its_bits_say(llama: Path, override: str, share: float):
    """A copy's memory is that of its own dtype or bits, as a share of the model's in float32."""
    loaded, reference, _ = referred(llama, override)
    assert reference.copy is not None
    taken = {p.data_ptr(): p.untyped_storage().nbytes() for p in reference.copy.parameters()}
    assert reference.nbytes == sum(taken.values())
    assert reference.nbytes <= share * sum(p.nbytes for p in loaded.model.parameters())


def test_weights_that_lie_quantised_cannot_be_otherwise(llama: Path, tmp_path: Path):
    """For a checkpoint in 4 bits, the copy has the same bits, and another quantisation is refused by its key."""
    loaded = load_model(config_for(llama, "model.quantization=nf4", "lora={rank=2}"), CPU)
    folder = tmp_path / "nf4"
    loaded.wrapped.unload().save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    with pytest.raises(UserError, match=r'reference\.quantization = "int8": the checkpoint of .* is quantised already'):
        referred(folder, "lora={rank=2}", "reference.quantization=int8")
    assert referred(folder, "lora={rank=2}")[2] == "a frozen copy of the model"
