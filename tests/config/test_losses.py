"""A loss's options are defined once, and everything that depends on losses derives from them."""

from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from fastpref.commands.init import check_loss, template
from fastpref.config import Config
from fastpref.config import load as loading
from fastpref.config.load import load_config
from fastpref.config.losses import DPO, LOSSES, Loss, loss_table
from fastpref.errors import UserError
from fastpref.names import LOSS_TITLES


@dataclass(frozen=True, kw_only=True, config=loss_table)
class XPO(Loss):
    """A planted loss."""

    type: Literal["xpo"] = "xpo"
    """Selects the loss."""
    beta: float = 3.0
    """Sets a planted key."""
    zeal: float = 1.0
    """Sets another planted key."""
    suits: ClassVar[str] = "single completions, and a test"
    paired: ClassVar[bool] = False


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the loss to the list of losses, and make a schema that has it."""
    monkeypatch.setitem(LOSSES, "xpo", XPO)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(loading, "Config", type("Config", (Config,), {"__module__": __name__}))


@pytest.mark.usefixtures("planted")
def test_a_new_loss_is_written_in_one_place(tmp_path: Path):
    """A new loss can be loaded, has its own template, and is listed in messages about other losses."""
    path = tmp_path / "cfg.toml"
    path.write_text(template(check_loss("XPO"), "m", "d"))
    config = load_config(path)
    assert isinstance(config.loss, XPO)
    assert (config.loss.beta, config.loss.zeal, config.loss.unit) == (3.0, 1.0, "completion")
    assert "#zeal = 1.0" in path.read_text()
    assert "single completions, and a test: xpo" in template("dpo", "m", "d")
    with pytest.raises(UserError, match="dpo, ipo, kto, orpo, simpo, cpo, pl, lipo, sft, xpo"):
        check_loss("npo")
    for override, message in (
        (
            "loss.type=xpoo",
            "must be one of dpo, ipo, kto, orpo, simpo, cpo, pl, lipo, sft, xpo, got 'xpoo' .did you mean 'xpo'",
        ),
        ("loss.gamma=1.0", "this loss has no such key; it belongs to simpo"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(path, [override])
    with pytest.raises(UserError, match="this loss has no such key; it belongs to xpo"):
        load_config(path, ["loss={type='kto', zeal=2.0}"])


def test_what_one_example_is():
    """KTO and SFT take single completions, PL and LiPO take lists, and every other loss takes pairs."""
    others = {name: options().unit for name, options in LOSSES.items() if options().unit != "pair"}
    assert others == {"kto": "completion", "pl": "list", "lipo": "list", "sft": "completion"}
    assert {name for name, options in LOSSES.items() if not options.uses_reference} == {"orpo", "simpo", "cpo", "sft"}


def test_a_loss_without_a_type_is_dpo():
    """Options without a type are DPO's; options of another class, and an unknown type, are refused."""
    raw = {"model": {"name": "m"}, "data": [{"path": "d"}]}
    assert Config.model_validate(raw | {"loss": {"beta": 0.2}}).loss == DPO(beta=0.2)
    assert Config.model_validate(raw | {"loss": DPO(beta=0.2)}).loss == DPO(beta=0.2)
    for loss in ({"type": "xpo"}, {"type": 3}, XPO(), 3):
        with pytest.raises(ValidationError):
            Config.model_validate(raw | {"loss": loss})


def test_every_loss_has_a_name_that_people_write():
    """Help lists the losses by names that stand apart from their options, in the same order."""
    assert list(LOSS_TITLES) == list(LOSSES)
    assert {options().title for options in LOSSES.values()} == set(LOSS_TITLES.values())
