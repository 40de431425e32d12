"""Training runs by `fastpref.train` on a fake CUDA device: what the GPU would be given in each part of a run."""

import gc
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PretrainedConfig, PreTrainedModel

import fastpref
from fastpref.checks import Findings
from fastpref.config import Config, ModelConfig, load_config
from fastpref.model import load
from fastpref.model.skeleton import materialise, skeleton
from fastpref.model.trial import choose_layout
from fastpref.run.checkpoint import Checkpoints
from fastpref.step.logprob_store import LogprobStore
from fastpref.training import start
from fastpref.training.progress import Display
from tests.support.paths import QUICKSTART_MODEL
from tests.support.tiny import model_config
from tests.support.trace import Event, Launch, Trace, traced

# Prompts with the same system text, so that rows share beginnings; so a step has several micro-batches.
_SYSTEM = {"role": "system", "content": "You answer briefly, and say so if you do not know."}
_CONFIG = """
[model]
name = "model"
streaming = false
[[data]]
path = "rows.jsonl"
[[eval.data]]
path = "heldout.jsonl"
[eval]
samples = 0
[train]
learning_rate = 1e-3
steps = 1
batch = 4
tokens_per_microbatch = 120
checkpointing = false
[output]
dir = "out"
"""


@dataclass
class Part:
    """A part of a run: an evaluation, a step, or the computation of the reference beforehand."""

    events: list[Event] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)

    def counted(self) -> Counter[tuple[str, str]]:
        """Count the events by kind and place."""
        return Counter((event.kind, event.place) for event in self.events)

    def launched(self, kernel: str) -> int:
        """Return how often a kernel was launched."""
        return sum(launch.kernel == kernel for launch in self.launches)


@dataclass
class TracedRun:
    """The parts of a run."""

    evaluation: Part = field(default_factory=Part)  # the last one
    step: Part = field(default_factory=Part)
    precomputing: Part = field(default_factory=Part)  # of all micro-batches but the first
    notes: list[str] = field(default_factory=list)


def traced_run(folder: Path, *overrides: str, kind: str = "llama", capability: tuple[int, int] = (9, 0)) -> TracedRun:
    """Train one step by a config with these overrides, with two evaluations, in an empty folder.

    The model has fake weights in the dtypes, the bits and on the device of a loaded one. The numbers that a model is
    tried with are missing, so every trial says that it is right.
    """
    config = _written(folder, kind, overrides)
    run, calls = TracedRun(), []
    with _alone(), traced(half=config.model.dtype != "float32", capability=capability) as trace, ExitStack() as patches:

        def replace(owner: Any, name: str, value: Any) -> None:
            patches.enter_context(mock.patch.object(owner, name, value))

        replace(start, "look", lambda config: Findings())  # there are no weights
        replace(load, "pretrained", _pretrained(config))
        replace(load, "choose_layout", lambda *args, **options: choose_layout(*args, **options, compare=False))
        for owner, name in ((start, "_read"), (start, "_streaming"), (load, "check_before_loading")):
            replace(owner, name, _with_numbers(getattr(owner, name)))
        replace(torch, "randperm", _with_numbers(torch.randperm))  # the order of the rows
        replace(start, "model_fingerprint", lambda loaded: "0" * 64)
        replace(Checkpoints, "save_weights", lambda *args: folder)
        replace(LogprobStore, "write", lambda store: None)
        replace(Display, "note", lambda display, note: run.notes.append(note))
        replace(Display, "precomputing", lambda *args: calls.append(_add(trace, run.precomputing if calls else Part())))
        replace(Display, "step", lambda *args: setattr(run, "step", _add(trace, Part())))
        replace(Display, "evaluation", lambda *args: setattr(run, "evaluation", _add(trace, Part())))
        fastpref.train(config)
        if config.model.streaming:
            gc.collect()  # what unlocks the layers' memory needs the device
    return run


def _add(trace: Trace, part: Part) -> Part:
    """Move what was traced since the last call to a part."""
    part.events += trace.events
    part.launches += trace.launches
    part.operations += trace.operations
    trace.clear()
    return part


def _written(folder: Path, kind: str, overrides: tuple[str, ...]) -> Config:
    """Write the config of a run, a model's config.json with the quickstart's tokenizer, and rows."""
    model = folder / "model"
    model.mkdir(parents=True)
    for path in QUICKSTART_MODEL.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copy(path, model)
    architecture: Any = model_config(kind)
    architecture.head_dim = 16  # FlexAttention's narrowest
    architecture.vocab_size = json.loads((QUICKSTART_MODEL / "config.json").read_text())["vocab_size"]
    architecture.architectures = [
        f"{type(architecture).__name__.removesuffix('Config').removesuffix('Text')}ForCausalLM"
    ]
    architecture.save_pretrained(model)
    lists = any(override in ("loss.type=pl", "loss.type=lipo") for override in overrides)
    for name, places in (("rows", range(4)), ("heldout", range(4, 6))):
        rows = [_row(at, lists=lists) for at in places]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "run.toml"
    path.write_text(_CONFIG)
    return load_config(path, [f'output.dir="{(folder / "out").as_posix()}"', *overrides])


def _row(at: int, *, lists: bool) -> dict[str, Any]:
    prompt = [_SYSTEM, {"role": "user", "content": f"How do you spell {'so' * (at + 1)}?"}]
    answers = [f"It is {'so ' * (at + 1)}", "I do not know.", "No, no.", f"Why do you ask for {at}?"]
    if lists:
        count = 2 + at % 3
        return {"prompt": prompt, "completions": answers[:count], "scores": [1.0, 2.0, -1.0, 0.5][:count]}
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers[at % 2 : at % 2 + 2])
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _pretrained(config: Config) -> Callable[..., PreTrainedModel]:
    """Return a `load.pretrained` that makes a model with fake weights."""

    def pretrained(
        options: ModelConfig, architecture: PretrainedConfig, dtype: torch.dtype, device: torch.device
    ) -> PreTrainedModel:
        with _disable_current_modes():
            bones = skeleton(config.but({"model": options.model_dump(), "lora": None}), architecture, dtype)
        with torch.device(device):
            materialise(bones.model)
        return bones.model

    return pretrained


def _with_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **options)

    return called


@contextmanager
def _alone() -> Iterator[None]:
    """Let Accelerate find its device again, inside the block and after it."""

    def reset() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    before = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState, GradientState)]
    reset()
    try:
        yield
    finally:
        reset()
        for state, values in before:
            state._shared_state.update(values)
