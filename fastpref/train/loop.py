"""The training run, from a config to a trained model: evaluate, sample, step, log; then save."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase, get_scheduler
from transformers.utils import logging as transformers_logging

from fastpref.config import Config, load_config
from fastpref.data.cache import load_examples
from fastpref.data.example import Example
from fastpref.data.tokenize import use_chat_template
from fastpref.errors import UserError
from fastpref.loss_options import KTO
from fastpref.model.load import Loaded, load_model, load_tokenizer
from fastpref.model.precompute import Precomputed, reference_folder
from fastpref.model.reference import Reference, make_reference, precomputes
from fastpref.train.checkpoint import RunFolder
from fastpref.train.optimizer import make_optimizer
from fastpref.train.progress import Display
from fastpref.train.step import Objective, chunks


@dataclass(frozen=True)
class RunResult:
    """Where a run's files are, and its last metrics."""

    output_dir: Path
    metrics: dict[str, float] = field(default_factory=dict)  # of the last step logged
    eval_metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation, prefixed eval/
    interrupted: bool = False  # by Ctrl-C or SIGTERM, before its last step


def train(
    config: Config | str | Path,
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
    default_name: str = "run",
    cache: bool = True,
) -> RunResult:
    """Train as a config says; `overrides` are `key=value` strings, for a path to a config.

    `force` replaces the run that output.dir already holds; `default_name` names the folder when output.dir is not
    given; without `cache` tokens are neither taken from the cache nor kept in it. Raises UserError for what a user can
    mend; but for the cache nothing is written before everything has been checked.
    """
    if not isinstance(config, Config):
        default_name = Path(config).stem
        config = load_config(config, overrides)
    folder = RunFolder.choose(config, default_name, force=force)
    _quiet_libraries()
    accelerator = Accelerator(mixed_precision=_mixed_precision(config))
    if accelerator.num_processes > 1:
        raise UserError(
            f"{accelerator.num_processes} processes: this version trains on one device; start it without a launcher"
        )
    set_seed(config.train.seed)

    tokenizer = load_tokenizer(config.model)
    use_chat_template(tokenizer, config.tokens.chat_template)
    data = load_examples(config, tokenizer, cache=cache)
    loaded = load_model(config, accelerator.device)
    run = _Run(config, folder, accelerator, tokenizer, loaded, data.train, data.heldout)
    for note in [*data.notes, *run.notes]:
        run.display.note(note)
    return run.go()


class _Run:
    """Everything a run holds. `go` is the loop."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        loaded: Loaded,
        examples: Sequence[Example],
        heldout: Sequence[Example],
    ):
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.tokenizer, self.loaded, self.examples, self.heldout = tokenizer, loaded, examples, heldout
        train = config.train
        self.steps = train.steps or math.ceil(train.epochs * len(examples) / train.batch)
        self.display = Display(self.steps)
        self.notes: list[str] = []

        reference = self._reference() if config.loss.uses_reference else None
        optimizer = make_optimizer(loaded.policy, config)
        warmup = train.warmup if train.warmup >= 1 else train.warmup * self.steps
        name = {"constant": "constant_with_warmup"}.get(train.schedule, train.schedule)
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=round(warmup), num_training_steps=self.steps)
        policy, self.optimizer, self.scheduler = accelerator.prepare(loaded.policy, optimizer, scheduler)
        self.policy: torch.nn.Module = policy
        pad = tokenizer.pad_token_id
        self.objective = Objective(
            policy=policy,
            reference=reference,
            options=config.loss,
            layout=loaded.layout,
            budget=config.tokens_per_microbatch,
            pad_token_id=pad if isinstance(pad, int) else 0,
            device=accelerator.device,
        )
        if isinstance(reference, Precomputed):
            self._precompute(reference)
        self.notes.append(self._plan())

    def _reference(self) -> Reference:
        reference, what = make_reference(self.config, self.loaded, self.accelerator.autocast)
        self.notes.append(f"reference: {what}")
        if not precomputes(self.config):
            return reference
        return Precomputed(reference, reference_folder(self.config, self.loaded.model))

    def _precompute(self, reference: Precomputed) -> None:
        """The reference's numbers for every completion of the run, while the model is still what it was."""
        batch, objective = self.config.train.batch, self.objective
        planned = islice(_data_order(len(self.examples), batch, self.config.train.seed), self.steps)
        steps = ([self.examples[i] for i in places] for places in planned)
        asked = chain.from_iterable(map(objective.referenced, chain(steps, chunks(self.heldout, batch))))
        computed = reference.complete(
            asked, layout=objective.layout, budget=objective.budget, device=objective.device,
            pad_token_id=objective.pad_token_id, progress=self.display.precomputing,
        )  # fmt: skip
        found = f"{len(reference) - computed:,} found in {reference.folder}, " if len(reference) > computed else ""
        self.notes += [*reference.notes, f"reference log-probabilities: {found}{computed:,} completions computed"]

    def go(self) -> RunResult:
        config, last, evaluated = self.config, {}, {}
        self.folder.create(config)
        order = _data_order(len(self.examples), config.train.batch, config.train.seed)
        step = 0
        with _Interrupt() as interrupt, self.display:
            evaluated = self._evaluate(step)
            before = self._answers()
            while step < self.steps and not interrupt.asked:
                batch = [self.examples[i] for i in next(order)]
                step += 1
                last = self._step(step, batch)
                due = config.eval.every is not None and step % config.eval.every == 0
                if due and step < self.steps:
                    evaluated = self._evaluate(step)
            if interrupt.asked:
                return self._stopped(step, last, evaluated)
            evaluated = self._evaluate(step)
            after = self._answers()
        self.display.samples(before, [answer for _, answer in after])
        place = self.folder.save("final", self.loaded, self.tokenizer)
        self.display.note(f"saved: {place}")
        return RunResult(self.folder.path, last, evaluated)

    def _step(self, step: int, examples: list[Example]) -> dict[str, float]:
        """One optimizer step. Returns its metrics, those of the tokens only when it is logged."""
        began = time.perf_counter()
        logged = step % self.config.log.every == 0 or step in (1, self.steps)
        self.policy.train()
        metrics, work = self.objective.step(examples, self.accelerator.backward, token_metrics=logged)
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.train.max_grad_norm)
        row: dict[str, float] = metrics.result()
        row["grad_norm"] = float(norm) if norm is not None else 0.0
        row["learning_rate"] = self.scheduler.get_last_lr()[0]
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            self._not_finite(step, examples, row)
        else:
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        row |= {"tokens_per_second": work.tokens / seconds, "pairs_per_second": len(examples) / seconds}
        if logged:
            self.folder.log({"step": step} | row)
        self.display.step(step, seconds, row)
        return row

    def _not_finite(self, step: int, examples: list[Example], row: dict[str, float]) -> None:
        rows = "; ".join(dict.fromkeys(str(example.row.place) for example in examples))
        what = f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}; its rows are {rows}"
        if self.config.train.nonfinite == "stop":
            raise UserError(
                f"{what}. The model is as it was after step {step - 1}, and was not saved. Lower "
                'train.learning_rate, look at those rows, or set train.nonfinite = "skip"'
            )
        self.display.note(f"{what}. The step is left out.")

    def _evaluate(self, step: int) -> dict[str, float]:
        """The metrics of all held-out examples, each under eval/."""
        if not self.heldout:
            return {}
        self.policy.eval()
        metrics = self.objective.evaluate(self.heldout, self.config.train.batch)
        row = {f"eval/{name}": value for name, value in metrics.result().items()}
        self.folder.log({"step": step} | row)
        self.display.evaluation(step, row)
        return row

    @torch.no_grad()
    def _answers(self) -> list[tuple[str, str]]:
        """The model's likeliest answers to some held-out prompts: (question, answer)."""
        options, found = self.config.eval, []
        self.policy.eval()
        for example in _first_prompts(self.heldout, options.samples):
            prompt = example.prompt
            ids = torch.tensor([prompt], device=self.accelerator.device)
            generate: Any = self.loaded.model.generate
            out = generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=options.sample_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=self.objective.pad_token_id,
            )
            answer = self.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
            found.append((example.row.question, str(answer).strip()))
        return found

    def _stopped(self, step: int, last: dict[str, float], evaluated: dict[str, float]) -> RunResult:
        place = self.folder.save("stopped", self.loaded, self.tokenizer)
        self.display.note(f"stopped after step {step} of {self.steps}; what was trained until then is in {place}")
        return RunResult(self.folder.path, last, evaluated, interrupted=True)

    def _plan(self) -> str:
        trained = sum(p.numel() for p in self.policy.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in self.loaded.model.parameters())
        what = "pairs" if not isinstance(self.config.loss, KTO) else "responses"
        layout = self.loaded.layout
        if self.loaded.why_padded:
            layout = f"padded, because {self.loaded.why_padded}"
        return (
            f"{self.config.loss.type.upper()}: {self.steps} steps of {self.config.train.batch} {what}; training "
            f"{trained:,} of {everything:,} parameters on {self.accelerator.device}; layout {layout}"
        )


def _first_prompts(examples: Sequence[Example], count: int) -> list[Example]:
    """The first examples of `count` different prompts."""
    found: dict[tuple[int, ...], Example] = {}
    for example in examples:
        if len(found) == count:
            break
        found.setdefault(tuple(example.prompt), example)
    return list(found.values())


def _data_order(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Places of the examples of each step: shuffled passes over the data, one after the other, without end."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:batch]
        waiting = waiting[batch:]


def _mixed_precision(config: Config) -> str:
    """Half precision products on a GPU; float32 on a CPU, whose float32 is the faster one."""
    if not torch.cuda.is_available() or config.model.dtype == "float32":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(False) and config.model.dtype != "float16" else "fp16"


def _quiet_libraries() -> None:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    # PEFT, of an adapter on a head that is tied to the embeddings: the two stay apart here, adapters are never merged.
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True.*", category=UserWarning)


class _Interrupt:
    """Ctrl-C or SIGTERM: the step at hand is finished first. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
