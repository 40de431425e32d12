"""A run lets the GPU's memory segments grow, and leaves alone what the user has set."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.allocator import let_segments_grow
from fastpref.training import start

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
GROWING = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
CASES: dict[str, tuple[dict[str, str], str, str | None, bool, dict[str, str]]] = {
    # set by the user, platform, ROCm, whether CUDA is initialised → what is set then
    "a new process": ({}, "linux", None, False, GROWING),
    **{f"{name} is set": ({name: "x:1"}, "linux", None, False, {name: "x:1"}) for name in NAMES},
    "set to nothing": ({"PYTORCH_ALLOC_CONF": ""}, "linux", None, False, {"PYTORCH_ALLOC_CONF": ""}),
    "ROCm": ({}, "linux", "6.4", False, {}),
    "Windows": ({}, "win32", None, False, {}),
    "CUDA is in use": ({}, "linux", None, True, {}),
}


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", CASES)
def test_the_options_of_the_allocator(name: str, monkeypatch: pytest.MonkeyPatch):
    given, platform, hip, used, expected = CASES[name]
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    let_segments_grow()
    assert {variable: os.environ[variable] for variable in NAMES if variable in os.environ} == expected


def test_a_run_sets_them_before_it_asks_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`train`, which the command calls too, sets them before it calls anything of CUDA."""

    class Stop(Exception):
        pass

    def asked(*_: Any) -> None:
        assert os.environ["PYTORCH_ALLOC_CONF"] == GROWING["PYTORCH_ALLOC_CONF"]
        raise Stop

    monkeypatch.setattr(torch.cuda, "is_available", asked)
    (tmp_path / "c.toml").write_text('model.name = "m"\ndata = [{path = "d"}]\n')
    with pytest.raises(Stop):
        start.train(tmp_path / "c.toml")
