"""The space that the result and the checkpoints of a run need on the disk, against what is free there."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastpref.config import Config, is_pattern
from fastpref.errors import UserError
from fastpref.model.headers import Stored, read_headers
from fastpref.places import folder_of
from fastpref.sizes import in_words

# Bytes of an optimizer's state for each trained number.
_STATES = {"8bit": 2, "lion": 4, "adafactor": 1, "muon": 4}
_REST = 1 << 20  # bytes of metrics, the report and other small files


@dataclass(frozen=True)
class Space:
    """The bytes that a run writes."""

    result: int  # final/
    checkpoint: int  # one checkpoint, while a run that is stopped or fails saves one at least
    kept: int  # how many checkpoints there are at most at the same time

    @property
    def least(self) -> int:
        """The bytes that a run needs to save one checkpoint and its result."""
        return self.result + self.checkpoint + _REST

    @property
    def most(self) -> int:
        return self.result + self.kept * self.checkpoint + _REST


def needed(config: Config, trained: int, saved: int) -> Space:
    """Return the space that a run needs.

    Args:
        trained: numbers that are trained, each with an optimizer state.
        saved: bytes of the weights in final/ and in each checkpoint.
    """
    name = config.train.optimizer
    state = next((size for part, size in _STATES.items() if part in name), 8)
    kept = 1 if config.output.save_every == "stop" else config.output.keep + 2  # the best, and one being written
    return Space(saved, saved + trained * state, kept)


def require_space(config: Config, folder: Path, space: Space) -> str | None:
    """Compare the space with what is free where a run's folder is or will be.

    Raises UserError if the result and one checkpoint do not fit. Returns a note if not all checkpoints do.
    """
    there = next((place for place in (folder, *folder.parents) if place.exists()), Path())
    free = shutil.disk_usage(there).free
    place, what = f"output.dir = {str(folder)!r}", f"{in_words(free)} are free there"
    if free < space.least:
        raise UserError(
            f"{place}: {what}, and the result ({in_words(space.result)}) and a checkpoint "
            f"({in_words(space.checkpoint)}) need {in_words(space.least)}; free some, or choose another folder"
        )
    if free < space.most:
        return (
            f"warning: {place}: {what}, and up to {space.kept} checkpoints of {in_words(space.checkpoint)} with the "
            f"result need {in_words(space.most)}; free some, or lower output.keep ({config.output.keep})"
        )
    return None


def space_findings(config: Config) -> tuple[list[str], list[str]]:
    """Return mistakes and notes on the disk space of a run, as far as the sizes are known from the model's files."""
    folder = folder_of(config.model.name)
    stored = read_headers(folder) if folder.is_dir() else {}
    if not stored or (config.lora is not None and config.lora.continues):
        return [], []
    trained = _trained(config, stored)
    where = folder_of(config.output.dir) if config.output.dir is not None else Path("runs")
    try:
        note = require_space(config, where.absolute(), needed(config, trained, 4 * trained))
    except UserError as error:
        return [str(error)], []
    return [], [note] if note else []


def _trained(config: Config, stored: Mapping[str, Stored]) -> int:
    """Return about how many numbers are trained: no more than those that every linear layer's adapter would have.

    In doubt fewer are counted, so that nothing is refused that fits.
    """
    lora = config.lora
    if lora is None:
        return 0 if config.train.freeze else sum(tensor.count for tensor in stored.values())
    if lora.exclude or lora.layers or (lora.target != "all-linear" and any(map(is_pattern, lora.target))):
        return 0
    layers = {name: tensor for name, tensor in stored.items()
              if len(tensor.shape) == 2 and name.endswith(".weight") and ".layers." in f".{name}"}  # fmt: skip
    ranks = {} if lora.target == "all-linear" else dict.fromkeys(lora.target)
    return sum(
        lora.rank * sum(tensor.shape)
        for name, tensor in layers.items()
        if not ranks or any(f".{name.removesuffix('.weight')}".endswith(f".{entry}") for entry in ranks)
    )
