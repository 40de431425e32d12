"""What is wrong with a config on this machine is found before anything heavy is imported, all of it at once."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from fastpref.checks import look, machine
from fastpref.config import make_config
from fastpref.errors import UserError
from fastpref.model.headers import read_header
from tests.support.families import tiny_config
from tests.support.paths import QUICKSTART_MODEL

ROW = {"prompt": "q", "chosen": "yes", "rejected": "no"}
CHAT = {
    name: [{"role": "user", "content": "q"}, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")
}


def looked(model: str | Path = QUICKSTART_MODEL, *overrides: str) -> list[str]:
    """Return the mistakes of a config on rows.jsonl."""
    raw = {"model": {"name": str(model)}, "data": [{"path": "rows.jsonl"}], "lora": {}}
    return look(make_config(raw, overrides)).mistakes


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(f"{json.dumps(ROW)}\n")
    return tmp_path


def changed(folder: Path, change: Callable[[Path], Any]) -> Path:
    """Copy the model to a folder and change it."""
    shutil.copytree(QUICKSTART_MODEL, folder)
    change(folder)
    return folder


def settings(name: str, **keys: Any) -> Callable[[Path], Any]:
    """Return a change of a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | keys
        (folder / name).write_text(json.dumps(content))

    return change


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: [path.unlink() for path in folder.glob(name)]


def untold(folder: Path) -> None:
    without("chat_template.jinja")(folder)
    settings("tokenizer_config.json", chat_template=None)(folder)
    Path("rows.jsonl").write_text(json.dumps(CHAT))


MODELS = {  # what is done to the model's folder, and the message
    "no weights": (without("*.safetensors"), "model.safetensors is missing"),
    "no config": (without("config.json"), "config.json is missing"),
    "no tokenizer": (without("tokenizer*"), "no tokenizer there: tokenizer.json is missing"),
    "weights cut short": (cut, "model.safetensors is damaged or was not downloaded to its end: it has "),
    "an unknown kind": (settings("config.json", model_type="grok9"), "has no grok9 models; a newer one may have them"),
    "GPTQ": (
        settings("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "its weights are quantised by gptq, which needs ",
    ),
    "chats without a template": (untold, "its rows are chats, and the tokenizer of "),
}


@pytest.mark.parametrize(("change", "message"), MODELS.values(), ids=MODELS)
def test_a_model_that_cannot_be_trained(folder: Path, change: Any, message: str):
    (mistake,) = looked(changed(folder / "model", change))
    assert message in mistake


SETTINGS = {  # overrides, and the message
    ("lora.layers=[9]",): "lora.layers: 9 is out of range: this model has 4 layers",
    ("lora.rank_pattern={nope=3}",): "lora.rank_pattern: no module of the model is named nope. Its layers have ",
    ("lora.target=['q_prj']",): "lora.target: no module of the model is named q_prj; did you mean q_proj? Its layers ",
    ("lora.modules_to_save=['hed']",): "lora.modules_to_save: no module of the model is named hed",
    ("tokens.chat_template=chatmll",): "tokens.chat_template: chatmll: cannot be read",
    ("log.trackers=['aim']",): "log.trackers: aim not installed; pip install aim",
    ("train.optimizer=paged_adamw",): 'train.optimizer = "paged_adamw": only moments on a GPU can be paged',
    ("train.offload_activations=true",): "train.offload_activations: on a CPU",
    ("model.liger=true",): "model.liger = true: ",
    ("train.callbacks=['none.py:tell']",): "train.callbacks: 'none.py:tell': none.py cannot be imported: there is no",
    ("lora.from=./none",): "lora.from = './none': there is no such folder",
    ("reference.name=a/b/c",): "reference.name = 'a/b/c': there is no such folder",
    ("data.0.path=none.jsonl",): "none.jsonl: there is no such file",
    ("data.0.path=./none",): "./none: there is no such file",
    ("data.0.format=chatml.intel",): "rows.jsonl:1: there is no column question",
    ("eval.data=[{path='none.json'}]",): "none.json: there is no such file",
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), SETTINGS.items(), ids=map(str, SETTINGS))
def test_a_setting_that_names_what_is_not_there(overrides: tuple[str, ...], message: str):
    (mistake,) = looked(QUICKSTART_MODEL, *overrides)
    assert mistake.startswith(message) or f"/{message}" in mistake


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("exaone", "gate_proj"),
        ("hrm_text", "q_proj"),
        ("lfm3", "g_proj"),
        ("roberta", "decoder"),
        ("whisper", "proj_out"),
    ],
)
def test_a_module_with_another_name_in_the_files(kind: str, name: str, tmp_path: Path):
    """A config names modules as they are in memory, which for some families is not as their files name them."""
    AutoModelForCausalLM.from_config(tiny_config(kind)).save_pretrained(tmp_path)
    assert not any("lora.target" in mistake for mistake in looked(tmp_path, f"lora.target=['{name}']"))


def test_every_mistake_is_told_at_once():
    """One line each, in one message."""
    overrides = [override for few in SETTINGS for override in few if not override.startswith("data")]
    mistakes = looked("./none", *overrides)
    assert len(mistakes) == len(overrides) + 1 - 4  # lora's names and layers are not known without the model
    findings = look(make_config({"model": {"name": "./none"}, "data": [{"path": "./none"}]}, ()))
    with pytest.raises(UserError, match=r"(?s)^model.name = './none': .*\n./none: there is no such file$"):
        findings.require()


FINE = {  # overrides of what is right
    "as it is": (),
    "names and patterns": ("lora.target=['q_proj', '.*mlp.*']", "lora.modules_to_save=['lm_head']"),
    "all weights": ("lora=false",),
    "a hub's name": ("data=[{path='someone/rows'}]", "model.name=someone/model"),
    "a template": ("tokens.chat_template=chatml",),
    "broken rows that are left out": ("data.0.on_error=drop",),
}


@pytest.mark.parametrize("overrides", FINE.values(), ids=FINE)
def test_nothing_is_said_of_what_is_right(overrides: tuple[str, ...]):
    assert looked(QUICKSTART_MODEL, *overrides) == []


def test_a_gpu_changes_what_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert looked(QUICKSTART_MODEL, "train.optimizer=paged_adamw", "model.liger=true") == []


Usage = namedtuple("Usage", "free")
STOP = "output.save_every=stop"
ADAPTER = 4 * 149_504  # bytes of rank 16 on every linear layer of the model, as the quickstart says


@pytest.mark.parametrize(
    ("free", "overrides", "outcome"),
    [
        (1 << 40, (), ""),
        (4 * ADAPTER + (1 << 20), (STOP,), ""),  # the result, and one checkpoint with two moments
        (4 * ADAPTER + (1 << 20) - 1, (STOP,), "mistake"),
        (4 * ADAPTER + (1 << 20), (), "note"),
        (15 * ADAPTER, (), ""),  # two, the best, and one that is being written
        (15 * ADAPTER, ("lora=false",), "mistake"),
        (3 * ADAPTER + (1 << 20), (STOP, "train.optimizer=adamw_8bit"), ""),
    ],
)
def test_the_space_on_the_disk(free: int, overrides: tuple[str, ...], outcome: str, monkeypatch: pytest.MonkeyPatch):
    """A run whose result does not fit is refused, and one whose checkpoints may not fit is told."""
    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(free))
    raw = {"model": {"name": str(QUICKSTART_MODEL)}, "data": [{"path": "rows.jsonl"}], "lora": {}}
    findings = look(make_config(raw, overrides))
    assert (len(findings.mistakes), len(findings.notes)) == (outcome == "mistake", outcome == "note")
    assert all("output.dir = '" in words for words in (*findings.mistakes, *findings.notes))


def test_headers_are_those_of_the_files():
    """The names and shapes are what safetensors itself reads."""
    from safetensors.torch import load_file

    file = QUICKSTART_MODEL / "model.safetensors"
    stored = read_header(file)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tuple(tensor.shape) for name, tensor in load_file(file).items()
    }
