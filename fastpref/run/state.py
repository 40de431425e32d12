"""Save the state of a run as safetensors and JSON, which run no code when they are read."""

import hashlib
import json
import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from fastpref.data.example import Example
from fastpref.errors import UserError
from fastpref.model.load import Loaded
from fastpref.model.weights import from_files

STATE = "training_state"  # .json, .safetensors
FORMAT = 2


@dataclass
class Progress:
    """The progress of a run, in values that JSON can hold."""

    step: int = 0  # optimizer steps taken
    last: dict[str, float] = field(default_factory=dict)  # metrics of the last step
    evaluated: dict[str, float] = field(default_factory=dict)  # metrics of the last evaluation
    evaluated_at: int | None = None
    best: dict[str, float] | None = None  # step, accuracy and loss of the best evaluation
    before: list[list[str]] | None = None  # questions, and the answers before the training
    skipped: int = 0  # steps left out because something in them was not finite
    skipped_in_row: int = 0

    def improved(self) -> bool:
        """Return and record whether the last evaluation is the best: more accurate, or as accurate with lower loss."""
        if "eval/rewards/accuracies" not in self.evaluated:
            return False
        accuracy, loss = self.evaluated["eval/rewards/accuracies"], self.evaluated["eval/loss"]
        if self.best is not None and (accuracy, -loss) <= (self.best["accuracy"], -self.best["loss"]):
            return False
        self.best = {"step": self.step, "accuracy": accuracy, "loss": loss}
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


def whole(value: Any) -> Any:
    """Return nested values in which tensors sharded by FSDP2 are whole tensors on the CPU.

    All processes must call it together.
    """
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    return value


def like(value: Tensor, own: Tensor) -> Tensor:
    """Shard a whole tensor in the same way as `own`."""
    if not isinstance(own, DTensor):
        return value
    value = value.to(own.device, own.dtype)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def optimizer_state(saved: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Shard the moments in a saved optimizer state in the same way as their parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def moment(own: Tensor, value: Any) -> Any:
        return like(value, own) if isinstance(value, Tensor) and value.shape == own.shape else value

    moments = {at: {name: moment(parameters[at], v) for name, v in of.items()} for at, of in saved["state"].items()}
    return saved | {"state": moments}


def rng_state() -> dict[str, Any]:
    """Return the states of all random number generators that a step may use."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.array(keys)), *(int(v) if i < 2 else float(v) for i, v in enumerate(rest))),
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


def whole_weights(loaded: Loaded) -> dict[str, Tensor] | None:
    """Join the weights that `save_weights` writes if the model is sharded, else return None.

    All processes call it together.
    """
    if not any(isinstance(p, DTensor) for p in loaded.model.parameters()):
        return None
    adapters = isinstance(loaded.wrapped, PeftModel)
    own = {
        name: tensor
        for name, tensor in loaded.wrapped.state_dict(keep_vars=True).items()
        if tensor.requires_grad or not adapters
    }
    joined = {id(tensor): whole(tensor) for tensor in own.values()}  # a tied tensor once, as transformers expects
    return {name: joined[id(tensor)] for name, tensor in own.items()}


def save_weights(folder: Path, loaded: Loaded, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapter for PEFT, or the model for transformers; `weights` come from `whole_weights`."""
    # If the head has an adapter, PEFT would also write the head and the embeddings, which have not changed.
    options: dict[str, Any] = {"save_embedding_layers": False} if isinstance(loaded.wrapped, PeftModel) else {}
    if weights is not None:
        options["state_dict"] = weights
    loaded.model.config.use_cache = True
    try:
        loaded.wrapped.save_pretrained(str(folder), **options)
    finally:
        loaded.model.config.use_cache = False


@torch.no_grad()
def load_weights(folder: Path, loaded: Loaded) -> None:
    """Load what `save_weights` wrote into the model. Raises UserError for another model's weights."""
    wrapped = loaded.wrapped
    if isinstance(wrapped, PeftModel):
        saved = load_file(folder / "adapter_model.safetensors")
        own = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    else:
        dtype = next(wrapped.parameters()).dtype
        load = partial(type(wrapped).from_pretrained, str(folder), dtype=dtype, use_safetensors=True)
        try:
            saved = from_files(load).state_dict()
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        own = wrapped.state_dict()
    wrong = sorted(
        name for name in own.keys() | saved.keys()
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    )  # fmt: skip
    if wrong:
        raise UserError(f"{folder}: the saved weights are of another model: {', '.join(wrong[:3])}")
    for name, tensor in own.items():  # these tensors share their storage with the model
        tensor.copy_(like(saved[name], tensor))


def model_fingerprint(loaded: Loaded) -> str:
    """Hash a sample of every weight that a run begins with: of the frozen ones with adapters, or else of all."""
    digest, adapters = hashlib.sha256(), isinstance(loaded.wrapped, PeftModel)
    for name, parameter in loaded.model.named_parameters():
        if not (adapters and parameter.requires_grad):
            values = parameter.detach().flatten()
            sample = values[:: max(1, len(values) // 64)].float().cpu().numpy().tobytes()
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample)
    return digest.hexdigest()


def data_fingerprint(examples: Iterable[Example]) -> str:
    """Hash the tokens, labels and unscored spans of the training examples in their order."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt, *example.completions):
            digest.update(array("i", [len(ids), *ids]).tobytes())
        digest.update(f"{example.label}{example.contexts or ''}".encode())
    return digest.hexdigest()
