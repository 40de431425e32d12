"""Load what `eval`, `chat`, `merge` and `push` take: a run, a checkpoint, an adapter, a model, or a config."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from fastpref.config import Config, ModelConfig, load_config, make_config
from fastpref.data.template.text import TextRecord, read_text, read_text_on_hub, stop_at
from fastpref.data.tokenize import use_chat_template
from fastpref.errors import UserError
from fastpref.memory.streaming import choose_streaming
from fastpref.model.adapters.source import read_adapter, with_start
from fastpref.model.load import Loaded, load_model
from fastpref.model.tokenizer import add_tokens, load_tokenizer
from fastpref.run.folder import RunFolder

_NO_DATA = [{"path": "no data"}]  # for a config that only describes a model


@dataclass(frozen=True)
class Trained:
    """Weights, and the config they were trained with as far as it is known."""

    weights: str  # a folder, or a name on the hub
    is_adapter: bool
    config: Config  # its model is the one that the training began with
    of_run: bool  # whether the config is that of a run, or only names the model
    text: TextRecord | None = None  # how the training text was written; None if unknown

    @property
    def began_with(self) -> str | None:
        """The model that the training began with, or None if it is the same one or unknown."""
        return self.config.model.name if self.is_adapter or self.config.model.name != self.weights else None


def find_trained(name: str, overrides: Sequence[str] = ()) -> Trained:
    """Find the weights and the config for a name.

    The name is that of a run's folder (for its final/, or else its newest checkpoint), of a checkpoint, of an adapter
    or a model in a folder or on the hub, or of a config (for the model it would train). The config gets the chat
    template and the keywords of text.json, unless an override sets others. Raises UserError.
    """
    path = Path(name).expanduser()
    if path.suffix == ".toml":
        config = with_start(load_config(path, overrides, trains=False))
        if config.lora is not None and config.lora.start is not None:
            start = read_adapter(config.lora.start, "lora.from")
            start.weights_file()
            return Trained(str(start.folder), True, config, True)
        return Trained(config.model.name, False, config, True)
    if not path.is_dir():
        return _on_hub(name, overrides)
    folder = _weights(path)
    toml = next((p for p in (path / "config.toml", folder / "config.toml", folder.parent / "config.toml")
                 if p.is_file()), None)  # fmt: skip
    adapter = (folder / "adapter_config.json").is_file()
    if toml is None:
        config = _config(_base(folder) if adapter else str(folder), overrides)
    else:
        config = load_config(toml, overrides, trains=False)
    trained = Trained(str(folder), adapter, config, of_run=toml is not None)
    return _as_recorded(trained, read_text(folder, path, folder.parent), overrides)


def load_trained(trained: Trained, device: torch.device, *, base: bool = False, reference: bool = False) -> Loaded:
    """Load the trained model, or with `base` the one it began with. Both stop at the trained ends. Raises UserError.

    With `reference` the trained model also gets the adapter of its reference, if that is one.
    """
    config, adapter = trained.config, trained.weights if trained.is_adapter and not base else None
    if not base and adapter is None and trained.weights != config.model.name:
        config = config.but({"model.name": trained.weights, "model.revision": None})
    config = _as_it_is(config, device)
    streaming, notes = choose_streaming(config, device)
    loaded = load_model(config, device, trained=True, adapter=adapter, reference=reference, streaming=streaming)
    loaded = replace(loaded, notes=(*notes, *loaded.notes))
    if trained.text is not None:
        stop_at(loaded.model, trained.text.ends.values())
    return loaded


def trained_tokenizer(trained: Trained) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the trained model, or else that of the model it began with."""
    config, folder = trained.config, Path(trained.weights)
    saved = folder.is_dir() and any(folder.glob("tokenizer*"))
    tokenizer = load_tokenizer(config.but({"model.name": str(folder)}).model if saved else config.model)
    add_tokens(tokenizer, config.tokens.add)
    use_chat_template(tokenizer, config.tokens.chat_template)
    return tokenizer


def _as_recorded(trained: Trained, text: TextRecord | None, overrides: Sequence[str]) -> Trained:
    """Add the text record of the training, because a template file in the config may have changed since."""
    if text is None:
        return trained
    named = {override.partition("=")[0].strip() for override in overrides}
    update: dict[str, Any] = {}
    if isinstance(text.chat_template, str) and not named & {"tokens", "tokens.chat_template"}:
        update["tokens.chat_template"] = text.chat_template
    if not any(key == "tokens" or key.startswith("tokens.chat_template_kwargs") for key in named):
        update["tokens.chat_template_kwargs"] = dict(text.chat_template_kwargs) or None
    return replace(trained, config=trained.config.but(update), text=text)


def _as_it_is(config: Config, device: torch.device) -> Config:
    """Choose half precision on a GPU for dtype = "auto", which is enough without training."""
    if config.model.dtype != "auto" or device.type == "cpu":
        return config
    half = "bfloat16" if device.type != "cuda" or torch.cuda.is_bf16_supported(False) else "float16"
    return config.but({"model.dtype": half})


def _weights(path: Path) -> Path:
    """Return the folder that holds the weights of a run or a checkpoint. Raises UserError."""
    if (path / "adapter_config.json").is_file() or (path / "config.json").is_file():
        return path
    if (path / "final").is_dir():
        return path / "final"
    newest = next(iter(RunFolder(path).checkpoints()), None)
    if newest is None:
        raise UserError(f"{path}: neither a run (no final/, no checkpoints), nor an adapter, nor a model")
    return newest


def _base(folder: str | Path) -> str:
    try:
        base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    except Exception as error:  # damaged JSON, an unknown kind of adapter
        raise UserError(f"{folder}: its adapter_config.json cannot be read: {error}") from None
    if not base:
        raise UserError(f"{folder}: its adapter_config.json does not name the model it belongs to")
    return base


def _on_hub(name: str, overrides: Sequence[str]) -> Trained:
    try:
        adapter = find_adapter_config_file(name) is not None
    except Exception:  # no such repository or no network, which loading the model reports
        adapter = False
    trained = Trained(name, adapter, _config(_base(name) if adapter else name, overrides), False)
    return _as_recorded(trained, read_text_on_hub(name), overrides)


def _config(model: str, overrides: Sequence[str]) -> Config:
    tables: dict[str, Any] = {"model": ModelConfig(name=model).model_dump(), "data": _NO_DATA}
    return make_config(tables, overrides, trains=False)
