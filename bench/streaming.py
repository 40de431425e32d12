"""Whole DPO steps with the frozen base resident and streamed, in turn on one device: the profile `streaming`.

Every engine has the same weights and the same adapters, which the tiny learning rate leaves as they are, and takes the
same micro-batch, so the losses must be the same. Copies are counted. On a CPU they are between two places of host
memory, so that only the counts and the losses say something there.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import Local, Row, take_turns
from bench.prefixes import LEARNING_RATE, LONGEST, LOSS_ERROR, ROWS, fill_adapters
from bench.results import RESIDENT
from bench.step_data import StepShape, choose_rows, write_model, write_rows
from fastpref.config import Config
from fastpref.data.batch import computed_tokens
from fastpref.data.cache import load_examples
from fastpref.data.example import Example
from fastpref.model.adapters.fresh import with_adapters
from fastpref.model.attention import NAME, give_attention
from fastpref.model.files import model_config
from fastpref.model.gradient_checkpointing import checkpoint_layers
from fastpref.model.load import Loaded, mixed_precision, pretrained, weight_dtype
from fastpref.model.policy import Policy
from fastpref.model.streaming.schedule import Transfers
from fastpref.model.streaming.stream import Streaming, WeightStream, stream_weights
from fastpref.model.streaming.transfers import CudaTransfers, HostTransfers
from fastpref.model.tokenizer import load_tokenizer
from fastpref.processes import start_processes
from fastpref.step.objective import Objective
from fastpref.step.optimizer import make_optimizer
from fastpref.step.reference import make_reference

CPU = torch.device("cpu")
ENGINES: dict[str, Streaming | None] = {
    RESIDENT: None,
    "2 slots": Streaming(slots=2),
    "3 slots": Streaming(slots=3),
}


@dataclass(frozen=True)
class StreamedSteps:
    """The sizes of the profile."""

    shape: StepShape  # of the random model; its batch is the number of pairs a step
    quantizations: tuple[str, ...]
    longest: int  # tokens of a pair of the file
    repeats: int

    @property
    def rule(self) -> str:
        return (
            f"DPO with LoRA of rank 16 and all layers checkpointed; a step is {self.shape.batch} pairs in one "
            f"micro-batch. The pairs are the first of the file with at most {self.longest} tokens a side. Tokens are "
            "those that the policy computes a step; the reference computes as many. Tokens/s is the median of the "
            f"turns; × {RESIDENT} is the median of the ratios of each turn, ± the distance of p20 or p80, the larger. "
            "MiB held is the model with adapters and optimizer on the device; MiB at most adds the most that torch's "
            f"allocator held beyond it in a step. Copies and their MiB are counted in one step. {self.repeats} turns."
        )


@dataclass
class Counted:
    """Copies that are counted on their way to other transfers."""

    transfers: Transfers
    sources: Sequence[Tensor]
    copied: list[int] = field(default_factory=list)  # the bytes of each copy

    def copy(self, layer: int, slot: int) -> None:
        self.copied.append(len(self.sources[layer]))
        self.transfers.copy(layer, slot)

    def wait(self, slot: int) -> None:
        self.transfers.wait(slot)

    def release(self, slot: int) -> None:
        self.transfers.release(slot)


@dataclass(frozen=True)
class Engine:
    """A step that can be measured, and what it keeps on the device."""

    step: Callable[[], float]  # which returns the loss
    held: int  # bytes
    counted: Counted | None


def compare_streaming(sizes: StreamedSteps, model: Path | None, data: Path | None) -> Iterator[dict[str, Any]]:
    """Measure steps on pairs of a file, for a model in each quantization: by default the quickstart's, and random."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if model is None:
            model = place / "model"
            write_model(sizes.shape, model)
        write_rows(choose_rows(str(model), data or ROWS, sizes.shape.batch, sizes.longest), place / "rows.jsonl")
        for quantization in sizes.quantizations:
            config = _config(model, place / "rows.jsonl", sizes.shape.batch, quantization)
            examples = list(load_examples(config, load_tokenizer(config.model), cache=False).train)
            accelerator, _ = start_processes(config, mixed_precision(config))
            yield _compare(quantization, config, examples, accelerator, sizes.repeats)


def _config(model: Path, rows: Path, pairs: int, quantization: str) -> Config:
    return Config.model_validate(
        {
            "model": {"name": str(model), "quantization": quantization},
            "lora": {"rank": 16, "alpha": 32},
            "loss": {"type": "dpo"},
            "data": [{"path": str(rows)}],
            "tokens": {"max_length": LONGEST},
            "train": {"batch": pairs, "learning_rate": LEARNING_RATE, "checkpointing": True},
        }
    )


def _compare(
    quantization: str, config: Config, examples: list[Example], accelerator: Any, repeats: int
) -> dict[str, Any]:
    device, rows, losses = accelerator.device, list(map(Row, ENGINES)), dict[str, float]()
    engines = {name: _engine(config, examples, accelerator, streaming) for name, streaming in ENGINES.items()}
    subjects = {
        name: Local(lambda name=name: losses.__setitem__(name, engines[name].step()), device.type) for name in engines
    }
    take_turns(subjects, rows, repeats)
    records = []
    for row in rows:
        engine, copied = engines[row.method], list[int]()
        if row.ms:
            row.value_error = abs(losses[row.method] / losses[RESIDENT] - 1)
            row.note = "" if row.value_error <= LOSS_ERROR[device.type] else f"wrong: loss off by {row.value_error:.1e}"
            if engine.counted is not None:
                engine.counted.copied.clear()
                engine.step()
                copied = engine.counted.copied
        numbers = {"loss": losses.get(row.method), "held": engine.held, "copies": len(copied), "copied": sum(copied)}
        records.append(row.record() | numbers)
    return {"what": quantization, "tokens": computed_tokens(examples, "tree"), "rows": records}


def _engine(config: Config, examples: list[Example], accelerator: Any, streaming: Streaming | None) -> Engine:
    device, counted = accelerator.device, list[Counted]()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0

    def counting(sources: Sequence[Tensor], slots: Sequence[Tensor]) -> Counted:
        make = CudaTransfers if device.type == "cuda" else HostTransfers
        counted.append(Counted(make(sources, slots), sources))
        return counted[0]

    place = device if streaming is None else CPU
    model = pretrained(config.model, model_config(config.model), weight_dtype(config, device), place)
    stream = None if streaming is None else stream_weights(model, device, streaming, make_transfers=counting)
    give_attention(model, NAME)
    step, optimizer = adapted_step(config, model, stream, examples, accelerator, LONGEST * len(examples))
    step()  # the optimizer allocates its state
    held = torch.cuda.memory_allocated() - before if device.type == "cuda" else _held(model, stream, optimizer)
    return Engine(step, held, counted[0] if counted else None)


def adapted_step(
    config: Config, model: Any, stream: WeightStream | None, examples: list[Example], accelerator: Any, budget: int
) -> tuple[Callable[[], float], torch.optim.Optimizer]:
    """Put filled adapters on a model whose layers are all checkpointed, and return a step of it, and its optimizer.

    The step returns the loss. A micro-batch has at most `budget` tokens.
    """
    wrapped = with_adapters(config, model)
    if stream is not None:
        stream.move_rest(model)
    fill_adapters(wrapped)
    checkpoint_layers(model)
    loaded = Loaded(model, wrapped, Policy.of(model), "tree", None, stream=stream)
    accelerator.prepare_model(loaded.policy, device_placement=False)
    reference, _ = make_reference(config, loaded, accelerator.autocast)
    objective = Objective(loaded.policy, reference, config.loss, "tree", budget, 0, accelerator.device)
    optimizer = make_optimizer(loaded.policy, config)
    trained = [parameter for parameter in loaded.policy.parameters() if parameter.requires_grad]

    def step() -> float:
        loaded.policy.train()
        metrics, _ = objective.step(examples, lambda loss: loss.backward())
        torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return metrics.result()["loss"]

    return step, optimizer


def _held(model: Any, stream: WeightStream | None, optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes that would lie on the device, on a CPU: streamed layers, embeddings and head would not."""
    tensors = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    hosted = set[int]()
    if stream is not None:
        tensors += stream.slots
        tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        hosted = {_address(tensor) for tensor in (*tables, *(layer.host for layer in stream.layers))}
    sizes = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, Tensor)}
    return sum(size for address, size in sizes.items() if address not in hosted)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
