"""Fresh adapters, and which modules of a model get one.

Which layers PEFT can adapt is asked of PEFT itself; what it would take without a word, or drop, is told or refused.
"""

import copy
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

import peft
import torch
from bitsandbytes.nn import Linear8bitLt
from peft.tuners.lora import LoraModel
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastpref.config import Config, LoraConfig, is_pattern
from fastpref.errors import UserError
from fastpref.model.adapters.fused import fuse_lora
from fastpref.model.body import body_of
from fastpref.model.failure import is_out_of_memory, words

_ALL = "all-linear"
_ROUTER = re.compile(r"(^|[._])(router|gate|gating)($|[._])")
_OLD_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # of an expert's layers
_OUTSIDE = "outside of the language model, which alone is trained here"
_WEIGHT_READ = re.compile(
    r"self\.(\w+)\.(?:weight|bias)\b(?!\s*\[|\.(?:dtype|device|shape|data|split|chunk|ndim|size|is_\w+)\b)"
)
_ROUTERS = "routers, which choose between experts"


def with_adapters(config: Config, model: PreTrainedModel) -> PreTrainedModel | peft.PeftModel:
    """Fresh adapters in the model's modules, if the config has a [lora] table.

    Raises UserError for modules that the model has not, or that PEFT cannot adapt.
    """
    options = config.lora
    if options is None:
        return model
    linear = sorted({name.rpartition(".")[2] for name in _linear(model)})  # before PEFT changes the model
    plan = _plan(options, model)
    try:
        wrapped = peft.get_peft_model(model, plan.settings)
    except Exception as error:  # PEFT raises many kinds, and so does model code
        if is_out_of_memory(error):
            raise
        message = words(error).rstrip(".")
        raise UserError(f"lora: {message}. This model's linear modules are {', '.join(linear)}") from None
    assert isinstance(wrapped, peft.PeftModel)
    fuse_lora(wrapped)
    return wrapped


def adapter_notes(config: Config, model: PreTrainedModel) -> list[str]:
    """What `with_adapters` will leave out of a plain model, and why, in one note or none. Raises as it does."""
    return [] if config.lora is None else _plan(config.lora, model).notes


# --- which modules ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """A model's modules by their names."""

    model: PreTrainedModel
    modules: Mapping[str, nn.Module]
    inside: frozenset[str]  # of the language model and its head: what text goes through

    @classmethod
    def of(cls, model: PreTrainedModel) -> "_Parts":
        modules = {name: module for name, module in model.named_modules() if name}
        try:
            decoder = model.get_decoder()
        except (AttributeError, NotImplementedError):  # not every model's code has one
            decoder = model
        if decoder is model.get_output_embeddings():  # a head by that name
            decoder = body_of(model)
        wholes = [decoder, model.get_output_embeddings(), model.get_input_embeddings()]
        ids = {id(module) for whole in wholes if whole is not None for module in whole.modules()}
        return cls(model, modules, frozenset(name for name, module in modules.items() if id(module) in ids))

    @property
    def head(self) -> nn.Module | None:
        return self.model.get_output_embeddings()

    @property
    def linear_names(self) -> str:
        names = {name.rpartition(".")[2] for name in _linear(self.model) if name in self.inside}
        return f"this model's linear modules are {', '.join(sorted(names))}"

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that modules of the language model hold themselves."""
        return {
            f"{name}.{own}": parameter
            for name in sorted(self.inside)
            for own, parameter in self.modules[name].named_parameters(recurse=False)
        }

    def experts(self) -> set[str]:
        """The experts' weights, where one parameter holds all of a layer's."""
        return {
            name
            for name, parameter in self.parameters().items()
            if parameter.dim() == 3 and "expert" in f"{name} {type(self.modules[_owner(name)]).__name__}".lower()
        }


@dataclass(frozen=True)
class _Plan:
    settings: peft.LoraConfig
    left_out: Mapping[str, set[str]]  # names by the reason

    @property
    def notes(self) -> list[str]:
        parts = [f"{short_names(names)} ({why})" for why, names in self.left_out.items()]
        return [f"lora: no adapters on {'; '.join(parts)}"] if parts else []


def _plan(options: LoraConfig, model: PreTrainedModel) -> _Plan:
    if options.dora and any(isinstance(m, Linear8bitLt) and m.weight.device.type == "cpu" for m in model.modules()):
        raise UserError(
            "lora.dora: PEFT loses the scales of weights in int8 when it computes DoRA on a CPU; leave lora.dora out, "
            'or set model.quantization to "nf4"'
        )
    parts, settings = _Parts.of(model), _settings(options)
    settings.modules_to_save = _modules_to_save(options, parts)
    excluded = _excluded(options.exclude, parts)
    every = _ALL in ((options.target,) if isinstance(options.target, str) else options.target)
    entries = () if isinstance(options.target, str) else tuple(e for e in options.target if e != _ALL)

    left_out: dict[str, set[str]] = {}
    targets, fused = _targets(every, entries, settings, parts), parts.experts()
    experts = {name: short for name, short in targets.parameters.items() if _owner(name) not in excluded}
    chosen = _all_linear(settings, parts, left_out) if every else set()
    chosen |= _named(entries, targets.names, settings, parts, left_out)
    chosen -= excluded
    if every:
        _add(left_out, _ROUTERS, {name for name in experts if name not in fused})
        experts = {name: short for name, short in experts.items() if name in fused}
        obstacle = "dropout" if options.dropout else "DoRA" if options.dora else None
        if obstacle is not None:
            _add(left_out, f"PEFT's adapters of experts know no {obstacle}", experts)
            experts = {}
        elif not experts:
            bare = {name for name in fused if _owner(name) not in excluded}
            _add(left_out, "PEFT counts the experts of this model among no linear layers", bare)
    kept = set(_converted(settings, model, chosen).target_modules or ())
    _add(left_out, "PEFT takes their names for the experts'", chosen - kept)
    if not kept and not experts:
        reasons = "; ".join(f"{short_names(names)}: {why}" for why, names in left_out.items())
        raise UserError(
            f"lora.target: nothing is left to adapt{f' ({reasons})' if reasons else ''}; {parts.linear_names}"
        )
    settings.target_modules = kept  # pyright: ignore[reportAttributeAccessIssue]
    if experts:
        settings.target_parameters = sorted(_shortest(experts, parts))
        settings.rank_pattern, settings.alpha_pattern = targets.ranks, targets.alphas
    return _Plan(settings, left_out)


def _settings(options: LoraConfig) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        use_dora=options.dora,
        task_type="CAUSAL_LM",
    )


# --- the experts, which PEFT finds by the names that their layers had in transformers 4 -------------------------------


@dataclass(frozen=True)
class _Targets:
    """What PEFT makes of targets for parameters that hold a layer's experts."""

    parameters: Mapping[str, str]  # names, and the end of them that PEFT gives them all
    names: frozenset[str]  # entries that mean such a parameter
    ranks: dict[str, Any]
    alphas: dict[str, Any]


def _targets(every: bool, entries: Iterable[str], settings: peft.LoraConfig, parts: _Parts) -> _Targets:
    patterns = [entry for entry in entries if is_pattern(entry)]
    plain = {entry for entry in entries if not is_pattern(entry)}
    own = parts.parameters()
    parameters: dict[str, str] = {}
    ranks, alphas = {}, {}
    names: set[str] = set()
    for target in [*([_ALL] if every else []), *([plain] if plain else []), *patterns]:
        converted = _converted(settings, parts.model, target)
        ranks |= converted.rank_pattern or {}
        alphas |= converted.alpha_pattern or {}
        for short in converted.target_parameters or ():
            full = {name for name in own if name == short or name.endswith(f".{short}")}
            if target in patterns:
                full = {name for name in full if _means(str(target), name)}
                names |= {str(target)} if full else set()
            parameters |= dict.fromkeys(full, short)
        if isinstance(target, set):
            names |= target - set(converted.target_modules or ())
    return _Targets(parameters, frozenset(names), ranks, alphas)


def _means(pattern: str, parameter: str) -> bool:
    """Whether a pattern matches a parameter of experts, or a layer of an expert by the name that it had."""
    owner, _, own = parameter.rpartition(".")
    return any(re.fullmatch(pattern, f"{owner}.{name}") for name in (own, *_OLD_NAMES)) or (
        re.fullmatch(pattern, owner) is not None
    )


def _converted(settings: peft.LoraConfig, model: PreTrainedModel, target: str | set[str]) -> peft.LoraConfig:
    """Settings as PEFT changes them for a model whose layers transformers has fused. Raises UserError."""
    changed = copy.copy(settings)
    changed.target_modules = target if isinstance(target, str) else set(target)  # pyright: ignore[reportAttributeAccessIssue]
    changed.target_parameters, changed.rank_pattern, changed.alpha_pattern = None, {}, {}
    try:
        convert_peft_config_for_transformers(changed, model, None)
    except ValueError as error:
        raise UserError(f"lora.target: {words(error)}") from None
    return changed


def _shortest(experts: Mapping[str, str], parts: _Parts) -> set[str]:
    """Names of parameters as PEFT takes them: their end where all that have it are meant."""
    own = parts.parameters()
    whole = {
        short
        for short in set(experts.values())
        if all(name in experts for name in own if name == short or name.endswith(f".{short}"))
    }
    return {short if short in whole else name for name, short in experts.items()}


# --- linear layers ----------------------------------------------------------------------------------------------------


def _linear(model: nn.Module) -> dict[str, nn.Module]:
    """What PEFT's "all-linear" counts, the head included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _all_linear(settings: peft.LoraConfig, parts: _Parts, left_out: dict[str, set[str]]) -> set[str]:
    """The language model's linear layers that PEFT can adapt, without its head."""
    layers = {name: layer for name, layer in _linear(parts.model).items() if layer is not parts.head}
    _add(left_out, _OUTSIDE, layers.keys() - parts.inside)
    sizes = _expert_counts(parts.model) | {1}
    inside = {name: layer for name, layer in layers.items() if name in parts.inside}
    routers = {n for n, layer in inside.items() if _ROUTER.search(n) and getattr(layer, "out_features", 0) in sizes}
    _add(left_out, _ROUTERS, routers)
    return _adaptable({n: layer for n, layer in inside.items() if n not in routers}, settings, parts, left_out)


def _adaptable(
    layers: Mapping[str, nn.Module], settings: peft.LoraConfig, parts: _Parts, left_out: dict[str, set[str]]
) -> set[str]:
    """Those of some layers that PEFT takes, and whose output is that of a linear layer."""
    chosen = set()
    for name, layer in layers.items():
        if _is_read_past(name, parts):
            _add(left_out, "the model's code may read their weight without calling them", {name})
        elif _refusal(name, settings, parts.model) is not None:
            _add(left_out, f"PEFT cannot adapt them in {parts.model.config.model_type} models", {name})
        elif isinstance(layer, nn.Linear) and not _is_plain(layer):
            _add(left_out, f"{type(layer).__name__} computes something else than a linear layer", {name})
        else:
            chosen.add(name)
    return chosen


def _refusal(name: str, settings: peft.LoraConfig, model: PreTrainedModel) -> str | None:
    """Why PEFT refuses a module of some families by its name, in its own words."""
    check = getattr(LoraModel, "_check_target_module_compatiblity", None)  # PEFT's spelling
    if check is None:
        return None
    try:
        check(object.__new__(LoraModel), settings, model, name.rpartition(".")[2])
    except ValueError as error:
        return words(error)
    return None


def _is_read_past(name: str, parts: _Parts) -> bool:
    """Whether the code around a layer hands its weight on, to a kernel for one, where no adapter would be met."""
    owner, _, own = name.rpartition(".")
    return own in _read_past(type(parts.modules[owner])) if owner else False


@cache
def _read_past(kind: type) -> frozenset[str]:
    """The layers whose weight or bias the code of a module reads as a tensor while it computes."""
    names: set[str] = set()
    for name, function in inspect.getmembers(kind, inspect.isfunction):
        if _is_model_code(kind) and not name.startswith(("__init", "_init", "reset_", "init_")):
            try:
                code = inspect.getsource(function)
            except (OSError, TypeError):  # made while the program runs
                continue
            names |= set(_WEIGHT_READ.findall(code))
    return frozenset(names)


def _is_plain(layer: nn.Linear) -> bool:
    """Whether a layer of a model's own class gives what a linear layer of its size does: one tensor."""
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


def _expert_counts(model: PreTrainedModel) -> set[int]:
    """Numbers of experts that a config names, by whatever key."""
    config = model.config.get_text_config().to_dict()
    return {value for key, value in config.items() if key.endswith("experts") and isinstance(value, int)}


# --- names and patterns -----------------------------------------------------------------------------------------------


def _named(
    entries: Iterable[str],
    experts: frozenset[str],
    settings: peft.LoraConfig,
    parts: _Parts,
    left_out: dict[str, set[str]],
) -> set[str]:
    """The modules that names and patterns mean. Raises UserError for one that means none."""
    chosen: set[str] = set()
    for entry in entries:
        hits = {name for name in parts.modules if _matches(entry, name)}
        layers = {name for name in hits if _has_weight(parts.modules[name])}
        if not layers and entry not in experts:
            if hits and not is_pattern(entry):
                inner = sorted(
                    {n.rpartition(".")[2] for n in _linear(parts.model) for hit in hits if n.startswith(f"{hit}.")}
                )
                advice = f"; name the layers in it: {', '.join(inner)}" if inner else ""
                raise UserError(f"lora.target: {entry} is no linear layer{advice}")
            raise UserError(f"lora.target: {_unknown(entry, parts)}")
        inside = layers & parts.inside
        if layers and not inside:
            raise UserError(f"lora.target: {entry} names {short_names(layers)}, {_OUTSIDE}")
        _add(left_out, _OUTSIDE, layers - inside)
        refused: dict[str, set[str]] = {}
        adaptable = _adaptable({name: parts.modules[name] for name in inside}, settings, parts, refused)
        if refused and not adaptable:
            raise UserError(f"lora.target: {entry} names {short_names(inside)}: {next(iter(refused))}")
        for why, names in refused.items():
            _add(left_out, why, names)
        chosen |= adaptable
    return chosen


def _has_weight(module: nn.Module) -> bool:
    """Whether it is one layer, not a block of several, nor a function or a norm."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if any(hasattr(module, name) for name in ("qweight", "weight_packed", "W_q")):  # GPTQ and its like
        return True
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() > 1


def _excluded(entries: Iterable[str], parts: _Parts) -> set[str]:
    """The modules that names and patterns leave out, with everything in them."""
    excluded: set[str] = set()
    for entry in entries:
        hits = {name for name in parts.modules if _matches(entry, name)}
        if not hits:
            raise UserError(f"lora.exclude: {_unknown(entry, parts)}")
        excluded |= hits | {name for name in parts.modules if any(name.startswith(f"{hit}.") for hit in hits)}
    return excluded


def _modules_to_save(options: LoraConfig, parts: _Parts) -> list[str] | None:
    names: list[str] = []
    for entry in options.modules_to_save:
        hits = {name for name in parts.modules if name.endswith(entry)}  # as PEFT matches them
        if not hits:
            raise UserError(f"lora.modules_to_save: {_unknown(entry, parts)}")
        if not hits & parts.inside:
            raise UserError(f"lora.modules_to_save: {entry} names {short_names(hits)}, {_OUTSIDE}")
        names += [entry] if hits <= parts.inside else sorted(hits & parts.inside)
    return names or None


def _matches(entry: str, name: str) -> bool:
    """As PEFT does: a pattern is a whole module's name, a name is its end."""
    if is_pattern(entry):
        return re.fullmatch(entry, name) is not None
    return name == entry or name.endswith(f".{entry}")


def _unknown(entry: str, parts: _Parts) -> str:
    known = sorted({name.rpartition(".")[2] for name in parts.inside if not name.rpartition(".")[2].isdecimal()})
    near = get_close_matches(entry.rpartition(".")[2], [*known, _ALL], n=1, cutoff=0.6) if not is_pattern(entry) else []
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    example = next((name for name in _linear(parts.model) if name in parts.inside), None)
    whole = f"; a pattern is matched with the whole name of a layer, such as {example}" if is_pattern(entry) else ""
    return f"this {parts.model.config.model_type} model has no layer {entry!r}{hint}{whole}; {parts.linear_names}"


def _add(left_out: dict[str, set[str]], why: str, names: Iterable[str]) -> None:
    if names := set(names):
        left_out.setdefault(why, set()).update(names)


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def short_names(names: Iterable[str]) -> str:
    """Names with a star for the numbers of layers."""
    alike = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names})
    return ", ".join(alike[:4]) + (f" and {len(alike) - 4} more" if len(alike) > 4 else "")
