"""Checkpoints of a run, from which it is resumed bit for bit."""

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref.atomic import WriteError, write_folder
from fastpref.config import Config
from fastpref.config.toml import to_toml
from fastpref.data.example import Example
from fastpref.data.template.text import TextRecord, save_generation_config
from fastpref.errors import UserError
from fastpref.model.load import Loaded
from fastpref.processes import ALONE, Processes
from fastpref.run.card import model_card
from fastpref.run.fingerprints import ADAPTERS, DATA, MODEL, data_fingerprint
from fastpref.run.folder import RunFolder
from fastpref.run.resume import Resumed
from fastpref.run.state import Progress, set_rng_state, write_state
from fastpref.run.weights import load_weights, optimizer_state, save_weights, whole, whole_weights
from fastpref.step.optimizer import load_state
from fastpref.step.precompute import Precomputed, Remembered


@dataclass
class Checkpoints:
    """Saves, or raises WriteError, and restores all that training changes. All processes call its methods together."""

    config: Config
    folder: RunFolder
    loaded: Loaded
    tokenizer: PreTrainedTokenizerBase
    text: TextRecord
    examples: Sequence[Example]
    optimizer: Any  # prepared by Accelerate; has state_dict and load_state_dict
    scheduler: Any
    scaler: Any | None  # only for float16
    model_fingerprint: str  # of the weights before training
    processes: Processes = ALONE
    reference: Remembered | Precomputed | None = None  # if its log-probabilities are in files
    latest: Path | None = None  # the last checkpoint known to be undamaged

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        began = {} if self.loaded.began is None else {ADAPTERS: self.loaded.began}
        return {MODEL: self.model_fingerprint, DATA: data_fingerprint(self.examples), **began}

    def save(self, progress: Progress, rng: dict[str, Any], *, best: bool = False) -> Path:
        """Write the checkpoint of the last whole step unless it exists, and remove old ones."""
        if not best and self.latest is not None and self.latest.name == f"step-{progress.step}":
            return self.latest
        weights, content = whole_weights(self.loaded), self._content(progress, rng)

        def write() -> Path:
            place = self.folder.checkpoint(progress.step, lambda folder: self._fill(folder, weights, content))
            if best and progress.best is not None:
                self.folder.mark_best(progress.best)
            self.folder.prune(self.config.output.keep)
            return place

        self.latest = self.processes.on_first(write)
        return self.latest

    def save_weights(self, name: str, step: int | None = None) -> Path:
        """Write the adapter or the model with its tokenizer to the folder `name`, and with `step` a model card."""
        weights, place = whole_weights(self.loaded), self.folder.path / name

        def fill(folder: Path) -> None:
            self._fill_weights(folder, weights)
            if step is not None:
                card = model_card(self.config, self.folder.rows(), self.fingerprints[DATA], step, self.text)
                (folder / "README.md").write_text(card, encoding="utf-8")

        self.processes.on_first(lambda: write_folder(place, fill))
        return place

    def restore(self, resumed: Resumed, steps: int) -> Progress:
        """Restore the state of a checkpoint. Raises UserError if it does not fit the run."""
        resumed.check_contents(self.fingerprints)
        saved, progress = resumed.state, Progress(**resumed.state["progress"])
        if progress.step > steps:
            raise UserError(
                f"{resumed.checkpoint}: {progress.step} steps are done, and the config asks for {steps}; raise "
                "train.steps, or take an earlier checkpoint"
            )
        load_weights(resumed.checkpoint, self.loaded)
        load_state(self.optimizer, optimizer_state(saved["optimizer"], self.optimizer))
        self.scheduler.load_state_dict(saved["scheduler"])
        if saved["scaler"] is not None and self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
        if self.processes.rank < len(saved["rng"]):
            set_rng_state(saved["rng"][self.processes.rank])
        self.latest = resumed.checkpoint
        return progress

    def rescue(self, progress: Progress, rng: dict[str, Any], *overrides: str) -> str:
        """Save the state after the last whole step as far as the disk allows. Returns a message on how to resume."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            command = self.folder.resume_command(self.save(progress, rng), *overrides)
            return f"Everything up to step {progress.step} is saved; go on with\n  {command}"
        except WriteError:
            pass
        before = self.before(*overrides)
        try:
            place = self.save_weights("stopped")
            return f"No checkpoint could be saved, but the weights after step {progress.step} are in {place}. {before}"
        except WriteError:
            return f"What was trained up to step {progress.step} could not be saved. {before}"

    def before(self, *overrides: str) -> str:
        """Return a message on how to resume from the last checkpoint."""
        if self.latest is None:
            return "There is no checkpoint before it."
        return f"Go on from the checkpoint before it with\n  {self.folder.resume_command(self.latest, *overrides)}"

    def _fill_weights(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        save_weights(folder, self.loaded, weights)
        self.tokenizer.save_pretrained(str(folder))
        save_generation_config(folder, self.loaded.model.generation_config)
        self.text.save(folder)

    def _fill(self, folder: Path, weights: dict[str, Tensor] | None, content: dict[str, Any]) -> None:
        self._fill_weights(folder, weights)
        (folder / "config.toml").write_text(to_toml(self.config), encoding="utf-8")
        write_state(folder, content)

    def _content(self, progress: Progress, rng: dict[str, Any]) -> dict[str, Any]:
        passes, place = divmod(progress.step * self.config.train.batch, len(self.examples))
        return {
            "progress": asdict(progress),
            "order": {"passes": passes, "place": place, "count": len(self.examples)},
            "fingerprints": self.fingerprints,
            "optimizer": whole(self.optimizer.state_dict()),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "rng": self.processes.gather(rng),
            "reference": None if self.reference is None else self.reference.write(),
        }
