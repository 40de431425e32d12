"""Whether a trained adapter is one of this model, and what a config says about it is true of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from fastpref.config import Config, LoraConfig
from fastpref.config.model import ADAPTERS_OWN
from fastpref.errors import UserError
from fastpref.model.adapters.fresh import planned
from fastpref.model.adapters.parts import Parts, short_names
from fastpref.model.adapters.source import AdapterFiles
from fastpref.model.adapters.switch import POLICY

_OF_THE_PLACES = ("target", "exclude")  # keys that choose which layers have an adapter


def check_base(config: Config, adapter: AdapterFiles) -> list[str]:
    """Compare the base model that an adapter names with `model.name`. Return a note if that does not decide.

    Raises UserError if they are two models.
    """
    base, own = adapter.base, config.model.name
    if base is None or base == own:
        return []
    here, there = Path(own).expanduser(), Path(base).expanduser()
    if here.is_dir() and there.is_dir():
        if here.resolve() == there.resolve() or _same_files(here, there):
            return []
    elif here.is_dir() or there.is_absolute() or base.startswith((".", "~")):
        return [f"{adapter.place}: its base model is {base}, which is taken to be {own}"]  # a copy, or it was moved
    raise UserError(
        f"{adapter.place}: it is an adapter of {base}, and model.name is {own}; set model.name to its "
        "base model, or to the adapter itself"
    )


def _same_files(here: Path, there: Path) -> bool:
    """Return whether two folders hold the same config.json and weights of the same names and sizes."""

    def files(folder: Path) -> Any:
        config = folder / "config.json"
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
        return config.read_bytes() if config.is_file() else None, sizes

    return files(here) == files(there)


@dataclass(frozen=True)
class WantedParts:
    """The modules and parameters that a config chooses for adapters, by their full names."""

    modules: frozenset[str]
    parameters: frozenset[str]


def wanted_parts(lora: LoraConfig, model: PreTrainedModel) -> WantedParts | None:
    """Return what [lora] chooses on a model without adapters; None if it leaves the choice to the adapter."""
    if not lora.model_fields_set & set(_OF_THE_PLACES):
        return None
    settings = planned(lora, model)
    ends = tuple(settings.target_parameters or ())
    names = Parts.of(model).parameters() if ends else {}
    chosen = {name for name in names if any(f".{name}".endswith(f".{end}") for end in ends)}
    return WantedParts(frozenset(settings.target_modules or ()), frozenset(chosen))


def check_agreement(lora: LoraConfig, wrapped: Any, adapter: AdapterFiles, wanted: WantedParts | None) -> None:
    """Raise UserError if a key of [lora] that was set says something else than the adapter."""
    settings = adapter.settings
    theirs = {
        "rank": settings.r,
        "alpha": settings.lora_alpha,
        "rslora": settings.use_rslora,
        "dora": settings.use_dora,
        "modules_to_save": sorted(settings.modules_to_save or ()),
    }
    for key, value in theirs.items():
        ours = getattr(lora, key)
        ours = sorted(ours) if key == "modules_to_save" else ours
        if key in lora.model_fields_set and ours != value:
            raise UserError(
                f"lora.{key} = {_word(ours)}: the adapter of lora.from ({adapter.name}) has {_word(value)}; remove the "
                "key, or set lora.stack = true for a new adapter on top"
            )
    others = lora.model_fields_set - {*theirs, *_OF_THE_PLACES, "start", "stack", "dropout"}
    if refused := sorted(others & set(ADAPTERS_OWN)):
        raise UserError(f"lora.{refused[0]}: the adapter of lora.from has it already; remove the key")
    if wanted is None:
        return
    own = adapted_parts(wrapped)
    for ours, has in ((wanted.modules, own.modules), (wanted.parameters, own.parameters)):
        if ours != has:
            key = "target" if "target" in lora.model_fields_set else "exclude"
            more, less = sorted(ours - has), sorted(has - ours)
            parts = [
                f"it has none on {short_names(more)}" if more else "",
                f"it has one on {short_names(less)}" if less else "",
            ]
            raise UserError(
                f"lora.{key} = {_word(getattr(lora, key))}: the adapter of lora.from ({adapter.name}) is another: "
                f"{', and '.join(filter(None, parts))}; remove the key"
            )


def adapted_parts(wrapped: Any, name: str = POLICY) -> WantedParts:
    """Return the modules and parameters that have the adapter `name`, by their names in the model without adapters."""
    modules, parameters = set(), set()
    inner: nn.Module = wrapped.base_model.model
    for path, module in inner.named_modules():
        plain = ".".join(part for part in path.split(".") if part != "base_layer")
        if not isinstance(module, LoraLayer) or name not in {*module.lora_A, *module.lora_embedding_A}:
            continue
        if isinstance(module, ParamWrapper):
            parameters.add(f"{plain}.{module.parameter_name}")
        else:
            modules.add(plain)
    return WantedParts(frozenset(modules), frozenset(parameters))


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_word, value))}]"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
