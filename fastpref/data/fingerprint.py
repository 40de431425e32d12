"""A fingerprint of everything that determines the tokens of a run: equal fingerprints mean equal examples."""

import hashlib
import json
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastpref.config import Config, DataConfig
from fastpref.config.formats import is_function, parse_format
from fastpref.data.opening import content_hash
from fastpref.data.template.keywords import writes_the_date
from fastpref.data.template.named import load_chat_template
from fastpref.functions import source_file

VERSION = 6
"""The version of the tokenised form. Raise it when tokenising or the stored columns change."""
_LIBRARIES = ("transformers", "tokenizers", "jinja2")  # they render and tokenise the text


def fingerprint(config: Config, tokenizer: PreTrainedTokenizerBase, day: date) -> str:
    """Return the fingerprint of a run on `day`, 32 hexadecimal digits. The tokenizer has the config's chat template.

    Raises UserError for a source that does not exist, OSError for one that cannot be read.
    """
    return _hash(inputs(config, tokenizer, day))[:32]


def inputs(config: Config, tokenizer: PreTrainedTokenizerBase, day: date) -> dict[str, Any]:
    """Return the values that the fingerprint is computed from, as JSON values."""
    values = {
        "version": VERSION,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "data": [_source(data) for data in config.data],
        "heldout": [_source(data) for data in config.eval.data],
        "fraction": config.eval.fraction,
        "tokens": config.tokens.model_dump(exclude={"chat_template"}),
        "examples": "imitated" if config.loss.supervised else config.loss.unit,
        "tokenizer": _tokenizer(tokenizer),
        "chat template": tokenizer.chat_template,
    }
    if writes_the_date(json.dumps(values)):
        values["date"] = day.isoformat()
    return values


def _source(data: DataConfig) -> dict[str, Any]:
    """Return a source's options and a hash of its contents. The path is included because messages name it."""
    source = data.model_dump(mode="json") | {"content": content_hash(data)}
    if isinstance(data.format, dict):
        source["chat template"] = load_chat_template(data.format.get("chat_template"), "format.chat_template")
    name, _ = parse_format(data.format)
    if is_function(name):
        file = source_file(name)
        source["function"] = file and hashlib.sha256(file.read_bytes()).hexdigest()
    return source


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        serialized = backend.to_str()
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            serialized = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return _hash([type(tokenizer).__name__, serialized, tokenizer.special_tokens_map])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
