"""The commands that run an exported file: its model card has them, and `fastpref export` prints them."""

import re
import shlex
from pathlib import Path


def of_model(file: Path, name: str, *, ollama: bool) -> tuple[str, ...]:
    """Return the commands for a whole model, with its Modelfile beside it.

    Without `ollama` its Modelfile has no chat template, and llama-server runs the one in the file.
    """
    path = shlex.quote(str(file))
    if not ollama:
        return (f"llama-cli --jinja -m {path}", f"llama-server --jinja -m {path}")
    tag = re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-._") or "model"
    made = shlex.quote(str(file.with_name("Modelfile")))
    return (f"llama-cli -m {path}", f"ollama create {tag} -f {made} && ollama run {tag}")


def of_adapter(file: Path, base: str | None) -> tuple[str, ...]:
    """Return the commands for an adapter, and the one that writes the file of its base model."""
    words = ["fastpref", "export", base or "BASE", "--gguf", "--quant", "f16", "--output", "base-f16.gguf"]
    return (shlex.join(words), f"llama-cli -m base-f16.gguf --lora {shlex.quote(str(file))}")
