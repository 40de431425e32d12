"""Compare a merged model with the adapter on its base by the logits of a probe, both loaded by transformers."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpref.config import Config, ModelConfig
from fastpref.errors import UserError, one_line
from fastpref.model.adapters.trained import load_adapter, rows_for
from fastpref.model.files import hub_options, model_config
from fastpref.model.load import weight_dtype
from fastpref.model.new_tokens import grow
from fastpref.model.quantize import keep_weights_as_loaded, quantization_config
from fastpref.model.streaming.stream import Streaming, stream_weights
from fastpref.model.weights import from_files
from fastpref.run.trained import Trained

_ALLOWED = 0.3  # half precision rounds; a missing layer loses its share, and a wrong one far more
_ALLOWED_WHOLE = 0.01  # if both are stored and computed in float32
_TOKENS = 64


def lost_share(folder: Path, trained: Trained, *, nf4: bool, plain: bool, whole: bool) -> float:
    """Return the share of the adapter's change of a probe's logits that is lost in a merged model.

    The base is loaded in nf4 if `nf4`, and dequantised if it is stored quantised and is `plain` in the merged model.
    With `model.streaming = true` both models are streamed.
    `whole`: whether merged tensors are written in float32. Raises UserError if too much is lost, or if the merged model
    cannot be loaded or lacks tensors.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fault, advice = (
        "compared, and is not kept: the adapter on its model fails",
        ". --no-verify merges without comparing",
    )
    try:
        with_adapter, without = _base_logits(trained, device, nf4=nf4, plain=plain)
        fault, advice = "loaded, so it is not kept", ""
        logits = _merged_logits(folder, trained.config, device)
    except UserError:
        raise
    except Exception as error:
        message = f"the merged model cannot be {fault}: {one_line(error)}{advice}"
        raise UserError(f"{trained.weights}: {message}") from None
    lost = float((logits - with_adapter).norm() / (with_adapter - without).norm().clamp(min=1e-30))
    exact = whole and weight_dtype(trained.config, device, trains=False) == torch.float32
    allowed = _ALLOWED_WHOLE if exact else _ALLOWED
    if not lost <= allowed:
        why = "" if whole else "; half precision may have rounded so small a change off, and --dtype float32 keeps it"
        raise UserError(
            f"{trained.weights}: the merged model is not kept, because {lost:.0%} of the adapter's effect on the "
            f"logits of a probe is lost in it, and {allowed:.0%} at most may be{why}"
        )
    return lost


def _base_logits(trained: Trained, device: torch.device, *, nf4: bool, plain: bool) -> tuple[Tensor, Tensor]:
    """Return the logits of the base with the adapter, and without it."""
    options = trained.config.model
    dtype = weight_dtype(trained.config, device, trains=False)
    load: dict[str, Any] = {"dtype": dtype, "device_map": {"": _loaded_to(options, device)}} | hub_options(options)
    if nf4:  # None would replace the settings of a model that is stored quantised
        load["quantization_config"] = quantization_config("nf4", dtype)
    make = partial(AutoModelForCausalLM.from_pretrained, options.name)
    model: Any = from_files(make, use_safetensors=True, **load)
    if plain:
        model = model.dequantize(dtype=dtype)
    keep_weights_as_loaded(model)
    grow(model, rows_for(trained.weights), trained.weights)
    stream = stream_weights(model, device, Streaming()) if options.streaming is True else None
    without = _probe(model)
    with warnings.catch_warnings(action="ignore"):
        wrapped = load_adapter(model, trained.weights)
    if stream is not None:
        stream.move_rest(model)
    return _probe(wrapped), without


def _merged_logits(folder: Path, config: Config, device: torch.device) -> Tensor:
    options = config.but({"model.name": str(folder), "model.revision": None}).model
    place, dtype = _loaded_to(options, device), weight_dtype(config, device, trains=False)
    load: dict[str, Any] = {"dtype": dtype, "device_map": {"": place}} | hub_options(options)
    make: Any = partial(AutoModelForCausalLM.from_pretrained, folder, config=model_config(options), **load)
    model, report = make(use_safetensors=True, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{', '.join(missing[:3])} is missing in the merged model, so it is not kept")
    if options.streaming is True:
        stream_weights(model, device, Streaming())
    return _probe(model)


def _loaded_to(options: ModelConfig, device: torch.device) -> torch.device:
    return torch.device("cpu") if options.streaming is True else device


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """Return float32 logits [T, V] of tokens that are spread over the vocabulary."""
    size = model.get_input_embeddings().weight.shape[0]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _TOKENS
    ids = torch.linspace(0, size - 1, min(_TOKENS, longest), device=model.device).long()[None]
    return model.eval()(input_ids=ids, use_cache=False).logits[0].float().cpu()
