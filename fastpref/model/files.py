"""Messages on why a model cannot be loaded: a missing or damaged file, or a folder that holds something else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpref.config import ModelConfig
from fastpref.errors import UserError, one_line
from fastpref.model.headers import read_header
from fastpref.places import means_a_path, no_such_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHER_FRAMEWORKS = {"*.gguf": "GGUF (llama.cpp)", "*.onnx": "ONNX", "*.msgpack": "Flax", "*.h5": "TensorFlow"}
_KINDS = {  # of models that are no causal language models, by transformers' tables of classes
    "IMAGE_TEXT_TO_TEXT": "a vision-language model",
    "SEQ_TO_SEQ_CAUSAL_LM": "an encoder-decoder",
    "SPEECH_SEQ_2_SEQ": "a speech model",
    "MULTIMODAL_LM": "a multimodal model",
    "MASKED_LM": "an encoder (a masked language model)",
    "TEXT_ENCODING": "an encoder",
    "IMAGE_CLASSIFICATION": "an image model",
    "CTC": "a speech model",
}


def model_config(options: ModelConfig) -> "PretrainedConfig":
    """Load the config.json of a causal language model. Raises UserError if there is none."""
    from transformers import AutoConfig

    folder = Path(options.name).expanduser()
    file = folder / "adapter_config.json"
    if file.is_file():  # transformers would silently load the adapter on its base model
        raise UserError(f"model.name = {options.name!r}: {_adapter(options.name, file, folder)}")
    load = hub_options(options)
    try:
        config = AutoConfig.from_pretrained(options.name, **load)
    except Exception as error:  # transformers and the hub raise many kinds
        raise UserError(f"model.name = {options.name!r}: no model there: {explained(options, error)}") from None
    if (fault := _no_causal_model(config)) is not None:
        raise UserError(f"model.name = {options.name!r}: {fault}")
    return config


def hub_options(options: ModelConfig) -> dict[str, Any]:
    """Return the keywords of `from_pretrained` for the version of a model and for whether its code is run.

    Raises UserError for a version of a folder, which has only one.
    """
    if options.revision is not None and Path(options.name).expanduser().is_dir():
        raise UserError(
            f"model.revision = {options.revision!r}: {options.name} is a folder on this machine, and only models on "
            "the hub have revisions; leave the key out"
        )
    return {"revision": options.revision or "main", "trust_remote_code": options.trust_remote_code}


def explained(options: ModelConfig, error: BaseException, *, tokenizer: bool = False) -> str:
    """Explain a library's error: return the file at fault if it can be found, else the error's own message."""
    if not options.trust_remote_code and "trust_remote_code" in str(error):
        advice = "set model.trust_remote_code = true if you have read the code and trust it"
        return f"it comes with Python code of its own, which is not run; {advice}"
    folder = Path(options.name).expanduser()
    if means_a_path(options.name) and not folder.exists():
        return no_such_folder(options.name)
    fault = fault_in_folder(folder, tokenizer) if folder.is_dir() else _on_hub(options, tokenizer)
    return fault or one_line(error)


def _no_causal_model(config: "PretrainedConfig") -> str | None:
    """Return a message on a model that is not a causal language model, by transformers or its own code; or None."""
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    if config.is_encoder_decoder:
        return f"{kind} is an encoder-decoder; a causal language model is needed"
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None
    names = {table: getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}) for table in _KINDS}
    if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        looks_both_ways = not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))
        if kind in names["MASKED_LM"] and looks_both_ways:
            return f"{kind} is {_KINDS['MASKED_LM']}, where tokens see later ones; a causal language model is needed"
        return None
    what = next((words for table, words in _KINDS.items() if kind in names[table]), "no causal language model")
    advice = "a causal language model is needed"
    if what == _KINDS["IMAGE_TEXT_TO_TEXT"]:
        advice = "it is not trained here; name a text model, or the language model of it saved by itself"
    return f"{kind} is {what}: {advice}"


def fault_in_folder(folder: Path, tokenizer: bool) -> str | None:
    """Return what is wrong with the files of a model, or of its tokenizer, or None. Nothing is imported for it."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            return f"{path.name} is damaged: {error}"
    if tokenizer:
        present = any((folder / name).exists() for name in _TOKENIZERS)
        return None if present else next(_instead(folder), f"tokenizer.json is missing in {folder}")
    if not (folder / "config.json").exists():
        return next(_instead(folder), f"config.json is missing in {folder}")
    content = json.loads((folder / "config.json").read_bytes())
    if not isinstance(content, dict) or "model_type" not in content:
        fault = f"config.json in {folder} has no model_type, so it is none of transformers' models"
        return next(_instead(folder), fault)
    index = folder / "model.safetensors.index.json"
    wanted = sorted(set(json.loads(index.read_bytes()).get("weight_map", {}).values())) if index.exists() else []
    for name in wanted:
        if not (folder / name).exists():
            return f"{name} is missing in {folder}, and {index.name} names it"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            read_header(path)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            return f"{path.name} is damaged or was not downloaded to its end: {error}"
    return None if wanted or (folder / "model.safetensors").exists() else next(_instead(folder), _no_weights(folder))


def _instead(folder: Path) -> Iterator[str]:
    """Yield what a folder without a causal language model holds, with advice."""
    final = folder / "final"
    if (folder / "adapter_config.json").is_file():
        yield _adapter(str(folder), folder / "adapter_config.json", folder)
    if final.is_dir() or (folder / "checkpoints").is_dir():
        if (final / "adapter_config.json").is_file():
            yield f"it is the folder of a run, whose result is an adapter; {_merge_first(str(folder))}"
        if final.is_dir():
            yield f"it is the folder of a run; its result is {final}"
        yield "it is the folder of a run that has no final/ yet: name a model, or go on with `fastpref train --resume`"
    if (folder / "model_index.json").is_file():
        yield "it is a diffusion pipeline (model_index.json); a causal language model is needed"
    if any((folder / file).is_file() for file in ("modules.json", "config_sentence_transformers.json")):
        yield "it is a sentence-transformers model, which makes embeddings; a causal language model is needed"
    if (folder / "params.json").is_file():
        yield (
            "it is a model in its maker's own format (params.json); take the version for transformers, with "
            "config.json and model.safetensors"
        )
    if not (folder / "config.json").is_file():
        yield from _other_weights(folder)


def _no_weights(folder: Path) -> str:
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    if present:
        names = ", ".join(present[:3])
        return f"model.safetensors is missing in {folder}, and no model.safetensors.index.json names {names}"
    return next(_other_weights(folder), f"model.safetensors is missing in {folder}: it has no weights")


def _other_weights(folder: Path) -> Iterator[str]:
    if any(folder.glob("*.safetensors")):
        return
    for pattern, kind in _OTHER_FRAMEWORKS.items():
        for path in sorted(folder.glob(pattern)):
            yield f"its weights are {kind} files ({path.name}); take the original model, with model.safetensors"
    for pattern in _PICKLES:
        for path in sorted(folder.glob(pattern)):
            yield (
                f"its weights are pickled ({path.name}), and a pickle can run code when it is read; only safetensors "
                "are read: if you trust it, load it with transformers' AutoModelForCausalLM.from_pretrained, call "
                "save_pretrained, and name that folder"
            )


def _adapter(name: str, file: Path, folder: Path | None = None) -> str:
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        return f"{file.name} is damaged: {error}"
    rank = f", rank {content['r']}" if isinstance(content.get("r"), int) else ""
    what = f"an adapter ({content.get('peft_type', 'PEFT')}{rank}) of {content.get('base_model_name_or_path')}"
    if folder is not None and any(folder.glob("model*.safetensors")):
        return (
            f"it holds {what} beside a model, and which of them is meant cannot be told: move adapter_config.json and "
            "adapter_model.safetensors to a folder of their own"
        )
    return f"it is {what}, not a model; {_merge_first(name)}"


def _merge_first(name: str) -> str:
    merged = f"{name.rstrip('/').rpartition('/')[2] or 'model'}-merged"
    return (
        f"merge it first and name the result:\n  fastpref merge {name} --output {merged}\n"
        "(`fastpref eval` and `fastpref chat` take the adapter as it is)"
    )


def _on_hub(options: ModelConfig, tokenizer: bool) -> str | None:
    """Return a message if a name on the hub is an adapter, or if its files are not in the cache when offline."""
    from huggingface_hub import constants, try_to_load_from_cache
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        adapter = None if tokenizer else find_adapter_config_file(options.name, revision=options.revision)
    except Exception:  # no such repository, no network: the first error says so
        adapter = None
    if adapter is not None:
        return _adapter(options.name, Path(adapter))
    if not constants.HF_HUB_OFFLINE or "/" not in options.name:
        return None
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ("config.json", "model.safetensors"):
        try:
            path = try_to_load_from_cache(options.name, name, revision=options.revision)
        except ValueError:  # not a valid name on the hub
            return None
        if not isinstance(path, str):
            return f"{name} is not in the cache ({constants.HF_HUB_CACHE}), and the hub is not asked (HF_HUB_OFFLINE)"
    return None
