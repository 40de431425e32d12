"""Save and load the weights of a model and the moments of its optimizer, which FSDP2 may have sharded.

All processes call `whole` and `whole_weights` together.
"""

from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from fastpref.errors import UserError
from fastpref.model.adapters.begin import BegunHalf
from fastpref.model.load import Loaded
from fastpref.model.weights import from_files


def whole_weights(loaded: Loaded) -> dict[str, Tensor] | None:
    """Join the weights that `save_weights` writes if the model is sharded, else return None."""
    if not any(isinstance(p, DTensor) for p in loaded.model.parameters()):
        return None
    adapters = isinstance(loaded.wrapped, PeftModel)
    weights = loaded.wrapped.state_dict(keep_vars=True)
    own = {name: tensor for name, tensor in weights.items() if tensor.requires_grad or not adapters}
    joined = {id(tensor): whole(tensor) for tensor in own.values()}  # a tied tensor once, as transformers expects
    return {name: joined[id(tensor)] for name, tensor in own.items()}


def save_weights(folder: Path, loaded: Loaded, weights: dict[str, Tensor] | None) -> None:
    """Write the adapter for PEFT, or the model for transformers; `weights` come from `whole_weights`."""
    # If the head has an adapter, PEFT would also write the head and the embeddings, which have not changed.
    options: dict[str, Any] = {"save_embedding_layers": False} if isinstance(loaded.wrapped, PeftModel) else {}
    loaded.model.config.use_cache = True
    try:
        loaded.wrapped.save_pretrained(str(folder), state_dict=weights, **options)
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
    shapes, saved_shapes = ({(name, tensor.shape) for name, tensor in weights.items()} for weights in (own, saved))
    if differing := sorted({name for name, _ in shapes ^ saved_shapes}):
        raise UserError(f"{folder}: the saved weights are of another model: {', '.join(differing[:3])}")
    for name, tensor in own.items():  # these tensors share their storage with the model
        tensor.copy_(_sharded_like(saved[name], tensor))
    for name, module in wrapped.named_modules():
        if isinstance(module, BegunHalf):  # which is saved as one weight that is a copy
            module.take(saved[f"{name.removesuffix('.default')}.weight"])


def whole(value: Any) -> Any:
    """Return nested values in which sharded tensors are whole tensors on the CPU."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    return value


def _sharded_like(value: Tensor, own: Tensor) -> Tensor:
    """Shard a whole tensor in the same way as `own`."""
    if not isinstance(own, DTensor):
        return value
    value = value.to(own.device, own.dtype)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def optimizer_state(saved: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Shard the moments in a saved optimizer state in the same way as their parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def moment(own: Tensor, value: Any) -> Any:
        return _sharded_like(value, own) if isinstance(value, Tensor) and value.shape == own.shape else value

    moments = {at: {name: moment(parameters[at], v) for name, v in of.items()} for at, of in saved["state"].items()}
    return saved | {"state": moments}
