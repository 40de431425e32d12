"""Read a config of TRL's command line, and find which of its commands it is for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpref.errors import UserError
from fastpref.translate.fields import Fields
from fastpref.translate.kinds import check_kind
from fastpref.translate.yaml_file import read_fields

TRAINER, OPTION = "TRL", "--from-trl"
METHODS = ("dpo", "kto", "sft")
SIGNS = {  # method → fields that only its command has, and values of loss_type
    "kto": (("desirable_weight", "undesirable_weight"), ("kto", "apo_zero_unpaired")),
    "sft": (
        ("completion_only_loss", "assistant_only_loss", "packing", "dataset_text_field", "chat_template_path"),
        ("nll", "dft", "chunked_nll"),
    ),
}
_OTHERS = {  # fields of commands that are not translated → what they do
    "reward_funcs": "generates completions to train on (GRPO or RLOO)",
    "num_generations": "generates completions to train on (GRPO or RLOO)",
    "reward_model_name_or_path": "generates completions to train on (GRPO or RLOO)",
    "teacher_model_name_or_path": "distils another model",
    "center_rewards_coefficient": "trains a reward model",
}


def read(path: Path, loss: str | None = None) -> Fields:
    """Read a config of `trl dpo`, `trl kto` or `trl sft`, as `loss` says. Raises UserError with one message."""
    values = read_fields(path, TRAINER, OPTION, "model_name_or_path", nulls=("max_length",))
    check_kind(path, values, OPTION)
    for field, what in _OTHERS.items():
        if field in values:
            raise UserError(f"{path}: {field}: a config that has it {what}; fastpref trains {', '.join(METHODS)}")
    if loss is not None and loss not in METHODS:
        raise UserError(f"--loss {loss}: TRL's commands that fastpref can follow are {', '.join(METHODS)}")
    method = loss or inferred(values)[0]
    if "model_name_or_path" not in values:
        raise UserError(f"{path}: there is no model_name_or_path: in it; add a model's name or folder")
    if not values.get("datasets") and "dataset_name" not in values:
        raise UserError(f"{path}: there is neither dataset_name: nor datasets: in it; add the data")
    given = {**values, "--loss": loss} if loss else values
    return Fields(path, given, TRAINER, method, f"trl {method}", values.get("use_peft") is True)


def inferred(values: Mapping[str, Any]) -> tuple[str, str]:
    """Return the method that a config is for, and the field that shows it; without one it is dpo."""
    losses = values.get("loss_type")
    for method, (fields, names) in SIGNS.items():
        for field in fields:
            if field in values:
                return method, field
        if losses in names:
            return method, "loss_type"
    return "dpo", ""
