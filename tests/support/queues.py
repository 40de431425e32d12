"""What the queues of a CUDA device could do at any relative speed: a recorder, a checker, and a naive checker.

A log lists what the host queued, in its order. Operations of one queue run in order. An event is what CUDA defines: a
wait captures the event's most recent record at the time of the call, and does nothing if there was none.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

COMPUTE, COPY = "compute", "copy"


@dataclass(frozen=True)
class Entry:
    """An operation of a queue: a copy writes a slot, a kernel reads it, and events order the two."""

    queue: str
    action: Literal["write", "read", "record", "wait"]
    slot: int = -1  # that is written or read
    layer: int | None = None  # that is written, or that the kernel needs
    event: int = -1  # that is recorded or waited for


def faults(log: Sequence[Entry]) -> list[str]:
    """Return the ways in which the queues can go wrong: nothing, if every timing gives the results of the log's order.

    One operation happens before another if they are of one queue, or through an event. Two accesses of a slot of which
    one is a write must be ordered so.
    """
    clocks: dict[str, dict[str, int]] = {}  # queue → the last operation of each queue that happens before its next one
    events: dict[int, dict[str, int]] = {}
    accesses: dict[tuple[int, str, str], int] = {}  # (slot, action, queue) → the last one, which is after the others
    holds: dict[int, int | None] = {}
    found = []
    for at, entry in enumerate(log):
        clock = clocks.setdefault(entry.queue, {})
        if entry.action == "wait":
            for queue, last in events.get(entry.event, {}).items():
                clock[queue] = max(clock.get(queue, -1), last)
        clock[entry.queue] = at
        if entry.action == "record":
            events[entry.event] = dict(clock)
        if entry.action not in ("read", "write"):
            continue
        for (slot, action, queue), before in accesses.items():
            if slot == entry.slot and "write" in (action, entry.action) and clock.get(queue, -1) < before:
                found.append(f"{at}: {_words(entry)} beside {before}: {_words(log[before])}")
        accesses[entry.slot, entry.action, entry.queue] = at
        if entry.action == "write":
            holds[entry.slot] = entry.layer
        elif holds.get(entry.slot) != entry.layer or entry.layer is None:
            found.append(f"{at}: {_words(entry)}, which has layer {holds.get(entry.slot)}")
    return found


def beside_kernels(log: Sequence[Entry]) -> list[Entry]:
    """Return the writes that can run at the same time as a kernel that reads some slot."""
    before, after = _ordered(log), []
    for at, entry in enumerate(log):
        reads = (i for i, other in enumerate(log) if other.action == "read")
        if entry.action == "write" and any(at not in before[i] and i not in before[at] for i in reads):
            after.append(entry)
    return after


def _ordered(log: Sequence[Entry]) -> list[set[int]]:
    """Return, for each operation, those that happen before it."""
    last: dict[str, int] = {}
    records: dict[int, int] = {}
    before: list[set[int]] = []
    for at, entry in enumerate(log):
        direct = [last[entry.queue]] if entry.queue in last else []
        if entry.action == "wait" and entry.event in records:
            direct.append(records[entry.event])
        before.append(set(direct).union(*(before[i] for i in direct)))
        last[entry.queue] = at
        if entry.action == "record":
            records[entry.event] = at
    return before


def can_go_wrong(log: Sequence[Entry]) -> bool:
    """Return what `faults` finds, naively: by every order in which accesses can begin and end. For short logs."""
    queues = [[at for at, entry in enumerate(log) if entry.queue == queue] for queue in sorted({e.queue for e in log})]
    captured = {
        at: max((i for i in range(at) if log[i].action == "record" and log[i].event == entry.event), default=None)
        for at, entry in enumerate(log)
        if entry.action == "wait"
    }
    seen, todo = set(), [(tuple(0 for _ in queues), frozenset[int](), frozenset[tuple[int, int | None]]())]
    while todo:
        state = todo.pop()
        if state in seen:
            continue
        seen.add(state)
        places, running, holds = state
        for which, queue in enumerate(queues):
            if places[which] == len(queue):
                continue
            at, moved = queue[places[which]], tuple(p + (i == which) for i, p in enumerate(places))
            entry = log[at]
            if entry.action == "wait":
                record = captured[at]
                done = record is None or any(record in q[: places[i]] for i, q in enumerate(queues))
                todo += [(moved, running, holds)] * done
            elif entry.action == "record":
                todo.append((moved, running, holds))
            elif at in running:  # it ends
                kept = frozenset((slot, layer) for slot, layer in holds if slot != entry.slot)
                written = kept | {(entry.slot, entry.layer)} if entry.action == "write" else holds
                todo.append((moved, running - {at}, written))
            else:
                others = [log[i] for i in running if log[i].slot == entry.slot]
                if any("write" in (entry.action, other.action) for other in others):
                    return True
                wrong = entry.layer is None or (entry.slot, entry.layer) not in holds
                if entry.action == "read" and wrong:
                    return True
                todo.append((places, running | {at}, holds))
    return False


def _words(entry: Entry) -> str:
    return f"the {entry.queue} queue {entry.action}s layer {entry.layer} in slot {entry.slot}"


# --- recording --------------------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Stands for `torch` in `transfers.py`: its streams and events write to a log. Copies are done at once.

    Copies are those of slots made by `slot`, from buffers named in `layers`.
    """

    log: list[Entry] = field(default_factory=list)
    layers: dict[int, int] = field(default_factory=dict)  # the address of a buffer → its layer
    current: str = COMPUTE
    _events: int = 0

    @property
    def cuda(self) -> Any:
        """The parts of `torch.cuda` that transfers need."""
        return SimpleNamespace(
            Stream=lambda device: _Stream(self, COPY),
            Event=self._event,
            stream=self._on,
            current_stream=lambda device: _Stream(self, self.current),
        )

    def read(self, slot: int, layer: int | None) -> None:
        """Queue a kernel that needs a layer in a slot."""
        entry = Entry(self.current, "read", slot, layer)
        if not self.log or self.log[-1] != entry:
            self.log.append(entry)

    def slot(self, place: int, tensor: Tensor | None = None) -> Any:
        return _Slot(self, place, tensor)

    def _event(self) -> "_Event":
        self._events += 1
        return _Event(self, self._events)

    @contextmanager
    def _on(self, stream: "_Stream") -> Iterator[None]:
        before, self.current = self.current, stream.queue
        try:
            yield
        finally:
            self.current = before


@dataclass(frozen=True)
class _Stream:
    recorder: Recorder
    queue: str

    def wait_event(self, event: "_Event") -> None:
        self.recorder.log.append(Entry(self.queue, "wait", event=event.number))


@dataclass(frozen=True)
class _Event:
    recorder: Recorder
    number: int

    def record(self, stream: _Stream | None = None) -> None:
        queue = self.recorder.current if stream is None else stream.queue
        self.recorder.log.append(Entry(queue, "record", event=self.number))


@dataclass(frozen=True)
class _Slot:
    """A slot, or a part of it from its beginning, into which copies are logged."""

    recorder: Recorder
    place: int
    tensor: Tensor | None
    device: str = "cuda"

    @property
    def data(self) -> "_Slot":
        return self

    def __getitem__(self, part: slice) -> "_Slot":
        return self if self.tensor is None else _Slot(self.recorder, self.place, self.tensor.data[part])

    def copy_(self, source: Any, *, non_blocking: bool = False) -> None:
        assert non_blocking, "the host would wait for the copy"
        layer = source.layer if isinstance(source, Source) else self.recorder.layers[source.data_ptr()]
        self.recorder.log.append(Entry(self.recorder.current, "write", self.place, layer))
        if self.tensor is not None and isinstance(source, Tensor):
            with _disable_current_modes():  # the copy itself is no kernel that reads
                self.tensor.copy_(source)

    def record_stream(self, stream: _Stream) -> None:
        assert stream.queue == COPY


@dataclass(frozen=True)
class Source:
    """Stands for a host buffer of a layer that has no numbers."""

    layer: int

    @property
    def data(self) -> "Source":
        return self

    def __len__(self) -> int:
        return 1


class Reads(TorchDispatchMode):
    """A context in which every operation that reads a slot is logged, with the layer that `layer` names then."""

    def __init__(self, recorder: Recorder, slots: Iterable[Tensor]):
        super().__init__()
        self.recorder, self.layer = recorder, None
        self._places = {slot.untyped_storage().data_ptr(): place for place, slot in enumerate(slots)}

    layer: int | None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._places:
                    self.recorder.read(self._places[value.untyped_storage().data_ptr()], self.layer)
        return func(*args, **(kwargs or {}))
