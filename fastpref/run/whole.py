"""Folders that are whole or not there: written beside their place, forced to disk, given a manifest, then renamed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpref.errors import UserError

MANIFEST = "manifest.json"


class WriteError(UserError):
    """Something could not be written: no space, no permission, a broken disk. What was there before is as it was."""


def write_folder(place: Path, fill: Callable[[Path], None], *, manifest: bool = False) -> None:
    """Let `fill` write a folder's files, and put it in its place, instead of one that is there, once they are on disk.

    Raises WriteError where the disk refuses; then, and after any other exception, `place` is as it was.
    """
    unfinished, old = place.with_name(f".{place.name}.tmp"), place.with_name(f".{place.name}.old")
    try:
        _remove(unfinished)
        unfinished.mkdir(parents=True)
        fill(unfinished)
        if manifest:
            (unfinished / MANIFEST).write_text(_manifest(_hashes(unfinished)), encoding="utf-8")
        for path in [*_files(unfinished), unfinished]:
            _sync(path)
        _remove(old)
        if place.exists():
            place.rename(old)
        unfinished.rename(place)
        _sync(place.parent)
        _remove(old)
    except BaseException as error:
        if old.exists() and not place.exists():
            old.rename(place)
        shutil.rmtree(unfinished, ignore_errors=True)
        if refusal := disk_refusal(error):
            raise WriteError(f"{place}: cannot be written: {refusal}") from None
        raise


def write_file(place: Path, text: str) -> None:
    """Write or replace a small file in one go. Raises WriteError where the disk refuses, with the file as it was."""
    unfinished = place.with_name(f".{place.name}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        _sync(unfinished)
        unfinished.replace(place)
        _sync(place.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise WriteError(f"{place}: cannot be written: {error.strerror}") from None


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that was written with a manifest, naming the file; None if every byte is right."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        files: dict[str, Any] = json.loads(text)["files"]
        if text != _manifest(files):
            return f"{MANIFEST} is damaged"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                return f"{name} has {size:,} bytes of {expected['size']:,}"
            if _hash(path) != expected["sha256"]:
                return f"{name} is damaged: its contents are not those that were written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def disk_refusal(error: BaseException) -> str | None:
    """Why the disk refused, if that is what an exception says; libraries in Rust raise kinds of their own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return os.strerror(int(number[1])) if number else None


def _manifest(files: dict[str, Any]) -> str:
    """The manifest's text. It holds a hash of itself, so that no byte of it can change unseen."""
    listed = json.dumps(files, indent=1, sort_keys=True)
    own = hashlib.sha256(listed.encode()).hexdigest()
    return f'{{"sha256": "{own}",\n"files": {listed}}}\n'


def _hashes(folder: Path) -> dict[str, Any]:
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _hash(path)}
        for path in _files(folder)
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folder, and needs none
        return
    number = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
