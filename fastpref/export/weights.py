"""The trained weights of a run, an adapter or a model, one tensor of the model at a time, merged if need be."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor
from transformers import PreTrainedModel

from fastpref.errors import UserError
from fastpref.merge.adapter import adapted, merged, through_four_bits, with_adapter
from fastpref.merge.checkpoint import Checkpoint, model_folder
from fastpref.merge.names import Group
from fastpref.merge.plan import Plan, bare_model, make_plan, nf4_weights
from fastpref.model.adapters.token_rows import rows_of_tokens
from fastpref.run.trained import Trained


@dataclass(frozen=True)
class Weights:
    """The tensors of a trained model by their names in memory, of which only shapes are known until they are read."""

    plan: Plan
    shapes: dict[str, tuple[int, ...]]
    onto: str | None  # which weights an adapter is merged into, in words

    @property
    def names(self) -> list[str]:
        """The names in the model's order. A head is among them only if it is not the embeddings."""
        tied = self.plan.tied and not self.plan.untied
        return [name for name in self.shapes if not (tied and name == self.plan.head)]

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor of `names` in float32.

        Memory holds one tensor of the model, with those of the files that transformers makes it of.
        """
        groups: dict[int, dict[str, Tensor]] = {}
        for name in self.names:
            group = self.plan.names.by_target.get(name)
            if group is None:  # a head that was tied to the embeddings until it was trained
                source = self.plan.names.by_target[self.plan.embedding]
                yield name, self._trained(name, self._converted(source)[self.plan.embedding])
                continue
            if id(group) not in groups:
                groups = {id(group): self._converted(group)}
            yield name, self._trained(name, groups[id(group)].pop(name))

    def _converted(self, group: Group) -> dict[str, Tensor]:
        checkpoint = self.plan.checkpoint
        return self.plan.names.to_model(group, {name: checkpoint.read(name) for name in group.sources})

    def _trained(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            raise UserError(f"{name}: holds {tensor.dtype}, not numbers that can be written")
        value = tensor.float()
        if name in self.plan.through_nf4:
            value = through_four_bits(value)
        part = self.plan.parts.get(name)
        return value if part is None else merged(part, name, value).float()


def open_weights(trained: Trained, *, dequantized: bool | None = None) -> Weights:
    """Plan the reading of a trained model, from headers and configs alone.

    `dequantized`: as in `fastpref merge`. Raises UserError for weights that are quantised by another method than
    bitsandbytes, that are missing or do not fit, and for adapters that cannot be merged.
    """
    options = trained.config.model
    if not trained.is_adapter and trained.weights != options.name:
        options = trained.config.but({"model.name": trained.weights, "model.revision": None}).model
    model = bare_model(options)
    checkpoint = Checkpoint(model_folder(options))
    if checkpoint.method is not None and not checkpoint.dequantised:
        raise UserError(
            f"{options.name}: its weights lie quantised by {checkpoint.method}; only those of bitsandbytes can be "
            "dequantised here. Export the unquantised model"
        )
    nf4_run = trained.is_adapter and options.quantization == "nf4" and not checkpoint.dequantised
    if dequantized and not nf4_run:
        raise UserError('--dequantized: the run\'s config does not say model.quantization = "nf4"')
    nf4 = nf4_run if dequantized is None else dequantized
    parts: dict[str, Any] = {}
    if trained.is_adapter:
        with_adapter(model, trained)
        parts = adapted(model)
    plan = make_plan(options, checkpoint, parts, nf4_weights(trained.config) if nf4 else frozenset())
    bare = bare_model(options)
    weights = Weights(plan, _shapes(bare), ("nf4, dequantised" if nf4 else options.name) if parts else None)
    _check(weights, options.name)
    return replace(weights, shapes=weights.shapes | _grown(weights))


def _grown(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tables that get rows for new tokens, by the tables' names."""
    parts = {name: part for name, part in weights.plan.parts.items() if isinstance(part, TrainableTokensWrapper)}
    before = {name: weights.shapes[name] for name in parts}
    return {name: (max(rows, rows_of_tokens(parts[name])), *rest) for name, (rows, *rest) in before.items()}


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}


def _check(weights: Weights, model: str) -> None:
    """Raise UserError for a tensor that the files do not hold as the model needs it, before anything is read."""
    plan = weights.plan
    for name in weights.names:
        if name == plan.head and name not in plan.names.by_target and plan.untied:
            continue
        if name not in plan.names.by_target:
            raise UserError(f"{model}: none of its files holds {name}")
        group = plan.names.by_target[name]
        if group.converter is None:
            (source,) = group.sources
            shape = plan.checkpoint.tensors[source].shape
            if shape != weights.shapes[name]:
                raise UserError(
                    f"{model}: {source} is {list(shape)} in its files, {list(weights.shapes[name])} in the model"
                )
        else:
            meta = {n: torch.empty(plan.checkpoint.tensors[n].shape, device="meta") for n in group.sources}
            if tuple(plan.names.to_model(group, meta)[name].shape) != weights.shapes[name]:
                raise UserError(f"{model}: its files' tensors do not make {name} of the model")
