"""The folder of a model: its files, its kind, its quantization, its tokenizer, and the modules that a config names."""

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastpref.checks.machine import is_installed
from fastpref.config import Config, is_pattern
from fastpref.config.layers import places
from fastpref.data.template.named import load_chat_template
from fastpref.errors import UserError
from fastpref.model.headers import Stored, read_headers
from fastpref.places import folder_of, means_a_path, no_such_folder

# The packages that transformers needs to load weights that lie quantised, by the method in config.json.
_PACKAGES = {
    "gptq": ("optimum", "gptqmodel"), "awq": ("gptqmodel",), "compressed-tensors": ("compressed_tensors",),
    "hqq": ("hqq",), "torchao": ("torchao",), "aqlm": ("aqlm",), "quanto": ("optimum.quanto",),
}  # fmt: skip
# Modules that every model may have without a tensor of their own name.
_ALWAYS = ("all-linear", "lm_head", "embed_tokens", "experts")


def model_mistakes(config: Config) -> Iterator[str]:
    """Yield what is wrong with the models and adapters of a config, as far as their files are on this machine."""
    start = None if config.lora is None else config.lora.start
    names = {"model.name": config.model.name, "lora.from": start, "reference.name": config.reference.name}
    for key, name in names.items():
        if name is not None and means_a_path(name) and not folder_of(name).is_dir():
            what = "this is a file; a model is a folder" if folder_of(name).exists() else no_such_folder(name)
            yield f"{key} = {name!r}: {what}"
    yield from _template_mistakes(config)
    folder = folder_of(config.model.name)
    if not folder.is_dir() or _is_adapter(folder):
        return
    if (fault := _fault(folder)) is not None:
        yield f"model.name = {config.model.name!r}: {fault}"
        return
    if start is None and (fault := _fault(folder, tokenizer=True)) is not None:
        yield f"model.name = {config.model.name!r}: no tokenizer there: {fault}"
    content = json.loads((folder / "config.json").read_bytes())
    yield from _kind_mistakes(config, content)
    if not content.get("auto_map"):
        text = content.get("text_config") or content
        layers, attributes = text.get("num_hidden_layers") or 0, _attributes(str(content.get("model_type")))
        yield from _name_mistakes(config, read_headers(folder), attributes, layers)


def has_chat_template(config: Config) -> bool | None:
    """Return whether the chats of a config have a template, or None if the tokenizer is not on this machine."""
    if config.tokens.chat_template not in (None, "tokenizer_default"):
        return True
    start = None if config.lora is None else config.lora.start
    folders = [folder_of(name) for name in (start, config.model.name) if name is not None]
    there = [folder for folder in folders if folder.is_dir() and any(folder.glob("tokenizer*"))]
    if not there or (there[0] / "chat_template.jinja").is_file() or (there[0] / "chat_templates").is_dir():
        return True if there else None
    try:
        settings = json.loads((there[0] / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return bool(isinstance(settings, dict) and settings.get("chat_template"))


def _fault(folder: Path, *, tokenizer: bool = False) -> str | None:
    """Return what is wrong with the files of a model or its tokenizer, or None."""
    from fastpref.model.files import fault_in_folder

    return fault_in_folder(folder, tokenizer)


def _is_adapter(folder: Path) -> bool:
    """Return whether a folder is that of an adapter, or of a run that made one: the run reads it with its base."""
    names = ("adapter_config.json", "final/adapter_config.json")
    return any((folder / name).is_file() for name in names) and not any(folder.glob("model*.safetensors"))


def _template_mistakes(config: Config) -> Iterator[str]:
    given = config.tokens.chat_template
    try:
        load_chat_template(given, "tokens.chat_template")
    except UserError as error:
        yield str(error)


def _kind_mistakes(config: Config, content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the architecture or the quantization in a config.json."""
    place, kind = f"model.name = {config.model.name!r}", str(content.get("model_type"))
    if not content.get("auto_map") and _is_unknown(kind):
        from importlib.metadata import version

        yield f"{place}: transformers {version('transformers')} has no {kind} models; a newer one may have them"
    own = content.get("quantization_config")
    own = own if isinstance(own, Mapping) else (content.get("text_config") or {}).get("quantization_config")
    if not isinstance(own, Mapping):
        return
    method = str(own.get("quant_method", "bitsandbytes"))
    if config.lora is None:
        yield f"{place}: its weights are quantised ({method}); add a [lora] table"
    missing = [name for name in _PACKAGES.get(method, ()) if not is_installed(name)]
    if missing:
        yield (
            f"{place}: its weights are quantised by {method}, which needs {' and '.join(missing)}; install it, or take "
            'the original model with model.quantization = "nf4"'
        )


def _is_unknown(kind: str) -> bool:
    """Return whether transformers' tables of model types, which are read as text, do not have a type."""
    tables = sorted(_code("auto", "*auto*.py"))
    texts = [path.read_text(encoding="utf-8") for path in tables if path.name.startswith(("auto_", "configuration_"))]
    return bool(texts) and not any(f'"{kind}"' in text for text in texts)


def _code(folder: str, pattern: str) -> list[Path]:
    """Return files of a folder of transformers' models; none if transformers is not found."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return []
    return list((Path(spec.origin).parent / "models" / folder).glob(pattern))


def _attributes(kind: str) -> set[str]:
    """Return the names of modules in transformers' code of a type of models, read as text; none if it is not found.

    A model may have other names in its files than in memory, which is what a config names.
    """
    folder = kind.replace("-", "_")
    paths = [path for name in {folder, folder.removesuffix("_text")} for path in _code(name, "modeling_*.py")]
    return {name for path in paths for name in re.findall(r"self\.(\w+)\b", path.read_text(encoding="utf-8"))}


def _name_mistakes(config: Config, stored: Mapping[str, Stored], attributes: set[str], layers: int) -> Iterator[str]:
    """Yield names of modules in [lora] that neither files nor code have. Raises UserError for layers out of range.

    Experts are fused when the model is loaded, so that a mixture's modules have other names than its files.
    """
    lora = config.lora
    if lora is None or lora.continues or not stored or any("expert" in name for name in stored):
        return
    known = {part for name in stored for part in name.split(".") if not part.isdecimal()} - {"weight", "bias"}
    named = {
        "target": () if isinstance(lora.target, str) else lora.target, "exclude": lora.exclude,
        "modules_to_save": lora.modules_to_save, "rank_pattern": lora.rank_pattern, "alpha_pattern": lora.alpha_pattern,
    }  # fmt: skip
    for key, entries in named.items() if attributes else ():
        for entry in entries:
            last = entry.rpartition(".")[2]
            if is_pattern(entry) or last.isdecimal() or last in (*known, *attributes, *_ALWAYS):
                continue
            near = get_close_matches(last, [*known, *_ALWAYS], n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            yield f"lora.{key}: no module of the model is named {entry}{hint} Its layers have {_layers(stored)}"
    numbers = [int(number) for name in stored for number in name.split(".") if number.isdecimal()]
    for entry in lora.layers if numbers else ():
        places(entry, max(*numbers, layers - 1) + 1)  # layers that share their weights lie in the files once


def _layers(stored: Mapping[str, Stored]) -> str:
    """Return the names of the matrices inside decoder layers."""
    inside = {re.sub(r"\.(weight|qweight)$", "", name).rpartition(".")[2]
              for name, tensor in stored.items() if len(tensor.shape) > 1 and re.search(r"\.\d+\.", name)}  # fmt: skip
    return ", ".join(sorted(inside))
