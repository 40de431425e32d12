"""Prepare the heavy imports of a command, and end its process."""

import atexit
import gc
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from fastpref.places import use_cache_if_alone

_of_command: list[bool] = []  # not empty in a process that runs one command and ends with it


def own_process() -> None:
    """Say that this process runs one command only, so that imports may be changed for all of it."""
    _of_command.append(True)


@contextmanager
def loading(*names: str, offline: bool = False) -> Iterator[None]:
    """Import heavy libraries inside the block, quietly and fast, while a terminal says that they are loading.

    If one of the `names` is on the hub and that cannot be reached, its cache is used, as it is if `offline`.
    In a process of its own a command imports no compiler before something is compiled, nor sharded tensors. The cyclic
    garbage collector would look at every object that the imports make, again and again: without it they take a sixth
    less time.
    """
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    elif unreachable := use_cache_if_alone(*names):
        note(unreachable)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it warns of a kernel for 4-bit inference
    told = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if told:
        print("loading torch and transformers …", end="", file=sys.stderr, flush=True)
    collecting = gc.isenabled()
    gc.disable()
    try:
        from fastpref.deferred import defer_compiler, defer_sharding, import_bitsandbytes

        if _of_command:
            defer_compiler()
        import_bitsandbytes()
        from fastpref.quiet import quiet_libraries

        quiet_libraries()
        if _of_command and "WORLD_SIZE" not in os.environ:
            defer_sharding()
        yield
    finally:
        if _of_command:
            gc.freeze()  # what the libraries have made stays until the end
        if collecting:
            gc.enable()
        if told:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Print a remark to stderr, which keeps stdout for the result."""
    typer.echo(text, err=True)


def leave(status: int) -> NoReturn:
    """End the process without taking every object apart, which takes a second after torch.

    What was registered for the end is done, and output is written. A thread that still works is waited for as usual.
    """
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.exit(status)
    try:
        atexit._run_exitfuncs()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # such as a pipe that nobody reads any more: Python's own way says so
        sys.exit(status or 1)
    os._exit(status)
