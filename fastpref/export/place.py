"""Write several files into a folder that may have others: all of them appear, or none."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from fastpref.atomic import WriteError, refusals_named, sync
from fastpref.errors import UserError

MARK = "fastpref export"  # in texts that an export wrote, which a later one may replace


def check_place(main: Path, beside: Mapping[str, str | bytes]) -> None:
    """Raise UserError if `main` is there already, or one of the files beside it that no export wrote."""
    if main.exists():
        raise UserError(f"--output {main}: is there already")
    for name, content in beside.items():
        path = main.parent / name
        if path.exists() and not _may_replace(path, content):
            raise UserError(f"{path}: is there already, and no export wrote it; name a file in another folder")


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError if a disk has less free space than `needed` bytes."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{folder}: {needed / 1e9:,.2f} GB are to be written, and {free / 1e9:,.2f} GB are free there")


def write_together(main: Path, fill: Callable[[Path], None], beside: Mapping[str, str | bytes]) -> None:
    """Write `main`, which `fill` writes to the path it is called with, and the files beside it.

    Everything is first written and synced in a hidden folder next to its place. Raises WriteError if the disk refuses;
    after that and after any other exception nothing is left.
    """
    unfinished = main.with_name(f".{main.name}.{os.getpid()}.tmp")
    made = [folder for folder in (main.parent, *main.parent.parents) if not folder.exists()]
    with refusals_named(main):
        try:
            unfinished.mkdir(parents=True)
            fill(unfinished / main.name)
            for name, content in beside.items():
                data = content.encode() if isinstance(content, str) else content
                (unfinished / name).write_bytes(data)
            for path in unfinished.iterdir():
                sync(path)
            for name in (*beside, main.name):
                (unfinished / name).replace(main.parent / name)
            sync(main.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            for folder in made:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
            raise
        unfinished.rmdir()


def _may_replace(path: Path, content: str | bytes) -> bool:
    if not path.is_file():
        return False
    try:
        old = path.read_bytes()
    except OSError as error:
        raise WriteError(f"{path}: cannot be read: {error.strerror}") from None
    return old == (content.encode() if isinstance(content, str) else content) or MARK.encode() in old
