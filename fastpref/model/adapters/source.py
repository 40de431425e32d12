"""The trained adapters that a config names: their files, and what they say of themselves.

`model.name`, `lora.from` and `reference.name` may name an adapter: its folder, the folder of a run (for its final/), or
a repository of the hub.
"""

import json
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import peft
from huggingface_hub import snapshot_download
from transformers.utils.peft_utils import find_adapter_config_file

from fastpref.config import Config
from fastpref.errors import UserError, one_line

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_TEXT = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "text.json")
# Settings of PEFT with which an adapter is continued as it is. Any other one that is set changes the computation.
_KNOWN = frozenset(
    [
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
        *("use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "use_dora", "qalora_group_size", "runtime_config", "target_parameters"),
        "trainable_token_indices",
    ]
)
# Initialisations that subtract the adapter from the model's weights, so that the model without it is another one.
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")

Kind = Literal["base", "start", "adapter", "model"]  # of a reference


@dataclass(frozen=True)
class AdapterFiles:
    """The files of a trained LoRA adapter."""

    name: str  # as a config names it
    folder: Path
    settings: peft.LoraConfig
    key: str  # of the config, for messages

    @property
    def base(self) -> str | None:
        """The base model that the adapter names; an absolute path if it is a folder of this machine."""
        name = self.settings.base_model_name_or_path
        return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None

    @property
    def place(self) -> str:
        """The key of the config and its value, with which messages begin."""
        return f"{self.key} = {self.name!r}"

    def weights_file(self) -> Path:
        """Return the file of the weights, as `weights_file`."""
        return weights_file(self.name, self.folder, self.place)


def weights_file(name: str, folder: Path, place: str) -> Path:
    """Return the file of an adapter's weights, which is downloaded for a name on the hub.

    `folder` is where `find_adapter` has found it, and `place` is the beginning of messages. Raises UserError if there
    is no such file, or only a pickled one.
    """
    file = folder / WEIGHTS
    if not file.is_file() and not Path(name).expanduser().exists():
        download_adapter(name)
    if file.is_file():
        return file
    if (folder / PICKLE).is_file() or _has_pickle(name):
        raise UserError(
            f"{place}: its weights are pickled ({PICKLE}), and a pickle can run code when it is read; only "
            "safetensors are read: if you trust it, load it with PEFT and call save_pretrained"
        )
    raise UserError(f"{place}: there are no weights in {folder}, {WEIGHTS} is missing")


def find_adapter(name: str, revision: str | None = None) -> Path | None:
    """Return the folder with the adapter_config.json of a name, or None if the name is that of no adapter."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return next((f for f in (folder, folder / "final") if (f / SETTINGS).is_file()), None)
    return None if folder.exists() or name.startswith(("/", ".", "~")) else _on_hub(name, revision)


def read_adapter(name: str, key: str, revision: str | None = None) -> AdapterFiles:
    """Read the settings of the adapter that `key` of a config names. Raises UserError unless it is plain LoRA."""
    place, folder = f"{key} = {name!r}", find_adapter(name, revision)
    if folder is None:
        raise UserError(f"{place}: {_no_adapter(name)}")
    try:
        raw = json.loads((folder / SETTINGS).read_bytes())
        settings = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # damaged JSON, an unknown kind of adapter
        raise UserError(f"{place}: its {SETTINGS} cannot be read: {one_line(error)}") from None
    if not isinstance(settings, peft.LoraConfig):
        raise UserError(f"{place}: a {raw.get('peft_type')} adapter; only LoRA, rsLoRA and DoRA are trained here")
    if settings.task_type not in (None, "CAUSAL_LM"):
        raise UserError(f"{place}: an adapter for {settings.task_type}; one of a causal language model is needed")
    if why := changes_base(settings):
        raise UserError(f"{place}: {why}")
    if settings.trainable_token_indices:
        raise UserError(
            f"{place}: it has trained rows of new tokens, which no other adapter can have beside it; merge it with "
            "fastpref merge, and name the merged model"
        )
    if others := [field.name for field in fields(settings) if field.name not in _KNOWN and _is_set(settings, field)]:
        raise UserError(f"{place}: its {SETTINGS} sets {', '.join(others)}, which is not computed here")
    return AdapterFiles(name, folder, settings, key)


def changes_base(settings: Any) -> str | None:
    """Return why the model without an adapter is not the base model, by the adapter's initialisation; or None."""
    start = getattr(settings, "init_lora_weights", None)
    if not isinstance(start, str) or not start.lower().startswith(CHANGING):
        return None
    return (
        f"its adapters began as {start}, which changes the model's own weights too, so that the model without it is "
        "another one; save it with PEFT's path_initial_model_for_weight_conversion, as plain LoRA"
    )


def with_start(config: Config) -> Config:
    """Return the config with the adapter that `model.name` may name as `lora.from`, and its base as `model.name`.

    Raises UserError for an adapter that names no base model, and for keys that need another adapter or reference.
    """
    start = None if config.lora is None else config.lora.start
    folder = find_adapter(config.model.name, config.model.revision)
    if folder is not None and not any(folder.glob("model*.safetensors")):
        files = read_adapter(config.model.name, "model.name", config.model.revision)
        if files.base is None:
            raise UserError(
                f"{files.place}: its {SETTINGS} does not name its base model; set model.name to that, and lora.from to "
                "the adapter"
            )
        if start is not None and find_adapter(start) != folder:
            raise UserError(f"lora.from = {start!r}: model.name is another adapter, {config.model.name}; name one")
        revision = None if Path(files.base).is_dir() else files.settings.revision
        base = {"model.name": files.base, "model.revision": revision}
        config = config.but({**base, "lora.from": start or config.model.name})
    _check_keys(config)
    return config


def reference_kind(config: Config) -> Kind:
    """Return what the reference of a config is, whether or not its loss has one."""
    if (name := config.reference.name) is not None:
        return "model" if find_adapter(name) is None else "adapter"
    starts = config.lora is not None and config.lora.start is not None and config.reference.adapter != "none"
    return "start" if starts else "base"


def _check_keys(config: Config) -> None:
    lora, reference = config.lora, config.reference
    starts = lora is not None and lora.start is not None
    if lora is not None and lora.stack and not starts:
        raise UserError("lora.stack: there is no adapter to stack a new one on; name it in lora.from")
    if not config.loss.uses_reference:
        return
    if reference.adapter == "start" and not starts:
        raise UserError('reference.adapter = "start": the run starts from no adapter; name it in lora.from')
    kind = reference_kind(config)
    if kind == "adapter" and lora is None:
        raise UserError(
            f"reference.name = {reference.name!r}: it is an adapter, which needs frozen base weights; add a [lora] "
            "table, or merge it and name the result"
        )
    what = "the adapter of lora.from" if kind == "start" else f"an adapter, {reference.name}"
    if kind in ("start", "adapter") and reference.mode == "copy":
        raise UserError(
            f'reference.mode = "copy": the reference is {what}, which needs no copy of the model; remove it'
        )
    if kind == "adapter" and (reference.dtype, reference.quantization) != ("auto", "auto"):
        key = "dtype" if reference.dtype != "auto" else "quantization"
        raise UserError(f"reference.{key}: the reference is {what}, on the model's own weights; remove it")
    if kind == "model" and reference.mode == "adapter":
        raise UserError(
            f'reference.mode = "adapter": reference.name = {reference.name!r} is a whole model; set "copy" or '
            '"precompute", or remove it'
        )


def _is_set(settings: Any, field: Any) -> bool:
    default = field.default if field.default is not MISSING else field.default_factory()
    return getattr(settings, field.name) not in (default, None, False)


def _no_adapter(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.is_file():
        return f"this is a file; name the folder with {SETTINGS}"
    if not folder.is_dir():
        where = (
            "there is no such folder"
            if name.startswith(("/", ".", "~"))
            else "no such folder, and no adapter on the hub"
        )
        return f"{where}, or the hub cannot be asked" if "hub" in where else where
    if (folder / "config.json").is_file() or (folder / "final" / "config.json").is_file():
        return "it is a whole model, not an adapter; name it as model.name"
    if checkpoints := sorted((folder / "checkpoints").glob("step-*")):
        return f"it is the folder of a run that has no final/ yet; name a checkpoint of it, such as {checkpoints[-1]}"
    return f"there is no adapter in it, {SETTINGS} is missing"


@cache
def _on_hub(name: str, revision: str | None) -> Path | None:
    try:
        file = find_adapter_config_file(name, revision=revision)
    except Exception:  # no such repository, no network: loading the model says so
        return None
    return None if file is None else Path(file).parent


def download_adapter(name: str) -> None:
    """Download an adapter of the hub with its tokenizer. Raises UserError."""
    try:
        snapshot_download(name, allow_patterns=[SETTINGS, WEIGHTS, *_TEXT])
    except Exception as error:  # the hub raises many kinds
        raise UserError(f"{name}: the adapter cannot be downloaded: {one_line(error)}") from None


def _has_pickle(name: str) -> bool:
    try:
        from huggingface_hub import file_exists

        return not Path(name).expanduser().exists() and file_exists(name, PICKLE)
    except Exception:  # no network
        return False
