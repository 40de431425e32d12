"""Where a run takes place: versions, the device, and the memory it has taken."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from fastpref import __version__

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel")


def environment(device: torch.device) -> dict[str, str]:
    """What a result depends on beside its config."""
    found = {"fastpref": __version__, "Python": platform.python_version(), "system": platform.platform(terse=True)}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"device": device_name(device)}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    if device.type != "cpu":
        return device.type
    return f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        named = []
    return named[0] if named else platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the highest so far: of the GPU what torch has allocated, else of the process. None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
