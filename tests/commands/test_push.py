"""Uploading, with a hub client that records its calls: no test reaches the hub."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

import fastpref
from fastpref.config import load_config
from fastpref.config.toml import to_toml
from fastpref.errors import UserError
from fastpref.run.card import model_card
from fastpref.run.hub import push
from tests.support.command_line import run_command


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Return the calls of the hub's client, in order."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def answer(name: str, result: Any) -> None:
        def method(self: HfApi, *arguments: Any, **options: Any) -> Any:
            calls.append((name, {"of": arguments[0]} | options if arguments else options))
            return result

        monkeypatch.setattr(HfApi, name, method)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    answer("whoami", {"name": "me"})
    answer("create_repo", "https://hub/me/mine")
    answer("upload_folder", None)
    return calls


def fails(error: Exception) -> Callable[..., None]:
    def method(*_: Any, **__: Any) -> None:
        raise error

    return method


SHORT = ["lora={rank=4}", "train.steps=1", "eval.samples=0"]
PUSHED = [*SHORT, "output.push_to=me/mine"]


def test_a_run_uploads_its_result_once_it_is_asked(config: Path, hub: list[Any], capsys: pytest.CaptureFixture[str]):
    """With output.push_to, the login is checked first, and final/ is uploaded at the end to a private repository."""
    fastpref.train(config, SHORT)
    assert hub == []
    fastpref.train(config, [*PUSHED, "output.dir=two"])
    assert [name for name, _ in hub] == ["whoami", "whoami", "create_repo", "upload_folder"]
    assert hub[2][1] == {"of": "me/mine", "private": True, "exist_ok": True}
    assert hub[3][1]["repo_id"] == "me/mine"
    assert Path(hub[3][1]["folder_path"]) == Path("two/final")
    assert "uploaded: https://hub/me/mine" in capsys.readouterr().out


def test_the_command(finished_run: Path, hub: Any):
    result = run_command("push", finished_run, "--to", "me/mine", "--public")
    assert (result.status, result.out) == (0, f"{finished_run / 'final'} is at https://hub/me/mine\n")
    assert dict(hub)["create_repo"]["private"] is False
    result = run_command("push", finished_run)
    assert (result.status, result.err) == (2, "fastpref: name a repository, --to user/name, or set output.push_to\n")


@pytest.mark.usefixtures("hub")
def test_what_the_hub_refuses(config: Path, monkeypatch: pytest.MonkeyPatch):
    """A missing login ends a run before it begins; a failed upload ends it after its result is saved, with the
    command that uploads again; offline, nothing can be uploaded."""
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "upload_folder", fails(OSError("the line was cut")))
        with pytest.raises(UserError, match=r"the line was cut\nIt is saved; upload it with\n  fastpref push out"):
            fastpref.train(config, PUSHED)
    assert Path("out/final/adapter_model.safetensors").exists()
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "whoami", fails(LocalTokenNotFoundError("no token")))
        with pytest.raises(UserError, match="nobody is logged in"):
            fastpref.train(config, [*PUSHED, "output.dir=other"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nothing can be uploaded"):
        fastpref.train(config, [*PUSHED, "output.dir=other"])
    assert not Path("other").exists()
    with pytest.raises(UserError, match=r"push_to"):
        load_config(config, ["output.push_to=no-slash"])


# --- The model card --------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_model_card(finished_run: Path, whole_run: Path):
    """The card has the hub's metadata, the held-out metrics before and after, the data's hash, and a valid config."""
    for run, library in ((finished_run, "peft"), (whole_run, "transformers")):
        text = (run / "final" / "README.md").read_text(encoding="utf-8")
        data: Any = ModelCard(text).data
        assert data.library_name == library
        assert {"fastpref", "dpo"} <= set(data.tags)
        assert "| reward accuracy | " in text
        assert re.search(r"`[0-9a-f]{64}`", text)
        config = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
        assert config is not None
        place = run.parent / "card.toml"
        place.write_text(config[1])
        assert load_config(place).train == load_config(run / "config.toml").train


def test_a_card_does_not_tell_the_folders_of_the_machine(finished_run: Path):
    """Local models, data, templates and formats are named without their folders; names on the hub are complete."""
    config = load_config(
        finished_run / "config.toml",
        ['data.0.format={type="chat_template.default", chat_template="/home/me/own.jinja"}',
         'tokens.chat_template="/home/me/own.jinja"'],
    )  # fmt: skip
    text = model_card(config, [], "0" * 64, 4)
    assert "/home/me" not in text
    assert str(finished_run.parent) not in text
    assert 'name = "model"' in text
    assert "own.jinja" in text
    assert str(Path(config.data[0].path).parent) in to_toml(config)
    assert str(Path(config.data[0].path).parent) not in text
    on_hub = config.but({"model.name": "org/model"})
    data: Any = ModelCard(model_card(on_hub, [], "0" * 64, 4)).data
    assert data.base_model == "org/model"


def test_not_reaching_the_hub_is_a_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: list[Any]):
    """HTTP errors of the client become a message without a traceback."""
    response: Any = SimpleNamespace(headers={}, request=None, status_code=403)
    monkeypatch.setattr(HfApi, "create_repo", fails(HfHubHTTPError("403 Forbidden", response=response)))
    with pytest.raises(UserError, match=r"me/mine: .* could not be uploaded: 403 Forbidden"):
        push(tmp_path, "me/mine")
