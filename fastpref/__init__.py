"""fastpref: preference training on one GPU, without ever materialising the logits.

The names below are the public interface; each is imported when it is first used, so that `import fastpref`
and the command line's help do not wait for torch.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpref import losses
    from fastpref.config import Config, load_config
    from fastpref.errors import UserError
    from fastpref.kernels.head_weight import FourBitWeight, OffloadedWeight
    from fastpref.ops import LoraWeight, TokenLogprobs, linear_logprob
    from fastpref.patch import Patch, patch, unpatch
    from fastpref.token_loss import PreferenceLoss, preference_loss
    from fastpref.train.loop import RunResult, train

__version__ = "0.1.0"
__all__ = [
    "Config",
    "FourBitWeight",
    "LoraWeight",
    "OffloadedWeight",
    "Patch",
    "PreferenceLoss",
    "RunResult",
    "TokenLogprobs",
    "UserError",
    "linear_logprob",
    "load_config",
    "losses",
    "patch",
    "preference_loss",
    "train",
    "unpatch",
]

_HOME = {
    "Config": "fastpref.config",
    "load_config": "fastpref.config",
    "UserError": "fastpref.errors",
    "FourBitWeight": "fastpref.ops",
    "LoraWeight": "fastpref.ops",
    "OffloadedWeight": "fastpref.ops",
    "TokenLogprobs": "fastpref.ops",
    "linear_logprob": "fastpref.ops",
    "Patch": "fastpref.patch",
    "unpatch": "fastpref.patch",
    "PreferenceLoss": "fastpref.token_loss",
    "preference_loss": "fastpref.token_loss",
    "RunResult": "fastpref.train.loop",
}


def _find_kernels() -> None:
    """In a checkout the kernels lie beside this package, in a wheel inside it; both import as `fastpref.kernels`.

    Hugging Face publishes a package that is also named `kernels`, and transformers looks for it. From the
    repository's root it would find our bare folder, so that folder is hidden under that name.
    """
    package = Path(__file__).resolve().parent
    root = package.parent
    if (package / "kernels").is_dir() or not (root / "kernels").is_dir():
        return
    __path__.append(str(root))
    if "kernels" in sys.modules:
        return
    found = importlib.util.find_spec("kernels")
    if found is not None and found.origin is None:  # a namespace: a folder without __init__.py
        sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]


_find_kernels()


def __getattr__(name: str):
    if name in ("losses", "patch", "train"):
        return importlib.import_module(f"fastpref.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fastpref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
