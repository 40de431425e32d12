"""Whether a name means a folder or a repository of the hub, and what is said where neither can be had."""

import os
import socket
from pathlib import Path

import pytest

from fastpref.errors import UserError
from fastpref.places import means_a_path, require_place, use_cache_if_alone

NAMES = {  # a name, where runs/ and runs/dpo are folders, and whether it means a path
    "gpt2": False, "me/model": False, "runs": True, "runs/dpo": True, "runs/nothere": True, "./none": True,
    "../none": True, "/none": True, "~/none": True, "a/b/c": True, "none/": True, "runs/cached": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "dpo").mkdir(parents=True)
    (tmp_path / "cache" / "models--runs--cached").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "path"), NAMES.items())
def test_a_name_is_a_path_or_one_of_the_hub(name: str, path: bool):
    assert means_a_path(name) == path


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "runs/nothere": r"^runs/nothere: there is no such folder \(in runs are dpo\)$",
        "runs/dpoo": "did you mean runs/dpo?",
        "./none": r"there is no such folder \(here are cache, runs\)",
    }.items(),
)
def test_a_missing_folder_is_told_with_what_is_there(name: str, words: str):
    with pytest.raises(UserError, match=words.replace("?", r"\?") if "mean" in words else words):
        require_place(name)
    require_place("me/model")
    require_place("runs/dpo")


@pytest.mark.parametrize(
    ("name", "reached", "offline"), [("me/m", False, True), ("me/m", True, False), ("runs", False, False)]
)
def test_the_cache_is_used_where_the_hub_is_not_reached(
    name: str, reached: bool, offline: bool, monkeypatch: pytest.MonkeyPatch
):
    """Only for names of the hub, and at one try."""

    def find(*_: object) -> list[object]:
        if not reached:
            raise socket.gaierror
        return []

    monkeypatch.setattr(socket, "getaddrinfo", find)
    for variable in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    note = use_cache_if_alone(name)
    assert (os.environ.get("HF_HUB_OFFLINE") == "1", note is not None) == (offline, offline)
