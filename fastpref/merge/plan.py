"""The plan of a merge, made from headers and configs alone. Weights that cannot be merged are errors here."""

from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastpref.config import Config, ModelConfig
from fastpref.errors import UserError, one_line
from fastpref.merge.adapter import adapted
from fastpref.merge.checkpoint import Checkpoint, model_folder
from fastpref.merge.names import Names
from fastpref.model.experts.quantizer import bits_of
from fastpref.model.files import model_config
from fastpref.model.skeleton import skeleton
from fastpref.model.weights import find_renaming


@dataclass(frozen=True)
class Plan:
    """The files of a model, and what happens to its tensors."""

    checkpoint: Checkpoint
    names: Names
    parts: dict[str, Any]  # by the names of the model's tensors, the PEFT modules that change them
    through_nf4: frozenset[str]  # the model's tensors that are quantised and dequantised first
    conv1d: frozenset[str]  # the model's tensors that bitsandbytes quantises transposed
    head: str  # the names of the head's weight and of the embeddings' weight in the model
    embedding: str
    tied: bool  # whether they are one weight in the model as it was
    untied: bool  # whether training has separated them, or they were separate in the files already


def make_plan(options: ModelConfig, checkpoint: Checkpoint, parts: dict[str, Any], nf4: frozenset[str]) -> Plan:
    """Plan the merge of a model and the tensors that adapters change. Raises UserError if it is impossible."""
    model = bare_model(options)
    names = Names(model, checkpoint.tensors)
    if (renaming := find_renaming(names.missing, names.unexpected)) is not None:  # as in loading
        checkpoint = checkpoint.renamed(renaming)
        names = Names(model, checkpoint.tensors)
    ends: list[Any] = [model.get_output_embeddings(), model.get_input_embeddings()]
    if None in ends:
        raise UserError(f"{options.name}: its code does not tell which layers are its head and its embeddings")
    head, embedding = (_weight(model, end) for end in ends)
    tied = ends[0].weight is ends[1].weight
    parted = tied and _are_apart(checkpoint, names, head, embedding)
    tied &= not parted
    conv1d = frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D))
    untied = parted or (tied and (head in parts or embedding in parts))
    if tied and isinstance(parts.get(embedding), TrainableTokensWrapper):  # whose rows the head has too
        if head in parts:
            raise UserError(
                f"{head}: it is tied to trained rows of new tokens, and has an adapter; it cannot be merged"
            )
        untied = parted
    packed = checkpoint.method is not None and not checkpoint.dequantised
    if packed and not all(_lies_plain(checkpoint, names, part) for part in parts):
        raise UserError(
            f"{options.name}: its weights lie quantised by {checkpoint.method}; merge dequantises those of "
            "bitsandbytes only. Use the adapter without merging, or merge it onto the unquantised model"
        )
    for target in sorted({*parts, *nf4}):
        if target == head and tied and target not in names.by_target:
            continue  # the head gets the embeddings' weight
        if fault := names.fault(target):
            raise UserError(f"{options.name}: {fault}; it cannot be merged")
    return Plan(checkpoint, names, parts, nf4, conv1d, head, embedding, tied, untied)


def merge_fault(config: Config, model: PreTrainedModel) -> str | None:
    """Return why `fastpref merge` will refuse the adapters of a run, or None.

    It reads headers and configs, but no weights. `model` is the causal language model with its adapters in place.
    """
    if config.lora is None:
        return None
    try:
        parts = adapted(model)
        nf4 = _four_bit_weights(model) if config.model.quantization == "nf4" else frozenset()
        make_plan(config.model, Checkpoint(model_folder(config.model, local=True)), parts, nf4)
    except UserError as error:
        return str(error)
    except Exception as error:  # an error of a library must not end the run
        return one_line(error, named=True)
    return None


def bare_model(options: ModelConfig) -> PreTrainedModel:
    """Make the model of a config.json on the meta device. Raises UserError if there is no config.json."""
    architecture = model_config(options)
    for part in (architecture, architecture.get_text_config()):
        vars(part).pop("quantization_config", None)  # make plain modules, even if the files are quantised
    trust = options.trust_remote_code
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, dtype=torch.float32, trust_remote_code=trust)


def nf4_weights(config: Config) -> frozenset[str]:
    """Return the names of the tensors that a run with `model.quantization = "nf4"` has in 4 bits."""
    bones = skeleton(config.but({"lora": None}), model_config(config.model), torch.float32)
    return _four_bit_weights(bones.model)


def _four_bit_weights(model: nn.Module) -> frozenset[str]:
    """Return the names of the tensors that are in 4 bits, in the model without adapters."""
    layers = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    experts = [
        f"{name}.{own}"
        for name, module in model.named_modules()
        for own in module._parameters
        if bits_of(module, own) == "nf4"
    ]
    return frozenset(".".join(part for part in name.split(".") if part != "base_layer") for name in layers + experts)


def _are_apart(checkpoint: Checkpoint, names: Names, head: str, embedding: str) -> bool:
    """Return whether the files hold a head that differs from the embeddings, whatever config.json says."""
    if head not in names.by_target or embedding not in names.by_target:
        return False
    (own, *more), (shared, *others) = (names.by_target[name].sources for name in (head, embedding))
    if more or others or own == shared:
        return False
    return not torch.equal(checkpoint.read(own), checkpoint.read(shared))


def _lies_plain(checkpoint: Checkpoint, names: Names, target: str) -> bool:
    group = names.by_target.get(target)
    return group is not None and all(checkpoint.tensors[source].dtype is not None for source in group.sources)


def _weight(model: nn.Module, wanted: nn.Module) -> str:
    return next(f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if module is wanted)
