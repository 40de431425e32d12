"""`fastpref merge`: an adapter added to the weights it was trained beside, a tensor at a time.

The model's safetensors are read and written one by one, and of each only the tensor at hand is in memory beside what
its file's merged tensors take: never the model twice. PEFT itself does the arithmetic (LoRA, rsLoRA, DoRA) on one
layer at a time, of a model whose weights are otherwise one number each.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from huggingface_hub import snapshot_download
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastpref.config import ModelConfig
from fastpref.data.text import add_text
from fastpref.errors import UserError
from fastpref.model.load import load_model, model_config
from fastpref.model.skeleton import skeleton
from fastpref.model.trained import Trained, trained_tokenizer
from fastpref.train.whole import write_folder

INDEX = "model.safetensors.index.json"
_ALLOWED = 0.3  # half precision rounds what is merged; a layer left out loses its share, one merged wrongly far more
_BESIDE = ("generation_config.json", "LICENSE*", "USE_POLICY*", "NOTICE*")


@dataclass(frozen=True)
class Merged:
    """What was written."""

    folder: Path
    tensors: int  # that the adapter changed
    untied: bool  # whether the head got a weight of its own
    onto: str  # which weights the adapter was added to, in words
    lost: float | None = None  # share of the adapter's change of a probe's logits; None if it was not looked at


def merge(
    trained: Trained,
    output: Path,
    *,
    dequantized: bool | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Merged:
    """Write the model that an adapter makes of its base to a folder, as transformers loads it.

    `dequantized`: add the adapter to the 4-bit weights it was trained beside, made whole again, instead of those of the
    model's files; by default if the run's config says nf4. `dtype` of what is written; that of the model's files if
    None. `verify` loads both, one after the other, and compares the logits of a probe. Raises UserError for what
    cannot be merged; nothing is left then.
    """
    if not trained.is_adapter:
        raise UserError(f"{trained.weights}: not an adapter: there is nothing to merge")
    if output.exists():
        raise UserError(f"--output {output}: is there already")
    four_bits = trained.config.model.quantization == "nf4"
    if dequantized and not four_bits:
        raise UserError('--dequantized: the run\'s config does not say model.quantization = "nf4"')
    dequantized = four_bits if dequantized is None else dequantized
    merger = _Merger(trained, dequantized, dtype)
    write_folder(output, merger.fill)
    result = Merged(output, len(merger.changed), merger.untied, merger.onto)
    return result if not verify else _verified(result, trained, dequantized)


class _Merger:
    def __init__(self, trained: Trained, dequantized: bool, dtype: torch.dtype | None):
        self._dtype = dtype
        self._trained, self._options = trained, trained.config.model
        self._base = _snapshot(self._options)
        self._files = _files(self._base)
        architecture = model_config(self._options)
        self._tied = bool(architecture.get_text_config().tie_word_embeddings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                architecture, dtype=torch.float32, trust_remote_code=self._options.trust_remote_code
            )
        _shrink(model)
        self._quantized = _quantized(trained) if dequantized else frozenset()
        self._model, self._parts = model, _adapted(model, trained)
        self.untied = self._tied and self._head_differs()
        self.changed: set[str] = set()
        bits = self._options.quantization
        self.onto = (
            "the nf4 weights that it was trained beside, dequantised" if dequantized
            else f"the weights of {self._options.name}" + (
                f", not their {bits} form that it was trained beside" if bits != "none" else ""
            )
        )  # fmt: skip
        self._check_names()

    # --- what is written -----------------------------------------------------------------------------------------

    def fill(self, folder: Path) -> None:
        """Write the model's files."""
        places: dict[str, str] = {}
        for file in self._files:
            tensors = dict(self._tensors(file))
            if file == self._files[-1] and self.untied and self._head_name not in places | tensors:
                tensors[self._head_name] = self._written(self._head_name, self._embedding())
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file.name)
            del tensors
        if len(set(places.values())) > 1:
            size = sum((folder / name).stat().st_size for name in set(places.values()))
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        config = json.loads((self._base / "config.json").read_text(encoding="utf-8"))
        if self.untied:
            config["tie_word_embeddings"] = False
            if isinstance(config.get("text_config"), dict):
                config["text_config"]["tie_word_embeddings"] = False
        if self._dtype is not None:
            config["dtype"] = str(self._dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        for pattern in _BESIDE:
            for path in self._base.glob(pattern):
                shutil.copyfile(path, folder / path.name)
        trained_tokenizer(self._trained).save_pretrained(str(folder))
        add_text(folder, self._trained.text, model_config(self._options))

    def _tensors(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                if name == self._head_name and self._tied and not self.untied:
                    continue  # a copy of the embeddings that some files hold
                yield name, self._written(name, stored.get_tensor(name))

    def _written(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            dtype = self._dtype or tensor.dtype
            tensor = self._merged(name, tensor.float()).to(dtype)
        return tensor.contiguous()

    def _merged(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model's files, in float32, with what was trained of it."""
        owner, _, kind = name.rpartition(".")
        part = self._parts.get(owner)
        if owner in self._quantized and kind == "weight":
            tensor = _through_four_bits(tensor)
        if part is None:
            return tensor
        if isinstance(part, ModulesToSaveWrapper):
            self.changed.add(name)
            return getattr(part.modules_to_save[part.active_adapters[0]], kind).detach().float()
        if kind != "weight":
            return tensor
        self.changed.add(name)
        layer = part.get_base_layer()
        before = layer.weight
        layer.weight = nn.Parameter(tensor, requires_grad=False)
        try:
            part.merge()
            return layer.weight.data
        finally:
            layer.weight = before  # the next tensor is alone again
            part.merged_adapters.clear()

    def _embedding(self) -> Tensor:
        """The stored embeddings, which a tied head shares."""
        for file in self._files:
            with safe_open(file, "pt") as stored:
                if self._embedding_name in stored.keys():  # noqa: SIM118
                    return stored.get_tensor(self._embedding_name)
        raise UserError(f"{self._base}: {self._embedding_name} is in none of its files")

    # --- what is where -------------------------------------------------------------------------------------------

    @property
    def _head_name(self) -> str:
        return f"{_name_of(self._model, self._model.get_output_embeddings())}.weight"

    @property
    def _embedding_name(self) -> str:
        return f"{_name_of(self._model, self._model.get_input_embeddings())}.weight"

    def _head_differs(self) -> bool:
        """Whether training has parted the head from the embeddings it shared its weight with."""
        return any(name.rpartition(".")[0] in self._parts for name in (self._head_name, self._embedding_name))

    def _check_names(self) -> None:
        """Every adapted module has its weight in the files, under its own name."""
        stored: set[str] = set()
        for file in self._files:
            with safe_open(file, "pt") as opened:
                stored |= set(opened.keys())
        free = {self._head_name} if self._tied else set()
        missing = sorted({f"{name}.weight" for name in self._parts} - stored - free)
        if missing:
            raise UserError(
                f"{self._options.name}: {', '.join(missing[:3])} is not in its files under that name, so it cannot be "
                "merged file by file; peft's merge_and_unload does it in memory"
            )


def _shrink(model: nn.Module) -> None:
    """Weights of the meta device as one number seen everywhere: PEFT puts adapters where their layer's weight is."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                small = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
                module._parameters[name] = made.setdefault(id(weight), nn.Parameter(small, requires_grad=False))


def _adapted(model: PreTrainedModel, trained: Trained) -> dict[str, Any]:
    """The modules that the adapter changes, by their names in the model, with the adapter's own weights loaded."""
    try:
        settings = peft.PeftConfig.from_pretrained(trained.weights)
        wrapped = peft.get_peft_model(model, settings, low_cpu_mem_usage=True)
        tensors = peft.utils.load_peft_weights(trained.weights, device="cpu")
        lost = peft.set_peft_model_state_dict(wrapped, tensors, low_cpu_mem_usage=True)
    except Exception as error:  # missing files, other shapes: PEFT raises many kinds
        said = " ".join(str(error).split())[:400]
        raise UserError(f"{trained.weights}: this adapter does not fit {trained.config.model.name}: {said}") from None
    if not isinstance(settings, peft.LoraConfig):
        raise UserError(f"{trained.weights}: a {settings.peft_type} adapter; LoRA, rsLoRA and DoRA can be merged")
    if lost.unexpected_keys:
        raise UserError(f"{trained.weights}: {', '.join(lost.unexpected_keys[:3])} has no place in the model")
    if settings.bias != "none" or settings.lora_bias:
        raise UserError(f"{trained.weights}: this adapter has trained biases too, which is not known here")
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper | LoraLayer):
            found[name] = module
        elif isinstance(module, BaseTunerLayer):
            raise UserError(f"{trained.weights}: {name} has a {type(module).__name__}, which is not known here")
    if settings.target_parameters:
        raise UserError(f"{trained.weights}: adapters of bare parameters (target_parameters) are not known here")
    return found


def _snapshot(options: ModelConfig) -> Path:
    """The folder of a model's files."""
    folder = Path(options.name).expanduser()
    if folder.is_dir():
        return folder
    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "USE_POLICY*", "NOTICE*"]
    try:
        return Path(snapshot_download(options.name, revision=options.revision, allow_patterns=wanted))
    except Exception as error:  # the hub raises many kinds
        said = " ".join(str(error).split())[:400]
        raise UserError(f"model.name = {options.name!r}: its files cannot be had: {said}") from None


def _files(folder: Path) -> Sequence[Path]:
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {missing[0]} is missing; only safetensors are read")
    return [folder / name for name in names]


def _quantized(trained: Trained) -> frozenset[str]:
    """The modules that were in 4 bits."""
    bones = skeleton(trained.config, model_config(trained.config.model), torch.float32)
    names = (name for name, module in bones.model.named_modules() if isinstance(module, Linear4bit))
    return frozenset(name.removesuffix(".base_layer") for name in names)


def _through_four_bits(weight: Tensor) -> Tensor:
    """What an nf4 weight with quantised scales is worth, as bitsandbytes makes and reads it."""
    packed, state = quantize_4bit(weight.float(), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state).to(weight.dtype)


def _name_of(model: nn.Module, wanted: Any) -> str:
    inner = wanted.get_base_layer() if isinstance(wanted, BaseTunerLayer) else wanted
    inner = inner.original_module if isinstance(inner, ModulesToSaveWrapper) else inner
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is inner]
    return names[0].removesuffix(".base_layer").removesuffix(".original_module")


# --- The probe -------------------------------------------------------------------------------------------------------


def _verified(result: Merged, trained: Trained, dequantized: bool) -> Merged:
    """Compare the logits of the merged model with those of the adapter beside its base."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = trained.config.model
    base = options if dequantized else options.model_copy(update={"quantization": "none"})
    config = trained.config.model_copy(update={"model": base})
    loaded = load_model(config, device, trained=True, adapter=trained.weights)
    theirs = _probe(loaded.model)
    assert isinstance(loaded.wrapped, peft.PeftModel)
    with loaded.wrapped.disable_adapter():
        before = _probe(loaded.model)
    del loaded
    plain = options.model_copy(update={"name": str(result.folder), "revision": None, "quantization": "none"})
    ours = _probe(load_model(config.model_copy(update={"model": plain}), device, trained=True).model)
    lost = float((ours - theirs).norm() / (theirs - before).norm().clamp(min=1e-30))
    if not lost <= _ALLOWED:
        shutil.rmtree(result.folder, ignore_errors=True)
        raise UserError(
            f"{trained.weights}: {lost:.0%} of what the adapter changes in the logits of a probe is lost in the merged "
            "model, so it is not kept. If its files are in half precision, rounding may be why: try --dtype float32"
        )
    return replace(result, lost=lost)


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """Float32 logits [T, V] of tokens from all over the vocabulary."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, size - 1, 64, device=model.device).long()[None]
    return model(input_ids=ids, use_cache=False).logits[0].float().cpu()
