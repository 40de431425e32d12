"""Find the checkpoint to resume from, and check that config, model and data are those of the run."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from fastpref.atomic import MANIFEST, damage
from fastpref.config import Config, load_config
from fastpref.config.model import ADAPTERS_OWN
from fastpref.config.paths import path_marks
from fastpref.data.template.text import TEXT, TextRecord, read_text
from fastpref.errors import UserError
from fastpref.run.fingerprints import ADAPTERS, DATA, MODEL
from fastpref.run.folder import RunFolder, default_folders, is_checkpoint, step_of
from fastpref.run.state import read_state


def places(schema: type[Config]) -> tuple[str, ...]:
    """Return the keys whose value is a path that is read. Values that contain paths are compared as a whole."""
    return tuple(key for key, mark in path_marks(schema) if not mark.written and mark.inside is None)


# Keys that do not change the weights, or only how long they are trained.
_FREE = ("output.", "log.", "eval.every", "eval.samples", "eval.sample_tokens", "eval.data", "eval.data.",
         "train.nonfinite", "train.steps", "train.epochs")  # fmt: skip
# Keys that change how a step is computed. Its result differs only by rounding and random dropout.
_ROUNDING = ("train.tokens_per_microbatch", "train.layout", "train.checkpointing", "train.offload_activations",
             "model.attention", "model.liger", "model.streaming")  # fmt: skip
# Paths may change, because their contents are compared once they are loaded.
_PLACES = places(Config)
# Keys whose change may be the reason that a fingerprint differs.
_KEYS_OF = {
    MODEL: ("model.", "lora.", "reference."),
    DATA: ("data.", "tokens.", "model."),
    ADAPTERS: ("model.", "lora.", "reference."),
}
_OF_ADAPTER = {*ADAPTERS_OWN} - {"dropout"}
_OF_THE_FIRST = ("output.dir", "output.push_to")  # keys that only the first process uses


@dataclass(frozen=True)
class Resumed:
    """An undamaged checkpoint in the folder of its run."""

    checkpoint: Path
    state: Mapping[str, Any]
    changed: Mapping[str, tuple[Any, Any]]  # key of the config → value then, value now
    notes: list[str] = field(default_factory=list)
    text: TextRecord | None = None  # older runs have none

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.checkpoint.parent.parent)

    def check_text(self, now: TextRecord) -> None:
        """Raise UserError unless rows become text in the same way as in the run, with the run's date."""
        if self.text is not None and (changes := self.text.changes(now)):
            raise self._differing(" and ".join(changes), ("tokens.", "model."), f" ({self.checkpoint / TEXT})")

    def check_contents(self, fingerprints: Mapping[str, str]) -> None:
        """Raise UserError unless these fingerprints, by the names of what they are of, are those of the checkpoint."""
        then = self.state["fingerprints"]
        for name in {**fingerprints, **then}:
            if then.get(name) != fingerprints.get(name):
                raise self._differing(name, _KEYS_OF[name])

    def _differing(self, names: str, keys: tuple[str, ...], place: str = "") -> UserError:
        changed = {key: both for key, both in self.changed.items() if key.startswith(keys)}
        return UserError(
            f"{self.checkpoint}: {names} are not those it was trained with{_listed(changed)}"
            f"\nResume with what it was trained with{place}, or start a new run"
        )


def find_checkpoint(config: Config, name: str, wanted: bool | str | Path, *, force: bool) -> Resumed:
    """Find the checkpoint `wanted`, or with True the newest undamaged one of the config's run. Raises UserError."""
    if isinstance(wanted, bool):
        checkpoint, notes = _newest(_run_folder(config, name))
    else:
        checkpoint, notes = _named(Path(wanted), force=force)
    changed = _changed(checkpoint, config)
    shown = {key: both for key, both in changed.items() if not may_change(key)}
    if not all(_matches(key, _PLACES) for key in shown):
        raise UserError(
            f"{checkpoint}: the config has changed since in what the training depends on{_listed(shown)}"
            f"\nResume with the settings it was trained with ({checkpoint / 'config.toml'}), or start a new run"
        )
    if rounding := [key for key in changed if _matches(key, _ROUNDING)]:
        notes.append(f"resumed with another {', '.join(rounding)}: equal to an uninterrupted run but for rounding")
    if any(key in changed for key in ("train.steps", "train.epochs")):
        notes.append("resumed with another length: the learning rate goes on by the schedule of the new one")
    return Resumed(checkpoint, read_state(checkpoint), changed, notes, read_text(checkpoint, checkpoint.parent.parent))


def may_change(key: str) -> bool:
    """Return whether a run can be resumed with another value of a key."""
    return _matches(key, _FREE + _ROUNDING)


def shared(config: Config, resumed: Resumed | None) -> dict[str, Any]:
    """Return the values that all processes of a run must share: the config without paths, the checkpoint's contents."""
    settings = {key: value for key, value in _flat(_resolved(config)) if not _matches(key, (*_PLACES, *_OF_THE_FIRST))}
    if resumed is None:
        return settings | {"checkpoint": "none"}
    manifest = hashlib.sha256((resumed.checkpoint / MANIFEST).read_bytes()).hexdigest()[:16]
    return settings | {"checkpoint": f"{resumed.checkpoint.name}, {manifest}"}


def _run_folder(config: Config, name: str) -> RunFolder:
    """Return the folder of output.dir, or the last default folder that exists."""
    if config.output.dir is not None:
        return RunFolder(Path(config.output.dir).expanduser())
    there = list(takewhile(Path.exists, default_folders(config, name)))
    if not there:
        raise UserError(f"--resume: there is no run in {next(default_folders(config, name))}; name a checkpoint")
    return RunFolder(there[-1])


def _newest(folder: RunFolder) -> tuple[Path, list[str]]:
    """Return the newest undamaged checkpoint, and notes on the damaged ones after it."""
    damaged = []
    for checkpoint in folder.checkpoints():
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint, [f"{each}; the one before it is taken" for each in damaged]
        damaged.append(f"{checkpoint} is not whole ({wrong})")
    if damaged:
        raise UserError("\n".join(["--resume: no checkpoint is whole:", *damaged]))
    raise UserError(
        f"--resume: there is no checkpoint in {folder.path / 'checkpoints'}; output.save_every and Ctrl-C write them"
    )


def _named(checkpoint: Path, *, force: bool) -> tuple[Path, list[str]]:
    if not checkpoint.is_dir():
        raise UserError(f"--resume {checkpoint}: there is no such folder")
    if not is_checkpoint(checkpoint):
        if not (checkpoint / "checkpoints").is_dir():
            raise UserError(f"--resume {checkpoint}: this is no checkpoint; they are RUN/checkpoints/step-N")
        return _newest(RunFolder(checkpoint))
    if wrong := damage(checkpoint):
        raise UserError(f"--resume {checkpoint}: this checkpoint is not whole: {wrong}; take another")
    for later in RunFolder(checkpoint.parent.parent).checkpoints():
        if step_of(later) > step_of(checkpoint) and damage(later) is None and not force:
            raise UserError(
                f"--resume {checkpoint}: {later} comes after it and would be lost; resume from that one, or give it "
                "up with --force"
            )
    return checkpoint, []


def _changed(checkpoint: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    then, now = (dict(_flat(_resolved(c))) for c in (load_config(checkpoint / "config.toml"), config))
    keys = [*then, *(key for key in now if key not in then)]
    return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}


def _resolved(config: Config) -> dict[str, Any]:
    """Return the config as JSON values, so that it equals one that is read back from TOML."""
    content = config.model_dump(mode="json")
    content["train"] |= {name: getattr(config, name) for name in ("learning_rate", "schedule", "warmup")}
    for key in {"rank_pattern", "alpha_pattern"} & (content["lora"] or {}).keys():  # the order of entries counts
        content["lora"][key] = list(map(list, content["lora"][key].items()))
    if config.lora is not None and config.lora.continues:  # the adapter has them, and its contents are compared
        content["lora"] = {key: value for key, value in content["lora"].items() if key not in _OF_ADAPTER}
    return content


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for at, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{at}")
    else:
        yield key, value


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    plain = ".".join("*" if part.isdecimal() else part for part in key.split("."))
    return any(plain == p or (p.endswith(".") and plain.startswith(p)) for p in patterns)


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    def words(value: Any) -> str:
        return "not set" if value is None else repr(value)

    lines = [f"\n  {key}: {words(then)} → {words(now)}" for key, (then, now) in changed.items()]
    return f":{''.join(lines)}" if lines else ""
