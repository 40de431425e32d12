"""Read a LLaMA-Factory config, and find what it trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpref.errors import UserError
from fastpref.translate.fields import Fields, word
from fastpref.translate.kinds import check_kind
from fastpref.translate.yaml_file import read_fields

TRAINER, OPTION = "LLaMA-Factory", "--from-llamafactory"
METHODS = ("dpo", "orpo", "simpo", "kto", "sft")
_STAGES = {"pt": "trains on plain texts", "rm": "trains a reward model", "ppo": "generates while it trains"}
_LOSSES = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "dpo", "orpo": "orpo", "simpo": "simpo"}
_KINDS = {
    "oft": "fastpref trains lora and full",
    "freeze": "fastpref trains lora and full; a full run with train.freeze leaves parameters as they are",
}


def read(path: Path, loss: str | None = None) -> Fields:
    """Read a LLaMA-Factory config. Raises UserError with one message unless fastpref has what it trains."""
    values = read_fields(path, TRAINER, OPTION, "model_name_or_path")
    check_kind(path, values, OPTION)
    method, called = _method(path, values)
    for field, need in (("model_name_or_path", "a model's name or folder"), ("dataset", "the names of data sets")):
        if field not in values:
            raise UserError(f"{path}: there is no {field}: in it; add {need}")
    kind = values.get("finetuning_type", "lora")
    if kind not in ("lora", "full"):
        why = _KINDS.get(kind, "this is not known here; fastpref trains lora and full") if isinstance(kind, str) else ""
        raise UserError(f"{path}: finetuning_type: {word(kind)}: {why or 'fastpref trains lora and full'}")
    return Fields(path, values, TRAINER, method, called, kind == "lora")


def _method(path: Path, values: Mapping[str, Any]) -> tuple[str, str]:
    """Return the loss, and what the file calls it."""
    stage = values.get("stage", "sft")
    known = "fastpref trains stage: dpo, kto and sft"
    if stage not in ("dpo", "kto", "sft"):
        why = _STAGES.get(stage, "this stage is not known here") if isinstance(stage, str) else "this is no stage"
        raise UserError(f"{path}: stage: {word(stage)}: {why}; {known}")
    if stage != "dpo":
        return stage, f"stage: {stage}"
    loss = values.get("pref_loss", "sigmoid")
    if loss == "kto_pair":
        raise UserError(f"{path}: pref_loss: kto_pair: fastpref has no KTO of pairs; stage: kto takes single rows")
    if not isinstance(loss, str) or loss not in _LOSSES:
        raise UserError(f"{path}: pref_loss: {word(loss)}: fastpref trains pref_loss: {', '.join(_LOSSES)}")
    return _LOSSES[loss], f"pref_loss: {loss}"
