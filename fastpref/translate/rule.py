"""A rule of a translation: which fields of another trainer become which keys of fastpref, and how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastpref.config.losses import LOSSES
from fastpref.translate.fields import Fields, Made, Setting, dotted

ANY = tuple(LOSSES)
"""The methods of a rule that holds for every one."""
Make = Callable[[Fields], Made]
Read = Callable[[Fields, str], Any]


@dataclass(frozen=True)
class Rule:
    """A rule that turns fields into keys. The documentation shows `how`."""

    fields: tuple[str, ...]
    keys: tuple[str, ...]
    make: Make
    how: str
    methods: tuple[str, ...] = ANY


@dataclass(frozen=True)
class Dialect:
    """A trainer whose configs are translated."""

    trainer: str
    option: str
    """The option of `fastpref init` that names such a config."""
    read: Callable[[Path, str | None], Fields]
    """Reads a config, and takes the loss that the command line names. Raises UserError."""
    rules: tuple[Rule, ...]
    reasons: Mapping[str, str]
    """Reasons why fields are left out → names of these fields, in which * stands for any text."""
    even_if_off: tuple[str, ...] = ()
    """Fields whose value `false` requests something that fastpref does not do."""

    def reason_for(self, field: str) -> str | None:
        """Return why a field without a rule is left out, or None for a field that the trainer does not have."""
        groups = (
            reason for reason, names in self.reasons.items() if any(fnmatchcase(field, name) for name in names.split())
        )
        return next(groups, None)


def rule(fields: str, keys: str, make: Make, how: str, *methods: str) -> Rule:
    """Make a rule of names that spaces separate."""
    return Rule(tuple(fields.split()), tuple(keys.split()), make, how, methods or ANY)


def same(field: str, key: str, read: Read, how: str = "the same", methods: tuple[str, ...] = ANY) -> Rule:
    """Make the rule for a field that only has another name in fastpref."""

    def make(config: Fields) -> Made:
        if field in config:
            yield Setting(dotted(key), read(config, field), (field,))

    return Rule((field,), (key,), make, how, methods)


def with_default(field: str, key: str, read: Read, default: Any, how: str = "", methods: tuple[str, ...] = ANY) -> Rule:
    """Make the rule for a field that has another name in fastpref, and another default, which is written out."""

    def make(config: Fields) -> Made:
        if field in config:
            yield Setting(dotted(key), read(config, field), (field,))
        else:
            yield Setting(dotted(key), default, (), f"{config.trainer}'s default")

    return Rule((field,), (key,), make, how or f"the same; without it {default}", methods)


def if_on(field: str, key: str, value: Any, methods: tuple[str, ...] = ANY) -> Rule:
    """Make the rule for a field that, if it is true, gives a key this value."""

    def make(config: Fields) -> Made:
        if config.on(field):
            yield Setting(dotted(key), value, (field,))

    return Rule((field,), (key,), make, f'"{value}"', methods)
