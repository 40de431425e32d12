"""Start a training run: prepare everything that its loop needs from a config."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import chain, islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastpref.allocator import let_segments_grow
from fastpref.checks import look
from fastpref.checks.space import needed, require_space
from fastpref.config import Config
from fastpref.data.cache import Tokenized, load_examples
from fastpref.data.order import data_order
from fastpref.data.template.text import TextRecord, stop_at, text_of
from fastpref.data.tokenize import use_chat_template
from fastpref.errors import UserError
from fastpref.memory.activations import checkpoint_activations
from fastpref.memory.measured import StepPeak
from fastpref.memory.streaming import choose_streaming
from fastpref.merge import merge_fault
from fastpref.model.adapters.source import with_start
from fastpref.model.failure import in_others_code, is_out_of_memory
from fastpref.model.limits import compare, limits_of, limits_of_model, pad_token
from fastpref.model.load import Loaded, load_model, mixed_precision
from fastpref.model.streaming.stream import Streaming
from fastpref.model.tokenizer import run_tokenizer
from fastpref.processes import ALONE, Processes, code, end_together, start_processes
from fastpref.quiet import quiet_libraries
from fastpref.run.checkpoint import Checkpoints
from fastpref.run.fingerprints import ADAPTERS, MODEL, model_fingerprint
from fastpref.run.folder import RunFolder
from fastpref.run.hub import check_login
from fastpref.run.lock import RunLock
from fastpref.run.resume import Resumed, find_checkpoint, shared
from fastpref.run.state import Progress
from fastpref.step.logprob_store import LogprobStore
from fastpref.step.objective import Objective
from fastpref.step.optimizer import make_optimizer
from fastpref.step.precompute import Precomputed, Remembered, reference_folder
from fastpref.step.reference import ONCE, ModelReference, Reference, make_reference, remembers
from fastpref.step.schedule import Schedule, warmup_steps
from fastpref.training.arguments import Rows, config_of
from fastpref.training.callbacks import Callbacks
from fastpref.training.loop import RunResult, TrainingRun
from fastpref.training.progress import Display
from fastpref.training.record import Record
from fastpref.training.trackers import Trackers, require_trackers


def train(
    config: Config | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    data: Rows | Sequence[Rows] | None = None,
    eval_data: Rows | Sequence[Rows] | None = None,
    force: bool = False,
    resume: bool | str | Path = False,
    default_name: str = "run",
    cache: bool = True,
) -> RunResult:
    """Train a model on preferences or completions, as the command `fastpref train` does, and return the result.

    Args:
        config: the path of a TOML file, a dict of its tables, or a fastpref.Config. A path in it is relative to the
            folder of the file, if it exists there, or else to the working directory.
        overrides: changes of the config, as strings ["train.steps=20"] or as a dict {"train.steps": 20}.
        data: the rows to train on, in place of the config's [[data]]: a datasets.Dataset, a path or a name on the hub,
            a table such as {"path": dataset, "weight": 2.0}, or a list of these. The key "data" of a dict takes the
            same. The rows of a Dataset are written to the cache folder, where the config in the run's folder names
            them, so that a resumed run and `fastpref eval` find them.
        eval_data: the rows that are held out, of the same kinds, in place of [[eval.data]] and eval.fraction.
        force: replace the run that output.dir holds already.
        resume: continue a run, bit for bit on a CPU: from the folder of a checkpoint, or with True from the newest
            undamaged checkpoint of the config's last run.
        default_name: the run is written to runs/NAME-LOSS if output.dir is not given. NAME is that of the file, or
            this.
        cache: False neither reads tokens and reference log-probabilities from the cache nor writes them there.

    Returns the run's folder, which has the trained weights in final/, with the last metrics and the verdicts on its
    health. After Ctrl-C there is a checkpoint instead of final/, and the result is `interrupted`. Raises UserError for
    mistakes of the user; before all checks have passed, only the cache is written.
    """
    let_segments_grow()  # before anything asks for a GPU
    try:
        default_name = Path(config).stem if isinstance(config, str | Path) else default_name
        config = config_of(config, overrides, data, eval_data)
        if not resume:
            look(config).require()
        config = with_start(config)
        require_trackers(config.log.trackers)
        if config.output.push_to is not None:
            check_login(config.output.push_to)
        resumed = find_checkpoint(config, default_name, resume, force=force) if resume else None
        if resume:
            look(config).require()
    except UserError as error:
        end_together(error)
    quiet_libraries()
    accelerator, processes = start_processes(config, mixed_precision(config))
    processes.agree(lambda: shared(config, resumed) | code())
    callbacks = processes.together(lambda: Callbacks(config.train.callbacks if processes.first else ()))
    folder = (
        resumed.folder if resumed else processes.on_first(lambda: RunFolder.choose(config, default_name, force=force))
    )
    lock = RunLock(folder.path)
    try:
        processes.on_first(lambda: lock.acquire() if folder.path.exists() else None)
        run = _prepare(config, folder, accelerator, processes, resumed, cache=cache)
        run.callbacks = callbacks
        return run.go(lock)
    finally:
        lock.release()


@dataclass(frozen=True)
class _Inputs:
    """The inputs that a run reads before it loads the model."""

    tokenizer: PreTrainedTokenizerBase
    data: Tokenized
    text: TextRecord
    beyond: list[str]  # notes on rows that are longer than the model's positions, and the like


def _prepare(
    config: Config,
    folder: RunFolder,
    accelerator: Accelerator,
    processes: Processes,
    resumed: Resumed | None,
    *,
    cache: bool,
) -> TrainingRun:
    """Load everything, and print a note on every decision. Raises UserError."""
    set_seed(config.train.seed)
    day = resumed.text.day if resumed and resumed.text else processes.on_first(date.today)
    # The other processes then find the tokens in the cache.
    inputs = processes.first_then_others(lambda: _read(config, resumed, day, cache=cache))
    data = inputs.data
    processes.agree(lambda: {f"tokens of the {name} rows": examples.digest() for name, examples in data.parts.items()})

    streaming, streamed = processes.together(lambda: _streaming(config, accelerator, processes))
    if streaming is not None and streaming.tokens is not None:
        config = config.but({"train.tokens_per_microbatch": streaming.tokens})

    def load() -> Loaded:
        loaded = load_model(config, accelerator.device, sharded=processes.sharded, streaming=streaming)
        compare(limits_of_model(loaded.model), data.parts, inputs.tokenizer, config)
        return replace(loaded, notes=(*streamed, *loaded.notes))

    try:
        loaded = processes.together(load)
        began = {} if loaded.began is None else {ADAPTERS: loaded.began[:16]}
        processes.agree(lambda: {MODEL: model_fingerprint(loaded)[:16], "layout": loaded.layout, **began})
        notes = checkpoint_activations(config, loaded, accelerator.device, sharded=processes.sharded)
        run, decisions = _assemble(config, folder, accelerator, processes, inputs, loaded, resumed, cache=cache)
    except UserError:
        raise
    except Exception as error:
        name = config.model.name
        if is_out_of_memory(error):
            smaller = "a smaller model" if config.lora else "adapters, lora={}, or a smaller model"
            raise UserError(f"out of memory while {name} was loaded; it needs {smaller}") from None
        if failure := in_others_code(error):
            raise UserError(f"model.name = {name!r}: its code fails before the first step: {failure}") from error
        raise
    if note := processes.on_first(lambda: _space(config, folder, loaded)):
        decisions.append(note)
    if fault := merge_fault(config, loaded.model):
        decisions.append(f"warning: fastpref merge will not take what this run makes: {fault}")
    for note in [*(resumed.notes if resumed else ()), *data.notes, *inputs.beyond, *notes, *decisions]:
        run.display.note(note)
    return run


def _space(config: Config, folder: RunFolder, loaded: Loaded) -> str | None:
    """Return a note if the disk has no room for all checkpoints. Raises UserError if it has none for the result."""
    trained = sum(p.numel() for p in loaded.policy.parameters() if p.requires_grad)
    saved = 4 * trained if config.lora else sum(p.nbytes for p in loaded.model.parameters())
    return require_space(config, folder.path, needed(config, trained, saved))


def _streaming(config: Config, accelerator: Accelerator, processes: Processes) -> tuple[Streaming | None, list[str]]:
    """Choose how much of the model is streamed. Raises UserError if the run cannot stream and the config says so."""
    if config.model.streaming is True and processes.count > 1:
        raise UserError(
            f"model.streaming: weights are streamed to one GPU, and there are {processes.count} processes; start one, "
            "or set it to false"
        )
    return (
        choose_streaming(config, accelerator.device, sharded=processes.sharded) if processes.count == 1 else (None, [])
    )


def _read(config: Config, resumed: Resumed | None, day: date, *, cache: bool) -> _Inputs:
    """Read the tokenizer and the rows, and compare them with the model's config before its weights are read."""
    tokenizer = run_tokenizer(config)
    use_chat_template(tokenizer, config.tokens.chat_template)
    data = load_examples(config, tokenizer, cache=cache, day=day)
    if data.chat_template is not None:  # save the template that wrote the rows with the result
        tokenizer.chat_template = data.chat_template
    text = text_of(config, tokenizer, day, data.ends)
    if resumed:
        resumed.check_text(text)
    return _Inputs(tokenizer, data, text, compare(limits_of(config.model), data.parts, tokenizer, config))


def _assemble(
    config: Config,
    folder: RunFolder,
    accelerator: Accelerator,
    processes: Processes,
    inputs: _Inputs,
    loaded: Loaded,
    resumed: Resumed | None,
    *,
    cache: bool,
) -> tuple[TrainingRun, list[str]]:
    """Make a run of its loaded parts, restored from a checkpoint if it is resumed. Also returns notes."""
    data, train, unit = inputs.data, config.train, f"{config.loss.unit}s"
    steps = train.steps or math.ceil(train.epochs * len(data.train) / train.batch)
    done = resumed.state["progress"]["step"] if resumed else 0
    display = Display(steps, done, None if processes.first else Console(quiet=True), examples=unit)
    notes = _end_notes(inputs.text, stop_at(loaded.model, inputs.text.ends.values()))
    fingerprint = model_fingerprint(loaded)
    reference = None
    if config.loss.uses_reference:
        reference, words = _reference(config, loaded, accelerator, processes, resumed, display, cache=cache)
        notes += words
    optimizer = make_optimizer(loaded.policy, config, warmup=warmup_steps(config, steps))
    schedule = Schedule(config, optimizer, steps)
    moved = None if loaded.stream is None else [False, None]  # None lets Accelerate move all to its device
    policy, optimizer = accelerator.prepare(loaded.policy, optimizer, device_placement=moved)
    schedule.follow(optimizer)
    if processes.sharded:
        from torch.distributed.fsdp import register_fsdp_forward_method  # takes a second to import

        register_fsdp_forward_method(policy, "generate")
    if not processes.first:  # every process has the same adapters, but its own dropout
        set_seed(train.seed + processes.rank)
    limits = limits_of_model(loaded.model)
    pad, unpadded = pad_token(inputs.tokenizer, limits)
    router = loaded.policy.router
    objective = Objective(
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
        notes += _precompute(reference, config, data, objective, steps, display)
    plan = _plan(config, loaded, policy, f"{steps} steps of {train.batch} {unit}", _devices(accelerator, processes))
    notes += [note for note in (unpadded, plan, *loaded.notes) if note]
    record = Record(folder, config, steps, data, plan, accelerator.device) if processes.first else None
    stored = reference if isinstance(reference, Remembered | Precomputed) else None
    checkpoints = Checkpoints(
        config=config,
        folder=folder,
        loaded=loaded,
        tokenizer=inputs.tokenizer,
        text=inputs.text,
        examples=data.train,
        optimizer=optimizer,
        scheduler=schedule,
        scaler=accelerator.scaler,
        model_fingerprint=fingerprint,
        processes=processes,
        reference=stored,
        moving=reference if isinstance(reference, ModelReference) and config.reference.sync is not None else None,
    )
    run = TrainingRun(
        config=config,
        folder=folder,
        accelerator=accelerator,
        processes=processes,
        tokenizer=inputs.tokenizer,
        loaded=loaded,
        limits=limits,
        data=data,
        steps=steps,
        policy=policy,
        optimizer=optimizer,
        schedule=schedule,
        objective=objective,
        checkpoints=checkpoints,
        resumed=resumed is not None,
        progress=checkpoints.restore(resumed, steps) if resumed else Progress(),
        display=display,
        record=record,
        trackers=Trackers(accelerator, display.note),
        peak=StepPeak(accelerator.device),
    )
    return run, notes


def _reference(
    config: Config,
    loaded: Loaded,
    accelerator: Accelerator,
    processes: Processes,
    resumed: Resumed | None,
    display: Display,
    *,
    cache: bool,
) -> tuple[Reference, list[str]]:
    """Make the reference of a run, with what earlier runs or the checkpoint know of it. Also returns notes."""
    computing, words = make_reference(config, loaded, accelerator.autocast)
    words = f"reference: {words}"
    if computing.sweep is not None:
        computing.sweep.tell = display.note
    keeping = remembers(config) and cache and processes == ALONE
    if not (config.precomputes or keeping):
        reason = "several processes remember nothing" if cache else "--no-cache keeps nothing"
        return computing, [f"{words}, computed in every step: {reason}" if remembers(config) else words]
    known = resumed.state.get("reference") if resumed else None
    store = LogprobStore(reference_folder(config, loaded, computing.copy), known)
    if not keeping:
        return Precomputed(computing, store), [words]
    notes = [f"{words}{ONCE} in {store.folder}"]
    if len(store):
        notes.append(f"reference log-probabilities: those of {len(store):,} completions are there")
    if resumed and store.notes:
        notes.append("what is computed again equals an uninterrupted run but for rounding")
    return Remembered(computing, store, display.note), [*store.notes, *notes]


def _precompute(
    reference: Precomputed, config: Config, data: Tokenized, objective: Objective, steps: int, display: Display
) -> list[str]:
    """Compute the reference's numbers for every completion of the run, before the model changes. Returns notes."""
    planned = islice(data_order(len(data.train), config.train.batch, config.train.seed), steps)
    batches = ([data.train[i] for i in places] for places in planned)
    completions = chain(
        chain.from_iterable(map(objective.referenced, batches)), objective.referenced_in_evaluation(data.heldout)
    )
    computed = reference.complete(
        completions,
        layout=objective.layout,
        budget=objective.budget,
        device=objective.device,
        pad_token_id=objective.pad_token_id,
        progress=display.precomputing,
        processes=objective.processes,
    )
    store = reference.store
    cached = f"{len(store) - computed:,} found in {store.folder}, " if len(store) > computed else ""
    return [*store.notes, f"reference log-probabilities: {cached}{computed:,} completions computed"]


def _devices(accelerator: Accelerator, processes: Processes) -> str:
    if processes.count == 1:
        return str(accelerator.device)
    return f"{processes.count} × {accelerator.device.type}, {'sharded by FSDP' if processes.sharded else 'by DDP'}"


def _plan(config: Config, loaded: Loaded, policy: nn.Module, length: str, devices: str) -> str:
    """Describe the run in one sentence."""
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in loaded.model.parameters())
    because = f", because {loaded.why_padded}" if loaded.why_padded else ""
    return (
        f"{config.loss.title}: {length}; training {trained:,} of {everything:,} parameters on {devices}; layout "
        f"{loaded.layout}{because}"
    )


def _end_notes(text: TextRecord, new: Sequence[int]) -> list[str]:
    """Return a note on the end tokens of completions that are `new` to the model, or on their absence."""
    if not text.ends:
        return ["every training completion was cut, so no end token is trained; raise tokens.max_length"]
    tokens = ", ".join(token for token, number in text.ends.items() if number in new)
    note = f"completions end with {tokens}, at which only the saved model stops, by its generation_config.json"
    return [note] if tokens else []
