"""What a model, a config or the environment must not be able to do."""

import json
import shutil
from pathlib import Path

import pytest

import fastpref
from fastpref.errors import UserError
from tests.support.paths import QUICKSTART, QUICKSTART_MODEL

FEW = ["train.steps=2", "train.batch=2", "eval.samples=0", "output.save_every=1"]


def test_code_beside_a_model_is_not_run(elsewhere: Path):
    """A model with its own Python code is refused, with the key that would allow it, and the code never runs."""
    model = elsewhere / "model"
    shutil.copytree(QUICKSTART_MODEL, model)
    canary = elsewhere / "ran"
    (model / "modeling_own.py").write_text(
        f"open({str(canary)!r}, 'w').close()\nclass Own: pass\nclass OwnConfig: pass\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"},
    }
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"Python code of its own, which is not run; set model\.trust_remote_code"):
        fastpref.train(QUICKSTART, [*FEW, f'model.name="{model}"'])
    assert not canary.exists()


def test_the_hubs_token_is_in_no_file(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    """No secret of the environment is in any file that a run writes."""
    secret = "hf_thisIsTheSecretOfTheTest"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("FASTPREF_CACHE", str(elsewhere / "cache"))
    fastpref.train(QUICKSTART, FEW)
    files = [path for path in elsewhere.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_a_run_writes_in_its_folder_and_the_cache_alone(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    """A run writes only into its output.dir, which may be outside of the working directory, and into the cache."""
    inside, home = elsewhere / "inside", elsewhere / "home"
    inside.mkdir()
    home.mkdir()
    monkeypatch.chdir(inside)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("FASTPREF_CACHE", str(elsewhere / "cache"))
    fastpref.train(QUICKSTART, [*FEW, 'output.dir="../out"'])
    assert sorted(path.name for path in elsewhere.iterdir()) == ["cache", "home", "inside", "out"]
    assert not [*inside.iterdir(), *home.iterdir()]
