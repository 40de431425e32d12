"""Atomic writes: a file or a folder is written under a temporary name, synced to the disk, and then renamed.

Whatever interrupts a write, its place holds all of the old contents or all of the new ones.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastpref.errors import UserError

MANIFEST = "manifest.json"


class WriteError(UserError):
    """The disk refused a write: no space, no permission, a broken disk. The old contents are unchanged."""


@contextmanager
def refusals_named(place: Path) -> Iterator[None]:
    """Raise WriteError with the name of `place` if the disk refuses what the block does."""
    try:
        yield
    except BaseException as error:
        if refusal := _refusal(error):
            raise WriteError(f"{place}: cannot be written: {refusal}") from None
        raise


def write_folder(place: Path, fill: Callable[[Path], None], *, manifest: bool = False) -> None:
    """Replace or create the folder `place` with the files that `fill` writes into the folder it is called with.

    With `manifest` the folder also gets the sizes and hashes of its files, which `damage` checks. Raises WriteError
    where the disk refuses; after that and after any other exception `place` is unchanged.
    """
    unfinished, old = place.with_name(f".{place.name}.tmp"), place.with_name(f".{place.name}.old")
    with refusals_named(place):
        try:
            _remove(unfinished)
            unfinished.mkdir(parents=True)
            fill(unfinished)
            if manifest:
                (unfinished / MANIFEST).write_text(_manifest(_hashes(unfinished)), encoding="utf-8")
            for path in [*_files(unfinished), unfinished]:
                sync(path)
            _remove(old)
            if place.exists():
                place.rename(old)
            unfinished.rename(place)
            sync(place.parent)
            _remove(old)
        except BaseException:
            if old.exists() and not place.exists():
                old.rename(place)
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def write_file(place: Path, content: str | Callable[[Path], None]) -> None:
    """Replace or create the file `place` with a text, or with what `content` writes to the path it is called with.

    A symbolic link keeps its name, and the file it leads to is replaced. Raises WriteError where the disk refuses;
    after that and after any other exception the file is unchanged.
    """
    target = place.resolve()
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")  # two processes may write the same file
    with refusals_named(place):
        try:
            if isinstance(content, str):
                unfinished.write_text(content, encoding="utf-8", newline="\n")
            else:
                content(unfinished)
            sync(unfinished)
            unfinished.replace(target)
            sync(target.parent)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk. Raises OSError."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folder, and needs none
        return
    number = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def damage(folder: Path) -> str | None:
    """Compare a folder with its manifest. Returns what is wrong, naming the file, or None if every byte is right."""
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


def _refusal(error: BaseException) -> str | None:
    """Return why the disk refused if an exception says so, else None. Libraries in Rust raise types of their own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return os.strerror(int(number[1])) if number else None


def _manifest(files: dict[str, Any]) -> str:
    """Return the manifest's text. It holds a hash of itself, so that no byte of it can change unseen."""
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


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
