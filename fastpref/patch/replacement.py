"""Replacement of attributes of TRL: methods of trainers, and functions in the namespaces of their modules."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fastpref.patch.logits import UNDERSTOOD, understanding

MISSING = object()  # stands for an attribute that a __dict__ does not hold


@dataclass(frozen=True)
class Replacement:
    """An attribute that is replaced."""

    owner: Any  # a class or a module
    name: str
    value: Any
    before: Any  # the value in the owner's __dict__ before, or MISSING

    def make(self) -> None:
        setattr(self.owner, self.name, self.value)

    def undo(self) -> None:
        if self.before is MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


def replacement(owner: Any, name: str, value: Any) -> Replacement:
    return Replacement(owner, name, value, vars(owner).get(name, MISSING))


def replace_method(trainer: Any, name: str, make: Callable[[Any], Any]) -> list[Replacement]:
    original = vars(trainer).get(name)
    return [] if original is None else [replacement(trainer, name, functools.wraps(original)(make(original)))]


def replace_functions_of_logits(module: ModuleType) -> list[Replacement]:
    """Replace TRL's functions of logits in the namespace of one trainer's module."""
    return [
        replacement(module, name, understanding(vars(module)[name], answer))
        for name, answer in UNDERSTOOD.items()
        if name in vars(module)
    ]
