"""The commands that use a merged model, which `fastpref merge` prints."""

import json
import shlex
from pathlib import Path

from fastpref.errors import UserError


def of_merged(folder: Path) -> list[str]:
    """Return the commands that chat with, serve and export the merged model in a folder."""
    path = shlex.quote(str(folder))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own_code = " --trust-remote-code" if "auto_map" in config else ""
    return [f"fastpref chat {path}", f"vllm serve {path}{own_code}", *_exported(path, str(config.get("model_type")))]


def _exported(path: str, kind: str) -> list[str]:
    """Return the command that writes a GGUF file, if it writes models of this kind."""
    try:
        from fastpref.export.families import FAMILIES
    except UserError:  # the package gguf is not installed, which the command says
        return [f"fastpref export {path} --gguf"]
    return [f"fastpref export {path} --gguf"] if kind in FAMILIES else []
