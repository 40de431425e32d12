"""Whether a name means a folder on this machine or a repository of the hub, and what to say of a missing folder."""

import os
import socket
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlsplit

from fastpref.errors import UserError

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_SHOWN = 5  # neighbours in a message


def folder_of(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~name of nobody
        return Path(name)


def means_a_path(name: str) -> bool:
    """Return whether a name is that of a file or a folder: it is there, no name on the hub looks so, or its first part
    is a folder here and the hub's cache does not know it.
    """
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/"):
        return True
    first, slash, _ = name.partition("/")
    if Path(name).exists():
        return True
    return bool(slash) and Path(first).is_dir() and not _is_cached(name)


def _is_cached(name: str) -> bool:
    """Return whether the hub's cache on this machine has a model or a data set."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return any((cache / f"{kind}s--{name.replace('/', '--')}").is_dir() for kind in ("model", "dataset"))


def no_such_folder(name: str) -> str:
    """Return a message on a folder that is not there, with what is."""
    folder = folder_of(name)
    parent = folder.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    wanted = folder.relative_to(parent).parts[0] if folder != parent else ""
    try:
        there = sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        there = []
    near = get_close_matches(wanted, there, n=1)
    shown = ", ".join(there[:_SHOWN]) + (", …" if len(there) > _SHOWN else "")
    where = "here" if str(parent) == "." else f"in {parent}"
    what = f"{where} are {shown}" if there else f"there is no folder {where}"
    hint = f"; did you mean {parent / near[0]}?" if near else f" ({what})"
    return f"there is no such folder{hint}"


def require_place(name: str) -> None:
    """Raise UserError for the name of a folder that is not there. A name of the hub is not looked up."""
    if means_a_path(name) and not folder_of(name).exists():
        raise UserError(f"{name}: {no_such_folder(name)}")


def use_cache_if_alone(*names: str) -> str | None:
    """Set the hub's libraries offline if one of the names is on the hub, and the hub's address is not known here.

    They would try again and again otherwise. Returns a note on it. Call it before they are imported.
    """
    if os.environ.get("HF_HUB_OFFLINE") or any(os.environ.get(name) for name in _PROXIES):
        return None
    if all(means_a_path(name) for name in names):
        return None
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return f"{host} cannot be reached, so only its cache on this machine is used, as with --offline"
    return None
