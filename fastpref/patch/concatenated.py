"""The patch of trainers with `concatenated_forward`: ORPO, CPO, and DPO before TRL 0.29."""

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastpref.patch.forward import Request
from fastpref.patch.labels import concatenated_labels, counted_labels
from fastpref.patch.limits import on_one_device
from fastpref.patch.replacement import Replacement, replace_functions_of_logits, replace_method

if TYPE_CHECKING:
    from fastpref.patch import Patch


def replace_concatenated_forward(patch: "Patch", trainer: Any, module: ModuleType) -> list[Replacement]:
    """Replace `concatenated_forward` of a trainer whose batches have keys `chosen_…` and `rejected_…`.

    ORPO and CPO log the mean of the logits over whole rows.
    """

    def concatenated_forward(original: Any) -> Any:
        def concatenated_forward(self: Any, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if not on_one_device(patch, trainer, model):
                return original(self, model, batch, *args, **kwargs)
            if getattr(self, "padding_free", False):
                patch.say(trainer.__name__, "padding_free lays rows out by itself; TRL's own path is taken")
                return original(self, model, batch, *args, **kwargs)
            if "chosen_labels" in batch:
                request = Request(functools.partial(concatenated_labels, batch), row_means=True)
            else:
                keep_end = getattr(self, "truncation_mode", None) == "keep_end"
                request = Request(functools.partial(counted_labels, batch, keep_end))
            with patch.standing_in(self, model, None, request):
                return original(self, model, batch, *args, **kwargs)

        return concatenated_forward

    return replace_method(trainer, "concatenated_forward", concatenated_forward) + replace_functions_of_logits(module)
