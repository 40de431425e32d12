"""The order of copies, events and kernels: no timing of the two queues changes what a layer reads.

`CudaTransfers` runs with streams and events that record what they are asked for. `tests.support.queues` says what the
queues of a device could make of it.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastpref.model.gradient_checkpointing import checkpoint_layers
from fastpref.model.streaming import stream, transfers
from fastpref.model.streaming.schedule import Direction, Schedule
from fastpref.model.streaming.stream import Streaming, WeightStream, stream_weights
from fastpref.model.streaming.transfers import CudaTransfers
from tests.support.queues import COMPUTE, COPY, Entry, Reads, Recorder, Source, beside_kernels, can_go_wrong, faults
from tests.support.tiny import SIZES, VOCABULARY

CPU = torch.device("cpu")
LAYERS = 6
DEEP: dict[str, Any] = SIZES | {"num_hidden_layers": LAYERS}

# --- the checker ------------------------------------------------------------------------------------------------------

QUEUES = st.sampled_from([COMPUTE, COPY])
SMALL = st.integers(0, 1)
ENTRIES = st.one_of(
    st.builds(Entry, QUEUES, st.just("write"), slot=SMALL, layer=SMALL),
    st.builds(Entry, QUEUES, st.just("read"), slot=SMALL, layer=SMALL),
    st.builds(Entry, QUEUES, st.sampled_from(["record", "wait"]), event=SMALL),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(ENTRIES, max_size=9))
def test_the_checker_is_exact(log: list[Entry]) -> None:
    """It finds a fault exactly if some order in which the accesses of the two queues begin and end has one."""
    assert bool(faults(log)) == can_go_wrong(log)


COPIED = [Entry(COPY, "write", 0, 7), Entry(COPY, "record", event=1)]
NEEDED = [Entry(COMPUTE, "wait", event=1), Entry(COMPUTE, "read", 0, 7)]


@pytest.mark.parametrize(
    ("log", "fault"),
    [
        ([*COPIED, *NEEDED], False),
        ([*COPIED, *NEEDED[1:]], True),
        ([*COPIED[::-1], *NEEDED], True),  # recorded before the copy
        ([*NEEDED[:1], *COPIED, *NEEDED[1:]], True),  # a wait for what is recorded later is none
        ([*COPIED, *NEEDED, Entry(COPY, "write", 0, 8)], True),
        ([*COPIED, *NEEDED, Entry(COPY, "write", 1, 8)], False),  # another slot
        ([*COPIED, NEEDED[0], Entry(COMPUTE, "read", 0, 6)], True),  # another layer
    ],
)
def test_an_event_is_what_cuda_defines(log: list[Entry], fault: bool) -> None:
    assert bool(faults(log)) is can_go_wrong(log) is fault


# --- orders of layers without a model ---------------------------------------------------------------------------------

ORDERS = st.lists(st.tuples(st.integers(0, LAYERS - 1), st.sampled_from([1, -1])), max_size=25)
FORWARD: list[tuple[int, Direction]] = [(layer, 1) for layer in range(LAYERS)]
SWEEPS = FORWARD + [(layer, -1) for layer, _ in reversed(FORWARD)]


def log_of(
    order: Sequence[tuple[int, Direction]],
    slots: int,
    schedule_kind: type[Schedule] = Schedule,
    transfers_kind: type[CudaTransfers] = CudaTransfers,
) -> list[Entry]:
    """Return the log of layers that arrive in an order, each of which a kernel reads then."""
    recorder = Recorder()
    with recording(recorder):
        sources: Any = [Source(layer) for layer in range(LAYERS)]
        schedule = schedule_kind(LAYERS, slots, transfers_kind(sources, list(map(recorder.slot, range(slots)))))
        for layer, direction in order:
            schedule.arrive(layer, direction)
            recorder.read(schedule.slot(layer), layer)
    return recorder.log


@contextmanager
def recording(recorder: Recorder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfers, "torch", SimpleNamespace(cuda=recorder.cuda))
        yield


@settings(max_examples=150, deadline=None)
@given(ORDERS, st.integers(2, 4))
def test_every_order_of_layers_is_safe(order: list[tuple[int, Direction]], slots: int) -> None:
    assert faults(log_of(order, slots)) == []


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_copies_run_beside_kernels(slots: int) -> None:
    """In sweeps, all copies but the first run beside the kernels of other layers, and no layer is copied twice."""
    log = log_of(SWEEPS, slots)
    writes = [entry for entry in log if entry.action == "write"]
    assert len(writes) == 2 * LAYERS - slots
    assert beside_kernels(log) == writes[1:]


# --- planted mistakes -------------------------------------------------------------------------------------------------


class NoRelease(CudaTransfers):
    def release(self, slot: int) -> None:
        pass


class ReleaseAtArrival(CudaTransfers):
    """Notes that a layer's slot is free when its copy has arrived, before its kernels are queued."""

    def wait(self, slot: int) -> None:
        super().wait(slot)
        super().release(slot)

    def release(self, slot: int) -> None:
        pass


class NoWait(CudaTransfers):
    def wait(self, slot: int) -> None:
        pass


class WaitsForAnotherSlot(CudaTransfers):
    def wait(self, slot: int) -> None:
        super().wait((slot + 1) % len(self.slots))


class CopiesBeforeTheSlotIsFree(CudaTransfers):
    def copy(self, layer: int, slot: int) -> None:
        free, self._free = self._free, [transfers.torch.cuda.Event()] * len(self._free)
        super().copy(layer, slot)
        self._free = free
        self._stream.wait_event(self._free[slot])


class ArrivesOnTheComputeQueue(CudaTransfers):
    """Records the arrival where computations are queued."""

    def copy(self, layer: int, slot: int) -> None:
        arrived, self._arrived = self._arrived, [transfers.torch.cuda.Event()] * len(self._free)
        super().copy(layer, slot)
        self._arrived = arrived
        self._arrived[slot].record(transfers.torch.cuda.current_stream(self._device))


class ReleasesOnTheCopyQueue(CudaTransfers):
    def release(self, slot: int) -> None:
        self._free[slot].record(self._stream)


class WaitsBeforeTheCopyIsQueued(Schedule):
    def arrive(self, layer: int, direction: Direction) -> None:
        self.transfers.wait(self.slot(layer))
        wait, self.transfers.wait = self.transfers.wait, lambda slot: None
        super().arrive(layer, direction)
        self.transfers.wait = wait


class NeighboursShareASlot(Schedule):
    def slot(self, layer: int) -> int:
        return layer // 2 % self.slots


class OneSlotLess(Schedule):
    def slot(self, layer: int) -> int:
        return layer % (self.slots - 1)


class FetchesTooFar(Schedule):
    """Also prefetches the layer that belongs into the current layer's slot."""

    def arrive(self, layer: int, direction: Direction) -> None:
        super().arrive(layer, direction)
        if 0 <= layer + direction * self.slots < self.layers:
            self._fetch(layer + direction * self.slots)


class ForgetsWhatItHolds(Schedule):
    """Takes whatever lies in a slot for the layer that is needed."""

    def _fetch(self, layer: int) -> None:
        if self.held[self.slot(layer)] is None:
            super()._fetch(layer)


MISTAKES: list[Any] = [
    NoRelease, ReleaseAtArrival, NoWait, WaitsForAnotherSlot, CopiesBeforeTheSlotIsFree, ArrivesOnTheComputeQueue,
    ReleasesOnTheCopyQueue, WaitsBeforeTheCopyIsQueued, NeighboursShareASlot, OneSlotLess, FetchesTooFar,
    ForgetsWhatItHolds,
]  # fmt: skip


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_planted_mistake_is_found(mistake: Any, slots: int) -> None:
    """Two sweeps are enough to find it."""
    kinds = (Schedule, mistake) if issubclass(mistake, CudaTransfers) else (mistake, CudaTransfers)
    assert faults(log_of(SWEEPS, slots)) == []
    assert faults(log_of(SWEEPS, slots, *kinds)) != []


# --- the hooks of a model ---------------------------------------------------------------------------------------------


class Run:
    """A tiny model whose layers are streamed, with adapters, and the log of what it queues."""

    def __init__(self, slots: int = 2, resident: int = 0, checkpointed: int = 0):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**DEEP)).eval()
        self.recorder = Recorder()
        with recording(self.recorder):
            self.stream = stream_weights(
                model, CPU, Streaming(slots, resident), make_transfers=partial(_recorded, self.recorder)
            )
        layers = stream.streamable_layers(model)
        streamed = stream._spread(layers, resident)
        self.model: Any = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        checkpoint_layers(model, checkpointed)
        self.reads = Reads(self.recorder, self.stream.slots)
        for layer in layers:
            place = streamed.index(layer) if layer in streamed else None
            layer.register_forward_pre_hook(partial(self._computes, place))
            layer.register_forward_hook(partial(self._marks, place))

    def __call__(self, work: Callable[[Any], None]) -> list[Entry]:
        with recording(self.recorder), self.reads:
            work(self.model)
        return self.recorder.log

    def _computes(self, place: int | None, *ignored: Any) -> None:
        self.reads.layer = place

    def _marks(self, place: int | None, module: nn.Module, args: Any, output: Any) -> None:
        self.reads.layer = None
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(partial(self._computes, place))


def _recorded(recorder: Recorder, sources: Sequence[Tensor], slots: Sequence[Tensor]) -> CudaTransfers:
    recorder.layers.update({source.data_ptr(): layer for layer, source in enumerate(sources)})
    made: Any = [recorder.slot(place, slot) for place, slot in enumerate(slots)]
    return CudaTransfers(sources, made)


IDS = torch.arange(3, 3 + 14).reshape(2, 7) % VOCABULARY


def step(model: Any) -> None:
    model.train()
    model(input_ids=IDS, use_cache=False).logits.sum().backward()


def evaluation(model: Any) -> None:
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)


def sample(model: Any) -> None:
    model.eval()
    model.generate(input_ids=IDS, max_new_tokens=4, use_cache=True, do_sample=False)


def two_graphs(model: Any) -> None:
    """Two forward passes, then the backward pass of both."""
    model.train()
    (model(input_ids=IDS, use_cache=False).logits.sum() + model(input_ids=IDS[:, :3]).logits.sum()).backward()


def reference(model: Any) -> None:
    with model.disable_adapter():
        evaluation(model)
    step(model)


def broken_off(model: Any) -> None:
    """A forward pass without its backward pass, and another one that fails in the middle."""
    model(input_ids=IDS)
    handle = model.base_model.model.model.layers[3].mlp.register_forward_pre_hook(_fail)
    with pytest.raises(ArithmeticError):
        model(input_ids=IDS)
    handle.remove()


def _fail(*ignored: Any) -> None:
    raise ArithmeticError


WORK: dict[str, list[Callable[[Any], None]]] = {
    "a step": [step],
    "accumulation": [step, step, step],
    "evaluation in between": [step, evaluation, step],
    "a sample": [sample, step, sample],
    "a reference": [reference, reference],
    "two graphs": [two_graphs, step],
    "a pass that breaks off": [step, broken_off, step],
}


@pytest.mark.parametrize(("slots", "resident"), [(2, 0), (3, 2)])
@pytest.mark.parametrize("checkpointed", [0, 2, LAYERS])
@pytest.mark.parametrize("work", WORK)
def test_a_run_is_safe(work: str, checkpointed: int, slots: int, resident: int) -> None:
    """Every kernel of a layer reads its own numbers, whatever the speed of the queues."""
    run = Run(slots, resident, checkpointed)
    for part in WORK[work]:
        run(part)
    log = run.recorder.log
    assert faults(log) == []
    read = [entry.layer for entry in log if entry.action == "read"]
    assert set(read) == set(range(LAYERS - resident))


@pytest.mark.parametrize("checkpointed", [0, LAYERS])
@pytest.mark.parametrize(("slots", "resident"), [(2, 0), (3, 0), (2, 2), (3, 3)])
def test_a_step_copies_each_layer_twice_less_the_slots(checkpointed: int, slots: int, resident: int) -> None:
    """The layers in the slots at the turn need no second copy, nor do those that the step before has left there."""
    run, streamed, counts = Run(slots, resident, checkpointed), LAYERS - resident, []
    slots = min(slots, streamed)
    for _ in range(3):
        before = len(run.recorder.log)
        counts.append(sum(entry.action == "write" for entry in run(step)[before:]))
    assert counts == [2 * streamed - slots] + [2 * streamed - 2 * slots] * 2
    writes = [entry for entry in run.recorder.log if entry.action == "write"]
    assert beside_kernels(run.recorder.log) == writes[1:]


def test_a_backward_pass_without_arrivals_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of the hooks, not of the schedule. With checkpointing the recomputation's arrivals come instead."""
    monkeypatch.setattr(WeightStream, "_before_backward", lambda *ignored: None)
    assert faults(Run()(step)) != []


def test_a_kernel_of_a_layer_that_has_left_is_found() -> None:
    """A weight that a layer keeps from its pass has another layer's numbers later: the checker sees real kernels."""
    run, kept = Run(), []

    def work(model: Any) -> None:
        module = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
        handle = module.register_forward_hook(lambda *ignored: kept.append(module.weight))
        evaluation(model)
        handle.remove()
        run.reads.layer = 0
        kept[0].sum()

    assert "which has layer 4" in faults(run(work))[0]
