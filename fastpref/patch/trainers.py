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
from fastpref.patch.forward import METRICS, Scope
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
class Change:
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


def change(owner: Any, name: str, value: Any) -> Change:
    return Change(owner, name, value, vars(owner).get(name, _MISSING))


def find_changes(trl: ModuleType, patch: "Patch") -> list[Change]:
    """What has to be exchanged in this TRL. Raises UserError for one that is not known."""
    found: list[Change] = []
    for name in HOMES:
        trainer = find_trainer(trl, name)
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
    """The class of this name where this TRL has it, or None."""
    for home in HOMES[name]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TRL's about experimental modules, meant for who imports them
                module = importlib.import_module(f"{trl.__name__}.{home}")
        except ImportError:
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


def _changes(patch: "Patch", trainer: Any) -> list[Change]:
    module = sys.modules[trainer.__module__]
    if _takes(trainer, "_compute_loss", "model", "inputs", "return_outputs"):
        return _loss_changes(patch, trainer, module)
    if _takes(trainer, "concatenated_forward", "model", "batch"):
        return _concatenated_changes(patch, trainer, module)
    return []


def _takes(trainer: Any, name: str, *parameters: str) -> bool:
    method = vars(trainer).get(name)
    return callable(method) and set(parameters) <= set(inspect.signature(method).parameters)


def _method(trainer: Any, name: str, make: Callable[[Any], Any]) -> list[Change]:
    original = vars(trainer).get(name)
    return [] if original is None else [change(trainer, name, functools.wraps(original)(make(original)))]


def _understanding(module: ModuleType) -> list[Change]:
    """TRL's functions of logits, in the namespace of one trainer."""
    return [
        change(module, name, understanding(vars(module)[name], answer))
        for name, answer in UNDERSTOOD.items()
        if name in vars(module)
    ]


# --- trainers with `_compute_loss`: DPO, KTO, TPO --------------------------------------------------------------------


def _loss_changes(patch: "Patch", trainer: Any, module: ModuleType) -> list[Change]:
    """Their batches hold `input_ids`, `attention_mask` and `completion_mask`."""
    fused = getattr(sys.modules.get(f"{module.__name__.split('.')[0]}.trainer.utils"), "FusedCausalLMOutput", None)
    fused = fused if "add_fused_lm_head" in vars(module) else None

    def compute_loss(original: Any) -> Any:
        def _compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool) -> Any:
            if return_outputs:
                patch.say(trainer.__name__, "compute_metrics asks for the logits: evaluation computes them as TRL does")
                if fused is None:
                    return original(self, model, inputs, return_outputs)
            live = None if getattr(self, "precompute_ref_logps", False) else getattr(self, "ref_model", None)
            with patch.standing_in(self, model, live, fused_output=fused) as scope:
                if scope is not None:
                    weighted = ("log_sum_sq_probs",) if getattr(self, "use_weighting", False) else ()
                    scope.outputs = METRICS + weighted
                    if fused is None:
                        scope.labels = functools.partial(_completions, inputs)
                return original(self, model, inputs, return_outputs)

        return _compute_loss

    def compute_ref_log_probs(original: Any) -> Any:
        def compute_ref_log_probs(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(original).bind(self, *args, **kwargs).arguments
            inputs, model = bound["inputs"], bound.get("model") or getattr(self, "ref_model", None) or self.model
            with patch.standing_in(self, model, None, fused_output=fused) as scope:
                if scope is not None:
                    scope.later_ids = inputs.get("KL_input_ids")
                    scope.keep_next = scope.later_ids is not None and bool(getattr(self, "calculate_KL", False))
                    if fused is None:
                        scope.labels = functools.partial(_completions, inputs)
                return original(self, *args, **kwargs)

        return compute_ref_log_probs

    def compute_kl_logps(original: Any) -> Any:
        def _compute_kl_logps(self: Any, model: Any, batch: Any) -> Any:
            scope = patch.current(self)
            if scope is None or not getattr(self, "calculate_KL", False):
                return original(self, model, batch)
            scope.later_ids = batch["KL_input_ids"]
            _prompts_first(scope, model, batch)
            try:
                return original(self, model, batch)
            finally:
                scope.kept = scope.later_ids = None

        return _compute_kl_logps

    found = _method(trainer, "_compute_loss", compute_loss)
    found += _method(trainer, "compute_ref_log_probs", compute_ref_log_probs)
    found += _method(trainer, "_compute_kl_logps", compute_kl_logps)
    if fused is None:
        return found + _understanding(module)
    return found + _method(trainer, "__init__", functools.partial(_adapted_heads, patch, module))


def _completions(inputs: Any, input_ids: Tensor) -> Tensor | None:
    """The labels of the batch's completions, or of its mismatched ones, for a call with these tokens."""
    for prefix in ("", "KL_"):
        ids, mask = inputs.get(f"{prefix}input_ids"), inputs.get(f"{prefix}completion_mask")
        if ids is not None and mask is not None and ids.shape == input_ids.shape and torch.equal(ids, input_ids):
            return input_ids.masked_fill(mask == 0, IGNORED)
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
    if not fused or plan is None or plan.refused or plan.padded or batch.keys() - _KTO_BATCH:
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


# --- trainers with `concatenated_forward`: ORPO, CPO -----------------------------------------------------------------


def _concatenated_changes(patch: "Patch", trainer: Any, module: ModuleType) -> list[Change]:
    """Their batches hold `chosen_…` and `rejected_…`, and they log the mean of the logits over whole rows."""

    def concatenated_forward(original: Any) -> Any:
        def concatenated_forward(self: Any, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(model, DistributedDataParallel):
                patch.say(trainer.__name__, "several devices: TRL's own path is taken")
                return original(self, model, batch, *args, **kwargs)
            with patch.standing_in(self, model, None) as scope:
                if scope is not None:
                    scope.labels = functools.partial(_concatenated_labels, batch)
                    scope.row_means = True
                return original(self, model, batch, *args, **kwargs)

        return concatenated_forward

    return _method(trainer, "concatenated_forward", concatenated_forward) + _understanding(module)


def _concatenated_labels(batch: Any, input_ids: Tensor) -> Tensor | None:
    """The labels of the chosen rows and then the rejected ones, as wide as the call's rows."""
    sides = [batch.get(f"{side}_labels") for side in ("chosen", "rejected")]
    width = input_ids.shape[1]
    if any(side is None or side.shape[1] > width for side in sides):
        return None
    wide = [torch.nn.functional.pad(side, (0, width - side.shape[1]), value=IGNORED) for side in sides]
    labels = torch.cat(wide).to(input_ids.device)
    return labels if labels.shape == input_ids.shape else None
