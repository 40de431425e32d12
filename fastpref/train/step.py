"""The loss of one optimizer step, cut into micro-batches that add up to it exactly.

Terms that need the whole step before any gradient (KTO's KL, the sorting variants of DPO) are found in a pass without
gradient when the step is more than one micro-batch, and on the way when it is one. The result is the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastpref.data.batch import Layout, PreferenceBatch, collate, plan_microbatches, with_mismatched
from fastpref.data.example import Example
from fastpref.loss_options import DPO, KTO, LossOptions, compares_neighbours
from fastpref.losses import PairLogps, Totals, WholeStep, kto_kl
from fastpref.model.policy import PolicyOutput
from fastpref.model.reference import Reference
from fastpref.ops import TokenLogprobs
from fastpref.token_loss import PreferenceLoss, pair_logps, preference_loss, scores_prompts, sequence_sums
from fastpref.train.metrics import TOKEN_OUTPUTS, Metrics

Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class Work:
    """What a step computed, beside its metrics."""

    tokens: int  # through the model with gradient, padding included
    microbatches: int


@dataclass(frozen=True)
class _Pass:
    """What the parts of a step, or of an evaluation, share."""

    totals: Totals  # of all its examples
    metrics: Metrics
    outputs: tuple[str, ...]  # asked of `linear_logprob`
    backward: Backward | None = None

    def add(self, loss: PreferenceLoss) -> None:
        """One part's loss: its gradient first, then its metrics."""
        if self.backward is not None:
            self.backward(loss.loss)
        self.metrics.add_loss(loss)


@dataclass(frozen=True)
class Objective:
    """A loss, with the models and the layout it is computed in."""

    policy: nn.Module  # a Policy, or what Accelerate made of it
    reference: Reference | None
    options: LossOptions
    layout: Layout
    budget: int  # tokens a micro-batch
    pad_token_id: int
    device: torch.device
    router_coefficient: float = 0.0  # of a mixture of experts' router loss

    def step(
        self, examples: Sequence[Example], backward: Backward, *, token_metrics: bool = True
    ) -> tuple[Metrics, Work]:
        """The loss of a whole step; `backward` is called with each micro-batch's share of it."""
        run = _Pass(self._totals(examples), Metrics(), TOKEN_OUTPUTS if token_metrics else (), backward)
        return run.metrics, self._run(examples, run)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], batch: int) -> Metrics:
        """The metrics of examples taken `batch` at a time, as one mean over all of them."""
        run = _Pass(self._totals(examples), Metrics(), TOKEN_OUTPUTS)
        for chunk in chunks(examples, batch):
            self._run(chunk, run)
        return run.metrics

    def referenced(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples of a step with every completion whose reference it asks for."""
        return with_mismatched(examples) if compares_neighbours(self.options, len(examples)) else examples

    def _run(self, examples: Sequence[Example], run: _Pass) -> Work:
        return self._run_rows(examples, run) if isinstance(self.options, KTO) else self._run_pairs(examples, run)

    # --- pairs -------------------------------------------------------------------------------------------------

    def _run_pairs(self, examples: Sequence[Example], run: _Pass) -> Work:
        tokens = 0
        parts = self._microbatches(examples)
        sorts = isinstance(self.options, DPO) and self.options.sorts_step
        whole = self._whole_step(parts, len(examples)) if sorts and len(parts) > 1 else None
        for part in parts:
            batch = part.to(self.device)
            output: PolicyOutput = self.policy(batch, run.outputs + self._extra_outputs())
            result = output.tokens
            reference = None if self.reference is None else self.reference(batch)
            step = None
            if sorts:
                step = WholeStep(whole, batch.index) if whole else _alone(self._pairs(result, reference, batch))
            loss = preference_loss(
                result.logp,
                batch.segments,
                batch.lengths,
                self.options,
                reference=reference,
                log_sum_sq_probs=result.log_sum_sq_probs,
                totals=run.totals,
                step=step,
            )
            run.add(self._with_router(loss, output, batch, parts, run))
            tokens += batch.tokens
            counted = torch.arange(len(batch.lengths), device=self.device) < 2 * batch.examples
            chosen = torch.arange(len(batch.lengths), device=self.device) < batch.examples
            run.metrics.add_sequences(loss.sums, chosen[: 2 * batch.examples])
            run.metrics.add_tokens(result, batch, chosen, counted)
        return Work(tokens, len(parts))

    def _pairs(self, result: TokenLogprobs, reference: Tensor | None, batch: PreferenceBatch) -> PairLogps:
        """The batch's pairs without gradient, for losses that compare them with others."""
        pairs = pair_logps(result.logp, batch.segments, batch.lengths, self.options, reference=reference)
        return pairs.detach()

    @torch.no_grad()
    def _whole_step(self, parts: Sequence[PreferenceBatch], count: int) -> PairLogps:
        """All pairs of the step in their order, without gradient."""
        found = []
        for part in parts:
            batch = part.to(self.device)
            reference = None if self.reference is None else self.reference(batch)
            found.append((batch.index, self._pairs(self.policy(batch).tokens, reference, batch)))
        index = torch.cat([i for i, _ in found])

        def joined(name: str) -> Tensor:
            values = torch.cat([getattr(pairs, name) for _, pairs in found])
            return torch.zeros_like(values).index_copy(0, index, values)

        names = ("chosen", "rejected", "chosen_lengths", "rejected_lengths", "ref_chosen", "ref_rejected")
        return PairLogps(**{name: joined(name) for name in names})

    def _totals(self, examples: Sequence[Example]) -> Totals:
        prompts = scores_prompts(self.options)
        scored = sum(len(e.completions[0]) + (len(e.prompt) - 1 if prompts else 0) for e in examples)
        return Totals(len(examples), scored)

    def _extra_outputs(self) -> tuple[str, ...]:
        return ("log_sum_sq_probs",) if isinstance(self.options, DPO) and self.options.weighting else ()

    # --- single responses --------------------------------------------------------------------------------------

    def _run_rows(self, examples: Sequence[Example], run: _Pass) -> Work:
        options, tokens = self.options, 0
        assert isinstance(options, KTO)
        run.metrics.single_responses()
        mismatched = compares_neighbours(self.options, len(examples))
        parts = self._microbatches(with_mismatched(examples)) if mismatched else []
        branched = len(parts) == 1
        kl: Tensor | float = 0.0
        if not branched:
            if mismatched:
                kl = self._mismatched_kl(examples)
            parts = self._microbatches(examples)
        for part in parts:
            batch = part.to(self.device)
            assert batch.labels is not None
            assert self.reference is not None
            count = batch.examples
            output: PolicyOutput = self.policy(batch, run.outputs)
            result = output.tokens
            reference = self.reference(batch)
            if branched:
                kl = kto_kl(_sums(result.logp.detach(), batch)[count:], _sums(reference, batch)[count:])
            loss = preference_loss(
                result.logp,
                batch.segments,
                batch.lengths,
                options,
                reference=reference,
                labels=batch.labels,
                kl=kl,
                totals=run.totals,
            )
            run.add(self._with_router(loss, output, batch, parts, run))
            tokens += batch.tokens
            run.metrics.add_sequences(loss.sums, batch.labels)
            own = torch.arange(len(batch.lengths), device=self.device) < count
            run.metrics.add_tokens(result, batch, batch.labels.repeat(batch.completions), own)
        if options.kl == "batch":
            run.metrics.add("kl", torch.as_tensor(kl) * len(examples), len(examples))
        return Work(tokens, len(parts))

    @torch.no_grad()
    def _mismatched_kl(self, examples: Sequence[Example]) -> Tensor:
        """KTO's KL over the whole step, in a pass of its own."""
        assert self.reference is not None
        logps, reference = [], []
        for part in self._microbatches([replace(e, completions=e.completions[1:]) for e in with_mismatched(examples)]):
            batch = part.to(self.device)
            logps.append(_sums(self.policy(batch).logp, batch))
            reference.append(_sums(self.reference(batch), batch))
        return kto_kl(torch.cat(logps), torch.cat(reference))

    # --- both --------------------------------------------------------------------------------------------------

    def _with_router(
        self,
        loss: PreferenceLoss,
        output: PolicyOutput,
        batch: PreferenceBatch,
        parts: Sequence[PreferenceBatch],
        run: _Pass,
    ) -> PreferenceLoss:
        """With the router loss of a mixture of experts, weighted by the micro-batch's share of the step's tokens.

        It is a product of means, so unlike everything else it depends on how the step is cut.
        """
        if output.router_loss is None or self.router_coefficient == 0:
            return loss
        run.metrics.add("aux_loss", output.router_loss * batch.tokens, batch.tokens)
        share = self.router_coefficient * batch.tokens / sum(part.tokens for part in parts)
        return replace(loss, loss=loss.loss + share * output.router_loss)

    def _microbatches(self, examples: Sequence[Example]) -> list[PreferenceBatch]:
        return [
            collate(
                [examples[i] for i in places],
                self.layout,
                index=places,
                pad_token_id=self.pad_token_id,
                score_prompts=scores_prompts(self.options),
            )
            for places in plan_microbatches(examples, self.layout, self.budget)
        ]


def chunks(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """Cut by size. KTO compares neighbours, so a last example does not stay alone."""
    starts = list(range(0, len(examples), size))
    if len(starts) > 1 and len(examples) - starts[-1] == 1:
        starts.pop()
    for a, b in zip(starts, [*starts[1:], len(examples)]):
        yield examples[a:b]


def _alone(pairs: PairLogps) -> WholeStep:
    """A step of these pairs and no others."""
    return WholeStep(pairs, torch.arange(len(pairs.chosen), device=pairs.chosen.device))


def _sums(logp: Tensor, batch: PreferenceBatch) -> Tensor:
    return sequence_sums(logp, batch.segments, len(batch.lengths))
