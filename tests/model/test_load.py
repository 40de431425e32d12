"""Loading models, adapters and references as a config describes them."""

from pathlib import Path

import pytest
import torch

from fastpref.config import ModelConfig
from fastpref.data.batch import collate
from fastpref.errors import UserError
from fastpref.model.head import Head
from fastpref.model.load import load_model
from fastpref.model.tokenizer import load_tokenizer
from fastpref.step.reference import make_reference
from tests.support.tiny import config_for, examples, save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def test_what_is_trained(llama: Path):
    """Without [lora] every parameter is trained; with it only adapters and modules_to_save are."""
    everything = load_model(config_for(llama), CPU).policy
    assert all(p.requires_grad for p in everything.parameters())
    adapters = load_model(config_for(llama, 'lora={rank=2, modules_to_save=["lm_head"]}'), CPU).policy
    trained = [name for name, p in adapters.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert any("modules_to_save" in name for name in trained)
    assert isinstance(adapters.head, Head)
    weight = adapters.head.weight_and_bias()[0]
    assert isinstance(weight, torch.Tensor)
    assert weight.requires_grad


REFERENCES = {
    "adapter": ["lora={rank=2}"],
    "adapter and trained head": ['lora={rank=2, modules_to_save=["lm_head"]}'],
    "copy beside an adapter": ["lora={}", "reference.mode=copy"],
    "copy": ["reference.mode=copy"],
}


@pytest.mark.parametrize("overrides", REFERENCES.values(), ids=REFERENCES)
def test_the_reference_is_the_model_before_training(llama: Path, overrides: list[str]):
    """However the policy changes, the reference gives the log-probabilities of the model before training."""
    dropout = ["lora.dropout=0.3"] if "lora" in overrides[0] else []
    loaded = load_model(config_for(llama, *overrides, *dropout), CPU)
    reference, _ = make_reference(config_for(llama, *overrides), loaded)
    batch = collate(examples(3), "tree")
    with torch.no_grad():
        before = loaded.policy.eval()(batch).logp
        for parameter in loaded.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        loaded.policy.train()
        torch.testing.assert_close(reference(batch), before)
        assert loaded.policy.training
        assert not torch.allclose(loaded.policy.eval()(batch).logp, before, atol=1e-2)


@pytest.mark.parametrize(
    ("override", "said"),
    [("model.name=nowhere/at-all", "nowhere/at-all"), ('lora={target=["no_such_module"]}', "q_proj")],
)
def test_models_that_cannot_be_had_are_said(llama: Path, override: str, said: str):
    """A missing model, or a module that the model does not have, gives one message that names it."""
    with pytest.raises(UserError, match=said):
        load_model(config_for(llama, override), CPU)


def test_pickled_weights_are_not_loaded(llama: Path, tmp_path: Path):
    """A folder with only a .bin file is refused, because its pickle could run code."""
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(config_for(tmp_path), CPU)


def test_a_missing_tokenizer_is_said(llama: Path):
    with pytest.raises(UserError, match="no tokenizer there"):
        load_tokenizer(config_for(llama).model)


@pytest.mark.parametrize("name", ["/no/such", "./none", "~/none-of-this-name"])
def test_a_folder_that_is_not_there(name: str):
    """If a name can only be a folder's, the message says that there is no such folder."""
    with pytest.raises(UserError, match=r"there is no such folder( \(|$)"):
        load_tokenizer(ModelConfig(name=name))
