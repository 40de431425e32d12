"""The run's folder: what is written where, and never half."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fastpref.config import Config
from fastpref.config_toml import to_toml
from fastpref.errors import UserError
from fastpref.model.load import Loaded


class RunFolder:
    """config.toml (resolved), metrics.jsonl (a JSON object a row), final/ (an adapter or a model)."""

    def __init__(self, path: Path):
        self.path = path
        self._metrics = path / "metrics.jsonl"

    @classmethod
    def choose(cls, config: Config, name: str, *, force: bool) -> "RunFolder":
        """The folder of output.dir, which must be free or replaced by `force`; or the next free one of its default.

        Nothing is written yet. Raises UserError.
        """
        if config.output.dir is None:
            base = Path("runs") / f"{name}-{config.loss.type}"
            path = next(p for p in _numbered(base) if not p.exists())
            return cls(path)
        path = Path(config.output.dir).expanduser()
        if path.exists() and not path.is_dir():
            raise UserError(f"output.dir = {str(path)!r}: a file of that name is in the way")
        if path.is_dir() and any(path.iterdir()):
            is_run = (path / "metrics.jsonl").exists() and (path / "config.toml").exists()
            if not force:
                raise UserError(
                    f"output.dir = {str(path)!r}: the folder is not empty; choose another"
                    + (", or replace the run in it with --force" if is_run else "")
                )
            if not is_run:
                raise UserError(f"output.dir = {str(path)!r}: this is no run's folder, so --force will not empty it")
        return cls(path)

    def create(self, config: Config) -> None:
        """Begin the run in the folder; what an earlier run saved there goes."""
        try:
            for old in ("final", "stopped"):
                shutil.rmtree(self.path / old, ignore_errors=True)
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.toml").write_text(to_toml(config), encoding="utf-8")
            self._metrics.write_text("", encoding="utf-8")
        except OSError as error:
            raise UserError(f"output.dir = {str(self.path)!r}: cannot be written: {error.strerror}") from None

    def log(self, row: Mapping[str, float | int]) -> None:
        """Append one row to metrics.jsonl."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, name: str, loaded: Loaded, tokenizer: PreTrainedTokenizerBase) -> Path:
        """Write the adapter or model and its tokenizer to a folder that appears only when it is complete."""
        place, unfinished = self.path / name, self.path / f".{name}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        loaded.model.config.use_cache = True
        # With an adapter on the head PEFT would also write the head and the embeddings, which have not changed.
        options: dict[str, Any] = {"save_embedding_layers": False} if isinstance(loaded.wrapped, PeftModel) else {}
        loaded.wrapped.save_pretrained(str(unfinished), **options)
        tokenizer.save_pretrained(str(unfinished))
        shutil.rmtree(place, ignore_errors=True)
        unfinished.rename(place)
        return place


def _numbered(base: Path):
    yield base
    number = 2
    while True:
        yield base.with_name(f"{base.name}-{number}")
        number += 1
