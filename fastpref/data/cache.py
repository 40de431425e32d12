"""The examples of a run, tokenised once and read from a cache by every later run with the same fingerprint.

    $FASTPREF_CACHE (~/.cache/fastpref) / tokens / FINGERPRINT / train.arrow, heldout.arrow, manifest.json
                                                 / FINGERPRINT.lock     held by the process that writes the entry

An entry is written atomically, so a folder that has its name is complete; the manifest shows whether a file was damaged
afterwards.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from fastpref.atomic import WriteError, write_folder
from fastpref.config import Config
from fastpref.data import table
from fastpref.data.balance import unbalanced
from fastpref.data.example import Counts, Example
from fastpref.data.extras import check_extras, has
from fastpref.data.fingerprint import fingerprint
from fastpref.data.sources import Rows, notes_on_text, prepare
from fastpref.data.table import Examples
from fastpref.data.template.text import check_template_keywords
from fastpref.data.tokenize import tokenize_batches
from fastpref.errors import UserError, one_line

_MANIFEST = "manifest.json"
_PARTS = {"train": "training", "heldout": "held-out"}


@dataclass(frozen=True)
class Tokenized:
    """Training and held-out examples, and counts of what became of their rows."""

    train: Examples
    heldout: Examples
    counts: dict[str, Counts]  # of "train" and "heldout"
    duplicates: int
    left_out: int
    ends: tuple[int, ...] = ()  # the tokens that end training completions, except cut ones
    chat_template: str | None = None  # the one of all training chats, if not the tokenizer's
    notes: list[str] = field(default_factory=list)  # what a user should know, one sentence each

    @property
    def parts(self) -> dict[str, Examples]:
        """The examples by the names that are used in messages."""
        return {words: getattr(self, name) for name, words in _PARTS.items()}

    @cached_property
    def extras(self) -> bool:
        """Return whether any training row has a weight or a margin. All of them are read, once."""
        return bool(has(self.train, "weight").any() or has(self.train, "margin").any())


def load_examples(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, cache: bool = True, day: date | None = None
) -> Tokenized:
    """Read the examples of a config from the cache, or tokenise them and, with `cache`, write them there.

    The tokenizer must have the config's chat template already. Templates that write the date write `day`, by default
    today. Raises UserError for broken rows, if no row can be used, for keywords that no template reads, and for weights
    and margins that the loss does not take. A cache that cannot be used adds a note and raises no error.
    """
    check_template_keywords(config, tokenizer)
    day = day or date.today()
    examples = _load_examples(config, tokenizer, day, cache=cache)
    for part in examples.parts.values():
        check_extras(config.loss, part)
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
        cached, _ = _open(entry)
        if cached:
            return cached
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_suffix(".lock")):
            cached, damage = _open(entry)  # another process may have been first
            if cached:
                return cached
            examples = _write(config, tokenizer, day, entry)
            if damage:
                examples.notes.append(f"the cache held these tokens, but {damage}; they were made again")
            return examples
    # No lock, no space, no permission, no home folder.
    except (OSError, WriteError, NotImplementedError, pa.ArrowException) as error:
        examples = _in_memory(config, tokenizer, day)
        note = f"the cache in {cache_folder()} cannot be used, so nothing is kept for later runs: {error}"
        examples.notes.append(note)
        return examples


def cache_folder() -> Path:
    """Return `$FASTPREF_CACHE`, or ~/.cache/fastpref."""
    return Path(os.environ.get("FASTPREF_CACHE") or "~/.cache/fastpref").expanduser()


def _in_memory(config: Config, tokenizer: PreTrainedTokenizerBase, day: date) -> Tokenized:
    parts: dict[str, Examples] = {}
    facts = _tokenize(config, tokenizer, day, lambda name, batches: parts.update({name: table.in_memory(batches)}))
    return Tokenized(**parts, **facts)


def _write(config: Config, tokenizer: PreTrainedTokenizerBase, day: date, entry: Path) -> Tokenized:
    """Tokenise into the folder `entry`, whose lock the caller holds. Raises WriteError."""
    facts: dict[str, Any] = {}

    def fill(folder: Path) -> None:
        facts.update(
            _tokenize(config, tokenizer, day, lambda name, batches: table.write(batches, folder / f"{name}.arrow"))
        )
        manifest = facts | {
            "files": {name: (folder / f"{name}.arrow").stat().st_size for name in _PARTS},
            "counts": {name: asdict(counts) for name, counts in facts["counts"].items()},
        }
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    write_folder(entry, fill)
    cached, damage = _open(entry)
    if cached is None:
        raise OSError(f"what was written is not there: {damage}")
    return replace(cached, **facts)


def _tokenize(
    config: Config, tokenizer: PreTrainedTokenizerBase, day: date, keep: Callable[[str, Iterator[list[Example]]], Any]
) -> dict[str, Any]:
    """Tokenise each part of the rows, and pass its name and its examples to `keep`. Returns Tokenized's other fields.

    Raises UserError if a part has rows and none can be used.
    """
    prepared = prepare(config)
    notes = [*prepared.notes, *notes_on_text(prepared, tokenizer)]
    counts = {name: _counts(getattr(prepared, name)) for name in _PARTS}
    ends: dict[str, set[int]] = {name: set() for name in _PARTS}
    templates: dict[str, set[str | None]] = {name: set() for name in _PARTS}
    for name in _PARTS:
        rows = getattr(prepared, name)
        batches = tokenize_batches(rows, tokenizer, config.tokens, counts[name], day, templates[name])
        keep(name, _observed(batches, ends[name], tokenizer))
    for name, count in counts.items():
        if count.rows and not count.kept:
            raise UserError(f"no {_PARTS[name]} row can be used: {count}")
    notes += [f"{_PARTS[name]}: {count}" for name, count in counts.items() if count.rows]
    used = templates["train"]
    if len(used) > 1:
        notes.append(
            f"{len(used)} chat templates write the training rows; the tokenizer's own is saved with the result"
        )
    return {
        "counts": counts,
        "duplicates": prepared.duplicates,
        "left_out": prepared.left_out,
        "ends": tuple(sorted(ends["train"])),
        "chat_template": next(iter(used)) if len(used) == 1 else None,
        "notes": notes,
    }


def _counts(rows: Rows) -> Counts:
    """Return the counts of the pairs that the rows of a part leave out."""
    return Counts(rows=rows.tied + rows.close, tied=rows.tied, close=rows.close)


def _open(entry: Path) -> tuple[Tokenized | None, str]:
    """Read an entry. Returns None and what is wrong with it if it is damaged, None and "" if it is not there."""
    if not entry.exists():
        return None, ""
    try:
        manifest: dict[str, Any] = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
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
        cached = Tokenized(**parts, counts=counts, ends=tuple(map(int, manifest["ends"])), notes=notes, **same)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        return None, f"{entry} is damaged ({one_line(error, named=True)})"
    return cached, ""


def _observed(
    batches: Iterable[list[Example]], ends: set[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[Example]]:
    """Yield the same batches, and add the tokens that end the assistant's turns in them to `ends`.

    Those are the last token of every completion that was not cut, and the special token before every turn of another
    speaker inside a completion.
    """
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    for batch in batches:
        for example in batch:
            cut = example.row.completions_cut or (0,) * len(example.completions)
            ends.update(ids[-1] for ids, lost in zip(example.completions, cut) if not lost)
            for ids, spans in zip(example.completions, example.contexts):
                ends.update({ids[begin - 1] for begin, _ in spans if begin > 0} & special)
        yield batch
