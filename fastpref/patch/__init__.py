"""`fastpref.patch(trl)` makes TRL's preference trainers work without logits and compute no beginning twice.

The package is callable: `fastpref.patch(trl)` patches TRL, and `python -m fastpref.patch script.py` runs a script with
the patch.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpref.patch.forward import Request, Scope
    from fastpref.patch.plan import Plan

__all__ = ["Patch", "patch", "unpatch"]

logger = logging.getLogger("fastpref.patch")
_patches: dict[ModuleType, "Patch"] = {}


def patch(trl: ModuleType, *, prefix_sharing: bool = True) -> "Patch":
    """Patch TRL's DPO, KTO, ORPO and CPO trainers. Losses, metrics and gradients stay the same as TRL's.

    A second call only changes the options of the patch. If a model cannot be computed faster, TRL's own code computes
    it, and the log says so once, with the reason.

    Args:
        trl: the imported module `trl`.
        prefix_sharing: whether the rows of a batch become one row without padding, in which what they share at their
            beginning is computed once. If False, rows stay as TRL makes them, and only the head is replaced.

    Returns:
        The patch, a context manager that unpatches TRL at its end.

    Raises:
        UserError: the version of TRL is not supported.
    """
    from fastpref.errors import UserError

    if not isinstance(trl, ModuleType) or trl.__name__ != "trl":
        raise UserError(f"fastpref.patch takes the module trl, got {trl!r}; import trl, then fastpref.patch(trl)")
    if trl not in _patches:
        _patches[trl] = Patch(trl, prefix_sharing)
    elif _patches[trl].prefix_sharing != prefix_sharing:
        _patches[trl].prefix_sharing = prefix_sharing
        _patches[trl]._forget_plans()
    return _patches[trl]


def unpatch(trl: ModuleType) -> None:
    """Restore every attribute of TRL. Does nothing without a patch."""
    patched = _patches.pop(trl, None)
    if patched is not None:
        patched._undo()


class Patch:
    """A patch of TRL, and a context manager that restores TRL at its end."""

    def __init__(self, trl: ModuleType, prefix_sharing: bool):
        from weakref import WeakKeyDictionary

        from fastpref.patch.report import Tally
        from fastpref.patch.trainers import find_replacements

        self.trl, self.prefix_sharing = trl, prefix_sharing
        self.tally = Tally()
        self._notes: dict[tuple[str, str], None] = {}
        self._plans: WeakKeyDictionary[Any, Plan] = WeakKeyDictionary()
        self._scopes: list[Scope] = []
        self._replacements = find_replacements(trl, self)
        for replacement in self._replacements:
            replacement.make()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        unpatch(self.trl)

    def __repr__(self) -> str:
        return f"<fastpref.Patch of trl {getattr(self.trl, '__version__', '')}: {', '.join(self.patched)}>"

    @property
    def patched(self) -> list[str]:
        """The names of the replaced attributes, such as "DPOTrainer._compute_loss"."""
        return [f"{one.owner.__name__.removeprefix('trl.')}.{one.name}" for one in self._replacements]

    @property
    def notes(self) -> list[str]:
        """The logged notes on the parts that TRL still computes, with reasons."""
        return [f"{what}: {why}" for what, why in self._notes]

    def report(self) -> str:
        """Return a text on what was patched and what the patch has saved so far."""
        from fastpref.patch.report import report

        return report(self)

    # --- for the patched methods ----------------------------------------------------------------------------------

    def say(self, what: str, why: str) -> None:
        """Log a note, once."""
        if (what, why) not in self._notes:
            self._notes[what, why] = None
            logger.warning("fastpref.patch: %s: %s", what, why)

    def plan(self, trainer: Any, wrapped: Any) -> "Plan":
        """Return how a model is computed, which is determined at its first call."""
        from fastpref.patch.plan import NOT_WANTED, bare, make_plan

        model = bare(wrapped)
        if model not in self._plans:
            plan = self._plans[model] = make_plan(trainer, wrapped, sharing=self.prefix_sharing)
            name = f"{type(trainer).__name__} with {type(model).__name__}"
            if plan.refused is not None:
                self.say(name, f"{plan.refused}; TRL's own path is taken")
            elif plan.padded not in (None, NOT_WANTED):
                self.say(name, f"{plan.padded}; rows stay padded, and only the head is exchanged")
        return self._plans[model]

    def current(self, trainer: Any) -> "Scope | None":
        """Return the running patched call of this trainer, or None."""
        return next((scope for scope in reversed(self._scopes) if scope.trainer is trainer), None)

    @contextmanager
    def standing_in(
        self, trainer: Any, model: Any, reference: Any, request: "Request", *, fused_output: Any = None
    ) -> "Iterator[Scope | None]":
        """Replace the forwards of a patched call's models inside the block. Yields None if TRL computes all of them."""
        from fastpref.patch.forward import Scope
        from fastpref.patch.plan import bare

        if self.current(trainer) is not None:  # another patched method called this one
            yield None
            return
        models = {id(bare(m)): m for m in (model, reference) if m is not None}
        plans = [(bare(m), self.plan(trainer, m)) for m in models.values()]
        if all(plan.refused is not None for _, plan in plans):
            yield None
            return
        scope = Scope(trainer, plans, self.tally, request, fused_output)
        self._scopes.append(scope)
        try:
            with scope.standing_in():
                yield scope
        finally:
            self._scopes.remove(scope)

    def _forget_plans(self) -> None:
        for model, plan in self._plans.items():
            plan.restore(model)
        self._plans.clear()

    def _undo(self) -> None:
        for replacement in reversed(self._replacements):
            replacement.undo()
        self._forget_plans()


class _Callable(ModuleType):
    """The type of this package, which makes `fastpref.patch(trl)` possible."""

    def __call__(self, trl: ModuleType, *, prefix_sharing: bool = True) -> Patch:
        return patch(trl, prefix_sharing=prefix_sharing)


sys.modules[__name__].__class__ = _Callable
