"""A resumed run is bit-identical to an uninterrupted one, or it is refused."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpref
from fastpref.errors import UserError
from fastpref.training.progress import Display
from tests.support.runs import LORA, contents, rows, train_in


def adapter(folder: str) -> bytes:
    return Path(folder, "final", "adapter_model.safetensors").read_bytes()


CASES = {
    "dpo-lora": [LORA],
    "dpo-full": [],
    "dpo-frozen": ['train.freeze=["embed_tokens", "layers.1", "norm.weight"]'],
    "dpo-noise": ["train.neftune_alpha=5"],
    "kto-lora-noise": ["loss.type=kto", LORA, "train.neftune_alpha=5"],
    "dpo-lora-new-tokens": [LORA, "tokens.add=['nine plus', '<think>']"],
    "kto-full-new-tokens": ["loss.type=kto", "tokens.add=['nine plus', '<think>']"],
    "kto-lora": ["loss.type=kto", LORA],
    "kto-full": ["loss.type=kto"],
    "dpo-full-synced": ["reference={mode='copy', sync={every=3, mix=0.3}}"],
    "orpo-lora-constant": ["loss.type=orpo", LORA, "train.schedule=constant", "eval.data=[]", "eval={}"],
    "dpo-dora-and-a-module": ['lora={rank=2, dora=true, modules_to_save=["norm"]}'],
    "kto-nf4-8-bit": ["loss.type=kto", LORA, "model.quantization=nf4", "train.optimizer=adamw_8bit"],
    "dpo-lora-precomputed": [LORA, "reference.mode=precompute"],
    "dpo-lora-ranks-and-layers": [
        'lora={rank=2, target=["all-linear", "lm_head"], layers=["1:"], rank_pattern={q_proj=3, lm_head=1}, '
        "alpha_pattern={'.*mlp.*'=4}}",
    ],
    "dpo-lora-pissa": ['lora={rank=2, dropout=0.1, init="pissa", target=["all-linear", "lm_head"]}'],
    "orpo-nf4-loftq": ["loss.type=orpo", 'lora={rank=2, init="loftq"}', "model.quantization=nf4"],
    "lion": [LORA, "train.optimizer=lion"],
    "lion-8-bit-full": ["train.optimizer=lion_8bit", "train.learning_rate=1e-4", "train.schedule=linear"],
    "adafactor": [LORA, "train.optimizer=adafactor", "train.min_lr=1e-4"],
    "muon-full": ["train.optimizer=muon", "train.weight_decay=0.1"],
    "muon-lora-plus": ["lora={rank=4, dropout=0.2, plus_ratio=8.0}", "train.optimizer=muon"],
    "schedule-free": [LORA, "train.optimizer=schedule_free_adamw", "train.warmup=7", "train.betas=[0.8, 0.99]"],
    "schedule-free-kto-full": ["loss.type=kto", "train.optimizer=schedule_free_adamw"],
    "plateau": [
        LORA, "train.schedule=reduce_lr_on_plateau", "train.schedule_options={patience=0, factor=0.5, threshold=0.5}",
        "eval.every=1",
    ],
    "greedy-by-shares": [
        LORA, "train.schedule=greedy", "train.schedule_options={patience=0, smooth=true}", "eval.every=0.1",
        "output.save_every=0.5",
    ],
    "dpo-lora-head-twice": ['lora={rank=2, dropout=0.1, target=["q_proj", "lm_head"]}', "train.checkpointing=true"],
}  # fmt: skip


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_ten_steps_are_five_and_five(config: Path, overrides: list[str]):
    """After ten steps, a resumed run has the same weights, state and metrics as an uninterrupted one."""
    fastpref.train(config, [*overrides, "output.keep=9"])
    out, whole = Path("out"), Path("whole")
    shutil.copytree(out, whole)
    for later in ("checkpoints/step-10", "checkpoints/step-8", "final"):
        shutil.rmtree(out / later, ignore_errors=True)
    torch.manual_seed(99)

    result = fastpref.train(config, [*overrides, "output.keep=9"], resume=True)

    assert rows(out) == rows(whole)
    for place in ("checkpoints/step-10", "final"):
        assert contents(out / place) == contents(whole / place)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert result.eval_metrics == {k: v for k, v in last.items() if k != "step"} or "eval/loss" not in last


# An evaluation follows step 4, and an interrupt does not wait for it.
@pytest.mark.parametrize(("stop", "optimizer"), [(4, "adamw"), (7, "adamw"), (7, "schedule_free_adamw"), (7, "muon")])
def test_an_interrupted_run_goes_on(config: Path, monkeypatch: pytest.MonkeyPatch, stop: int, optimizer: str, capsys):
    """Ctrl-C after any step writes a checkpoint and prints the command, which resumes as if nothing had happened."""
    overrides = [LORA, "output.save_every=100", f"train.optimizer={optimizer}"]
    fastpref.train(config, [*overrides, "output.dir=whole"])
    step = Display.step

    def interrupted(self, number: int, *rest) -> None:
        step(self, number, *rest)
        if number == stop:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "step", interrupted)
    result = fastpref.train(config, overrides)
    assert result.interrupted
    assert f"fastpref train out/config.toml --resume out/checkpoints/step-{stop}" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(config.parent)
    resumed = fastpref.train("out/config.toml", resume=f"out/checkpoints/step-{stop}")
    assert not resumed.interrupted
    assert rows(Path("out")) == rows(Path("whole"))
    assert adapter("out") == adapter("whole")


def test_a_finished_run_can_be_made_longer(config: Path):
    """With a constant learning rate, a finished run that is extended equals one with that many steps from the start."""
    overrides = [LORA, "train.schedule=constant", "train.warmup=0", "eval.data=[]", "eval={}"]
    fastpref.train(config, [*overrides, "train.steps=4", "output.save_every=4"])
    fastpref.train(config, [*overrides, "train.steps=8"], resume=True)
    fastpref.train(config, [*overrides, "train.steps=8", "output.dir=whole"])
    assert [row["step"] for row in rows(Path("out"))] == list(range(1, 9))
    assert adapter("out") == adapter("whole")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in a new folder; its run `out` has three steps with checkpoints at 1, 2 and 3."""
    return train_in(tmp_path_factory.mktemp("trained"), SAME)


@pytest.fixture
def again(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy `trained` into the working directory, and return its config."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    return folder / "cfg.toml"


SAME = [LORA, "train.steps=3", "output.save_every=1", "output.keep=9", "eval.every=100"]
REFUSED = {
    "a learning rate": (["train.learning_rate=2e-3"], r"train\.learning_rate: 0\.001 → 0\.002"),
    "another batch": (["train.batch=4"], r"train\.batch: 5 → 4"),
    "another loss": (["loss.type=ipo"], r"loss\.type: 'dpo' → 'ipo'"),
    "a loss's option": (["loss.beta=0.2"], r"loss\.beta: 0\.1 → 0\.2"),
    "other adapters": (["lora.rank=5"], r"lora\.rank: 4 → 5"),
    "another order": (
        ["lora.alpha_pattern={'.*proj'=2, q_proj=2}"],
        r"lora\.alpha_pattern: \[\] → \[\['\.\*proj', 2\.0\], ",
    ),
    "another seed": (["train.seed=1"], r"train\.seed: 42 → 1"),
    "other lengths": (["tokens.max_length=64"], r"tokens\.max_length: 96 → 64"),
    "fewer rows": (["data.0.rows=20"], r"data\.0\.rows: 23 → 20"),
    "more data": (['data=[{path="a"}, {path="b"}]'], r"data\.1\.path: not set → 'b'"),
    "two at once": (["train.batch=4", "train.seed=1"], r"train\.batch: 5 → 4\n  train\.seed: 42 → 1"),
    "fewer steps": (["train.steps=2"], r"3 steps are done, and the config asks for 2"),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_another_config_is_refused(again: Path, overrides: list[str], message: str):
    """A change that affects the weights is refused with the old and the new value, and no file changes."""
    before = contents(Path("out"))
    with pytest.raises(UserError, match=message):
        fastpref.train(again, [*SAME, *overrides], resume=True)
    assert contents(Path("out")) == before


@pytest.mark.parametrize(
    "overrides",
    [["output.keep=1"], ["log.every=2"], ["eval.every=1"], ["train.nonfinite=skip"], ["train.tokens_per_microbatch=99"],
     ["train.layout=packed"], ["train.checkpointing=true"], ["train.steps=4"], ["eval.data.0.rows=3"]],
    ids=str,
)  # fmt: skip
def test_a_change_that_does_not_matter_is_taken(again: Path, overrides: list[str]):
    result = fastpref.train(again, [*SAME, *overrides], resume=True)
    assert (result.output_dir / "final").is_dir()


def test_changed_files_are_refused(again: Path):
    """Files with other rows or weights are refused; the same contents under other names are not."""
    data, model = Path("rows.jsonl"), Path("model")
    original = fastpref.load_config(again)
    lines = Path(original.data[0].path).read_text().splitlines()
    data.write_text("\n".join([*lines[:22], lines[30]]))
    with pytest.raises(UserError, match=r"training rows .*\n  data\.0\.path: '.*train\.jsonl' → '.*rows\.jsonl'"):
        fastpref.train(again, [*SAME, "data.0.path=rows.jsonl"], resume=True)
    data.write_text("\n".join(lines))
    shutil.copytree(original.model.name, model)
    moved = [*SAME, "data.0.path=rows.jsonl", "model.name=model"]
    fastpref.train(again, moved, resume=True)
    tensors = load_file(model / "model.safetensors")
    save_file({name: t * 1.01 for name, t in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="the model's weights are not those"):
        fastpref.train(again, moved, resume=True)


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("out/checkpoints/step-7", "there is no such folder"),
        ("out/final", "this is no checkpoint"),
        ("out/checkpoints/step-2", "step-3 comes after it and would be lost.*--force"),
    ],
)
def test_a_checkpoint_that_cannot_be_taken(again: Path, resume: str, message: str):
    with pytest.raises(UserError, match=message):
        fastpref.train(again, SAME, resume=resume)


def test_where_a_run_is_looked_for(again: Path, monkeypatch: pytest.MonkeyPatch):
    """`resume=True` takes output.dir or the last numbered folder; a run's folder means its newest checkpoint."""
    assert fastpref.train(again, SAME, resume="out").output_dir == Path("out")
    fastpref.train(again, SAME, resume="out/checkpoints/step-2", force=True)
    assert [row["step"] for row in rows(Path("out"))] == [0, 1, 2, 3, 3]
    text = again.read_text().replace('dir = "out"\n', "")
    again.write_text(text)
    with pytest.raises(UserError, match="there is no run in runs/cfg-dpo"):
        fastpref.train(again, SAME, resume=True)
    Path("runs/cfg-dpo").mkdir(parents=True)
    shutil.copytree("out", "runs/cfg-dpo-2")
    assert fastpref.train(again, SAME, resume=True).output_dir == Path("runs/cfg-dpo-2")
    shutil.rmtree("runs/cfg-dpo-2/checkpoints")
    with pytest.raises(UserError, match=r"no checkpoint in runs/cfg-dpo-2/checkpoints"):
        fastpref.train(again, SAME, resume=True)
