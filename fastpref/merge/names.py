"""Map the tensors in a model's files to those of the model, by transformers' own weight conversion.

Files may use other names than the model in memory (an additional or missing prefix, older names), or hold its tensors
in parts (single experts, which are fused in memory). transformers converts while it loads, and back while it saves.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, __version__
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from fastpref.errors import UserError, one_line
from fastpref.merge.checkpoint import Entry


@dataclass(frozen=True)
class Group:
    """Tensors of the files that are converted together to tensors of the model, mostly one to one."""

    sources: Mapping[str, str]  # name in the files → pattern that it has matched, in transformers' order
    targets: tuple[str, ...]  # names in the model
    converter: WeightConverter | None = None  # None if a tensor is only renamed


class Names:
    """The groups for a model on the meta device and the tensors in its files."""

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, Entry]):
        self._model: Any = model
        self._entries = tensors
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
        conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        groups = self._groups(tensors)
        own = conversions[: len(get_model_conversion_mapping(model, add_legacy=False))]
        prefixes = [c for c in own if isinstance(c, PrefixChange) and not c.was_used()]
        older = any(c.was_used() for c in own)
        self._naming = [c for c in own if c not in prefixes] if older else []  # for tensors that are not in the files
        self._used = [c for c in conversions if c.was_used()]  # the conversions that saving reverts after loading
        self.by_target = {target: group for group in groups for target in group.targets}
        self.by_source = {source: group for group in groups for source in group.sources}
        self.missing = [name for name in self._shapes if name not in self.by_target]
        self.unexpected = [name for name in tensors if name not in self.by_source]

    def to_model(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a group's tensors of the files to those of the model, by their names there."""
        if group.converter is None:
            (source,), (target,) = group.sources, group.targets
            return {target: tensors[source]}
        converter = deepcopy(group.converter)
        for source, pattern in group.sources.items():
            converter.add_tensor(group.targets[0], source, pattern, tensors[source])  # pyright: ignore[reportArgumentType]
        values = converter.convert(group.targets[0], model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}

    def to_files(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert tensors back. Raises UserError if transformers does not restore the names and shapes of the files."""
        if group.converter is None:
            (source,), (target,) = group.sources, group.targets
            return {source: tensors[target]}
        reverted = {
            next((spelling for spelling in self._spellings(name) if spelling in group.sources), name): tensor
            for name, tensor in self._reverted(tensors, self._used).items()
        }
        expected = {name: self._entries[name].shape for name in group.sources}
        if {name: tuple(tensor.shape) for name, tensor in reverted.items()} != expected:
            raise UserError(
                f"transformers {__version__} reads {', '.join(list(expected)[:2])} of its files as "
                f"{', '.join(group.targets)}, and does not write them back as they were"
            )
        return reverted

    def fault(self, target: str) -> str | None:
        """Return why a tensor of the model cannot be read from the files and written back, or None."""
        group = self.by_target.get(target)
        if group is None:
            return f"none of its files holds {target}"
        if group.converter is None:
            (source,) = group.sources
            entry, shape = self._entries[source], self._shapes[target]
            # bitsandbytes quantises the weight of a Conv1D transposed.
            if entry.shape != shape and not (entry.statistics and entry.shape == shape[::-1]):
                return f"{source} in its files is {list(entry.shape)}, and {list(shape)} in the model"
            return None
        try:
            values = self.to_model(group, self._meta(group))
            self.to_files(group, values)
        except UserError as error:
            return str(error)
        except Exception as error:  # an operation of a conversion may raise anything
            return f"transformers {__version__} cannot convert {target}: {one_line(error)}"
        wrong = [name for name, value in values.items() if tuple(value.shape) != self._shapes.get(name)]
        return f"its files' tensors do not make {wrong[0]} of the model" if wrong else None

    def in_files(self, target: str) -> str:
        """Return the name that a tensor of the model has, or would have, in the files."""
        group = self.by_target.get(target)
        if group is not None and len(group.sources) == 1:
            return next(iter(group.sources))
        names = list(self._reverted({target: torch.empty(0, device="meta")}, self._naming))
        spellings = [n for name in names for n in self._spellings(name) if self._target(n)[0] == target]
        return spellings[0] if spellings else target

    def _groups(self, tensors: Iterable[str]) -> list[Group]:
        """Collect the groups as transformers' `convert_and_load_state_dict_in_model` does."""
        converters = {pattern: c for c in self._converters for pattern in c.source_patterns}
        renamed: list[Group] = []
        converted: dict[str, Group] = {}
        for source in sorted(tensors, key=dot_natural_key):
            target, pattern = self._target(source)
            if target not in self._shapes:
                continue  # the model does not have this tensor, so loading skips it
            if pattern is None:
                renamed.append(Group({source: source}, (target,)))
                continue
            group = converted.setdefault(target, Group({}, (target,), converters[pattern]))
            converted[target] = replace(group, sources={**group.sources, source: pattern})
        return renamed + [replace(group, targets=self._all_targets(group)) for group in converted.values()]

    def _target(self, source: str) -> tuple[str, str | None]:
        """Return the model's name for a tensor of the files, and the pattern of its converter."""
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(source, self._renamings, self._converters, prefix, self._shapes)
        if target not in self._shapes and source in self._shapes:
            target, pattern = rename_source_key(source, [], [], prefix, self._shapes)
        return target, pattern

    def _reverted(self, tensors: Mapping[str, Tensor], conversions: list[WeightTransform]) -> dict[str, Tensor]:
        self._model._weight_conversions = conversions
        return revert_weight_conversion(self._model, dict(tensors))

    def _all_targets(self, group: Group) -> tuple[str, ...]:
        """Return a conversion's names in the model; transformers' own map gives only the first."""
        try:
            return tuple(self.to_model(group, self._meta(group)))
        except Exception:  # `fault` reports it if it matters
            return group.targets

    def _meta(self, group: Group) -> dict[str, Tensor]:
        return {name: torch.empty(self._entries[name].shape, device="meta") for name in group.sources}

    def _spellings(self, name: str) -> tuple[str, str, str]:
        """Return a name as it is, without and with the base model's prefix, which loading adds or removes."""
        prefix = f"{self._model.base_model_prefix}."
        return name, name.removeprefix(prefix), f"{prefix}{name}"
