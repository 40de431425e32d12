"""A key that another trainer has is answered with the key that it is here."""

import pytest

from fastpref.config import Config, make_config
from fastpref.config.losses import LOSSES
from fastpref.config.mistakes import tables_of
from fastpref.config.others import KEYS, answer
from fastpref.errors import UserError
from fastpref.translate import DIALECTS

OURS = {f"{table}.{key}".lstrip(".") for table, keys in tables_of(Config) for key in keys}
LEFT = {"use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_llama_pro"}  # methods that are not here


@pytest.mark.parametrize("key", KEYS)
def test_answers_name_keys_that_exist(key: str):
    """Every key and table that an answer names is one of the schema."""
    assert key.strip("[]") in OURS


@pytest.mark.parametrize("trainer", DIALECTS.values(), ids=lambda trainer: trainer.trainer)
def test_every_field_that_is_translated_is_answered(trainer):
    """A field that becomes keys of one table in a translation has an answer, unless a key here has its name."""
    names = {key.rpartition(".")[2] for key in OURS} | set(vars(LOSSES["dpo"]()))
    fields = {field for rule in trainer.rules if rule.keys for field in rule.fields if "." not in field}
    assert [field for field in sorted(fields - names - LEFT) if not answer(field)] == []


def test_mistakes_of_a_dict_stay_apart():
    """Each mistake of tables without lines, which are a dict in Python, has a message of its own."""
    small = {"model": {"name": "m"}, "data": [{"path": "d"}], "loss": {"type": "orpo"}, "eval": {"every": 5}}
    with pytest.raises(UserError) as caught:
        make_config(small | {"reference": {"mode": "copy", "dtype": "float32"}})
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "reference.mode", "reference.dtype", "eval.every",
    ]  # fmt: skip


def test_lora_can_be_switched():
    """lora = false trains the whole model, and lora = true adapters with the defaults."""
    small = {"model": {"name": "m"}, "data": [{"path": "d"}]}
    assert Config.model_validate(small | {"lora": False}).lora is None
    assert Config.model_validate(small | {"lora": True}) == Config.model_validate(small | {"lora": {}})
