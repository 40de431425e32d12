"""The patch of trainers with `_compute_loss`: DPO, KTO and TPO."""

import functools
import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastpref.patch.adapted_heads import accept_adapted_heads
from fastpref.patch.forward import Request
from fastpref.patch.kto import kl_logps
from fastpref.patch.labels import completion_labels, mismatched_ids
from fastpref.patch.limits import left_to_liger
from fastpref.patch.replacement import Replacement, replace_functions_of_logits, replace_method

if TYPE_CHECKING:
    from fastpref.patch import Patch


def replace_compute_loss(patch: "Patch", trainer: Any, module: ModuleType) -> list[Replacement]:
    """Replace the methods of a trainer whose batches have token ids, `attention_mask` and `completion_mask`."""
    fused = getattr(sys.modules.get(f"{module.__name__.split('.')[0]}.trainer.utils"), "FusedCausalLMOutput", None)
    fused = fused if "add_fused_lm_head" in vars(module) else None
    entropies = {"entropy_from_logits", "selective_log_softmax_and_entropy"} & vars(module).keys()
    metrics = ("entropy", "mean_logit", "is_top1") if fused else ("entropy", "is_top1") if entropies else ()

    def compute_loss(original: Any) -> Any:
        def _compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool) -> Any:
            if return_outputs:
                patch.say(trainer.__name__, "compute_metrics asks for the logits: evaluation computes them as TRL does")
            if fused is None and (return_outputs or left_to_liger(patch, trainer, self)):
                return original(self, model, inputs, return_outputs)
            live = None if getattr(self, "precompute_ref_logps", False) else getattr(self, "ref_model", None)
            request = Request(outputs=metrics)
            if fused is None:
                labels = functools.partial(completion_labels, inputs)
                request = Request(labels, metrics, row_means="_compute_kl_logps" in vars(trainer))
            elif getattr(self, "use_weighting", False):
                request = Request(outputs=(*metrics, "log_sum_sq_probs"))
            with patch.standing_in(self, model, live, request, fused_output=fused):
                return original(self, model, inputs, return_outputs)

        return _compute_loss

    def compute_ref_log_probs(original: Any) -> Any:
        def compute_ref_log_probs(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(original).bind(self, *args, **kwargs).arguments
            inputs, model = bound["inputs"], bound.get("model") or getattr(self, "ref_model", None) or self.model
            if fused is None and left_to_liger(patch, trainer, self):
                return original(self, *args, **kwargs)
            later_ids = mismatched_ids(inputs)
            request = Request(
                labels=functools.partial(completion_labels, inputs) if fused is None else None,
                keep_next=later_ids is not None and bool(getattr(self, "calculate_KL", False)),
                later_ids=later_ids,
            )
            with patch.standing_in(self, model, None, request, fused_output=fused):
                return original(self, *args, **kwargs)

        return compute_ref_log_probs

    def truncate_inputs(original: Any) -> Any:
        def _truncate_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            input_ids, attention_mask, completion_mask = original(self, *args, **kwargs)
            scope = patch.current(self)
            if scope is not None:
                cut = {"input_ids": input_ids, "completion_mask": completion_mask}
                scope.ask(labels=functools.partial(completion_labels, cut))
            return input_ids, attention_mask, completion_mask

        return _truncate_inputs

    replacements = replace_method(trainer, "_compute_loss", compute_loss)
    replacements += replace_method(trainer, "compute_ref_log_probs", compute_ref_log_probs)
    replacements += replace_method(trainer, "_compute_kl_logps", functools.partial(kl_logps, patch))
    if fused is not None:
        accept = functools.partial(accept_adapted_heads, patch, module)
        return replacements + replace_method(trainer, "__init__", accept)
    replacements += replace_method(trainer, "_truncate_inputs", truncate_inputs)
    return replacements + replace_functions_of_logits(module)
