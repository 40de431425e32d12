"""Locked memory: all of it is registered, and CUDA forgets it before the system takes it back."""

from pathlib import Path

import pytest
import torch

from fastpref.errors import UserError
from fastpref.model.streaming.pinned import pinned

SIZE = 12_345


class Runtime:
    """Stands for the CUDA runtime, and records what is registered."""

    def __init__(self, status: int = 0):
        self.status, self.calls = status, []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append(("register", address, size, _is_mapped(address)))
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address, _is_mapped(address)))
        return 0


def _is_mapped(address: int) -> bool:
    maps = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) == address or int(first, 16) < address < int(last, 16) for first, last in maps)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    if not Path("/proc/self/maps").exists():
        pytest.skip("Linux only")
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: made.calls.append(("synchronize",)))
    return made


def test_a_buffer_is_registered_as_long_as_it_is_used(runtime: Runtime) -> None:
    """It has pages of its own. The last view keeps it; then copies end, CUDA forgets it, and it is unmapped."""
    buffer = pinned(SIZE)
    address = buffer.data_ptr()
    assert (len(buffer), buffer.dtype, address % 4096) == (SIZE, torch.uint8, 0)
    assert runtime.calls == [("register", address, SIZE, True)]
    view = buffer[256:512].view(torch.float32)
    view.fill_(3.5)
    del buffer
    assert runtime.calls[1:] == []
    assert view.sum() == 3.5 * 64
    del view
    assert runtime.calls[1:] == [("synchronize",), ("unregister", address, True)]


def test_a_system_that_locks_no_memory_is_told(runtime: Runtime) -> None:
    """The message says how much was asked for; nothing is unregistered that was not registered."""
    runtime.status = 2
    with pytest.raises(UserError, match=r"does not lock 12,345 bytes .* \(CUDA error 2\); raise the limit"):
        pinned(SIZE)
    assert [call[0] for call in runtime.calls] == ["register"]


@pytest.mark.parametrize(("size", "gpu"), [(0, True), (SIZE, False)])
def test_nothing_to_lock(size: int, gpu: bool, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert len(pinned(size)) == size
    assert runtime.calls == []
