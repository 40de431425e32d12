"""The decoder layers that get adapters, and modules whose adapters have another rank or alpha.

The same words as in `lora.target` name modules. PEFT matches its own patterns otherwise, so it gets whole names where
the two would differ.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peft.utils.other import get_pattern_key

from fastpref.config import LoraConfig
from fastpref.config.layers import places
from fastpref.errors import UserError
from fastpref.model.adapters.parts import Parts, matches, short_names, unknown
from fastpref.model.gradient_checkpointing import decoder_layers


def left_out_layers(options: LoraConfig, parts: Parts) -> set[str]:
    """Return the names of the modules inside decoder layers that `lora.layers` leaves out.

    Raises UserError for an index that the model does not have, and for a slice without layers.
    """
    if not options.layers:
        return set()
    layers = {id(layer) for layer in decoder_layers(parts.model)}
    names = [name for name, module in parts.modules.items() if id(module) in layers and name in parts.inside]
    if not names:
        raise UserError(f"lora.layers: the code of {parts.model.config.model_type} models does not tell its layers")
    chosen = {place for entry in options.layers for place in places(entry, len(names))}
    others = tuple(f"{name}." for place, name in enumerate(names) if place not in chosen)
    return {name for name in parts.modules if name.startswith(others)}


def peft_pattern(
    key: str,
    entries: Mapping[str, Any],
    default: Any,
    adapted: Collection[str],
    experts: Mapping[str, Any],
    parts: Parts,
) -> dict[str, Any]:
    """Return PEFT's `rank_pattern` or `alpha_pattern` for the entries of the config.

    Args:
        key: of the config, for messages.
        default: the value of modules that no entry matches.
        adapted: whole names of the layers and of the parameters that get an adapter.
        experts: PEFT's own entries for parameters that hold several matrices: a multiple of the default.

    Raises UserError for an entry that matches no module, none with an adapter, or only those of earlier entries.
    """
    values: dict[str, Any] = {}
    for entry, value in entries.items():
        hits = {name for name in adapted if matches(entry, name)}
        if not hits:
            there = {name for name in parts.modules if matches(entry, name)}
            if not there:
                raise UserError(f"lora.{key}: {unknown(entry, parts)}")
            raise UserError(f"lora.{key}: {entry} names {short_names(there)}, which get no adapter of their own")
        if not hits - values.keys():
            raise UserError(f"lora.{key}: {entry} changes nothing: earlier entries match all of its modules")
        values |= dict.fromkeys(hits - values.keys(), value)
    multiples = {name: value / default for name, value in _given(experts, default, adapted).items()}
    wanted = {name: type(default)(values.get(name, default) * multiple) for name, multiple in multiples.items()}
    short = {**entries, **experts}
    if _given(short, default, wanted) == wanted:
        return short
    return {re.escape(name): wanted[name] for name in sorted(values)} | dict(experts)


def _given(pattern: Mapping[str, Any], default: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the values that PEFT gives to modules by a pattern."""
    return {name: pattern.get(get_pattern_key(list(pattern), name), default) for name in names}
