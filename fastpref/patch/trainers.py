"""TRL's trainers by what their classes have: which methods call a model, and how each is patched.

Versions differ in where a trainer lies, what its methods are named and what they ask of a model. All of it is found
by attributes; no version number is compared.
"""

import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastpref.errors import UserError
from fastpref.patch.forward import Scope
from fastpref.patch.logits import UNDERSTOOD, understanding
from fastpref.patch.plan import bare
from fastpref.patch.trees import IGNORED

if TYPE_CHECKING:
    from fastpref.patch import Patch

KNOWN = "0.24 to 1.16"
HOMES = {  # where a trainer may lie
    "DPOTrainer": ("trainer.dpo_trainer",),
    "KTOTrainer": ("trainer.kto_trainer", "experimental.kto.kto_trainer"),
    "ORPOTrainer": ("experimental.orpo.orpo_trainer", "trainer.orpo_trainer"),
    "CPOTrainer": ("experimental.cpo.cpo_trainer", "trainer.cpo_trainer"),
    "TPOTrainer": ("experimental.tpo.tpo_trainer",),
}
_EVERYWHERE = ("DPOTrainer", "KTOTrainer")  # every known TRL has them
_MISSING = object()


@dataclass(frozen=True)
class Replacement:
    """An attribute that is exchanged."""

    owner: Any  # a class or a module
    name: str
    value: Any
    before: Any  # what its __dict__ held

    def make(self) -> None:
        setattr(self.owner, self.name, self.value)

    def undo(self) -> None:
        if self.before is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


def replacement(owner: Any, name: str, value: Any) -> Replacement:
    return Replacement(owner, name, value, vars(owner).get(name, _MISSING))


def find_changes(trl: ModuleType, patch: "Patch") -> list[Replacement]:
    """What has to be exchanged in this TRL. Raises UserError for one that is not known."""
    found: list[Replacement] = []
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
        changes = [] if trainer is None else _changes(patch, trainer)
        if not changes:
            raise UserError(
                f"trl {_version(trl)} is not known here: its {name} calls its model in no way that fastpref.patch "
                f"knows; known are TRL {KNOWN}"
            )
        found += changes
    return found


def find_trainer(trl: ModuleType, name: str) -> Any:
    """The class of this name where this TRL has it, or None. Raises ImportError where its module fails."""
    for home in HOMES[name]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TRL's about experimental modules, meant for who imports them
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
    """A class of its own, and not one that only forwards to the place it has moved to."""
    return any(name in vars(trainer) for name in ("_compute_loss", "concatenated_forward", "compute_loss", "forward"))


def _version(trl: ModuleType) -> str:
    return str(getattr(trl, "__version__", "without a version"))


def _changes(patch: "Patch", trainer: Any) -> list[Replacement]:
    module = sys.modules[trainer.__module__]
    if _takes(trainer, "_compute_loss", "model", "inputs", "return_outputs"):
        return _loss_changes(patch, trainer, module)
    if _takes(trainer, "concatenated_forward", "model", "batch"):
        return _concatenated_changes(patch, trainer, module)
    if _takes(trainer, "forward", "model", "batch") and _takes(trainer, "get_batch_loss_metrics", "model", "batch"):
        return _metrics_changes(patch, trainer, module)
    return []


def _takes(trainer: Any, name: str, *parameters: str) -> bool:
    method = vars(trainer).get(name)
    return callable(method) and set(parameters) <= set(inspect.signature(method).parameters)


def _method(trainer: Any, name: str, make: Callable[[Any], Any]) -> list[Replacement]:
    original = vars(trainer).get(name)
    return [] if original is None else [replacement(trainer, name, functools.wraps(original)(make(original)))]


def _understanding(module: ModuleType) -> list[Replacement]:
    """TRL's functions of logits, in the namespace of one trainer."""
    return [
        replacement(module, name, understanding(vars(module)[name], answer))
        for name, answer in UNDERSTOOD.items()
        if name in vars(module)
    ]


# --- trainers with `_compute_loss`: DPO, KTO, TPO --------------------------------------------------------------------


def _loss_changes(patch: "Patch", trainer: Any, module: ModuleType) -> list[Replacement]:
    """Their batches hold token ids, `attention_mask` and `completion_mask`."""
    fused = getattr(sys.modules.get(f"{module.__name__.split('.')[0]}.trainer.utils"), "FusedCausalLMOutput", None)
    fused = fused if "add_fused_lm_head" in vars(module) else None
    entropies = {"entropy_from_logits", "selective_log_softmax_and_entropy"} & vars(module).keys()
    metrics = ("entropy", "mean_logit", "is_top1") if fused else ("entropy", "is_top1") if entropies else ()

    def compute_loss(original: Any) -> Any:
        def _compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool) -> Any:
            if return_outputs:
                patch.say(trainer.__name__, "compute_metrics asks for the logits: evaluation computes them as TRL does")
            if fused is None and (return_outputs or _left_to_liger(patch, trainer, self)):
                return original(self, model, inputs, return_outputs)
            live = None if getattr(self, "precompute_ref_logps", False) else getattr(self, "ref_model", None)
            with patch.standing_in(self, model, live, fused_output=fused) as scope:
                if scope is not None:
                    scope.outputs = metrics
                    if fused is None:
                        scope.labels = functools.partial(_completions, inputs)
                        scope.row_means = "_compute_kl_logps" in vars(trainer)
                    elif getattr(self, "use_weighting", False):
                        scope.outputs += ("log_sum_sq_probs",)
                return original(self, model, inputs, return_outputs)

        return _compute_loss

    def compute_ref_log_probs(original: Any) -> Any:
        def compute_ref_log_probs(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(original).bind(self, *args, **kwargs).arguments
            inputs, model = bound["inputs"], bound.get("model") or getattr(self, "ref_model", None) or self.model
            if fused is None and _left_to_liger(patch, trainer, self):
                return original(self, *args, **kwargs)
            with patch.standing_in(self, model, None, fused_output=fused) as scope:
                if scope is not None:
                    scope.later_ids = _mismatched(inputs)
                    scope.keep_next = scope.later_ids is not None and bool(getattr(self, "calculate_KL", False))
                    if fused is None:
                        scope.labels = functools.partial(_completions, inputs)
                return original(self, *args, **kwargs)

        return compute_ref_log_probs

    def truncate_inputs(original: Any) -> Any:
        def _truncate_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            input_ids, attention_mask, completion_mask = original(self, *args, **kwargs)
            scope = patch.current(self)
            if scope is not None:
                cut = {"input_ids": input_ids, "completion_mask": completion_mask}
                scope.labels = functools.partial(_completions, cut)
            return input_ids, attention_mask, completion_mask

        return _truncate_inputs

    found = _method(trainer, "_compute_loss", compute_loss)
    found += _method(trainer, "compute_ref_log_probs", compute_ref_log_probs)
    found += _method(trainer, "_compute_kl_logps", functools.partial(_kl_logps, patch))
    if fused is not None:
        return found + _method(trainer, "__init__", functools.partial(_adapted_heads, patch, module))
    return found + _method(trainer, "_truncate_inputs", truncate_inputs) + _understanding(module)


def _kl_logps(patch: "Patch", original: Any) -> Any:
    """KTO's pass of the mismatched completions."""

    def _compute_kl_logps(self: Any, model: Any, batch: Any) -> Any:
        scope = patch.current(self)
        if scope is None or not getattr(self, "calculate_KL", False):
            return original(self, model, batch)
        scope.later_ids = _mismatched(batch)
        _prompts_first(scope, model, batch)
        try:
            return original(self, model, batch)
        finally:
            scope.kept = scope.later_ids = None

    return _compute_kl_logps


def _left_to_liger(patch: "Patch", trainer: Any, self: Any) -> bool:
    """Liger's losses call the body themselves."""
    options = (self, self.args)
    left = any(getattr(o, name, False) for o in options for name in ("use_liger_kernel", "use_liger_loss"))
    if left:
        patch.say(trainer.__name__, "use_liger_kernel computes the loss; TRL's own path is taken")
    return left


def _mismatched(batch: Any) -> Tensor | None:
    return batch.get("KL_input_ids", batch.get("KL_completion_input_ids"))


_LABELS = (  # tokens, and what marks their completions
    ("input_ids", "completion_mask"),
    ("completion_input_ids", "completion_mask"),
    ("completion_input_ids", "completion_labels"),
    ("KL_input_ids", "KL_completion_mask"),
    ("KL_completion_input_ids", "KL_completion_mask"),
    ("KL_completion_input_ids", "KL_completion_labels"),
)


def _completions(inputs: Any, input_ids: Tensor, _mask: Tensor) -> Tensor | None:
    """The labels of the batch's completions, or of its mismatched ones, for a call with these tokens."""
    for name, marks_name in _LABELS:
        ids, marks = inputs.get(name), inputs.get(marks_name)
        if ids is None or marks is None or not (ids is input_ids or torch.equal(ids, input_ids)):
            continue
        return marks if marks_name.endswith("labels") else input_ids.masked_fill(marks == 0, IGNORED)
    return None


_KTO_BATCH = {"input_ids", "attention_mask", "completion_mask", "label", "ref_logps", "ref_KL_logps"} | {
    "KL_input_ids", "KL_attention_mask", "KL_completion_mask"
}  # fmt: skip


def _prompts_first(scope: Scope, model: Any, batch: Any) -> None:
    """Compute the batch before its mismatched completions, which follow the same prompts; TRL asks for it next.

    DDP prepares its reduction in a forward with gradient and is left in TRL's order.
    """
    fused = scope.fused_output is not None
    plan = next((plan for known, plan in scope.plans if known is bare(model)), None)
    if not fused or plan is None or plan.refused or plan.padded or plan.by_length or batch.keys() - _KTO_BATCH:
        return
    if isinstance(model, DistributedDataParallel) and torch.is_grad_enabled():
        return
    ids = batch["input_ids"]
    call = {"input_ids": ids, "attention_mask": batch["attention_mask"], "use_cache": False}
    if scope.outputs and getattr(scope.trainer, "aux_loss_enabled", False):
        call["output_router_logits"] = True
    scope.keep_next, scope.stash = True, None
    labels = ids.masked_fill(batch["completion_mask"] == 0, IGNORED)
    scope.stash = (ids, model(**call, labels=labels, fused_lm_head=True))


def _adapted_heads(patch: "Patch", module: ModuleType, original: Any) -> Any:
    """`__init__` of trainers that refuse an adapter on the head, because their head would leave it out."""

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
    """No layer is an adapter's in the eyes of a trainer's module."""
    before = vars(module).get("BaseTunerLayer", _MISSING)
    if before is _MISSING:
        yield
        return
    vars(module)["BaseTunerLayer"] = type("NoTunerLayer", (), {})
    try:
        yield
    finally:
        vars(module)["BaseTunerLayer"] = before


def _refuse_without(model: Any) -> None:
    """TRL's own head would train nothing of the adapter, silently: refuse it once the patch is gone."""
    forward = model.forward

    @functools.wraps(forward)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused_lm_head"):
            raise RuntimeError("lm_head has an adapter, which TRL's head leaves out: train it with fastpref.patch(trl)")
        return forward(*args, **kwargs)

    model.forward = guarded


# --- KTO before 1.6 ------------------------------------------------------------------------------------------------


def _metrics_changes(patch: "Patch", trainer: Any, module: ModuleType) -> list[Replacement]:
    """`get_batch_loss_metrics` calls `forward` for policy and reference, and logs sums of logits over whole rows."""

    def get_batch_loss_metrics(original: Any) -> Any:
        def get_batch_loss_metrics(self: Any, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if _one_device(patch, trainer, model) and not _left_to_liger(patch, trainer, self):
                with patch.standing_in(self, model, getattr(self, "ref_model", None)) as scope:
                    if scope is not None:
                        scope.labels, scope.row_means = functools.partial(_completions, batch), True
                    return original(self, model, batch, *args, **kwargs)
            return original(self, model, batch, *args, **kwargs)

        return get_batch_loss_metrics

    def compute_reference_log_probs(original: Any) -> Any:
        def compute_reference_log_probs(self: Any, padded_batch: Any) -> Any:
            with patch.standing_in(self, getattr(self, "ref_model", None) or self.model, None) as scope:
                if scope is not None:
                    scope.labels, scope.later_ids = (
                        functools.partial(_completions, padded_batch),
                        _mismatched(padded_batch),
                    )
                    scope.keep_next = scope.later_ids is not None
                return original(self, padded_batch)

        return compute_reference_log_probs

    found = _method(trainer, "get_batch_loss_metrics", get_batch_loss_metrics)
    found += _method(trainer, "compute_reference_log_probs", compute_reference_log_probs)
    return found + _method(trainer, "_compute_kl_logps", functools.partial(_kl_logps, patch)) + _understanding(module)


# --- trainers with `concatenated_forward`: ORPO, CPO, DPO before 0.29 ------------------------------------------------


def _concatenated_changes(patch: "Patch", trainer: Any, module: ModuleType) -> list[Replacement]:
    """Their batches hold `chosen_…` and `rejected_…`; ORPO and CPO log the mean of the logits over whole rows."""

    def concatenated_forward(original: Any) -> Any:
        def concatenated_forward(self: Any, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if not _one_device(patch, trainer, model):
                return original(self, model, batch, *args, **kwargs)
            if getattr(self, "padding_free", False):
                patch.say(trainer.__name__, "padding_free lays rows out by itself; TRL's own path is taken")
                return original(self, model, batch, *args, **kwargs)
            with patch.standing_in(self, model, None) as scope:
                if scope is not None:
                    labelled = "chosen_labels" in batch
                    scope.row_means = labelled
                    keep_end = getattr(self, "truncation_mode", None) == "keep_end"
                    find = functools.partial(_concatenated_labels, batch)
                    scope.labels = find if labelled else functools.partial(_counted_labels, batch, keep_end)
                return original(self, model, batch, *args, **kwargs)

        return concatenated_forward

    return _method(trainer, "concatenated_forward", concatenated_forward) + _understanding(module)


def _one_device(patch: "Patch", trainer: Any, model: Any) -> bool:
    """DDP looks for the tensors of a forward's output, which are not yet there in a `Logits`."""
    if isinstance(model, DistributedDataParallel):
        patch.say(trainer.__name__, "several devices; TRL's own path is taken")
        return False
    return True


def _concatenated_labels(batch: Any, input_ids: Tensor, _mask: Tensor) -> Tensor | None:
    """The labels of the chosen rows and then the rejected ones, as wide as the call's rows."""
    sides = [batch.get(f"{side}_labels") for side in ("chosen", "rejected")]
    width = input_ids.shape[1]
    if any(side is None or side.shape[1] > width for side in sides):
        return None
    wide = [torch.nn.functional.pad(side, (0, width - side.shape[1]), value=IGNORED) for side in sides]
    labels = torch.cat(wide).to(input_ids.device)
    return labels if labels.shape == input_ids.shape else None


def _counted_labels(batch: Any, keep_end: bool, input_ids: Tensor, mask: Tensor) -> Tensor | None:
    """The labels of rows that TRL has put together from prompts and completions, cut, and moved to the left."""
    sides = [batch[f"{side}_attention_mask"].sum(1) for side in ("chosen", "rejected")]
    completions = torch.cat(sides).to(mask.device)  # tokens, before they were cut
    prompts = batch["prompt_attention_mask"].sum(1).to(mask.device).repeat(2)
    if mask.shape != input_ids.shape or len(prompts) != len(mask):
        return None
    start = (mask.sum(1) - completions).clamp(min=0) if keep_end else prompts
    scored = mask.bool() & (mask.cumsum(1) > start[:, None])
    return input_ids.masked_fill(~scored, IGNORED)
