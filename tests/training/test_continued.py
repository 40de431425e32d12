"""Runs that continue an adapter: where it is named, what is their reference, and how they are resumed."""

import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import fastpref
from fastpref.config import load_config
from fastpref.errors import UserError
from fastpref.model.tokenizer import run_tokenizer
from tests.support.adapters import save_adapter
from tests.support.command_line import run_command, succeed
from tests.support.paths import QUICKSTART_HELDOUT, QUICKSTART_MODEL, QUICKSTART_ROWS
from tests.support.runs import contents, rows

CONFIG = f"""
[model]
name = "{QUICKSTART_MODEL.as_posix()}"
[[data]]
path = "{QUICKSTART_ROWS.as_posix()}"
rows = 9
[train]
learning_rate = 1e-3
steps = 4
batch = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with cfg.toml and two adapters of its model, start/ and other/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cfg.toml").write_text(CONFIG)
    save_adapter(tmp_path / "start", QUICKSTART_MODEL)
    save_adapter(tmp_path / "other", QUICKSTART_MODEL, seed=9, r=2, target_modules=["o_proj"])
    return tmp_path


def run(name: str, *overrides: str, resume: bool = False, config: str = "cfg.toml") -> list[dict[str, float]]:
    """Train in the folder `name`, and return what is logged."""
    fastpref.train(config, [f"output.dir={name}", *overrides], resume=resume)
    return rows(Path(name))


def same(a: Sequence[dict[str, float]], b: Sequence[dict[str, float]]) -> None:
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for ours, theirs in zip(a, b):
        for key in ("loss", "rewards/chosen", "rewards/rejected"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=2e-6), key


START = "lora.from=start"
REFERENCES: dict[str, tuple[list[str], list[str]]] = {
    "before the training": ([START], [START, "reference.mode=precompute"]),
    "by the run's mode": ([START], [START, "reference.mode=adapter"]),
    "by its name": ([START], [START, "reference.name=start"]),
    "the base, by its name": (
        [START, "reference.adapter=none"],
        [START, f"reference.name={QUICKSTART_MODEL.as_posix()}"],
    ),
    "the base, copied": ([START, "reference.adapter=none"], [START, "reference.adapter=none", "reference.mode=copy"]),
    "another, before": (
        [START, "reference.name=other"],
        [START, "reference.name=other", "reference.mode=precompute"],
    ),
    "of a stack, before": (
        [START, "lora.stack=true", "lora.rank=3"],
        [START, "lora.stack=true", "lora.rank=3", "reference.mode=precompute"],
    ),
    "a model, in full training": ([], [f"reference.name={QUICKSTART_MODEL.as_posix()}"]),
    "streamed": ([START], [START, "model.streaming=true"]),
    "padded": ([START, "reference.name=other"], [START, "reference.name=other", "train.layout=padded"]),
    "checkpointed": ([START], [START, "train.checkpointing=true", "train.tokens_per_microbatch=80"]),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_the_same_reference_by_two_ways(folder: Path, case: str):
    """Ways that lead to one reference give one training."""
    first, second = REFERENCES[case]
    same(run("first", *first), run("second", *second))


def test_references_differ(folder: Path):
    """The start, the base and another adapter are three references, and none finds what another one remembered."""
    losses = [
        tuple(row["loss"] for row in run(name, START, *more))
        for name, more in (("a", []), ("b", ["reference.adapter=none"]), ("c", ["reference.name=other"]))
    ]
    assert losses[0][0] == pytest.approx(0.693147, abs=1e-5)  # log 2: policy and reference are the same model
    assert len({round(loss[0], 4) for loss in losses}) == 3
    assert len(list((folder / "cache" / "reference").iterdir())) == 3


def test_a_model_named_by_an_adapter(folder: Path):
    """An adapter as model.name, or the run that made it, is the same training as its base with lora.from."""
    named = run("a", "model.name=start")
    same(run("b", START), named)
    written = tomllib.loads((folder / "a" / "config.toml").read_text())
    assert written["model"]["name"] == str(QUICKSTART_MODEL)
    assert (written["lora"]["from"], "rank" in written["lora"]) == (str(folder / "start"), False)
    assert run("c", "model.name=a")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("stack", [False, True], ids=["continued", "stacked"])
def test_a_cut_run_is_the_whole_one(folder: Path, stack: bool):
    """A run that is resumed has the same bytes, and a key that agrees with the adapter may be added meanwhile."""
    options = [START, "output.save_every=2", "lora.dropout=0.3", *(["lora.stack=true"] if stack else [])]
    run("run", *options)
    shutil.copytree("run", "whole")
    for later in ("checkpoints/step-4", "final"):
        shutil.rmtree(Path("run", later))
    run("run", *options, resume=True)
    for place in ("checkpoints/step-4", "final"):
        assert contents(Path("run", place)) == contents(Path("whole", place))
    if not stack:
        run("run", *options, "lora.rank=4", resume=True)
        with pytest.raises(UserError, match=r"lora\.rank = 5"):
            run("run", *options, "lora.rank=5", resume=True)


@pytest.mark.parametrize("options", [
    [START], [START, "reference.mode=precompute"], [START, "lora.stack=true"], ["lora={}", "reference.name=start"],
], ids=str)  # fmt: skip
def test_another_adapter_in_its_place(folder: Path, options: list[str]):
    """A run is not resumed with another adapter than that it began with."""
    run("run", *options, "output.save_every=2", "train.steps=2")
    save_adapter(folder / "start", QUICKSTART_MODEL, seed=4)
    with pytest.raises(UserError, match="the adapters that it began with are not those"):
        run("run", *options, "output.save_every=2", resume=True)


def test_the_tokenizer_is_the_adapters(folder: Path):
    """The chat template that supervised training saved with the adapter is that of the run."""
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    tokenizer.save_pretrained(folder / "start")
    assert run_tokenizer(load_config("cfg.toml", [START])).chat_template == tokenizer.chat_template
    assert run_tokenizer(load_config("cfg.toml")).chat_template != tokenizer.chat_template


@pytest.mark.parametrize(("options", "words"), [
    ([START], "continued the adapter `start`"),
    ([START, "lora.stack=true", "lora.rank=3"], "on top of `start`; this is their sum"),
], ids=str)  # fmt: skip
def test_a_result_without_its_start(folder: Path, options: list[str], words: str):
    """A result is merged and evaluated when its start is gone; eval then needs another reference, and says so."""
    run("run", *options)
    assert words in (folder / "run" / "final" / "README.md").read_text()
    shutil.rmtree("start")
    heldout = ["--data", QUICKSTART_HELDOUT]
    refused = run_command("eval", "run", *heldout)
    assert (refused.status, "there is no such folder" in refused.err, "--reference" in refused.err) == (2, True, True)
    assert "accuracy" in succeed("eval", "run", *heldout, "--reference", QUICKSTART_MODEL).out
    succeed("merge", "run", "--output", "merged")
    assert (folder / "merged" / "model.safetensors").exists()


def test_what_stands_in_the_way_is_said_before_the_first_step(folder: Path):
    """A streamed model has no room for a whole model as reference, which is an error before anything is written."""
    with pytest.raises(UserError, match=r"reference\.name.*whole model would lie on the GPU"):
        run("run", START, f"reference.name={QUICKSTART_MODEL.as_posix()}", "model.streaming=true")
    assert not Path("run").exists()
