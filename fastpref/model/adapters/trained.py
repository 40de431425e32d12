"""Loading of trained adapters from a folder or the hub. An adapter that does not fit the model is an error."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel

from fastpref.errors import UserError
from fastpref.model.adapters.experts import fuse_expert_lora
from fastpref.model.adapters.source import changes_base, find_adapter, weights_file
from fastpref.model.adapters.switch import POLICY
from fastpref.model.adapters.token_rows import fuse_tokens, tokens_of
from fastpref.model.failure import is_out_of_memory, words
from fastpref.model.new_tokens import grow
from fastpref.model.weights import Misfit, Renaming, Shape, find_renaming, take_note


def load_adapter(model: PreTrainedModel, folder: str | Path) -> peft.PeftModel:
    """Return the model with the trained adapter of a folder or of the hub.

    Raises UserError for pickled weights, for an adapter with a tensor that does not fit, and for one that also changes
    weights outside its adapters.
    """
    begin = f"{folder}: this adapter cannot be put on {model.name_or_path}"
    if (found := find_adapter(str(folder))) is not None:
        weights_file(str(folder), found, begin)
    with told_of_misfit(begin):
        weights = peft.load_peft_weights(str(folder), device="cpu")
        settings = peft.PeftConfig.from_pretrained(str(folder))
        check_weights(settings, weights, model, begin)
        grow(model, tokens_of(settings), str(folder))
        wrapped = peft.PeftModel.from_pretrained(model, str(folder)).eval()
        put_weights(wrapped, weights, POLICY, str(folder), begin)
        fuse_expert_lora(wrapped)
        fuse_tokens(wrapped)
    return wrapped


def rows_for(folder: str | Path) -> int:
    """Return how many rows a model needs for the new tokens of a trained adapter, 0 for none. Raises UserError."""
    with told_of_misfit(f"{folder}: this adapter cannot be read"):
        return tokens_of(peft.PeftConfig.from_pretrained(str(folder)))


def put_weights(wrapped: peft.PeftModel, weights: dict[str, torch.Tensor], name: str, source: str, begin: str) -> None:
    """Load an adapter's weights into the adapter `name` of a model. Raises UserError for any that does not fit.

    `source` names the weights in a note, and `begin` is the beginning of messages.
    """
    misfit, renaming = _reloaded(wrapped, weights, name)
    if misfit:
        raise UserError(f"{begin}: {misfit}. It was probably trained on another model, or on another form of this one")
    if renaming is not None:
        take_note(wrapped, f"{source}: {renaming}")


@contextmanager
def told_of_misfit(begin: str) -> Iterator[None]:
    """Turn PEFT's errors inside the block into a UserError that begins with `begin`."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:  # the weights lack a module of PEFT's `modules_to_save`
        misfit = Misfit(missing=(str(error.args[0]),))
        raise UserError(
            f"{begin}: {misfit}. It was probably trained on another model, or on another form of this one"
        ) from None
    except Exception as error:  # PEFT raises many kinds of errors: for missing or damaged files, or for other shapes
        if is_out_of_memory(error):
            raise
        shapes = _misshapen(str(error))
        if not shapes:
            raise UserError(f"{begin}: {words(error)}") from None
        raise UserError(f"{begin}: {Misfit(misshapen=shapes)}. {_why_misshapen(shapes)}") from None


def check_weights(settings: Any, weights: Mapping[str, torch.Tensor], model: PreTrainedModel, begin: str) -> None:
    """Raise UserError for adapters that load but are wrong: added tokens, changed weights of the model, NaN or inf."""
    if settings.is_prompt_learning or settings.is_adaption_prompt:
        raise UserError(f"{begin}: {settings.peft_type.value} adds tokens to prompts, which is not computed here")
    if why := changes_base(settings):
        raise UserError(f"{begin}: {why}")
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{begin}: its {name} holds numbers that are not finite; the training went wrong")
    saved, own = tuple(settings.modules_to_save or ()), model.state_dict()
    for name, tensor in weights.items():
        plain = name.removeprefix("base_model.model.")
        before = own.get(plain)
        if before is None or before.device.type == "meta" or any(part in plain for part in saved):
            continue
        if before.shape != tensor.shape or not torch.equal(before.float().cpu(), tensor.to(before.dtype).float()):
            raise UserError(
                f"{begin}: it holds another {plain} in place of the model's, outside of its adapters, and the model "
                "without it would have that too. Save the model with these weights, and merge the adapter into that"
            )


def _reloaded(
    wrapped: peft.PeftModel, weights: dict[str, torch.Tensor], adapter: str
) -> tuple[Misfit, Renaming | None]:
    """Load an adapter's tensors again to find those that do not fit. If one renaming makes them fit, return it too."""
    misfit = _put(wrapped, weights, adapter)
    if not misfit or _put_by_own_names(wrapped, weights, adapter):
        return Misfit(), None
    own = [name.replace(f".{adapter}", "") for name in misfit.missing]
    renaming = find_renaming(own, misfit.unexpected)
    if renaming is None or {renaming(name) for name in misfit.unexpected} != set(own):
        return misfit, None
    return _put(wrapped, {renaming(name): tensor for name, tensor in weights.items()}, adapter), renaming


def _put(wrapped: peft.PeftModel, weights: dict[str, torch.Tensor], adapter: str) -> Misfit:
    result: Any = peft.set_peft_model_state_dict(wrapped, weights, adapter_name=adapter)
    missing = sorted(name for name in result.missing_keys if f".{adapter}" in name)
    unexpected = sorted(name.replace(f".{adapter}", "") for name in result.unexpected_keys)
    return Misfit(tuple(missing), tuple(unexpected))


@torch.no_grad()
def _put_by_own_names(wrapped: peft.PeftModel, weights: dict[str, torch.Tensor], adapter: str) -> bool:
    """Copy an adapter's tensors to those that PEFT would save under the same names; return whether all of them fit.

    PEFT applies transformers' renamings when it loads an adapter, and for some model families these also change
    correct names.
    """
    # These tensors share the model's storage.
    own = peft.get_peft_model_state_dict(wrapped, adapter_name=adapter, save_embedding_layers=False)
    if own.keys() != weights.keys() or any(own[name].shape != weights[name].shape for name in own):
        return False
    for name, tensor in own.items():
        tensor.copy_(weights[name])
    return True


def _misshapen(message: str) -> tuple[tuple[str, Shape, Shape], ...]:
    """Return (name, shape in the file, shape in the model) for each mismatch in a message of `load_state_dict`."""
    pattern = r"size mismatch for (\S+): .*?shape torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)"
    return tuple((name, _shape(file), _shape(own)) for name, file, own in re.findall(pattern, message))


def _shape(text: str) -> Shape:
    return tuple(int(size) for size in text.split(",") if size.strip())


def _why_misshapen(shapes: Sequence[tuple[str, Shape, Shape]]) -> str:
    sides = {"lora_A": 0, "lora_B": 1}  # the dimension of the rank
    ranks = [
        (file[axis], own[axis])
        for name, file, own in shapes
        for side, axis in sides.items()
        if side in name and len(file) == 2 == len(own) and file[1 - axis] == own[1 - axis]
    ]
    if ranks and len(ranks) == len(shapes):
        return f"Its tensors have rank {ranks[0][0]} and its adapter_config.json says {ranks[0][1]}"
    return "It was trained on a model of another size"
