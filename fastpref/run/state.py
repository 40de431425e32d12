"""The state of a run, saved as safetensors and JSON, which run no code when they are read."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastpref.config.stopping import Better
from fastpref.errors import UserError

STATE = "training_state"  # .json, .safetensors
FORMAT = 3


@dataclass
class Progress:
    """The progress of a run, in values that JSON can hold."""

    step: int = 0  # optimizer steps taken
    last: dict[str, float] = field(default_factory=dict)  # metrics of the last step
    evaluated: dict[str, float] = field(default_factory=dict)  # metrics of the last evaluation
    evaluated_at: int | None = None
    first: dict[str, float] | None = None  # metrics of the evaluation before the training
    best: dict[str, float] | None = None  # step and metrics of the best evaluation
    not_better: int = 0  # evaluations in a row that were not better than it
    before: list[list[str]] | None = None  # questions, and the answers before the training
    skipped: int = 0  # steps left out because something in them was not finite
    skipped_in_row: int = 0

    def improved(self, better: Better, *, departed: bool = False) -> bool:
        """Return and record whether the last evaluation is the best, and count those in a row that are not.

        One at which the model has `departed` from its language is not, however right it is about the pairs.
        """
        if self.step == 0:
            self.first = self.evaluated
        if not better.knows(self.evaluated):
            return False
        if self.best is not None and (departed or not better(self.evaluated, self.best)):
            self.not_better += 1
            return False
        self.best, self.not_better = {"step": self.step} | self.evaluated, 0
        return True


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write nested dicts, lists and tuples of tensors and plain values."""
    tensors: dict[str, Tensor] = {}
    skeleton = _pack({"format": FORMAT} | state, tensors, {})
    save_file(tensors, folder / f"{STATE}.safetensors")
    (folder / f"{STATE}.json").write_text(json.dumps(skeleton), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote, with tensors on the CPU. Raises UserError for another version's format."""
    skeleton = json.loads((folder / f"{STATE}.json").read_text(encoding="utf-8"))
    state = _unpack(skeleton, load_file(folder / f"{STATE}.safetensors"))
    if state.pop("format", None) != FORMAT:
        raise UserError(f"{folder}: this checkpoint is of another version of fastpref; its weights can still be loaded")
    return state


def _pack(value: Any, tensors: dict[str, Tensor], known: dict[int, str]) -> Any:
    """Encode a value as JSON. Tensors, tuples and dicts, whose keys may not be strings, become one-key objects."""
    if isinstance(value, Tensor):
        if id(value) not in known:  # 8-bit optimizers share their tables among parameters
            known[id(value)] = f"t{len(tensors)}"
            plain = value.detach().cpu().contiguous()
            whole = plain.untyped_storage().nbytes() == plain.nbytes
            tensors[known[id(value)]] = plain if whole else plain.clone()
        return {"tensor": known[id(value)]}
    if isinstance(value, dict):
        return {"map": [[_pack(k, tensors, known), _pack(v, tensors, known)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(v, tensors, known) for v in value]}
    if isinstance(value, list):
        return [_pack(v, tensors, known) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_unpack(v, tensors) for v in inner)
    return {_unpack(k, tensors): _unpack(v, tensors) for k, v in inner}


def rng_state() -> dict[str, Any]:
    """Return the states of all random number generators that a step may use."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.array(keys)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda, device)
