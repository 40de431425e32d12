"""Tell by its fields which trainer a config is for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpref.errors import UserError

_KINDS = {  # option of `fastpref init` → whose config it translates, and the fields by which it is known
    "--from-axolotl": ("Axolotl", ("base_model", "micro_batch_size")),
    "--from-llamafactory": (
        "LLaMA-Factory",
        ("stage", "finetuning_type", "cutoff_len", "pref_loss", "pref_beta", "dataset_dir", "template", "lora_rank"),
    ),
    "--from-trl": ("TRL", ("model_name_or_path",)),
}


def check_kind(path: Path, values: Mapping[str, Any], option: str) -> None:
    """Raise UserError, naming the option to use, for a config that is another trainer's by its fields."""
    for kind, (trainer, fields) in _KINDS.items():
        known = next((field for field in fields if field in values), None)
        if known is None:
            continue
        if kind != option:
            raise UserError(
                f"{path}: this is a config of {trainer}, which has {known}:, and not of {_KINDS[option][0]}; "
                f"translate it with `fastpref init {kind} {path}`"
            )
        return
