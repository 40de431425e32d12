"""Save and load the weights of a model and the moments of its optimizer, which FSDP2 may have sharded.

All processes call `whole` and `whole_weights` together.
"""

from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastpref.errors import UserError
from fastpref.model.adapters.begin import BegunHalf
from fastpref.model.adapters.joined import is_stacked, joined_settings, joined_weights
from fastpref.model.adapters.served import serving_note
from fastpref.model.adapters.source import SETTINGS, WEIGHTS
from fastpref.model.adapters.switch import POLICY
from fastpref.model.load import Loaded
from fastpref.model.weights import from_files
from fastpref.sharding import is_sharded

ON_TOP = "on_top"  # the folder of a stacked adapter without the one below it
_ON_TOP = """\
# The upper adapter of a stack

This adapter was trained on top of another one (`lora.stack` of fastpref), and is right only together with that one. The
folder above holds both as one adapter, for every use. This one alone is what a resumed run continues.
"""


def whole_weights(loaded: Loaded) -> dict[str, Tensor] | None:
    """Join the weights that `save_weights` writes if the model is sharded, else return None."""
    if not any(is_sharded(p) for p in loaded.model.parameters()):
        return None
    adapters = isinstance(loaded.wrapped, PeftModel)
    weights = loaded.wrapped.state_dict(keep_vars=True)
    own = {name: tensor for name, tensor in weights.items() if tensor.requires_grad or not adapters}
    joined = {id(tensor): whole(tensor) for tensor in own.values()}  # a tied tensor once, as transformers expects
    return {name: joined[id(tensor)] for name, tensor in own.items()}


def save_weights(folder: Path, loaded: Loaded, weights: dict[str, Tensor] | None) -> None:
    """Write the adapter for PEFT, or the model for transformers; `weights` come from `whole_weights`."""
    # If the head has an adapter, PEFT would also write the head and the embeddings, which have not changed.
    adapters: dict[str, Any] = {"save_embedding_layers": False, "selected_adapters": [POLICY]}
    options = adapters if isinstance(loaded.wrapped, PeftModel) else {}
    place = folder / ON_TOP if is_stacked(loaded.wrapped) else folder
    loaded.model.config.use_cache = True
    try:
        loaded.wrapped.save_pretrained(str(place), state_dict=weights, **options)
    finally:
        loaded.model.config.use_cache = False
    if place != folder:
        joined_settings(loaded.wrapped).save_pretrained(str(folder))
        save_file(joined_weights(loaded.wrapped), folder / WEIGHTS, metadata={"format": "pt"})
        (place / "README.md").write_text(_ON_TOP, encoding="utf-8")


def serving(folder: Path) -> str | None:
    """Return a note on how vLLM takes the adapter of a folder, if that is not by its defaults; None for a model."""
    if not (folder / SETTINGS).is_file():
        return None
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = list(file.keys())
    settings: Any = peft.PeftConfig.from_pretrained(str(folder))
    return serving_note(settings, names)


@torch.no_grad()
def load_weights(folder: Path, loaded: Loaded) -> None:
    """Load what `save_weights` wrote into the model. Raises UserError for another model's weights."""
    wrapped = loaded.wrapped
    if isinstance(wrapped, PeftModel):
        saved = load_file((folder / ON_TOP if is_stacked(wrapped) else folder) / WEIGHTS)
        own = peft.get_peft_model_state_dict(wrapped, adapter_name=POLICY, save_embedding_layers=False)
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
    if is_sharded(value):
        return value.full_tensor().detach().cpu()
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    return value


def _sharded_like(value: Tensor, own: Any) -> Tensor:
    """Shard a whole tensor in the same way as `own`."""
    if not is_sharded(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(own.device, own.dtype)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def optimizer_state(saved: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Shard the moments in a saved optimizer state in the same way as their parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def moment(own: Tensor, value: Any) -> Any:
        return _sharded_like(value, own) if isinstance(value, Tensor) and value.shape == own.shape else value

    moments = {at: {name: moment(parameters[at], v) for name, v in of.items()} for at, of in saved["state"].items()}
    return saved | {"state": moments}
