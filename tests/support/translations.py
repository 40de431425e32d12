"""The trainers whose configs are translated, with the smallest config of each, and translations as flat tables."""

import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastpref.config import Config
from fastpref.translate import DIALECTS, Dialect, Translation, translate
from fastpref.translate.axolotl import rows as axolotl_rows
from fastpref.translate.llamafactory import rows as llamafactory_rows
from fastpref.translate.trl import rows as trl_rows
from fastpref.translate.trl import source as trl_source
from tests.support import axolotl_configs
from tests.support.trainer_fields import LLAMAFACTORY_FIELDS, TRL_FIELDS

PENDING: tuple[str, ...] = ()  # keys that importers write before the config has them
_OLD = ("unsloth_lora_mlp", "unsloth_rms_norm", "unsloth_cross_entropy_loss")  # of older versions of Axolotl
_QUANTIZED = ("double_quantization", "quantization_method", "quantization_type")
_CHATS = [{"path": "d", "type": "chat_template"}]


@dataclass(frozen=True)
class Trainer:
    """A trainer, the fields of its schema, and configs of it."""

    dialect: Dialect
    smallest: Mapping[str, Any]
    """The fields that every config needs."""
    adapters: Mapping[str, Any]
    """The fields of a config that trains adapters."""
    methods: Mapping[str, Mapping[str, Any]]
    """Loss → the fields of a config that trains by it."""
    fields: tuple[str, ...]
    entry: str
    """What the page calls a table of data."""
    entry_keys: Mapping[str, str]
    entry_left_out: Mapping[str, str]
    page: str
    needs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Fields → others, without which they mean nothing."""

    methods_by: tuple[str, ...] = ()
    """Fields that show by which method a config trains."""

    @property
    def ruled(self) -> set[str]:
        return {name for rule in self.dialect.rules for name in rule.fields}

    @property
    def names(self) -> dict[str, str]:
        """Return the names of fields that are left out, in which * stands for any text, with the reasons."""
        return {name: reason for reason, names in self.dialect.reasons.items() for name in names.split()}

    @property
    def left_fields(self) -> list[str]:
        return sorted({*self.fields, *(name for name in self.names if "*" not in name)} - self.ruled)


TRAINERS = {
    trainer.dialect.trainer: trainer
    for trainer in (
        Trainer(
            DIALECTS["--from-axolotl"],
            {"base_model": "m", "rl": "dpo", "datasets": [{"path": "d"}]},
            {"adapter": "lora"},
            {
                **{rl: {"rl": rl} for rl in ("dpo", "ipo", "orpo", "simpo", "kto")},
                "kto": {"rl": "kto", "micro_batch_size": 2},
                "sft": {"rl": "", "datasets": _CHATS},
            },
            (*axolotl_configs.FIELDS, *_OLD),
            "datasets[].",
            axolotl_rows.KEYS,
            axolotl_rows.LEFT_OUT,
            "axolotl.md",
            {"peft.weight_dtype": {"peft.backend": "bnb"}},
            ("pretraining_dataset", "reward_model", "process_reward_model", "train_on_inputs"),
        ),
        Trainer(
            DIALECTS["--from-trl"],
            {"model_name_or_path": "m", "dataset_name": "d"},
            {"use_peft": True},
            {"dpo": {}, "kto": {"loss_type": "kto"}, "sft": {"loss_type": "nll"}},
            tuple(TRL_FIELDS),
            "datasets[].",
            trl_rows.KEYS,
            trl_rows.LEFT_OUT,
            "from_trl.md",
            {name: {"load_in_4bit": True} for name in ("use_bnb_nested_quant", "bnb_4bit_quant_type")},
            tuple(name for names, _ in trl_source.SIGNS.values() for name in names),
        ),
        Trainer(
            DIALECTS["--from-llamafactory"],
            {"model_name_or_path": "m", "dataset": "d", "stage": "dpo"},
            {"finetuning_type": "lora"},
            {
                **{loss: {"pref_loss": loss} for loss in ("orpo", "simpo")},
                **{stage: {"stage": stage} for stage in ("dpo", "kto", "sft")},
            },
            tuple(LLAMAFACTORY_FIELDS),
            "dataset_info.json: ",
            llamafactory_rows.KEYS,
            llamafactory_rows.LEFT_OUT,
            "from_llamafactory.md",
            {name: {"quantization_bit": 4} for name in _QUANTIZED},
        ),
    )
}


def methods_of(trainer: Trainer) -> list[str]:
    return list(trainer.methods)


def translated(trainer: Trainer, folder: Path, fields: Mapping[str, Any], out: Path | None = None) -> Translation:
    """Translate the smallest config with more or other fields; dotted names are those of tables."""
    raw = dict(trainer.smallest)
    for name, value in fields.items():
        table, _, inner = name.rpartition(".")
        if table:
            raw[table] = {**raw.get(table, {}), inner: value}
        else:
            raw[name] = value
    path = folder / "cfg.yml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return translate(trainer.dialect, path, out or folder)


def snippet(trainer: Trainer, folder: Path, added: str, out: Path | None = None) -> Translation:
    """Translate the smallest config with the fields of a YAML text."""
    return translated(trainer, folder, yaml.safe_load(added) or {}, out)


def tables(translation: Translation) -> dict[str, Any]:
    return tomllib.loads(translation.text)


def flat(raw: Any, name: str = "") -> dict[str, Any]:
    """Return the values by dotted keys; the options of a format, a reference's sync and train.stop stay tables."""
    if isinstance(raw, dict) and not name.endswith(("format", "sync", "stop", "options", "kwargs")):
        return {k: v for key, inner in raw.items() for k, v in flat(inner, f"{name}.{key}".lstrip(".")).items()} or {
            name: {}
        }
    if isinstance(raw, list) and raw and isinstance(raw[0], dict):
        return {k: v for at, inner in enumerate(raw) for k, v in flat(inner, f"{name}.{at}").items()}
    return {name: raw}


def expected(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat tables after changes, of which None removes a key, and a table of a section its other keys."""
    after = {**base, **{key: value for name, inner in changes.items() for key, value in flat(inner, name).items()}}
    return {key: value for key, value in after.items() if value is not None}


def wanted(translation: Translation) -> dict[str, Any]:
    """Return all settings of a translation by dotted keys, those that the schema refuses too."""
    settings = (*translation.settings, *(setting for setting, _ in translation.refused))
    return {".".join(map(str, setting.key)): setting.value for setting in settings}


_HEAD = {"base_model": "base_model: m", "rl": "rl: dpo", "datasets": "datasets: [{path: d}]"}


def axolotl(folder: Path, added: str, out: Path | None = None) -> Translation:
    """Translate a YAML text of Axolotl's, after adding the missing fields that every config needs."""
    added = textwrap.dedent(added)
    if added.startswith("{"):
        added = yaml.safe_dump(yaml.safe_load(added))
    lines = [line for field, line in _HEAD.items() if f"\n{field}:" not in f"\n{added}"]
    path = folder / "cfg.yml"
    path.write_text("\n".join([*lines, added]), encoding="utf-8")
    return translate(DIALECTS["--from-axolotl"], path, out or folder)


def taken(translation: Translation, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a translation has for these keys, which the schema takes."""
    Config.model_validate(tables(translation))
    refused = [(".".join(map(str, setting.key)), reason) for setting, reason in translation.refused]
    assert [(key, reason) for key, reason in refused if key in keys and key not in PENDING] == []
    settings = wanted(translation)
    return {key: settings.get(key) for key in keys}
