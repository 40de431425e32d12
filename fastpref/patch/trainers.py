"""The search for TRL's trainers, and for the methods to patch in each.

Versions of TRL differ in the module of a trainer, in the names of its methods and in the outputs of a model that they
use. All of it is found by attributes; no version number is compared.
"""

import importlib
import inspect
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastpref.errors import UserError
from fastpref.patch.compute_loss import replace_compute_loss
from fastpref.patch.concatenated import replace_concatenated_forward
from fastpref.patch.kto import replace_batch_metrics
from fastpref.patch.replacement import Replacement

if TYPE_CHECKING:
    from fastpref.patch import Patch

KNOWN = "0.24 to 1.16"
HOMES = {  # the modules that may define a trainer
    "DPOTrainer": ("trainer.dpo_trainer",),
    "KTOTrainer": ("trainer.kto_trainer", "experimental.kto.kto_trainer"),
    "ORPOTrainer": ("experimental.orpo.orpo_trainer", "trainer.orpo_trainer"),
    "CPOTrainer": ("experimental.cpo.cpo_trainer", "trainer.cpo_trainer"),
    "TPOTrainer": ("experimental.tpo.tpo_trainer",),
}
_EVERYWHERE = ("DPOTrainer", "KTOTrainer")  # every supported TRL has them


def find_replacements(trl: ModuleType, patch: "Patch") -> list[Replacement]:
    """List the attributes to replace in this TRL. Raises UserError if this version is not supported."""
    result: list[Replacement] = []
    for name in HOMES:
        try:
            trainer = find_trainer(trl, name)
        except ImportError as error:
            if name in _EVERYWHERE:
                raise UserError(f"trl {_version(trl)}: its {name} cannot be imported: {error}") from error
            patch.say(name, f"it cannot be imported: {error}")
            continue
        if trainer is None and name not in _EVERYWHERE:
            continue
        replacements = [] if trainer is None else replacements_of(patch, trainer)
        if not replacements:
            raise UserError(
                f"trl {_version(trl)} is not known here: its {name} calls its model in no way that fastpref.patch "
                f"knows; known are TRL {KNOWN}"
            )
        result += replacements
    return result


def find_trainer(trl: ModuleType, name: str) -> Any:
    """Return the trainer class of this name, or None if this TRL has none. Raises ImportError if its module fails."""
    for home in HOMES[name]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TRL warns users who import experimental modules themselves
                module = importlib.import_module(f"{trl.__name__}.{home}")
        except ModuleNotFoundError as error:
            if error.name is None or not f"{trl.__name__}.{home}".startswith(error.name):
                raise
            continue
        trainer = vars(module).get(name)
        if trainer is not None and trainer.__module__ == module.__name__ and _calls_a_model(trainer):
            return trainer
    return None


def _calls_a_model(trainer: Any) -> bool:
    """Return whether a class is a real trainer, and not one that only forwards to its new module."""
    return any(name in vars(trainer) for name in ("_compute_loss", "concatenated_forward", "compute_loss", "forward"))


def _version(trl: ModuleType) -> str:
    return str(getattr(trl, "__version__", "without a version"))


def replacements_of(patch: "Patch", trainer: Any) -> list[Replacement]:
    module = sys.modules[trainer.__module__]
    if _takes(trainer, "_compute_loss", "model", "inputs", "return_outputs"):
        return replace_compute_loss(patch, trainer, module)
    if _takes(trainer, "concatenated_forward", "model", "batch"):
        return replace_concatenated_forward(patch, trainer, module)
    if _takes(trainer, "forward", "model", "batch") and _takes(trainer, "get_batch_loss_metrics", "model", "batch"):
        return replace_batch_metrics(patch, trainer, module)
    return []


def _takes(trainer: Any, name: str, *parameters: str) -> bool:
    method = vars(trainer).get(name)
    return callable(method) and set(parameters) <= set(inspect.signature(method).parameters)
