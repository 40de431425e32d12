"""Read an Axolotl config, and find what it trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpref.errors import UserError
from fastpref.translate.fields import Fields, word
from fastpref.translate.kinds import check_kind
from fastpref.translate.yaml_file import read_fields

TRAINER, OPTION = "Axolotl", "--from-axolotl"
PAIRED = ("dpo", "ipo", "orpo", "simpo")
PREFERENCES = (*PAIRED, "kto")
METHODS = (*PREFERENCES, "sft")
_GENERATING = ("grpo", "gdpo", "ebft")
_NESTED = ("trl", "peft")
_CHAT = ("chat_template", "chat_template.default")
_UNLIKE = {  # fields of supervised data → the values with which the loss is that of fastpref
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"]),
    "train_on_eos": ("turn",),
    "train_on_eot": ("turn",),
    "message_field_training": (),
    "message_field_training_detail": (),
}


def read(path: Path, loss: str | None = None) -> Fields:
    """Read an Axolotl config. Raises UserError with one message unless fastpref has the method that it trains."""
    values = read_fields(path, TRAINER, OPTION, "base_model", nested=_NESTED)
    check_kind(path, values, OPTION)
    method = _method(path, values)
    for field, need in (("base_model", "a model's name or folder"), ("datasets", "a list of tables with a path")):
        if field not in values:
            raise UserError(f"{path}: there is no {field}: in it; add {need}")
    adapter = values.get("adapter")
    if adapter not in (None, "lora", "qlora"):
        raise UserError(
            f"{path}: adapter: {word(adapter)}: fastpref trains lora, qlora, or the whole model (no adapter)"
        )
    called = f"rl: {method}" if values.get("rl") else "supervised training"
    return Fields(path, values, TRAINER, method, called, "adapter" in values)


def _method(path: Path, values: Mapping[str, Any]) -> str:
    method = values.get("rl")
    known = f"fastpref trains rl: {', '.join(PREFERENCES)}"
    if not method:
        why = _unlike_sft(values)
        if why is None:
            return "sft"
        raise UserError(
            f"{path}: there is no rl: in it, so it trains on no preferences, and its supervised training is not "
            f"fastpref's: {why}; {known}"
        )
    if method not in PREFERENCES:
        generates = method in _GENERATING
        why = f"{method.upper()} generates while it trains" if generates else "this method is not known here"
        raise UserError(f"{path}: rl: {word(method)}: {why}; {known}")
    return method


def _unlike_sft(values: Mapping[str, Any]) -> str | None:
    """Return why the loss of a config without `rl` is not the supervised one of fastpref, or None."""
    entries = values.get("datasets")
    if values.get("pretraining_dataset") or not isinstance(entries, list) or not entries:
        return "it has no datasets of conversations"
    if values.get("reward_model") or values.get("process_reward_model"):
        return "it trains a reward model"
    if values.get("train_on_inputs"):
        return "train_on_inputs trains on prompts too"
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.get("type") not in _CHAT:
            return f"datasets[{number}] is not of type chat_template, whose assistant turns alone are trained on"
        for field, allowed in _UNLIKE.items():
            if entry.get(field) is not None and entry[field] not in allowed:
                return f"datasets[{number}].{field} selects what is trained on"
    return None
