"""The training run, from a config to a trained model: evaluate, sample, save, stop, step, log."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import chain, islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedTokenizerBase, get_scheduler

from fastpref.commands.push import check_login, push
from fastpref.config import Config, load_config
from fastpref.data.cache import Tokenized, load_examples
from fastpref.data.example import Example
from fastpref.data.table import Examples
from fastpref.data.template.text import TEXT, TextRecord, stop_at, text_of
from fastpref.data.tokenize import use_chat_template
from fastpref.errors import UserError
from fastpref.health import Verdict
from fastpref.memory.activations import checkpoint_activations
from fastpref.memory.advice import advice, step_counter
from fastpref.memory.peak import StepPeak
from fastpref.merge import merge_fault
from fastpref.model.failure import in_others_code
from fastpref.model.limits import compare, limits_of, limits_of_model, pad_token
from fastpref.model.load import Loaded, load_model, load_tokenizer, mixed_precision
from fastpref.processes import Processes, code, end_together, start_processes
from fastpref.quiet import quiet_libraries
from fastpref.run import state
from fastpref.run.checkpoint import Checkpoints
from fastpref.run.environment import peak_memory
from fastpref.run.folder import RunFolder
from fastpref.run.lock import RunLock
from fastpref.run.resume import Resumed, find_checkpoint, may_change, shared
from fastpref.run.state import Progress
from fastpref.run.whole import WriteError, write_file
from fastpref.step.objective import Objective
from fastpref.step.order import data_order
from fastpref.step.precompute import Precomputed, reference_folder
from fastpref.step.reference import Reference, make_reference, precomputes
from fastpref.training import faults
from fastpref.training.faults import Interrupt, NotFinite
from fastpref.training.optimizer import make_optimizer
from fastpref.training.progress import Display
from fastpref.training.record import Record
from fastpref.training.trackers import Trackers, require_trackers


@dataclass(frozen=True)
class RunResult:
    """Where a run's files are, and its last metrics."""

    output_dir: Path
    metrics: dict[str, float] = field(default_factory=dict)  # of the last step logged
    eval_metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation, prefixed eval/
    verdicts: tuple[Verdict, ...] = ()  # on its health, alarms first; empty in processes other than the first
    interrupted: bool = False  # by Ctrl-C or SIGTERM, before its last step


def train(
    config: Config | str | Path,
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
    resume: bool | str | Path = False,
    default_name: str = "run",
    cache: bool = True,
) -> RunResult:
    """Train as a config says; `overrides` are `key=value` strings, for a path to a config.

    `force` replaces the run that output.dir already holds; `default_name` names the folder when output.dir is not
    given. `resume` goes on with a run, bit for bit on a CPU: from a checkpoint's folder, or with True from the newest
    whole one of the config's last run. Without `cache` tokens are neither taken from the cache nor kept in it. Raises
    UserError for what a user can mend; but for the cache nothing is written before everything has been checked.
    """
    try:
        if not isinstance(config, Config):
            default_name = Path(config).stem
            config = load_config(config, overrides)
        require_trackers(config.log.trackers)
        if config.output.push_to is not None:
            check_login(config.output.push_to)
        resumed = find_checkpoint(config, default_name, resume, force=force) if resume else None
    except UserError as error:
        end_together(error)
    quiet_libraries()
    accelerator, processes = start_processes(config, mixed_precision(config))
    processes.agree(lambda: shared(config, resumed) | code())
    folder = resumed.folder if resumed else processes.on_first(
        lambda: RunFolder.choose(config, default_name, force=force)
    )  # fmt: skip
    lock = RunLock(folder.path)
    try:
        processes.on_first(lambda: lock.acquire() if folder.path.exists() else None)
        run = _prepare(config, folder, accelerator, processes, resumed, cache=cache)
        return run.go(lock)
    finally:
        lock.release()


def _prepare(
    config: Config,
    folder: RunFolder,
    accelerator: Accelerator,
    processes: Processes,
    resumed: Resumed | None,
    *,
    cache: bool,
) -> "_Run":
    """Load everything, and say what was decided."""
    set_seed(config.train.seed)
    began = resumed.text if resumed else None
    day = processes.on_first(date.today) if began is None else began.day

    def read() -> tuple[PreTrainedTokenizerBase, Tokenized, TextRecord, list[str]]:
        tokenizer = load_tokenizer(config.model)
        use_chat_template(tokenizer, config.tokens.chat_template)
        data = load_examples(config, tokenizer, cache=cache, day=day)
        if data.chat_template is not None:  # the rows' own goes with the result, and not one that wrote none of them
            tokenizer.chat_template = data.chat_template
        text = text_of(config, tokenizer, day, data.ends)
        if resumed:
            resumed.check_text(text)
        beyond = compare(limits_of(config.model), data.parts, tokenizer, config)  # before its weights are read
        return tokenizer, data, text, beyond

    def load() -> Loaded:
        loaded = load_model(config, accelerator.device, sharded=processes.sharded)
        compare(limits_of_model(loaded.model), data.parts, tokenizer, config)
        return loaded

    tokenizer, data, text, beyond = processes.first_then_others(read)  # the others find its tokens in the cache
    processes.agree(lambda: {f"tokens of the {name} rows": examples.digest() for name, examples in data.parts.items()})
    try:
        loaded = processes.together(load)
        processes.agree(lambda: {"the model's weights": state.model_fingerprint(loaded)[:16], "layout": loaded.layout})
        notes = checkpoint_activations(config, loaded, accelerator.device, sharded=processes.sharded)
        run = _Run(config, folder, accelerator, processes, tokenizer, text, loaded, data, resumed)
    except UserError:
        raise
    except Exception as error:
        if not faults.is_out_of_memory(error):
            failure = in_others_code(error)
            if failure is None:
                raise
            raise UserError(
                f"model.name = {config.model.name!r}: its code fails before the first step: {failure}"
            ) from error
        smaller = "a smaller model" if config.lora else "adapters, lora={}, or a smaller model"
        raise UserError(f"out of memory while {config.model.name} was loaded; it needs {smaller}") from None
    if fault := merge_fault(config, loaded.model):
        run.notes.append(f"warning: fastpref merge will not take what this run makes: {fault}")
    for note in [*(resumed.notes if resumed else ()), *data.notes, *beyond, *notes, *run.notes]:
        run.display.note(note)
    return run


class _Run:
    """Everything a run holds. `go` is the loop."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        accelerator: Accelerator,
        processes: Processes,
        tokenizer: PreTrainedTokenizerBase,
        text: TextRecord,
        loaded: Loaded,
        data: Tokenized,
        resumed: Resumed | None = None,
    ):
        examples, heldout = data.train, data.heldout
        self.config, self.folder, self.accelerator, self.processes = config, folder, accelerator, processes
        self.tokenizer, self.text, self.loaded = tokenizer, text, loaded
        self.examples, self.heldout = examples, heldout
        train = config.train
        self.steps = train.steps or math.ceil(train.epochs * len(examples) / train.batch)
        console = None if processes.first else Console(quiet=True)
        self.what = f"{config.loss.unit}s"
        done = resumed.state["progress"]["step"] if resumed else 0
        self.display = Display(self.steps, done, console, examples=self.what)
        self.notes: list[str] = _end_notes(text, stop_at(loaded.model, text.ends.values()))
        fingerprint = state.model_fingerprint(loaded)

        reference = self._reference() if config.loss.uses_reference else None
        optimizer = make_optimizer(loaded.policy, config)
        warmup = train.warmup if train.warmup >= 1 else train.warmup * self.steps
        name = {"constant": "constant_with_warmup"}.get(train.schedule, train.schedule)
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=round(warmup), num_training_steps=self.steps)
        policy, self.optimizer, self.scheduler = accelerator.prepare(loaded.policy, optimizer, scheduler)
        self.policy: torch.nn.Module = policy
        if processes.sharded:
            register_fsdp_forward_method(policy, "generate")
        if not processes.first:  # the same adapters, but dropout of its own
            set_seed(train.seed + processes.rank)
        self.limits = limits_of_model(loaded.model)
        pad, unpadded = pad_token(tokenizer, self.limits)
        router = loaded.policy.router
        self.objective = Objective(
            policy=policy,
            reference=reference,
            options=config.loss,
            layout=loaded.layout,
            budget=config.tokens_per_microbatch,
            pad_token_id=pad,
            device=accelerator.device,
            router_coefficient=router.coefficient if router is not None else 0.0,
            processes=processes,
        )
        if isinstance(reference, Precomputed):
            self._precompute(reference)
        plan = self._plan()
        self.notes += [*([unpadded] if unpadded else []), plan, *loaded.notes]
        self.record = Record(folder, config, self.steps, data, plan, accelerator.device) if processes.first else None
        self.checkpoints = Checkpoints(
            config,
            folder,
            loaded,
            tokenizer,
            text,
            examples,
            self.optimizer,
            self.scheduler.scheduler,
            accelerator.scaler,
            fingerprint,
            processes,
        )
        self.progress = self.checkpoints.restore(resumed, self.steps) if resumed else Progress()
        self.resumed = resumed is not None
        self.rng = state.rng_state()  # as the last whole step left it: what a checkpoint holds
        self.batch: list[Example] = []  # the step's, for messages
        self.trackers = Trackers(accelerator, self.display.note)
        self.peak = StepPeak(accelerator.device)

    def _reference(self) -> Reference:
        reference, what = make_reference(self.config, self.loaded, self.accelerator.autocast)
        self.notes.append(f"reference: {what}")
        if not precomputes(self.config):
            return reference
        return Precomputed(reference, reference_folder(self.config, self.loaded.model))

    def _precompute(self, reference: Precomputed) -> None:
        """The reference's numbers for every completion of the run, while the model is still what it was."""
        batch, objective = self.config.train.batch, self.objective
        planned = islice(data_order(len(self.examples), batch, self.config.train.seed), self.steps)
        steps = ([self.examples[i] for i in places] for places in planned)
        asked = chain(
            chain.from_iterable(map(objective.referenced, steps)), objective.referenced_in_evaluation(self.heldout)
        )
        computed = reference.complete(
            asked, layout=objective.layout, budget=objective.budget, device=objective.device,
            pad_token_id=objective.pad_token_id, progress=self.display.precomputing, processes=self.processes,
        )  # fmt: skip
        found = f"{len(reference) - computed:,} found in {reference.folder}, " if len(reference) > computed else ""
        self.notes += [*reference.notes, f"reference log-probabilities: {found}{computed:,} completions computed"]

    def go(self, lock: RunLock) -> RunResult:
        self.processes.on_first(lock.acquire)
        self._open()
        with Interrupt() as interrupt, self.display:
            try:
                return self._finish() if self._train(interrupt) else self._stopped()
            except Exception as error:
                fault = self._explained(error)
                if fault is None:
                    raise
                together = self.processes.count == 1 or isinstance(error, NotFinite | WriteError)
            finally:
                self.trackers.end()
            # Out of the handler, what the failed step held can be freed.
            said, overrides = fault
            self._report("ended by a fault")
            if not together:
                raise UserError(f"{said}\n{self.checkpoints.before(*overrides)}")
            raise UserError(f"{said}\n{self.checkpoints.rescue(self.progress, self.rng, *overrides)}")

    def _open(self) -> None:
        if self.resumed:
            self.processes.on_first(lambda: self.folder.resume(self.config, self.progress))
            self.display.note(f"resumed after step {self.progress.step} of {self.steps}: {self.checkpoints.latest}")
        else:
            self.processes.on_first(lambda: self.folder.create(self.config))
        self.processes.on_first(lambda: write_file(self.folder.path / TEXT, self.text.to_json()))
        self._write_down(lambda record: record.begin(resumed=self.resumed))
        self.trackers.start(self.config, self.folder.path, self.progress.step)

    def _train(self, interrupt: Interrupt) -> bool:
        """Whether it came to its end."""
        progress, train, every = self.progress, self.config.train, self.config.output.save_every
        order = data_order(len(self.examples), train.batch, train.seed, start=progress.step)
        while True:
            self.rng = state.rng_state()
            improved, stops = False, self.processes.any(interrupt.asked)
            if self._evaluation_is_due() and not stops:
                self._evaluate()
                improved = progress.improved() and progress.step > 0
            if progress.before is None:
                progress.before = self._answers()
            if every is not None and progress.step > 0 and (improved or progress.step % every == 0):
                self.checkpoints.save(progress, self.rng, best=improved)
            if progress.step >= self.steps or stops:
                return not stops
            self.batch = [self.examples[i] for i in next(order)]
            self._step(progress.step + 1, self.batch)

    def _finish(self) -> RunResult:
        answers = [answer for _, answer in self._answers()]
        self.display.samples([(question, old) for question, old in self.progress.before or []], answers)
        place = self.checkpoints.save_weights("final", self.progress.step)
        self.display.note(f"saved: {place}")
        if self.peak.bytes and isinstance(self.examples, Examples):
            self.display.note(self.peak.beside_estimate(self.config, self.examples, self.loaded))
        verdicts = self._report("finished", answers)
        if self.config.output.push_to is not None:
            self.display.note(f"uploaded: {self.processes.on_first(lambda: self._push(place))}")
        return RunResult(self.folder.path, self.progress.last, self.progress.evaluated, verdicts)

    def _push(self, place: Path) -> str:
        assert self.config.output.push_to is not None
        try:
            return push(place, self.config.output.push_to)
        except UserError as error:
            raise UserError(f"{error}\nIt is saved; upload it with\n  fastpref push {self.folder.path}") from None

    def _step(self, step: int, examples: list[Example]) -> None:
        """One optimizer step. Its metrics are those of the tokens too only when it is logged."""
        began = time.perf_counter()
        self.peak.start()
        logged = step % self.config.log.every == 0 or step in (1, self.steps)
        self.policy.train()
        metrics, work = self.objective.step(examples, self.accelerator.backward, token_metrics=logged)
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.train.max_grad_norm)
        row: dict[str, float] = metrics.result()
        row["grad_norm"] = float(norm) if norm is not None else 0.0
        row["learning_rate"] = self.scheduler.get_last_lr()[0]
        if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
            self.optimizer.step()
            self.progress.skipped_in_row = 0
        else:
            self._not_finite(step, examples, row)
        self.peak.end()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        row |= {"tokens_per_second": work.tokens / seconds, "pairs_per_second": len(examples) / seconds}
        self.progress.step, self.progress.last = step, row
        if logged:
            self._log({"step": step} | row)
        self.display.step(step, seconds, row, peak_memory(self.accelerator.device))

    def _not_finite(self, step: int, examples: list[Example], row: dict[str, float]) -> None:
        """Leave the step out, or raise NotFinite."""
        what = faults.not_finite(step, row["loss"], row["grad_norm"], examples, self.objective)
        overflow = self.accelerator.scaler is not None and math.isfinite(row["loss"])
        if overflow:  # float16 finds its scale by trying: the scaler leaves the step out and lowers it
            self.optimizer.step()
        elif self.config.train.nonfinite == "stop":
            raise NotFinite(
                f"{what}. The model is as it was after step {step - 1}. Lower train.learning_rate, look at those "
                'rows, or set train.nonfinite = "skip"'
            )
        self.progress.skipped += 1
        self.progress.skipped_in_row += 1
        if self.progress.skipped_in_row >= faults.SKIPS_IN_ROW:
            raise NotFinite(f"{what}. It is the {faults.SKIPS_IN_ROW}th such step in a row, so skipping does not help")
        self.display.note(f"{what}. The step is left out, the {self.progress.skipped}. of this run.")

    def _log(self, row: dict[str, float]) -> None:
        self.processes.on_first(lambda: self.folder.log(row))
        self.trackers.log(row)
        for verdict in self.record.add(row) if self.record is not None else ():
            self.display.verdict(verdict)

    def _write_down(self, what: Callable[[Record], None]) -> None:
        """In run.json. What the first process cannot write ends all of them alike."""
        record = self.record
        self.processes.on_first(lambda: None if record is None else what(record))

    def _report(self, ended: str, answers: Sequence[str] = ()) -> tuple[Verdict, ...]:
        """How healthy the run was, on the terminal and as a page. The run stands without it."""
        if self.record is None:
            return ()
        verdicts: tuple[Verdict, ...] = ()
        try:
            verdicts = self.record.verdicts()
            self.display.health(verdicts)
            self.record.sampled(self.progress.before or [], answers)
            self.display.note(f"report: {self.record.end(ended)}")
        except Exception as error:  # nor does it hide why a run has ended
            self.display.note(f"no report: {error if isinstance(error, UserError) else repr(error)}")
        return verdicts

    # --- evaluate and sample -----------------------------------------------------------------------------------

    def _evaluation_is_due(self) -> bool:
        step, every = self.progress.step, self.config.eval.every
        due = step in (0, self.steps) or (every is not None and step % every == 0)
        return due and bool(self.heldout) and self.progress.evaluated_at != step

    def _evaluate(self) -> None:
        """The metrics of all held-out examples, each under eval/."""
        self.policy.eval()
        metrics = self.objective.evaluate(self.heldout, self.config.train.batch)
        row = {f"eval/{name}": value for name, value in metrics.result().items()}
        self._write_down(lambda record: record.evaluated(self.progress.step, metrics))
        self._log({"step": self.progress.step} | row)
        self.progress.evaluated, self.progress.evaluated_at = row, self.progress.step
        self.display.evaluation(self.progress.step, row)

    @torch.no_grad()
    def _answers(self) -> list[list[str]]:
        """The model's likeliest answers to some held-out prompts: [question, answer]."""
        options, found = self.config.eval, []
        self.policy.eval()
        for example in _first_prompts(self.heldout, options.samples):
            prompt = example.prompt
            ids = torch.tensor([prompt], device=self.accelerator.device)
            out = self.loaded.policy.generate(
                self.loaded.model,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.limits.room(len(prompt), options.sample_tokens),
                do_sample=False,
                use_cache=True,
                pad_token_id=self.objective.pad_token_id,
            )
            answer = self.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
            found.append([example.row.question, str(answer).strip()])
        return found

    # --- stop --------------------------------------------------------------------------------------------------

    def _stopped(self) -> RunResult:
        place = self.checkpoints.save(self.progress, self.rng)
        verdicts = self._report("stopped")
        said = f"stopped after step {self.progress.step} of {self.steps}; go on with"
        self.display.note(f"{said}\n  {self.folder.resume_command(place)}")
        return RunResult(self.folder.path, self.progress.last, self.progress.evaluated, verdicts, interrupted=True)

    def _explained(self, error: Exception) -> tuple[str, list[str]] | None:
        """What to say of an exception that a person can do something about, and with which overrides to go on."""
        if isinstance(error, NotFinite | WriteError):
            return str(error), []
        if not faults.is_out_of_memory(error):
            failure = in_others_code(error) if self.progress.step == 0 else None
            if failure is None:
                return None
            kind = self.loaded.model.config.model_type
            raise UserError(f"the code of {kind} models fails in the first step: {failure}") from error
        held = faults.held(self.config, self.loaded, self.optimizer, self.objective, self.batch or self.heldout)
        count = step_counter(self.loaded, held.microbatch, self.accelerator.device, sharded=self.processes.sharded)
        advised = advice(self.config, held, count)
        said = f"out of memory after step {self.progress.step}: {held}. {advised}"
        return said, [override for override in advised.overrides if may_change(override.partition("=")[0])]

    def _plan(self) -> str:
        trained = sum(p.numel() for p in self.policy.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in self.loaded.model.parameters())
        devices = str(self.accelerator.device)
        if self.processes.count > 1:
            how = "sharded by FSDP" if self.processes.sharded else "by DDP"
            devices = f"{self.processes.count} × {self.accelerator.device.type}, {how}"
        layout = self.loaded.layout
        if self.loaded.why_padded:
            layout = f"padded, because {self.loaded.why_padded}"
        return (
            f"{self.config.loss.type.upper()}: {self.steps} steps of {self.config.train.batch} {self.what}; training "
            f"{trained:,} of {everything:,} parameters on {devices}; layout {layout}"
        )


def _end_notes(text: TextRecord, new: Sequence[int]) -> list[str]:
    """What to say of the tokens that end responses: those that are `new` to the model, or that there are none."""
    if not text.ends:
        return ["every training response was cut, so no token that ends an answer is trained; raise tokens.max_length"]
    tokens = [token for token, number in text.ends.items() if number in new]
    if not tokens:
        return []
    return [
        f"answers end with {', '.join(tokens)}, at which the model would not stop so far; what is saved does, by its "
        "generation_config.json"
    ]


def _first_prompts(examples: Sequence[Example], count: int) -> list[Example]:
    """The first examples of `count` different prompts."""
    found: dict[tuple[int, ...], Example] = {}
    for example in examples:
        if len(found) == count:
            break
        found.setdefault(tuple(example.prompt), example)
    return list(found.values())
