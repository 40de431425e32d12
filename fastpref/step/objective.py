"""The loss of one optimizer step, cut into micro-batches that add up to it exactly.

Terms that need the whole step before any gradient (KTO's KL, the sorting variants of DPO) are computed in a separate
pass without gradient if the step has several micro-batches, and together with the loss if it has one (`data/plan.py`).
The result is the same.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import ceil

import torch
from torch import Tensor, nn

from fastpref.config.losses import DPO, KTO, LossOptions, compares_neighbours
from fastpref.data.batch import Layout, PreferenceBatch, collate, collate_after, following
from fastpref.data.example import Example
from fastpref.data.forest import Kept
from fastpref.data.mismatched import mismatched
from fastpref.data.order import chunks
from fastpref.data.plan import Pass, StepPlan, compared, plan_pass, plan_step
from fastpref.losses import PairLogps, PreferenceLoss, Totals, WholeStep, kto_kl
from fastpref.losses.token_loss import pair_logps, preference_loss, scores_prompts, sequence_sums
from fastpref.model.later import keeping, kept_apart
from fastpref.model.policy import PolicyOutput
from fastpref.ops import TokenLogprobs
from fastpref.processes import ALONE, Processes
from fastpref.step.metrics import TOKEN_OUTPUTS, Metrics
from fastpref.step.reference import Reference, both

Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class Work:
    """The amount of work of a step, over all processes."""

    tokens: int  # tokens in forward passes with gradient, including padding
    microbatches: int


@dataclass(frozen=True)
class _Part:
    """One of this process's micro-batches."""

    batch: PreferenceBatch
    share: float  # its share of the tokens of the whole step
    counts: bool  # False if it only keeps this process in step with the others, which compute as many
    last: bool


@dataclass(frozen=True)
class _Pass:
    """The arguments that the parts of a step, or of an evaluation, share."""

    totals: Totals  # of all examples
    metrics: Metrics
    outputs: tuple[str, ...]  # of `linear_logprob`, in addition to the log-probabilities
    processes: Processes
    backward: Backward | None = None
    kl: Tensor | None = None  # of all examples of an evaluation; a step computes its own

    def add(self, loss: PreferenceLoss, part: _Part) -> None:
        """Add one part's loss: first its gradient, then its metrics."""
        if self.backward is not None:
            # Gradients are averaged over the processes, but the loss is a sum.
            weight = self.processes.count if part.counts else 0
            self.backward(loss.loss if weight == 1 else weight * loss.loss)
        if part.counts:
            self.metrics.add_loss(loss, part.batch.lengths)


@dataclass(frozen=True)
class _Whole:
    """The terms of a loss that need the whole step."""

    kl: Tensor | float = 0.0  # KTO's
    pairs: PairLogps | None = None  # of the sorting variants of DPO


@dataclass(frozen=True)
class Objective:
    """A loss, and the models and the layout with which it is computed."""

    policy: nn.Module  # a Policy, which Accelerate may have wrapped
    reference: Reference | None
    options: LossOptions
    layout: Layout
    budget: int  # tokens per micro-batch
    pad_token_id: int
    device: torch.device
    router_coefficient: float = 0.0  # of a mixture of experts' router loss
    processes: Processes = ALONE
    tell: Callable[[int, int], None] = lambda number, of: None
    """Is called with the number of a step's micro-batch and how many there are, before it is computed; in an
    evaluation with the examples done, and all. It may raise, which ends an evaluation without a trace."""

    def step(
        self, examples: Sequence[Example], backward: Backward, *, token_metrics: bool = True
    ) -> tuple[Metrics, Work]:
        """Compute the loss of a whole step, and call `backward` with each micro-batch's share of it.

        Every process must get the same examples. The metrics are over all processes.
        """
        outputs = TOKEN_OUTPUTS if token_metrics else ()
        run = _Pass(self._totals(examples), Metrics(), outputs, self.processes, backward)
        work = self._run(examples, run)
        return run.metrics.joined(self.processes), work

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], batch: int) -> Metrics:
        """Compute metrics, `batch` examples at a time, as means over all examples, whatever their order.

        KTO has a single KL over all examples, each prompt with a completion of another prompt (`data/mismatched.py`).
        """
        kl = self._evaluated_kl(examples, batch) if compares_neighbours(self.options, len(examples)) else None
        run = _Pass(self._totals(examples), Metrics(), TOKEN_OUTPUTS, self.processes, kl=kl)
        for number, chunk in enumerate(chunks(examples, batch)):
            self.tell(number * batch, len(examples))
            self._run(chunk, run)
        return run.metrics.joined(self.processes)

    def referenced(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return the examples of a step with every completion whose reference log-probability it needs."""
        return compared(self.options, examples)

    def referenced_in_evaluation(self, examples: Sequence[Example]) -> Iterator[Example]:
        """Yield the examples of an evaluation with every completion whose reference log-probability it needs."""
        yield from examples
        if compares_neighbours(self.options, len(examples)):
            yield from mismatched(examples)

    def _run(self, examples: Sequence[Example], run: _Pass) -> Work:
        if isinstance(self.options, KTO):
            run.metrics.single_completions()
        if self.options.supervised:
            run.metrics.imitated_completions()
        plan = self._plan(examples) if run.kl is None else StepPlan(self._plan_pass(examples))
        parts, work = self._parts(plan.trained)
        whole = self._found_first(plan, parts, run, len(examples))
        for number, part in enumerate(parts, start=1):
            if run.backward is not None:
                self.tell(number, len(parts))
            with self.processes.accumulating(self.policy, part.last):
                batch = part.batch.to(self.device)
                with self._keeping(batch, plan.later) as (beside, kept, kept_reference):
                    output, reference = self._both(batch, beside, run.outputs + self._extra_outputs())
                tokens = output.tokens
                if plan.later:
                    whole = self._later(batch, plan.later, kept, kept_reference)
                elif whole is None:
                    pairs = self._pairs(tokens, reference, batch)
                    whole = _Whole(pairs=self._joined([(part, pairs)], len(examples)))
                loss = preference_loss(
                    tokens.logp,
                    batch.segments,
                    batch.lengths,
                    self.options,
                    reference=reference,
                    labels=batch.labels,
                    kl=whole.kl,
                    log_sum_sq_probs=tokens.log_sum_sq_probs,
                    scores=batch.ranking if self.options.listwise else batch.scores,
                    weights=batch.weights,
                    margins=self._margins(batch),
                    totals=run.totals,
                    step=None if whole.pairs is None else WholeStep(whole.pairs, batch.index),
                )
                run.add(self._with_router(loss, output, part, run), part)
            if part.counts:
                self._add_metrics(run.metrics, loss, tokens, batch)
        if isinstance(self.options, KTO) and self.options.kl == "batch" and self.processes.first:
            assert whole is not None
            run.metrics.add("kl", torch.as_tensor(whole.kl) * len(examples), len(examples))
        return work

    def _found_first(self, plan: StepPlan, parts: Sequence[_Part], run: _Pass, count: int) -> _Whole | None:
        """Compute the terms of the whole step in a separate pass, or return None if its only micro-batch gives them."""
        if isinstance(self.options, KTO):
            if plan.first is not None:
                return _Whole(kl=kto_kl(*self._completion_sums(plan.first)))
            return _Whole(kl=0.0 if run.kl is None else run.kl)
        if not (isinstance(self.options, DPO) and self.options.sorts_step):
            return _Whole()
        return None if plan.first is None else _Whole(pairs=self._whole_step(parts, count))

    def _both(
        self, batch: PreferenceBatch, beside: PreferenceBatch, outputs: tuple[str, ...] = ()
    ) -> tuple[PolicyOutput, Tensor | None]:
        """Compute a batch by the policy, with outputs of `linear_logprob`, and one by the reference, if there is one.

        The two are the same, or differ in the keys and values that they keep or follow.
        """
        return both(partial(self.policy, batch, outputs), self.reference, beside)

    @contextmanager
    def _keeping(
        self, batch: PreferenceBatch, later: Sequence[Example]
    ) -> Iterator[tuple[PreferenceBatch, Kept, Kept]]:
        """Keep the keys and values of a batch that other completions follow.

        Yields the batch for the reference, and the keys and values of the policy and of the reference.
        """
        if not later:
            yield batch, {}, {}
            return
        assert batch.tree is not None
        tree = kept_apart(batch.tree)
        with keeping(batch.tree) as kept, keeping(tree) as kept_reference:
            yield replace(batch, tree=tree), kept, kept_reference

    @torch.no_grad()
    def _later(self, batch: PreferenceBatch, later: Sequence[Example], kept: Kept, kept_reference: Kept) -> _Whole:
        """Compute KTO's KL from mismatched completions, which follow the prompts of the step's only micro-batch."""
        mismatched = collate_after(batch, later).to(self.device)
        if kept_reference:
            beside = following(mismatched, kept_reference)
        else:  # the reference looked the batch up, so there is nothing to follow
            beside = collate(later, self.layout, pad_token_id=self.pad_token_id).to(self.device)
        output, reference = self._both(following(mismatched, kept), beside)
        assert reference is not None
        kept.clear()  # not to hold them during the backward pass
        kept_reference.clear()
        return _Whole(kl=kto_kl(_sums(output.logp, mismatched), _sums(reference, mismatched)))

    def _add_metrics(
        self, metrics: Metrics, loss: PreferenceLoss, tokens: TokenLogprobs, batch: PreferenceBatch
    ) -> None:
        places = torch.arange(len(batch.lengths), device=self.device)
        if self.options.supervised:
            every = torch.ones_like(batch.lengths, dtype=torch.bool)
            metrics.add_tokens(tokens, batch, every, ~every, every)
            return
        if batch.labels is not None:
            metrics.add_sequences(loss.sums, batch.labels)
            labels, counted = batch.labels.repeat(batch.completions), places < batch.examples
            metrics.add_tokens(tokens, batch, labels & counted, ~labels & counted, counted)
            return
        # The sequences that `sums` has: those of the pairs, or the best and the worst of each list.
        sequences = places[: 2 * batch.examples] if loss.sequences is None else loss.sequences
        counted = places < batch.completions * batch.examples
        chosen, rejected = (torch.zeros_like(counted).index_fill(0, side, True) for side in sequences.chunk(2))
        metrics.add_sequences(loss.sums, torch.arange(len(sequences), device=self.device) < batch.examples)
        metrics.add_ranking(loss.sums, batch.lengths[sequences])
        metrics.add_tokens(tokens, batch, chosen, rejected, counted)

    def _margins(self, batch: PreferenceBatch) -> Tensor | None:
        """Return the margins of all pairs if some have one of their own; the others have that of the loss."""
        if batch.margins is None:
            return None
        return torch.where(batch.margins.isnan(), self.options.margin, batch.margins)

    # --- pairs -------------------------------------------------------------------------------------------------

    def _pairs(self, result: TokenLogprobs, reference: Tensor | None, batch: PreferenceBatch) -> PairLogps:
        """Return the batch's pairs without gradient, for losses that compare them with other pairs."""
        pairs = pair_logps(result.logp, batch.segments, batch.lengths, self.options, reference=reference)
        return pairs.detach()

    @torch.no_grad()
    def _whole_step(self, parts: Sequence[_Part], count: int) -> PairLogps:
        """Compute all pairs of the step in their order, in a separate pass without gradient."""
        pairs = []
        for part in parts:
            batch = part.batch.to(self.device)
            output, reference = self._both(batch, batch)
            pairs.append((part, self._pairs(output.tokens, reference, batch)))
        return self._joined(pairs, count)

    def _joined(self, parts: Sequence[tuple[_Part, PairLogps]], count: int) -> PairLogps:
        """Return the pairs of all parts of the step, in their order."""
        names = ("chosen", "rejected", "chosen_lengths", "rejected_lengths", "ref_chosen", "ref_rejected")
        return PairLogps(
            **{name: self._in_order([(part, getattr(pairs, name)) for part, pairs in parts], count) for name in names}
        )

    def _totals(self, examples: Sequence[Example]) -> Totals:
        prompts = scores_prompts(self.options)
        scored = sum(e.scored(0) + (len(e.prompt) - 1 if prompts else 0) for e in examples)
        return Totals(len(examples), scored)

    def _extra_outputs(self) -> tuple[str, ...]:
        return ("log_sum_sq_probs",) if isinstance(self.options, DPO) and self.options.weighting else ()

    # --- single completions --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluated_kl(self, examples: Sequence[Example], batch: int) -> Tensor:
        """Compute KTO's KL over all examples of an evaluation, `batch` mismatched completions at a time."""
        mates = mismatched(examples)
        groups = iter(lambda: list(islice(mates, batch)), [])
        results = [self._completion_sums(self._plan_pass(group)) for group in groups]
        return kto_kl(*(torch.cat(sums) for sums in zip(*results)))

    @torch.no_grad()
    def _completion_sums(self, completions: Pass) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities [E] of single completions by policy and reference, in a separate pass."""
        logps, reference = [], []
        for part in self._parts(completions)[0]:
            batch = part.batch.to(self.device)
            output, compared = self._both(batch, batch)
            assert compared is not None
            logps.append((part, _sums(output.logp, batch)))
            reference.append((part, _sums(compared, batch)))
        count = len(completions.examples)
        return self._in_order(logps, count), self._in_order(reference, count)

    # --- both --------------------------------------------------------------------------------------------------

    def _with_router(
        self,
        loss: PreferenceLoss,
        output: PolicyOutput,
        part: _Part,
        run: _Pass,
    ) -> PreferenceLoss:
        """Add the router loss of a mixture of experts, weighted by the micro-batch's share of the step's tokens.

        The router loss is a product of means, so unlike everything else it depends on the micro-batches.
        """
        if output.router_loss is None or self.router_coefficient == 0:
            return loss
        if part.counts:
            run.metrics.add("aux_loss", output.router_loss * part.batch.tokens, part.batch.tokens)
        return replace(loss, loss=loss.loss + self.router_coefficient * part.share * output.router_loss)

    def _plan(self, examples: Sequence[Example]) -> StepPlan:
        return plan_step(self.options, examples, self.layout, self.budget, self.processes.count)

    def _plan_pass(self, examples: Sequence[Example]) -> Pass:
        return plan_pass(examples, self.layout, self.budget, self.processes.count)

    def _parts(self, whole: Pass) -> tuple[list[_Part], Work]:
        """Return this process's micro-batches, as many as every other process has, and the work of all processes."""
        rank, count = self.processes.rank, self.processes.count
        plan, groups, tokens = whole.microbatches, whole.groups, whole.tokens
        rounds = ceil(len(plan) / count)
        parts = []
        for turn in range(rounds):
            at = turn * count + rank
            counts = at < len(plan)
            at = at if counts else len(plan) - 1  # the smallest one
            batch = collate(
                groups[at],
                self.layout,
                index=plan[at],
                pad_token_id=self.pad_token_id,
                score_prompts=scores_prompts(self.options),
            )
            parts.append(_Part(batch, tokens[at] / sum(tokens), counts, last=turn == rounds - 1))
        return parts, Work(sum(tokens), len(plan))

    def _in_order(self, parts: Sequence[tuple[_Part, Tensor]], count: int) -> Tensor:
        """Return one value per example of the step, [count], from the parts of all processes."""
        whole = torch.zeros(count, dtype=parts[0][1].dtype, device=self.device)
        for part, values in parts:
            if part.counts:
                whole.index_copy_(0, part.batch.index.to(self.device, non_blocking=True), values)
        return self.processes.sum(whole)


def _sums(logp: Tensor, batch: PreferenceBatch) -> Tensor:
    return sequence_sums(logp, batch.segments, len(batch.lengths))
