"""Support for trainers that refuse an adapter on the head, because TRL's own head would ignore it."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer

from fastpref.patch.plan import bare
from fastpref.patch.replacement import MISSING, replacement

if TYPE_CHECKING:
    from fastpref.patch import Patch


def accept_adapted_heads(patch: "Patch", module: ModuleType, original: Any) -> Any:
    """Return an `__init__` that accepts an adapter on the head, for a trainer that refuses one."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        with _accepting_adapters(module):
            original(self, *args, **kwargs)
        model = bare(self.model)
        if model is self.model or not isinstance(model.get_output_embeddings(), BaseTunerLayer):
            return
        plan = patch.plan(self, self.model)
        if plan.refused is not None:
            raise ValueError(f"Applying a PEFT adapter to `lm_head` is not supported for this model: {plan.refused}")
        _refuse_without(model)

    return __init__


@contextmanager
def _accepting_adapters(module: ModuleType) -> Iterator[None]:
    """Hide from a trainer's module that a layer belongs to an adapter."""
    hidden = replacement(module, "BaseTunerLayer", type("NoTunerLayer", (), {}))
    if hidden.before is MISSING:
        yield
        return
    hidden.make()
    try:
        yield
    finally:
        hidden.undo()


def _refuse_without(model: Any) -> None:
    """Make TRL's own head raise an error once the patch is removed: it would silently not train the adapter."""
    forward = model.forward

    @functools.wraps(forward)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused_lm_head"):
            raise RuntimeError("lm_head has an adapter, which TRL's head leaves out: train it with fastpref.patch(trl)")
        return forward(*args, **kwargs)

    model.forward = guarded
