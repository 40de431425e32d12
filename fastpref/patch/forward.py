"""The forward pass that replaces a model's own while a patched method of TRL runs.

TRL's method computes its loss and logs its metrics as usual. During the call, only the `forward` of the causal language
model, inside the wrappers of Accelerate and PEFT, is replaced. It takes the padded batch, computes it as a forest, and
returns what TRL's code reads: a `FusedCausalLMOutput` if TRL asks for log-probabilities (1.15 and newer), or else an
output whose `logits` are a `Logits`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from fastpref.patch.logits import Logits, Scores
from fastpref.patch.plan import Plan
from fastpref.patch.replacement import replacement
from fastpref.patch.report import Tally
from fastpref.patch.states import States, later_states, packed_states, padded_router_loss, padded_states
from fastpref.patch.trees import IGNORED, Packed, later_completions, later_padding, pack, read_rows

_KNOWN = {  # keywords of a call that do not affect the body, or are handled here
    "input_ids", "attention_mask", "labels", "use_cache", "return_dict", "fused_lm_head", "output_router_logits",
    "output_hidden_states", "logits_to_keep",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """The requirements of a patched method for the forward passes of its models."""

    labels: Callable[[Tensor, Tensor], Tensor | None] | None = None  # finds labels, by token ids and mask, for a call
    outputs: tuple[str, ...] = ()  # outputs of the policy's next pass in addition to log-probabilities
    row_means: bool = False  # whether TRL logs the mean of the logits over whole rows of the policy's next pass
    keep_next: bool = False  # whether other completions of the next pass's prompts follow it
    later_ids: Tensor | None = None  # the token ids of those completions' batch


@dataclass
class Scope:
    """One call of a patched method, and results of its passes that later passes use."""

    trainer: Any
    plans: list[tuple[Any, Plan]]  # of the models it calls
    tally: Tally
    request: Request
    fused_output: Callable[..., Any] | None = None  # TRL's FusedCausalLMOutput, if it has one
    kept: tuple[Packed, States, Any] | None = None  # a packed pass with its keys and values
    stash: tuple[Tensor, Any] | None = None  # the token ids and result of a pass that ran before TRL's call for it

    def ask(self, **changes: Any) -> None:
        """Change the request for the passes that follow."""
        self.request = replace(self.request, **changes)

    @contextmanager
    def standing_in(self) -> Iterator["Scope"]:
        """Replace the models' forwards inside the block."""
        planned = [(model, plan) for model, plan in self.plans if plan.refused is None]
        replacements = [replacement(m, "forward", _Forward(self, m, plan, m.forward)) for m, plan in planned]
        try:
            for one in replacements:
                one.make()
            yield self
        finally:
            for one in replacements:
                one.undo()


@dataclass
class _Forward:
    """The replaced forward of one model."""

    scope: Scope
    model: Any
    plan: Plan
    original: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = dict(kwargs)
        if len(args) == 1:
            call["input_ids"] = args[0]
        input_ids, fused = call.get("input_ids"), bool(call.get("fused_lm_head"))
        if len(args) > 1 or input_ids is None:
            return self.original(*args, **kwargs)
        mask = call.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        labels = self._labels(call, input_ids, mask, fused)
        if labels is None or (fused and self.scope.fused_output is None):
            return self.original(*args, **kwargs)
        scope = self.scope
        if scope.stash is not None and scope.stash[0] is input_ids:
            result, scope.stash = scope.stash[1], None
            return result
        extra = {name: value for name, value in call.items() if name not in _KNOWN and value is not None}
        routed = bool(call.get("output_router_logits")) or getattr(self.model.config, "output_router_logits", False)
        if routed:
            extra["output_router_logits"] = True
        plan = self.plan
        assert plan.backbone is not None
        with scope.trainer.accelerator.autocast():
            states = self._states(input_ids, mask, labels, extra)
            aux_loss = padded_router_loss(self.original, plan.backbone, states, mask) if routed else None
            if fused:
                return self._fused(states, input_ids, labels, aux_loss)
            return self._logits(states, input_ids, labels, aux_loss, int(call.get("logits_to_keep") or 0))

    def _labels(self, call: dict[str, Any], input_ids: Tensor, mask: Tensor, fused: bool) -> Tensor | None:
        if fused:
            return None if call.get("shift_labels") is not None else call.get("labels")
        find = self.scope.request.labels
        return None if find is None else find(input_ids, mask)

    # --- the body -----------------------------------------------------------------------------------------------

    def _states(self, input_ids: Tensor, mask: Tensor, labels: Tensor, extra: dict[str, Any]) -> States:
        scope, plan = self.scope, self.plan
        assert plan.backbone is not None
        assert plan.head is not None
        packed = None
        later = scope.request.later_ids is input_ids
        if plan.padded is None and not extra.keys() - {"output_router_logits"}:
            rows = read_rows(input_ids, mask, labels)
            if rows is not None and (plan.rotary or not any(row.first for row in rows)):
                if later and scope.kept is not None and not plan.by_length:  # by length, longer rows have other keys
                    before, states, kept = scope.kept
                    tokens = later_completions(before, rows, input_ids.shape[1], input_ids.device)
                    if tokens is not None:
                        scope.tally.computed(input_ids.numel(), tokens.input_ids.numel())
                        return later_states(plan.backbone, states, kept, tokens, eager=plan.was_eager)
                packed = pack(rows, input_ids.shape[1], input_ids.device)
                if scope.request.row_means and any(row.first for row in rows):
                    packed = None  # padding on the left attends to nothing, but TRL's logged mean includes it
                if plan.by_length and max(map(len, rows)) < input_ids.shape[1]:
                    packed = None  # all rows have padding, whose positions the rotary angles depend on too
        if packed is None:
            scope.tally.computed(input_ids.numel(), input_ids.numel())
            return padded_states(plan.backbone, plan.head, input_ids, attention_mask=mask, **extra)
        keep = not later and (scope.request.keep_next or scope.request.row_means)
        states, kept = packed_states(plan.backbone, plan.head, packed, keep=keep, **extra)
        scope.tally.computed(input_ids.numel(), packed.tokens)
        if kept is not None:
            scope.kept = (packed, states, kept)
            scope.ask(keep_next=False)
        return states

    # --- the head -----------------------------------------------------------------------------------------------

    def _fused(self, states: States, input_ids: Tensor, labels: Tensor, aux_loss: Tensor | None) -> Any:
        """Return the output of TRL's fused head, with values [B, T − 1] that are zero where there is no label."""
        scope, outputs = self.scope, ()
        if scope.request.later_ids is not input_ids:
            outputs = scope.request.outputs
            scope.ask(outputs=())
        labels = labels.to(states.hidden.device)
        kept = labels[:, 1:] != IGNORED
        where = torch.nn.functional.pad(kept, (0, 1))
        targets = labels[:, 1:][kept]
        with scope.tally.head(labels.numel(), len(targets)):
            tokens = states.score_labels(where, targets, outputs)

        def spread(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.new_zeros(kept.shape).masked_scatter(kept, values)

        log_probs = spread(tokens.logp)
        assert log_probs is not None
        loss = -log_probs.sum() / kept.sum().clamp(min=1)
        if aux_loss is not None:
            loss = loss + getattr(self.model.config, "router_aux_loss_coef", 0.0) * aux_loss
        assert scope.fused_output is not None
        return scope.fused_output(
            loss=loss,
            log_probs=log_probs,
            entropy=spread(tokens.entropy),
            log_sum_sq_probs=spread(tokens.log_sum_sq_probs),
            mean_logits=spread(tokens.mean_logit),
            is_top1=spread(tokens.is_top1),
            label_mask=kept,
            aux_loss=aux_loss,
        )

    def _logits(
        self, states: States, input_ids: Tensor, labels: Tensor, aux_loss: Tensor | None, logits_to_keep: int
    ) -> Any:
        scope, outputs, row_states = self.scope, (), None
        if scope.request.later_ids is not input_ids:
            outputs = scope.request.outputs
            if scope.request.row_means:
                row_states = self._row_states(states, input_ids)
            scope.ask(outputs=(), row_means=False)
        autocast, head = scope.trainer.accelerator.autocast, scope.tally.head

        @contextmanager
        def around(places: int, scored: int) -> Iterator[None]:
            with autocast(), head(places, scored):
                yield

        scores = Scores(states, input_ids, labels != IGNORED, outputs, around, row_states)
        at = torch.arange(input_ids.numel(), device=states.hidden.device).view(input_ids.shape)
        scope.tally.logits(at.numel(), states.head.vocabulary)
        logits: Any = Logits(scores, at[:, -logits_to_keep:])
        return MoeCausalLMOutputWithPast(logits=logits, aux_loss=aux_loss)  # pyright: ignore[reportArgumentType]

    def _row_states(self, states: States, input_ids: Tensor) -> Callable[[], States]:
        """Return a function that computes states with those of padding, which come after the others when needed."""
        scope, plan, before = self.scope, self.plan, self.scope.kept
        scope.kept = None

        def with_padding() -> States:
            if before is None:  # padded rows
                return states
            packed, _, kept = before
            later = later_padding(packed, input_ids)
            if later is None:
                return states
            assert plan.backbone is not None
            scope.tally.computed(0, later.input_ids.numel())
            with scope.trainer.accelerator.autocast():
                return later_states(plan.backbone, states, kept, later, eager=plan.was_eager)

        return with_padding
