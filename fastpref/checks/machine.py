"""The packages that a config needs, and whether there is a GPU, without importing torch."""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from fastpref.config import Config
from fastpref.config.formats import is_function, parse_format

# The modules with which Accelerate knows a tracker to be there; any of them will do.
_TRACKERS = {
    "comet_ml": ("comet_ml",), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",),
}  # fmt: skip


def package_mistakes(config: Config) -> Iterator[str]:
    """Yield what a config needs and is not installed, and functions that are not there."""
    missing = [name for name in config.log.trackers if not any(map(is_installed, _TRACKERS.get(name, (name,))))]
    if missing:
        yield f"log.trackers: {', '.join(missing)} not installed; pip install {' '.join(missing)}"
    if config.train.optimizer == "schedule_free_adamw" and not is_installed("schedulefree"):
        yield 'train.optimizer = "schedule_free_adamw" needs the package schedulefree; pip install schedulefree'
    if config.model.attention == "varlen" and not is_installed("flash_attn"):
        yield 'model.attention = "varlen" needs the package flash-attn; pip install flash-attn, or leave the key out'
    formats = [parse_format(data.format)[0] for data in (*config.data, *config.eval.data)]
    named = {"train.callbacks": config.train.callbacks, "data.format": [name for name in formats if is_function(name)]}
    for key, names in named.items():
        for name in names:
            file = name.rpartition(":")[0]
            if file.endswith(".py") and not Path(file).expanduser().is_file():
                yield f"{key}: {name!r}: {file} cannot be imported: there is no such file"


def device_mistakes(config: Config) -> Iterator[str]:
    """Yield settings that need a GPU where there is none."""
    if has_gpu() is not False:
        return
    name = config.train.optimizer
    if name.startswith("paged"):
        plain = name.removeprefix("paged_").removesuffix("_8bit")
        yield f'train.optimizer = "{name}": only moments on a GPU can be paged; set "{plain}" or "{plain}_8bit"'
    if config.train.offload_activations:
        yield "train.offload_activations: on a CPU activations are in host memory already; leave the key out"
    if config.model.liger is True:
        yield "model.liger = true: they run on GPUs only; leave the key out"


def has_gpu() -> bool | None:
    """Return whether torch will find a GPU, or None if that is not known without importing it."""
    torch: Any = sys.modules.get("torch")
    return _driver_has_gpu() if torch is None else torch.cuda.is_available()


@cache
def _driver_has_gpu() -> bool | None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or sys.platform != "linux":
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    if "+cpu" in text or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if "rocm" in text:
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return found and count.value > 0


def is_installed(module: str) -> bool:
    """Return whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
