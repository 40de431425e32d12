"""A model's modules by their names, and which of its layers PEFT can adapt."""

import inspect
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

import peft
import torch
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastpref.config import is_pattern
from fastpref.model.body import body_of
from fastpref.model.experts.kinds import shape_of

OUTSIDE = "outside of the language model, which alone is trained here"
_WEIGHT_READ = re.compile(
    r"self\.(\w+)\.(?:weight|bias)\b(?!\s*\[|\.(?:dtype|device|shape|data|split|chunk|ndim|size|is_\w+)\b)"
)


@dataclass(frozen=True)
class Parts:
    """A model's modules by their names."""

    model: PreTrainedModel
    modules: Mapping[str, nn.Module]
    inside: frozenset[str]  # the names of the language model and its head, through which text goes

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Parts":
        modules = {name: module for name, module in model.named_modules() if name}
        try:
            decoder = model.get_decoder()
        except (AttributeError, NotImplementedError):  # not every model's code has one
            decoder = model
        if decoder is model.get_output_embeddings():  # some models name their head "decoder"
            decoder = body_of(model)
        wholes = [decoder, model.get_output_embeddings(), model.get_input_embeddings()]
        ids = {id(module) for whole in wholes if whole is not None for module in whole.modules()}
        return cls(model, modules, frozenset(name for name, module in modules.items() if id(module) in ids))

    @property
    def linear_names(self) -> str:
        names = {name.rpartition(".")[2] for name in linear_layers(self.model) if name in self.inside}
        return f"this model's linear modules are {', '.join(sorted(names))}"

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the language model's modules, by their full names."""
        return {
            f"{name}.{own}": parameter
            for name in sorted(self.inside)
            for own, parameter in self.modules[name].named_parameters(recurse=False)
        }

    def experts(self) -> set[str]:
        """Return the names of parameters that hold the weights of all experts of a layer."""
        three_dimensional = [name for name, parameter in self.parameters().items() if len(shape_of(parameter)) == 3]
        kinds = {name: type(self.modules[owner_of(name)]).__name__ for name in three_dimensional}
        return {name for name, kind in kinds.items() if "expert" in f"{name} {kind}".lower()}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that PEFT's "all-linear" selects, and the head, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def adaptable_layers(
    layers: Mapping[str, nn.Module], settings: peft.LoraConfig, parts: Parts, left_out: dict[str, set[str]]
) -> set[str]:
    """Return the names of the layers that PEFT can adapt and that compute the same as a linear layer."""
    chosen = set()
    for name, layer in layers.items():
        owner, _, own = name.rpartition(".")
        if owner and own in _read_past(type(parts.modules[owner])):  # for example for a kernel, past an adapter
            leave_out(left_out, "the model's code may read their weight without calling them", {name})
        elif _is_refused(name, settings, parts.model):
            leave_out(left_out, f"PEFT cannot adapt them in {parts.model.config.model_type} models", {name})
        elif isinstance(layer, nn.Linear) and not _is_plain(layer):
            leave_out(left_out, f"{type(layer).__name__} computes something else than a linear layer", {name})
        else:
            chosen.add(name)
    return chosen


def _is_refused(name: str, settings: peft.LoraConfig, model: PreTrainedModel) -> bool:
    """Return whether PEFT refuses a module of this model's family by its name."""
    check = getattr(LoraModel, "_check_target_module_compatiblity", lambda *_: None)  # PEFT's spelling
    try:
        check(object.__new__(LoraModel), settings, model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


@cache
def _read_past(kind: type) -> frozenset[str]:
    """Return the names of layers whose weight or bias a module's code reads as a tensor while it computes."""
    names: set[str] = set()
    for name, function in inspect.getmembers(kind, inspect.isfunction) if _is_model_code(kind) else ():
        if not name.startswith(("__init", "_init", "reset_", "init_")):
            with suppress(OSError, TypeError):  # the function was made while the program runs
                names |= set(_WEIGHT_READ.findall(inspect.getsource(function)))
    return frozenset(names)


def _is_plain(layer: nn.Linear) -> bool:
    """Return whether a layer of a class of the model returns one tensor, as a linear layer of its size does."""
    if type(layer).forward is nn.Linear.forward or not _is_model_code(type(layer)):
        return True
    weight = layer.weight
    try:
        with torch.no_grad():
            out = layer(torch.zeros(1, layer.in_features, dtype=weight.dtype, device=weight.device))
    except Exception:  # it wants another input
        return False
    return isinstance(out, torch.Tensor) and out.shape == (1, layer.out_features)


def _is_model_code(kind: type) -> bool:
    return kind.__module__.startswith(("transformers.models.", "transformers_modules."))


def is_one_layer(module: nn.Module) -> bool:
    """Return whether a module is a single layer with a matrix, and not a block, a function or a norm."""
    packed = any(hasattr(module, name) for name in ("qweight", "weight_packed", "W_q"))  # GPTQ and similar methods
    weight = getattr(module, "weight", None)
    matrix = isinstance(weight, torch.Tensor) and weight.dim() > 1
    return matrix or packed or isinstance(module, nn.MultiheadAttention)


def leave_out(left_out: dict[str, set[str]], why: str, names: Iterable[str]) -> None:
    """Add names to those that are left out for a reason."""
    if names := set(names):
        left_out.setdefault(why, set()).update(names)


def owner_of(parameter: str) -> str:
    """Return the name of the module that holds a parameter."""
    return parameter.rpartition(".")[0]


def short_names(names: Iterable[str]) -> str:
    """Return at most four names, with a star for the numbers of layers, and how many more there are."""
    alike = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names})
    return ", ".join(alike[:4]) + (f" and {len(alike) - 4} more" if len(alike) > 4 else "")


def matches(entry: str, name: str) -> bool:
    """Return whether an entry matches, as in PEFT: a pattern matches a module's whole name, a name matches its end."""
    return re.fullmatch(entry, name) is not None if is_pattern(entry) else ends(name, entry)


def ends(name: str, end: str) -> bool:
    """Return whether a name ends in whole parts of it."""
    return f".{name}".endswith(f".{end}")


def unknown(entry: str, parts: Parts) -> str:
    """Return the message about an entry that matches no module, with what it may have meant."""
    known = sorted({name.rpartition(".")[2] for name in parts.inside if not name.rpartition(".")[2].isdecimal()})
    near = (
        get_close_matches(entry.rpartition(".")[2], [*known, "all-linear"], n=1, cutoff=0.6)
        if not is_pattern(entry)
        else []
    )
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    example = next((name for name in linear_layers(parts.model) if name in parts.inside), None)
    whole = f"; a pattern is matched with the whole name of a layer, such as {example}" if is_pattern(entry) else ""
    return f"this {parts.model.config.model_type} model has no layer {entry!r}{hint}{whole}; {parts.linear_names}"
