"""The circumstances of a result: the machine, the versions, the commit."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "triton", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy", "unsloth_zoo", "accelerate",
    "bitsandbytes",
)  # fmt: skip


def describe(device: str) -> dict[str, Any]:
    import torch

    from fastpref.run.environment import processor

    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "versions": {name: number for name in PACKAGES if (number := version(name)) is not None},
        "commit": commit(),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the repository's commit, with "+" after it if files differ from it."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if head.returncode else head.stdout.strip() + ("+" if changed.stdout.strip() else "")
