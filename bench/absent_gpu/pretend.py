"""Answers to what torch and Triton ask of a GPU."""

from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch._dynamo import device_interface
from torch._inductor.runtime import triton_helpers
from torch._subclasses import fake_tensor
from triton.backends.compiler import GPUTarget

from bench.absent_gpu.card import Card


def pretend(card: Card) -> None:
    """Let this process, after `take_over`, take itself to be on a machine with this card, for good."""
    fake_tensor.init_gpu_context = lambda *_: None
    _answer_torch(card)
    _answer_dynamo(card)
    driver: Any = _Driver(card)
    triton.runtime.driver.set_active(driver)
    triton_helpers.set_driver_to_gpu = _always(None)  # it would replace the driver


def _answer_torch(card: Card) -> None:
    properties, stream = card.properties(), SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)
    answers: dict[str, Any] = {
        "_lazy_init": None,
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": card.architecture >= 80,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "set_device": None,
        "get_device_properties": properties,
        "get_device_capability": card.capability,
        "get_device_name": card.name,
        "current_stream": stream,
        "synchronize": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    torch.accelerator.is_available = _always(False)  # it would ask the driver


def _answer_dynamo(card: Card) -> None:
    properties, interface = card.properties(), device_interface.CudaInterface
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_compute_capability": card.architecture,
        "get_raw_stream": 0,
        "is_bf16_supported": card.architecture >= 80,
        "synchronize": None,
    }
    for name, answer in answers.items():
        setattr(interface, name, staticmethod(_always(answer)))
    interface.Worker.get_device_properties = staticmethod(_always(properties))
    interface.Worker.current_device = staticmethod(_always(0))


def _always(answer: Any) -> Any:
    return lambda *_, **__: answer


class _Driver:
    """Triton's driver, as far as Triton calls it before a launch."""

    launcher_cls = staticmethod(lambda *_: lambda *_, **__: None)

    def __init__(self, card: Card):
        self._target = GPUTarget("cuda", card.architecture, 32)
        sizes = {"max_shared_mem": card.limit, "multiprocessor_count": card.processors}
        limits = sizes | {"max_num_regs": 65536, "warpSize": 32}
        self.utils = SimpleNamespace(get_device_properties=_always(limits), load_binary=_always((0, 0, 0, 0, 1024)))

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)
