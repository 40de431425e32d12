"""Why a model cannot be loaded, by the file that is missing or damaged."""

import json
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from safetensors import safe_open

from fastpref.config import ModelConfig

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


def explained(options: ModelConfig, error: BaseException, *, tokenizer: bool = False) -> str:
    """What a library's error means: the file at fault where it can be found, else the error's own words."""
    if not options.trust_remote_code and "trust_remote_code" in str(error):
        return (
            "it comes with Python code of its own, which is not run; set model.trust_remote_code = true if you have "
            "read the code and trust it"
        )
    folder = Path(options.name).expanduser()
    fault = _in_folder(folder, tokenizer) if folder.is_dir() else _on_hub(options, tokenizer)
    return fault or " ".join(str(error).split())[:400] or type(error).__name__


def _in_folder(folder: Path, tokenizer: bool) -> str | None:
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            return f"{path.name} is damaged: {error}"
    if tokenizer:
        if not any((folder / name).exists() for name in _TOKENIZERS):
            return f"tokenizer.json is missing in {folder}"
        return None
    if not (folder / "config.json").exists():
        return f"config.json is missing in {folder}"
    index = folder / "model.safetensors.index.json"
    wanted = sorted(set(json.loads(index.read_bytes()).get("weight_map", {}).values())) if index.exists() else []
    for name in wanted:
        if not (folder / name).exists():
            return f"{name} is missing in {folder}, and {index.name} names it"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except Exception as error:  # safetensors has its own kind
            return f"{path.name} is damaged or was not downloaded to its end: {error}"
    return None


def _on_hub(options: ModelConfig, tokenizer: bool) -> str | None:
    """A first file that is not in the cache, where the hub may not be asked."""
    if not constants.HF_HUB_OFFLINE or "/" not in options.name:
        return None
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ("config.json", "model.safetensors"):
        try:
            found = try_to_load_from_cache(options.name, name, revision=options.revision)
        except ValueError:  # no name that the hub could have
            return None
        if not isinstance(found, str):
            return f"{name} is not in the cache ({constants.HF_HUB_CACHE}), and the hub is not asked (HF_HUB_OFFLINE)"
    return None
