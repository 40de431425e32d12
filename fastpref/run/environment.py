"""The environment of a run: versions, the device, and peak memory."""

import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from fastpref import __version__

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel")


def environment(device: torch.device) -> dict[str, str]:
    """Return what a result depends on in addition to its config: versions, the system and the device."""
    versions = {"fastpref": __version__, "Python": platform.python_version(), "system": platform.platform(terse=True)}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions | {"device": device_name(device)}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    if device.type != "cpu":
        return device.type
    return f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int | None:
    """Return the peak bytes that torch has allocated on a GPU, or else those of the process. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
