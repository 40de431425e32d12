"""The examples of a run: tokenised once, and read from the cache by every later run with the same fingerprint.

    $FASTPREF_CACHE (~/.cache/fastpref) / tokens / FINGERPRINT / train.arrow, heldout.arrow, manifest.json
                                                 / FINGERPRINT.tmp      while it is written
                                                 / FINGERPRINT.lock     held by who writes

A folder is renamed to its name when everything in it is on the disk, so what has the name is complete; the manifest
tells a file that was harmed afterwards.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from fastpref.config import Config
from fastpref.data import table
from fastpref.data.balance import unbalanced
from fastpref.data.example import Counts, Example
from fastpref.data.fingerprint import fingerprint
from fastpref.data.sources import Prepared, notes_on_text, prepare
from fastpref.data.table import Examples
from fastpref.data.template.text import check_template_keywords
from fastpref.data.tokenize import tokenize_batches
from fastpref.errors import UserError

_PARTS = {"train": "training", "heldout": "held-out"}


@dataclass(frozen=True)
class Tokenized:
    """Training and held-out examples, and what became of their rows."""

    train: Examples
    heldout: Examples
    counts: dict[str, Counts]  # of "train" and "heldout"
    duplicates: int
    left_out: int
    ends: tuple[int, ...] = ()  # the tokens with which training responses end, cut ones aside
    chat_template: str | None = None  # the one that wrote all training chats in place of the tokenizer's
    notes: list[str] = field(default_factory=list)  # what a user should know, one sentence each

    @property
    def parts(self) -> dict[str, Examples]:
        """As messages call them."""
        return {words: getattr(self, name) for name, words in _PARTS.items()}


def load_examples(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, cache: bool = True, day: date | None = None
) -> Tokenized:
    """The examples of a config, from the cache if they are there, else tokenised and, with `cache`, put there.

    The tokenizer has the config's chat template already; one that writes the date writes that of `day`, today's if
    None. Raises UserError for rows that are mistakes, if none is left, or for keywords that no template reads. A cache
    that cannot be written is a note, not an error.
    """
    check_template_keywords(config, tokenizer)
    day = day or date.today()
    examples = _load_examples(config, tokenizer, day, cache=cache)
    labels = examples.train.labels
    if labels is not None:
        wrong = unbalanced(int(labels.sum()), int((~labels).sum()), config.loss)
        examples.notes.extend([". ".join(wrong)] if wrong else [])
    return examples


def _load_examples(config: Config, tokenizer: PreTrainedTokenizerBase, day: date, *, cache: bool) -> Tokenized:
    if not cache:
        return _in_memory(config, tokenizer, day)
    try:
        entry = cache_folder() / "tokens" / fingerprint(config, tokenizer, day)
        found, _ = _open(entry)
        if found:
            return found
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_suffix(".lock")):
            found, harmed = _open(entry)  # another process may have been first
            if found:
                return found
            made = _write(config, tokenizer, day, entry)
            if harmed:
                made.notes.append(f"the cache held these tokens, but {harmed}; they were made again")
            return made
    except (OSError, NotImplementedError, pa.ArrowException) as error:  # no lock, no space, no rights, no home
        made = _in_memory(config, tokenizer, day)
        made.notes.append(f"the cache in {_shown_folder()} cannot be used, so nothing is kept for later runs: {error}")
        return made


def cache_folder() -> Path:
    """`$FASTPREF_CACHE`, or ~/.cache/fastpref."""
    return Path(os.environ.get("FASTPREF_CACHE") or "~/.cache/fastpref").expanduser()


def _in_memory(config: Config, tokenizer: PreTrainedTokenizerBase, day: date) -> Tokenized:
    prepared = _prepare(config, tokenizer)
    counts = {name: Counts() for name in _PARTS}
    ends: dict[str, set[int]] = {name: set() for name in _PARTS}
    templates: dict[str, set[str | None]] = {name: set() for name in _PARTS}
    found = {}
    for name in _PARTS:
        batches = tokenize_batches(
            getattr(prepared, name), tokenizer, config.tokens, counts[name], day, templates[name]
        )
        found[name] = table.in_memory(_observed(batches, ends[name], tokenizer))
    _check(counts)
    duplicates, left_out, notes = _findings(prepared, counts, templates["train"])
    kept, template = tuple(sorted(ends["train"])), _only(templates["train"])
    return Tokenized(found["train"], found["heldout"], counts, duplicates, left_out, kept, template, notes)


def _prepare(config: Config, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    prepared = prepare(config)
    prepared.notes.extend(notes_on_text(prepared, tokenizer))
    return prepared


def _write(config: Config, tokenizer: PreTrainedTokenizerBase, day: date, entry: Path) -> Tokenized:
    """Tokenise into a folder beside `entry`, and rename it to that. The lock is held."""
    temporary = entry.with_suffix(".tmp")
    for leftover in (temporary, entry):  # of a writer that was killed; harmed
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir()
    try:
        prepared = _prepare(config, tokenizer)
        counts = {name: Counts() for name in _PARTS}
        ends: dict[str, set[int]] = {name: set() for name in _PARTS}
        templates: dict[str, set[str | None]] = {name: set() for name in _PARTS}
        for name in _PARTS:
            batches = tokenize_batches(
                getattr(prepared, name), tokenizer, config.tokens, counts[name], day, templates[name]
            )
            table.write(_observed(batches, ends[name], tokenizer), temporary / f"{name}.arrow")
        _check(counts)
        duplicates, left_out, notes = _findings(prepared, counts, templates["train"])
        manifest = {
            "files": {name: (temporary / f"{name}.arrow").stat().st_size for name in _PARTS},
            "counts": {name: asdict(counts[name]) for name in _PARTS},
            "duplicates": duplicates,
            "left_out": left_out,
            "ends": sorted(ends["train"]),
            "chat_template": _only(templates["train"]),
            "notes": notes,
        }
        _write_down(temporary / "manifest.json", json.dumps(manifest, indent=1))
        _sync(temporary)
        temporary.rename(entry)
        _sync(entry.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    made, harmed = _open(entry)
    if made is None:
        raise OSError(f"what was written is not there: {harmed}")
    return Tokenized(made.train, made.heldout, counts, duplicates, left_out, made.ends, made.chat_template, notes)


def _open(entry: Path) -> tuple[Tokenized | None, str]:
    """What the cache has, or None and what is wrong with it; nothing if it is not there."""
    if not entry.exists():
        return None, ""
    try:
        manifest: dict[str, Any] = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        parts = {}
        for name in _PARTS:
            path = entry / f"{name}.arrow"
            if path.stat().st_size != manifest["files"][name]:
                return None, f"{path} has {path.stat().st_size} bytes instead of {manifest['files'][name]}"
            parts[name] = table.read(path)
        counts = {name: Counts(**manifest["counts"][name]) for name in _PARTS}
        for name, examples in parts.items():
            if len(examples) != counts[name].kept:
                return None, f"{name}.arrow has {len(examples)} rows instead of {counts[name].kept}"
        notes = [*manifest["notes"], f"rows and tokens: from the cache, {entry}"]
        same = {name: manifest[name] for name in ("duplicates", "left_out", "chat_template")}
        found = Tokenized(**parts, counts=counts, ends=tuple(map(int, manifest["ends"])), notes=notes, **same)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        return None, f"{entry} is harmed ({type(error).__name__}: {error})"
    return found, ""


def _observed(
    batches: Iterable[list[Example]], ends: set[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[Example]]:
    """The same batches; `ends` gets the tokens that end the assistant's turns in them: the last token of every
    completion that was not cut, and the special token before every other speaker's turn inside one."""
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    for batch in batches:
        for example in batch:
            cut = example.row.completions_cut or (0,) * len(example.completions)
            ends.update(ids[-1] for ids, lost in zip(example.completions, cut) if not lost)
            for ids, spans in zip(example.completions, example.contexts):
                ends.update({ids[begin - 1] for begin, _ in spans if begin > 0} & special)
        yield batch


def _only(templates: set[str | None]) -> str | None:
    """The template of all chats, if they have one that is not the tokenizer's."""
    return next(iter(templates)) if len(templates) == 1 else None


def _findings(prepared: Prepared, counts: dict[str, Counts], templates: set[str | None]) -> tuple[int, int, list[str]]:
    said = [f"{_PARTS[name]}: {count}" for name, count in counts.items() if count.rows]
    if len(templates) > 1:
        said.append(
            f"{len(templates)} chat templates write the training rows; the tokenizer's own is saved with the result"
        )
    return prepared.duplicates, prepared.left_out, [*prepared.notes, *said]


def _check(counts: dict[str, Counts]) -> None:
    for name, count in counts.items():
        if count.rows and not count.kept:
            raise UserError(f"no {_PARTS[name]} row can be used: {count}")


def _write_down(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """What was renamed in a folder is on the disk, where a folder can be opened."""
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _shown_folder() -> str:
    try:
        return str(cache_folder())
    except RuntimeError:
        return "~/.cache/fastpref"
