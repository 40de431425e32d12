"""fastpref: preference training on one GPU, without ever materialising the logits.

The names below are the public interface; each is imported when it is first used, so that `import fastpref`
and the command line's help do not wait for torch.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpref import losses
    from fastpref.config import Config, load_config
    from fastpref.errors import UserError
    from fastpref.kernels.head_weight import FourBitWeight, OffloadedWeight
    from fastpref.losses.result import PreferenceLoss
    from fastpref.losses.token_loss import preference_loss
    from fastpref.ops import LoraWeight, TokenLogprobs, linear_logprob
    from fastpref.patch import Patch, patch, unpatch
    from fastpref.training.loop import RunResult
    from fastpref.training.start import train

if (Path(__file__).parent / "kernels").is_file():
    raise ImportError(
        "fastpref/kernels is a text file: this checkout was made without symbolic links. Make it again with "
        "`git -c core.symlinks=true clone`, or install the package with `pip install .`, which needs no links"
    )

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
    "PreferenceLoss": "fastpref.losses.result",
    "preference_loss": "fastpref.losses.token_loss",
    "RunResult": "fastpref.training.loop",
    "train": "fastpref.training.start",
}


def __getattr__(name: str):
    if name in ("losses", "patch"):
        return importlib.import_module(f"fastpref.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fastpref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
