"""Fresh adapters, and the choice of the modules that get one.

PEFT itself decides which layers it can adapt. Modules that it would silently adapt or drop become a note or an error.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
from bitsandbytes.nn import Linear8bitLt
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from fastpref.config import Config, LoraConfig, is_pattern
from fastpref.errors import UserError
from fastpref.model.adapters.begin import begin, halves, needs_layers
from fastpref.model.adapters.fused import fuse_lora
from fastpref.model.adapters.parts import (
    OUTSIDE,
    Parts,
    adaptable_layers,
    ends,
    is_one_layer,
    leave_out,
    linear_layers,
    matches,
    owner_of,
    short_names,
    unknown,
)
from fastpref.model.adapters.patterns import left_out_layers, peft_pattern
from fastpref.model.adapters.token_rows import fuse_tokens, train_tokens
from fastpref.model.adapters.whole import train_in_float32
from fastpref.model.failure import is_out_of_memory, words

_ALL = "all-linear"
_ROUTER = re.compile(r"(^|[._])(router|gate|gating)($|[._])")
_OLD_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # of an expert's layers
_ROUTERS = "routers, which choose between experts"


def with_adapters(
    config: Config,
    model: PreTrainedModel,
    originals: Callable[[], nn.Module] | None = None,
    tokens: tuple[int, ...] = (),
) -> PreTrainedModel | peft.PeftModel:
    """Put fresh adapters on the model's modules if the config has a [lora] table. What is trained then is float32.

    `originals` loads the model without quantization, for `lora.init = "loftq"`. The rows of `tokens`, which are new,
    are trained too. Raises UserError for modules that the model does not have, or that PEFT cannot adapt.
    """
    if config.lora is None:
        return model
    linear = sorted({name.rpartition(".")[2] for name in linear_layers(model)})  # before PEFT changes the model
    settings, _ = _plan(config.lora, model)
    if tokens:
        train_tokens(settings, tokens, model)
    try:
        wrapped = peft.get_peft_model(model, settings)
    except Exception as error:  # PEFT and model code raise many kinds of errors
        if is_out_of_memory(error):
            raise
        message = words(error).rstrip(".")
        raise UserError(f"lora: {message}. This model's linear modules are {', '.join(linear)}") from None
    assert isinstance(wrapped, peft.PeftModel)
    begin(config.lora, wrapped, originals)
    train_in_float32(wrapped)
    fuse_lora(wrapped)
    fuse_tokens(wrapped)
    return wrapped


def adapter_notes(config: Config, model: PreTrainedModel) -> list[str]:
    """Return at most one note, on modules that `with_adapters` leaves out and why. Raises the same errors."""
    fresh = config.lora is not None and not config.lora.continues
    left_out = _plan(config.lora, model)[1] if fresh and config.lora is not None else {}
    parts = [f"{short_names(names)} ({why})" for why, names in left_out.items()]
    return [f"lora: no adapters on {'; '.join(parts)}"] if parts else []


def planned(options: LoraConfig, model: PreTrainedModel) -> peft.LoraConfig:
    """Return the settings with which PEFT puts fresh adapters on a model. Raises the errors of `with_adapters`."""
    return _plan(options, model)[0]


# --- which modules ----------------------------------------------------------------------------------------------------


def _plan(options: LoraConfig, model: PreTrainedModel) -> tuple[peft.LoraConfig, dict[str, set[str]]]:
    """Return the settings for PEFT, and the names of the modules that they leave out, by the reason."""
    if options.dora and any(isinstance(m, Linear8bitLt) and m.weight.device.type == "cpu" for m in model.modules()):
        raise UserError(
            "lora.dora: PEFT loses the scales of weights in int8 when it computes DoRA on a CPU; leave lora.dora out, "
            'or set model.quantization to "nf4"'
        )
    # A frozen half keeps its scaling: that of rsLoRA is alpha/√rank.
    ranks, alphas = halves(options), halves(options) ** (0.5 if options.rslora else 1)
    rank, alpha = options.rank * ranks, options.alpha * alphas
    sizes: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": options.dropout}
    sizes["init_lora_weights"] = options.init if options.init == "gaussian" else True
    settings = peft.LoraConfig(**sizes, use_rslora=options.rslora, use_dora=options.dora, task_type="CAUSAL_LM")
    parts = Parts.of(model)
    settings.modules_to_save = _modules_to_save(options, parts)
    excluded = _excluded(options.exclude, parts) | left_out_layers(options, parts)
    wanted = [options.target] if isinstance(options.target, str) else options.target
    every, entries = _ALL in wanted, [entry for entry in wanted if entry != _ALL]

    left_out: dict[str, set[str]] = {}
    targets, fused = _targets(every, entries, settings, parts), parts.experts()
    experts = {n: short for n, short in targets.parameters.items() if not {n, owner_of(n)} & excluded}
    chosen = _all_linear(settings, parts, left_out) if every else set()
    chosen |= _named(entries, targets.names, settings, parts, left_out)
    chosen -= excluded
    obstacle = _no_experts(options)
    if experts and obstacle and not every:
        key = "lora.dropout" if options.dropout else "lora.dora" if options.dora else "lora.init"
        raise UserError(
            f"lora.target: {short_names(experts)} are experts, whose adapters in PEFT know no {obstacle}: leave out "
            f"{key}, or the experts; {parts.linear_names}"
        )
    if every:
        leave_out(left_out, _ROUTERS, {name for name in experts if name not in fused})
        experts = {name: short for name, short in experts.items() if name in fused}
        if obstacle:
            leave_out(left_out, f"PEFT's adapters of experts know no {obstacle}", experts)
            experts = {}
        elif not experts:
            bare = {name for name in fused if not {name, owner_of(name)} & excluded}
            leave_out(left_out, "PEFT counts the experts of this model among no linear layers", bare)
    kept = set(_converted(settings, model, chosen).target_modules or ())
    leave_out(left_out, "PEFT takes their names for the experts'", chosen - kept)
    if not kept and not experts:
        reasons = "; ".join(f"{short_names(names)}: {why}" for why, names in left_out.items())
        because = f" ({reasons})" if reasons else ""
        raise UserError(f"lora.target: nothing is left to adapt{because}; {parts.linear_names}")
    settings.target_modules = kept  # pyright: ignore[reportAttributeAccessIssue]
    own_ranks, own_alphas = (targets.ranks, targets.alphas) if experts else ({}, {})
    if experts:
        settings.target_parameters = sorted(_shortest(experts, parts))
    adapted = {*kept, *experts}
    entries = {name: value * ranks for name, value in options.rank_pattern.items()}
    settings.rank_pattern = peft_pattern("rank_pattern", entries, rank, adapted, own_ranks, parts)
    entries = {name: value * alphas for name, value in options.alpha_pattern.items()}
    settings.alpha_pattern = peft_pattern("alpha_pattern", entries, alpha, adapted, own_alphas, parts)
    return settings, left_out


def _no_experts(options: LoraConfig) -> str | None:
    """Return what PEFT's adapters of experts do not know of these options, or None."""
    if options.dropout or options.dora:
        return "dropout" if options.dropout else "DoRA"
    return f"lora.init = {options.init!r}" if needs_layers(options) else None


# --- experts, which PEFT finds by the names of their layers in transformers 4, or by those of their parameters --------


@dataclass
class _Targets:
    """Targets for the parameters that hold a layer's experts."""

    parameters: dict[str, str]  # full name → the end of it, which PEFT uses
    names: set[str]  # entries that mean such a parameter
    ranks: dict[str, Any]
    alphas: dict[str, Any]


def _targets(every: bool, entries: Iterable[str], settings: peft.LoraConfig, parts: Parts) -> _Targets:
    patterns = [entry for entry in entries if is_pattern(entry)]
    plain, own = set(entries) - set(patterns), parts.parameters()
    targets = _Targets({}, set(), {}, {})
    for target in [*([_ALL] if every else []), *([plain] if plain else []), *patterns]:
        converted = _converted(settings, parts.model, target)
        targets.ranks.update(converted.rank_pattern or {})
        targets.alphas.update(converted.alpha_pattern or {})
        for short in converted.target_parameters or ():
            full = {name for name in own if ends(name, short)}
            if target in patterns:
                full = {name for name in full if _means(str(target), name)}
                targets.names |= {str(target)} if full else set()
            targets.parameters.update(dict.fromkeys(full, short))
        if isinstance(target, set):
            targets.names |= target - set(converted.target_modules or ())
    for entry in [*plain, *patterns]:
        named = _named_experts(entry, parts)
        targets.names |= {entry} if named else set()
        targets.parameters = {name: ".".join(name.split(".")[-2:]) for name in named} | targets.parameters
    return targets


def _named_experts(entry: str, parts: Parts) -> set[str]:
    """Return the parameters of experts that an entry names, or all of a module of experts that it names.

    A name that is also a linear layer's means only that, as in PEFT.
    """
    if is_pattern(entry):
        return {name for name in parts.experts() if re.fullmatch(entry, name)}
    if any(ends(name, entry) and is_one_layer(module) for name, module in parts.modules.items()):
        return set()
    return {name for name in parts.experts() if ends(name, entry) or ends(owner_of(name), entry)}


def _means(pattern: str, parameter: str) -> bool:
    """Return whether a pattern matches a parameter of experts, or an expert's layer by its name in transformers 4."""
    owner = owner_of(parameter)
    names = (parameter, owner, *(f"{owner}.{name}" for name in _OLD_NAMES))
    return any(re.fullmatch(pattern, name) for name in names)


def _converted(settings: peft.LoraConfig, model: PreTrainedModel, target: str | set[str]) -> peft.LoraConfig:
    """Return the settings as PEFT converts them for a model whose layers transformers has fused. Raises UserError."""
    changed = copy.copy(settings)
    changed.target_modules = target if isinstance(target, str) else set(target)  # pyright: ignore[reportAttributeAccessIssue]
    changed.target_parameters, changed.rank_pattern, changed.alpha_pattern = None, {}, {}
    try:
        convert_peft_config_for_transformers(changed, model, None)
    except ValueError as error:
        raise UserError(f"lora.target: {words(error)}") from None
    return changed


def _shortest(experts: Mapping[str, str], parts: Parts) -> set[str]:
    """Return names for PEFT that match exactly these parameters: a common end, if all parameters with it are chosen."""
    others = parts.parameters().keys() - experts.keys()
    ambiguous = {short for short in set(experts.values()) if any(ends(name, short) for name in others)}
    return {name if short in ambiguous else short for name, short in experts.items()}


# --- linear layers ----------------------------------------------------------------------------------------------------


def _all_linear(settings: peft.LoraConfig, parts: Parts, left_out: dict[str, set[str]]) -> set[str]:
    """Return the language model's linear layers that PEFT can adapt, except its head."""
    head = parts.model.get_output_embeddings()
    layers = {name: layer for name, layer in linear_layers(parts.model).items() if layer is not head}
    leave_out(left_out, OUTSIDE, layers.keys() - parts.inside)
    config = parts.model.config.get_text_config().to_dict()
    sizes = {1, *(count for key, count in config.items() if key.endswith("experts") and isinstance(count, int))}
    inside = {name: layer for name, layer in layers.items() if name in parts.inside}
    routers = {n for n, layer in inside.items() if _ROUTER.search(n) and getattr(layer, "out_features", 0) in sizes}
    leave_out(left_out, _ROUTERS, routers)
    return adaptable_layers({n: inside[n] for n in inside if n not in routers}, settings, parts, left_out)


# --- names and patterns -----------------------------------------------------------------------------------------------


def _named(
    entries: Iterable[str], experts: set[str], settings: peft.LoraConfig, parts: Parts, left_out: dict[str, set[str]]
) -> set[str]:
    """Return the modules that names and patterns match. Raises UserError for an entry that matches none."""
    chosen: set[str] = set()
    for entry in entries:
        hits = {name for name in parts.modules if matches(entry, name)}
        layers = {name for name in hits if is_one_layer(parts.modules[name])}
        if not layers and entry not in experts:
            if not hits or is_pattern(entry):
                raise UserError(f"lora.target: {unknown(entry, parts)}")
            inner = linear_layers(parts.model).keys() & _inside(hits, parts)
            names = ", ".join(sorted({name.rpartition(".")[2] for name in inner}))
            advice = f"; name the layers in it: {names}" if inner else ""
            raise UserError(f"lora.target: {entry} is no linear layer{advice}")
        inside = layers & parts.inside
        if layers and not inside:
            raise UserError(f"lora.target: {entry} names {short_names(layers)}, {OUTSIDE}")
        leave_out(left_out, OUTSIDE, layers - inside)
        refused: dict[str, set[str]] = {}
        adaptable = adaptable_layers({name: parts.modules[name] for name in inside}, settings, parts, refused)
        if refused and not adaptable:
            raise UserError(f"lora.target: {entry} names {short_names(inside)}: {next(iter(refused))}")
        for why, names in refused.items():
            leave_out(left_out, why, names)
        chosen |= adaptable
    return chosen


def _excluded(entries: Iterable[str], parts: Parts) -> set[str]:
    """Return the modules that names and patterns exclude, with all modules inside them."""
    excluded: set[str] = set()
    for entry in entries:
        hits = {name for name in [*parts.modules, *parts.experts()] if matches(entry, name)}
        if not hits:
            raise UserError(f"lora.exclude: {unknown(entry, parts)}")
        excluded |= hits | _inside(hits, parts)
    return excluded


def _inside(owners: set[str], parts: Parts) -> set[str]:
    """Return the modules inside these modules."""
    return {name for name in parts.modules if any(name.startswith(f"{owner}.") for owner in owners)}


def _modules_to_save(options: LoraConfig, parts: Parts) -> list[str] | None:
    names: list[str] = []
    for entry in options.modules_to_save:
        hits = {name for name in parts.modules if name.endswith(entry)}  # as PEFT matches them
        if not hits:
            raise UserError(f"lora.modules_to_save: {unknown(entry, parts)}")
        if not hits & parts.inside:
            raise UserError(f"lora.modules_to_save: {entry} names {short_names(hits)}, {OUTSIDE}")
        names += [entry] if hits <= parts.inside else sorted(hits & parts.inside)
    return names or None
