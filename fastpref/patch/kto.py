"""The patch of KTO's pass over mismatched completions, and of its trainer before TRL 1.6."""

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from fastpref.patch.forward import Request, Scope
from fastpref.patch.labels import completion_labels, mismatched_ids
from fastpref.patch.limits import left_to_liger, on_one_device
from fastpref.patch.plan import bare
from fastpref.patch.replacement import Replacement, replace_functions_of_logits, replace_method
from fastpref.patch.trees import IGNORED

if TYPE_CHECKING:
    from fastpref.patch import Patch


def kl_logps(patch: "Patch", original: Any) -> Any:
    """Replace KTO's pass over the mismatched completions."""

    def _compute_kl_logps(self: Any, model: Any, batch: Any) -> Any:
        scope = patch.current(self)
        if scope is None or not getattr(self, "calculate_KL", False):
            return original(self, model, batch)
        scope.ask(later_ids=mismatched_ids(batch))
        compute_prompts_first(scope, model, batch)
        try:
            return original(self, model, batch)
        finally:
            scope.kept = None
            scope.ask(later_ids=None)

    return _compute_kl_logps


_KTO_BATCH = {"input_ids", "attention_mask", "completion_mask", "label", "ref_logps", "ref_KL_logps"} | {
    "KL_input_ids", "KL_attention_mask", "KL_completion_mask"
}  # fmt: skip


def compute_prompts_first(scope: Scope, model: Any, batch: Any) -> None:
    """Compute the batch before its mismatched completions, which follow the same prompts. TRL computes it next.

    DDP prepares its reduction in a forward with gradient, so TRL's order is kept for it.
    """
    fused = scope.fused_output is not None
    plan = next((plan for known, plan in scope.plans if known is bare(model)), None)
    if not fused or plan is None or plan.refused or plan.padded or plan.by_length or batch.keys() - _KTO_BATCH:
        return
    if isinstance(model, DistributedDataParallel) and torch.is_grad_enabled():
        return
    ids = batch["input_ids"]
    call = {"input_ids": ids, "attention_mask": batch["attention_mask"], "use_cache": False}
    if scope.request.outputs and getattr(scope.trainer, "aux_loss_enabled", False):
        call["output_router_logits"] = True
    scope.ask(keep_next=True)
    scope.stash = None
    labels = ids.masked_fill(batch["completion_mask"] == 0, IGNORED)
    scope.stash = (ids, model(**call, labels=labels, fused_lm_head=True))


def replace_batch_metrics(patch: "Patch", trainer: Any, module: ModuleType) -> list[Replacement]:
    """Replace the methods of a trainer whose `get_batch_loss_metrics` calls `forward` for policy and reference.

    The trainer logs sums of logits over whole rows.
    """

    def get_batch_loss_metrics(original: Any) -> Any:
        def get_batch_loss_metrics(self: Any, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if on_one_device(patch, trainer, model) and not left_to_liger(patch, trainer, self):
                request = Request(functools.partial(completion_labels, batch), row_means=True)
                with patch.standing_in(self, model, getattr(self, "ref_model", None), request):
                    return original(self, model, batch, *args, **kwargs)
            return original(self, model, batch, *args, **kwargs)

        return get_batch_loss_metrics

    def compute_reference_log_probs(original: Any) -> Any:
        def compute_reference_log_probs(self: Any, padded_batch: Any) -> Any:
            labels, later_ids = functools.partial(completion_labels, padded_batch), mismatched_ids(padded_batch)
            request = Request(labels, keep_next=later_ids is not None, later_ids=later_ids)
            with patch.standing_in(self, getattr(self, "ref_model", None) or self.model, None, request):
                return original(self, padded_batch)

        return compute_reference_log_probs

    replacements = replace_method(trainer, "get_batch_loss_metrics", get_batch_loss_metrics)
    replacements += replace_method(trainer, "compute_reference_log_probs", compute_reference_log_probs)
    return (
        replacements
        + replace_method(trainer, "_compute_kl_logps", functools.partial(kl_logps, patch))
        + replace_functions_of_logits(module)
    )
