"""A name for everything that changes the tokens of a run: two configs of one name have the same examples."""

import hashlib
import json
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastpref.config import Config, DataConfig
from fastpref.data.opening import content_hash
from fastpref.data.rows.function import is_function, source_file
from fastpref.data.template.keywords import writes_the_date
from fastpref.data.template.named import load_chat_template

VERSION = 4
"""Of what tokenising makes of a row; to be raised when that, or what is stored of it, changes."""
_LIBRARIES = ("transformers", "tokenizers", "jinja2")  # which write and encode the text


def fingerprint(config: Config, tokenizer: PreTrainedTokenizerBase, day: date) -> str:
    """32 hexadecimal digits. The tokenizer has the chat template of the config already; `day` is the run's.

    Raises UserError for a source that is not there, OSError for one that cannot be read.
    """
    return _hash(inputs(config, tokenizer, day))[:32]


def inputs(config: Config, tokenizer: PreTrainedTokenizerBase, day: date) -> dict[str, Any]:
    """What the fingerprint is made of, as JSON."""
    found = {
        "version": VERSION,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "data": [_source(data) for data in config.data],
        "heldout": [_source(data) for data in config.eval.data],
        "fraction": config.eval.fraction,
        "tokens": config.tokens.model_dump(exclude={"chat_template"}),
        "single responses": not config.loss.paired,
        "tokenizer": _tokenizer(tokenizer),
        "chat template": tokenizer.chat_template,
    }
    if writes_the_date(json.dumps(found)):
        found["date"] = day.isoformat()
    return found


def _source(data: DataConfig) -> dict[str, Any]:
    """A source's options and contents; its path too, because messages name it."""
    found = data.model_dump(mode="json") | {"content": content_hash(data)}
    name = data.format if isinstance(data.format, str) else data.format.get("type", "table")
    if isinstance(data.format, dict):
        found["chat template"] = load_chat_template(data.format.get("chat_template"), "format.chat_template")
    if is_function(name):
        file = source_file(name)
        found["function"] = file and hashlib.sha256(file.read_bytes()).hexdigest()
    return found


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
