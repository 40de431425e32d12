"""The loop of a training run: step, log, evaluate, sample, save, stop."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastpref.atomic import WriteError, write_file
from fastpref.config import Config
from fastpref.config.stopping import Better
from fastpref.data.cache import Tokenized
from fastpref.data.example import Example
from fastpref.data.order import data_order
from fastpref.data.table import Examples
from fastpref.data.template.text import TEXT
from fastpref.errors import UserError
from fastpref.health import Verdict
from fastpref.memory.measured import StepPeak, oversized_step, step_counter
from fastpref.model.failure import in_others_code, is_out_of_memory
from fastpref.model.limits import Limits
from fastpref.model.load import Loaded
from fastpref.processes import Processes
from fastpref.run.checkpoint import Checkpoints
from fastpref.run.environment import peak_memory
from fastpref.run.folder import RunFolder
from fastpref.run.history import REPORT
from fastpref.run.hub import push
from fastpref.run.lock import RunLock
from fastpref.run.state import Progress, rng_state
from fastpref.run.weights import serving
from fastpref.step.objective import Objective, Work
from fastpref.step.optimizer import training_weights
from fastpref.step.schedule import Schedule
from fastpref.training import faults
from fastpref.training.cadence import CheckpointTimer, evaluation_steps
from fastpref.training.callbacks import CallbackError, Callbacks, RunEvent
from fastpref.training.faults import NotFinite, StoppedAtOnce, interrupts
from fastpref.training.progress import Display
from fastpref.training.record import Record
from fastpref.training.stopping import (
    best_elsewhere,
    ends,
    forget_lost_best,
    left_language,
    require_metric,
    take_best,
)  # fmt: skip
from fastpref.training.trackers import Trackers


@dataclass(frozen=True)
class RunResult:
    """The result of a run: its folder, its last metrics and its verdicts."""

    output_dir: Path
    metrics: dict[str, float] = field(default_factory=dict)  # of the last logged step
    eval_metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation, prefixed eval/
    verdicts: tuple[Verdict, ...] = ()  # on its health, alarms first; empty in processes other than the first
    interrupted: bool = False  # by Ctrl-C or SIGTERM, before its last step


@dataclass
class TrainingRun:
    """A run that is ready for its next step. `go` is the loop."""

    config: Config
    folder: RunFolder
    accelerator: Accelerator
    processes: Processes
    tokenizer: PreTrainedTokenizerBase
    loaded: Loaded
    limits: Limits
    data: Tokenized
    steps: int
    policy: nn.Module  # prepared by Accelerate, like the optimizer
    optimizer: Any
    schedule: Schedule
    objective: Objective
    checkpoints: Checkpoints
    progress: Progress
    display: Display
    record: Record | None  # of the first process only
    trackers: Trackers
    resumed: bool
    peak: StepPeak
    callbacks: Callbacks = field(default_factory=Callbacks)  # none in processes other than the first
    rng: dict[str, Any] = field(default_factory=rng_state)  # after the last whole step, for the next checkpoint
    batch: list[Example] = field(default_factory=list)  # of the current step, for messages

    def __post_init__(self) -> None:
        self.timer = CheckpointTimer(self.config, self.steps)

    def go(self, lock: RunLock) -> RunResult:
        """Train to the end or to an interrupt. A fault raises a UserError that says how to resume."""
        self.processes.on_first(lock.acquire)
        try:
            self._open()
        except KeyboardInterrupt as interrupt:
            left = f"{self.checkpoints.latest} is as it was" if self.resumed else f"--force replaces {self.folder.path}"
            self.display.note(f"stopped before the first step; {left}")
            raise StoppedAtOnce from interrupt
        with interrupts(self.display.stopping) as signals, self.display:
            self.objective = replace(self.objective, tell=partial(self._part, signals))
            try:
                return self._finish() if self._train(signals) else self._stopped()
            except KeyboardInterrupt:
                self.display.note(f"stopped at once, after step {self.progress.step}. {self.checkpoints.before()}")
                raise
            except Exception as error:
                fault = self._explained(error)
                if fault is None:
                    raise
                together = self.processes.count == 1 or isinstance(error, NotFinite | WriteError | CallbackError)
            finally:
                self.trackers.end()
            # Outside the handler, the tensors of the failed step can be freed.
            message, overrides = fault
            self._report("ended by a fault")
            if not together:
                raise UserError(f"{message}\n{self.checkpoints.before(*overrides)}")
            raise UserError(f"{message}\n{self.checkpoints.rescue(self.progress, self.rng, *overrides)}")

    def _open(self) -> None:
        if self.resumed:
            lost = forget_lost_best(self.config.train.stop, self.checkpoints, self.progress, self.processes)
            self.processes.on_first(lambda: self.folder.resume(self.config, self.progress))
            self.display.past(self.folder.rows())
            self.display.note(f"resumed after step {self.progress.step} of {self.steps}: {self.checkpoints.latest}")
            if lost is not None:
                self.display.note(lost)
        else:
            self.processes.on_first(lambda: self.folder.create(self.config))
        self.processes.on_first(lambda: write_file(self.folder.path / TEXT, self.checkpoints.text.to_json()))
        self._write_down(lambda record: record.begin(resumed=self.resumed))
        self.trackers.start(self.config, self.folder.path, self.progress.step)

    def _train(self, signals: Sequence[int]) -> bool:
        """Train until the last step, an early end or an interrupt. Returns whether it was no interrupt."""
        progress, train, stepped = self.progress, self.config.train, False
        order = data_order(len(self.data.train), train.batch, train.seed, start=progress.step)
        while True:
            self.rng = rng_state()
            if stepped:
                self._tell("step", progress.last)
            asked = (bool(signals), self.callbacks.asked_to_stop, self.timer.overdue)
            interrupted, ending, overdue = map(any, zip(*self.processes.gather(asked)))
            evaluated, improved = self._evaluation_is_due(ending=ending) and not interrupted, False
            if evaluated:
                try:
                    improved = self._evaluate()
                except _Skipped:  # a resumed run makes it
                    interrupted, evaluated = True, False
            if progress.before is None:
                progress.before = self._answers()
            if not interrupted:
                self._renew(begun=not stepped, evaluated=evaluated)
            if self.timer.is_due(progress.step, improved=improved, overdue=overdue):
                self.display.phase("saving a checkpoint")
                self.checkpoints.save(progress, self.rng, best=improved)
                self.timer.saved()
            if evaluated and train.callbacks:
                self._tell("evaluation", progress.evaluated)
                ending = self.processes.any(self.callbacks.asked_to_stop)
            if progress.step >= self.steps or interrupted or ending or ends(train.stop, progress):
                return not interrupted
            self.batch = [self.data.train[i] for i in next(order)]
            self._step(progress.step + 1, self.batch)
            stepped = True

    def _finish(self) -> RunResult:
        stop, progress, evaluated = self.config.train.stop, self.progress, self.progress.evaluated
        if stop is not None and progress.best is not None:
            self.checkpoints.save(progress, self.rng)  # another train.stop can go on from it
            evaluated = {name: value for name, value in progress.best.items() if name != "step"}
        step, note = take_best(stop, self.checkpoints, self.loaded, progress, self.processes)
        if note is not None:
            self.display.note(note)
        answers = [answer for _, answer in self._answers()]
        self.display.samples(progress.before or [], answers)
        self.display.phase("saving the result")
        place = self.checkpoints.save_weights("final", step)
        if self.checkpoints.reference is not None:
            self.checkpoints.reference.write()
        self.display.note(f"saved: {place}")
        if (note := best_elsewhere(stop, self.checkpoints, progress, self.processes)) is not None:
            self.display.note(note)
        if self.processes.first and (note := serving(place)) is not None:
            self.display.note(note)
        if self.peak.bytes and isinstance(self.data.train, Examples):
            self.display.note(self.peak.against_estimate(self.config, self.data.train, self.loaded))
        self._tell("end", evaluated or progress.last)
        verdicts = self._report("finished", answers)
        if self.config.output.push_to is not None:
            self.display.note(f"uploaded: {self.processes.on_first(lambda: self._push(place))}")
        return RunResult(self.folder.path, progress.last, evaluated, verdicts)

    def _push(self, place: Path) -> str:
        assert self.config.output.push_to is not None
        try:
            return push(place, self.config.output.push_to)
        except UserError as error:
            raise UserError(f"{error}\nIt is saved; upload it with\n  fastpref push {self.folder.path}") from None

    def _step(self, step: int, examples: list[Example]) -> None:
        """Take one optimizer step. Metrics of single tokens are computed only if the step is logged."""
        began = time.perf_counter()
        self.display.phase(f"step {step:,}", part="micro-batch")
        self.peak.start()
        logged = step % self.config.log.every == 0 or step in (1, self.steps)
        self.policy.train()
        with training_weights(self.optimizer):
            row, work = self._update(step, examples, token_metrics=logged)
        self.peak.end()
        self.schedule.stepped()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        row |= {"tokens_per_second": work.tokens / seconds, "pairs_per_second": len(examples) / seconds}
        sync = self.config.reference.sync
        if sync is not None and self.checkpoints.moving is not None and step % sync.every == 0:
            self.checkpoints.moving.move(self.loaded.model, sync.mix)
        self.progress.step, self.progress.last = step, row
        if logged:
            self._log({"step": step} | row)
        self.display.step(step, seconds, row, peak_memory(self.accelerator.device))

    def _update(self, step: int, examples: list[Example], *, token_metrics: bool) -> tuple[dict[str, float], Work]:
        """Compute the gradients and update the weights, if both are finite. Return the metrics and the work."""
        metrics, work = self.objective.step(examples, self.accelerator.backward, token_metrics=token_metrics)
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.train.max_grad_norm)
        grad_norm = float(norm) if norm is not None else 0.0
        row: dict[str, float] = metrics.result() | {"grad_norm": grad_norm, "learning_rate": self.schedule.rate}
        if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
            self.optimizer.step()
            self.progress.skipped_in_row = 0
        else:
            self._not_finite(step, examples, row)
        return row, work

    def _not_finite(self, step: int, examples: list[Example], row: dict[str, float]) -> None:
        """Skip a step whose loss or gradient is not finite, or raise NotFinite."""
        fault = faults.not_finite(step, row["loss"], row["grad_norm"], examples, self.objective)
        if self.accelerator.scaler is not None and math.isfinite(row["loss"]):
            self.optimizer.step()  # float16 finds its loss scale by trial: the scaler skips the step and lowers it
        elif self.config.train.nonfinite == "stop":
            raise NotFinite(
                f"{fault}. The model is as it was after step {step - 1}. Lower train.learning_rate, look at those "
                'rows, or set train.nonfinite = "skip"'
            )
        self.progress.skipped += 1
        self.progress.skipped_in_row += 1
        if self.progress.skipped_in_row >= faults.SKIPS_IN_ROW:
            raise NotFinite(f"{fault}. It is the {faults.SKIPS_IN_ROW}th such step in a row, so skipping does not help")
        self.display.note(f"{fault}. The step is left out, the {self.progress.skipped}. of this run.")

    def _log(self, row: dict[str, float]) -> None:
        self.processes.on_first(lambda: self.folder.log(row))
        self.trackers.log(row)
        for verdict in self.record.add(row) if self.record is not None else ():
            self.display.verdict(verdict)

    def _renew(self, *, begun: bool, evaluated: bool) -> None:
        """Write the report of the run so far, if that is due."""
        if self.record is None:
            return
        note = self.record.renew(self.progress.before or (), at_once=begun or evaluated)
        if note is None and begun:
            note = f"report: {self.folder.path / REPORT}, written again as the run goes on"
        if note is not None:
            self.display.note(note)

    def _write_down(self, what: Callable[[Record], None]) -> None:
        """Update run.json in the first process. An error there ends all processes."""
        record = self.record
        self.processes.on_first(lambda: None if record is None else what(record))

    def _report(self, ended: str, answers: Sequence[str] = ()) -> tuple[Verdict, ...]:
        """Print the verdicts on the run's health and write the report. A failure here does not fail the run."""
        if self.record is None:
            return ()
        verdicts: tuple[Verdict, ...] = ()
        self.display.ended()
        try:
            self.record.sampled(self.progress.before or [], answers)
            health = self.record.health()
            verdicts = health.verdicts
            self.display.health(health)
            self.display.note(f"report: {self.record.end(ended)}")
        except Exception as error:  # a failing report must not hide why the run has ended
            self.display.note(f"no report: {error if isinstance(error, UserError) else repr(error)}")
        return verdicts

    def _evaluation_is_due(self, *, ending: bool) -> bool:
        step, every = self.progress.step, evaluation_steps(self.config, self.steps, len(self.data.heldout))
        due = step in (0, self.steps) or ending or (every is not None and step % every == 0)
        return due and bool(self.data.heldout) and self.progress.evaluated_at != step

    def _evaluate(self) -> bool:
        """Compute and log the metrics of all held-out examples, each under eval/. Return whether they are the best."""
        progress, stop = self.progress, self.config.train.stop
        self.display.phase("evaluating held-out rows", len(self.data.heldout))
        self.policy.eval()
        metrics = self.objective.evaluate(self.data.heldout, self.config.train.batch)
        row = {f"eval/{name}": value for name, value in metrics.result().items()}
        require_metric(stop, self.checkpoints, row)
        better, spoilt = Better.of(stop, self.config.loss), left_language(self.config, self.data, progress, row)
        if stop is None or progress.best is None or (not spoilt and better(row, progress.best)):
            self._write_down(lambda record: record.evaluated(progress.step, metrics))  # the report is on final/
        self._log({"step": progress.step} | row)
        self.schedule.evaluated(row["eval/loss"])
        progress.evaluated, progress.evaluated_at = row, progress.step
        self.display.evaluation(progress.step, row)
        return progress.improved(better, departed=spoilt)

    def _tell(self, kind: Literal["step", "evaluation", "end"], metrics: Mapping[str, float]) -> None:
        """Call the functions of `train.callbacks` in the first process. Raises CallbackError in all."""
        if not self.config.train.callbacks:
            return
        model = None if self.processes.sharded else self.loaded.wrapped
        event = RunEvent(
            kind, self.progress.step, self.steps, dict(metrics), self.folder.path, self.config, model, self.tokenizer
        )
        self.processes.on_first(lambda: self.callbacks.tell(event))

    @torch.no_grad()
    def _answers(self) -> list[list[str]]:
        """Generate the likeliest answers to some held-out prompts. Returns [question, answer] of each."""
        options, answers = self.config.eval, []
        self.policy.eval()
        prompts = _first_prompts(self.data.heldout, options.samples)
        self.display.phase("writing sample answers", len(prompts))
        for number, example in enumerate(prompts, start=1):
            self.display.part(number, len(prompts))
            prompt = example.prompt
            ids = torch.tensor([prompt], device=self.accelerator.device)
            out = self.loaded.policy.generate(
                self.loaded.model,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                max_new_tokens=self.limits.room(len(prompt), options.sample_tokens),
                pad_token_id=self.objective.pad_token_id,
            )
            answer = self.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
            answers.append([example.row.question, str(answer).strip()])
        return answers

    def _part(self, signals: Sequence[int], number: int, of: int) -> None:
        """Show the progress within a step or an evaluation. An interrupt ends an evaluation in a process alone."""
        self.display.part(number, of)
        if signals and not self.policy.training and self.processes.count == 1:
            raise _Skipped

    def _stopped(self) -> RunResult:
        self.display.phase("saving a checkpoint")
        place = self.checkpoints.save(self.progress, self.rng)
        verdicts = self._report("stopped")
        command = self.folder.resume_command(place)
        self.display.note(f"stopped after step {self.progress.step} of {self.steps}; go on with\n  {command}")
        return RunResult(self.folder.path, self.progress.last, self.progress.evaluated, verdicts, interrupted=True)

    def _explained(self, error: Exception) -> tuple[str, list[str]] | None:
        """Return the message for an exception that a user can act on, and the overrides to resume with, or None."""
        if isinstance(error, NotFinite | WriteError | CallbackError):
            return str(error), []
        if not is_out_of_memory(error):
            failure = in_others_code(error) if self.progress.step == 0 else None
            if failure is None:
                return None
            kind = self.loaded.model.config.model_type
            raise UserError(f"the code of {kind} models fails in the first step: {failure}") from error
        examples = self.batch or self.data.heldout
        step = oversized_step(self.config, self.loaded, self.optimizer, self.objective, examples)
        return faults.out_of_memory(self.progress.step, step, step_counter(step, self.loaded))


class _Skipped(Exception):
    """An evaluation has been left out."""


def _first_prompts(examples: Sequence[Example], count: int) -> list[Example]:
    """Return the first examples of `count` different prompts."""
    by_prompt: dict[tuple[int, ...], Example] = {}
    for example in examples:
        if len(by_prompt) == count:
            break
        by_prompt.setdefault(tuple(example.prompt), example)
    return list(by_prompt.values())
