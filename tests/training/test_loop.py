"""Whole runs with the quickstart's model: what they write, what they print, and how they stop."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastpref
from fastpref.errors import UserError
from tests.support.paths import QUICKSTART, QUICKSTART_MODEL, QUICKSTART_ROWS

METHODS = ("dpo", "ipo", "kto", "orpo", "simpo", "cpo", "pl", "lipo", "sft")
ALWAYS = {
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "rewards/length_correlation", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected",
    "entropy", "mean_token_accuracy",
}  # fmt: skip
IMITATED = {"loss", "nll_loss", "perplexity", "entropy", "mean_token_accuracy"}  # by SFT
TRAINING = {"step", "grad_norm", "learning_rate", "tokens_per_second", "pairs_per_second"}
PAIRS = {"logps/accuracies"}
EXTRA = {
    "orpo": PAIRS | {"nll_loss", "log_odds_ratio", "log_odds_chosen"}, "kto": {"kl"}, "cpo": PAIRS | {"nll_loss"},
    "pl": PAIRS | {"rewards/kendall_tau"}, "lipo": PAIRS | {"rewards/kendall_tau"},
}  # fmt: skip


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_the_quickstart(elsewhere: Path, method: str):
    """A short run of any method writes finite metrics, evaluates first and last, and saves a loadable adapter."""
    result = fastpref.train(QUICKSTART, [f"loss.type={method}", "train.steps=3", "eval.every=2", "train.batch=4"])
    assert result.output_dir == Path("runs") / f"quickstart-{method}"
    logged = rows(result.output_dir)
    names = IMITATED if method == "sft" else ALWAYS | EXTRA.get(method, PAIRS)
    assert [(row["step"], "eval/loss" in row) for row in logged] == [
        (0, True), (1, False), (2, False), (2, True), (3, False), (3, True),
    ]  # fmt: skip
    for row in logged:
        if "eval/loss" in row:
            assert set(row) == {"step"} | {f"eval/{name}" for name in names}
        else:
            # KTO's four rows may all have the same label
            assert set(row) == names | TRAINING or method == "kto"
        assert all(math.isfinite(value) for value in row.values())
    assert result.eval_metrics == {k: v for k, v in logged[-1].items() if k != "step"}
    assert result.metrics["loss"] == logged[-2]["loss"]
    again = fastpref.load_config(result.output_dir / "config.toml")
    assert again.loss.type == method
    base = AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL)
    assert PeftModel.from_pretrained(base, result.output_dir / "final").peft_config
    assert AutoTokenizer.from_pretrained(result.output_dir / "final").chat_template


def test_the_quickstart_is_learnt(elsewhere: Path):
    """Held-out accuracy rises from chance to nearly all, and the reward margins rise."""
    result = fastpref.train(QUICKSTART)
    evaluations = [row for row in rows(result.output_dir) if "eval/loss" in row]
    assert evaluations[0]["eval/rewards/accuracies"] == 0.5
    assert evaluations[-1]["eval/rewards/accuracies"] > 0.9
    assert evaluations[-1]["eval/rewards/margins"] > evaluations[0]["eval/rewards/margins"] + 0.5


@pytest.mark.parametrize("method", METHODS)
def test_margins_rise_on_a_repeated_batch(elsewhere: Path, method: str):
    """Trained on the same few rows again and again, every method raises their margins, and SFT their likelihood."""
    result = fastpref.train(
        QUICKSTART, [f"loss.type={method}", "train.steps=12", "train.batch=8", "data.0.rows=8", "eval.data=[]"]
    )
    logged = rows(result.output_dir)
    if method == "sft":
        assert logged[-1]["nll_loss"] < 0.97 * logged[0]["nll_loss"]
    else:
        assert logged[-1]["rewards/margins"] > logged[0]["rewards/margins"]


def test_full_fine_tuning_is_loadable_by_transformers(elsewhere: Path):
    """Without [lora] the whole model is trained and saved, and transformers loads it without fastpref's attention."""
    config = elsewhere / "full.toml"
    config.write_text(
        f'[model]\nname = "{QUICKSTART_MODEL}"\n[[data]]\npath = "{QUICKSTART_ROWS}"\n'
        '[train]\nsteps = 2\nbatch = 4\nlearning_rate = 1e-3\n[output]\ndir = "out"\n'
    )
    result = fastpref.train(config)
    saved = json.loads((result.output_dir / "final" / "config.json").read_text())
    assert "fastpref" not in json.dumps(saved)
    trained = AutoModelForCausalLM.from_pretrained(result.output_dir / "final")
    original = AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL)
    assert not torch.equal(trained.lm_head.weight, original.lm_head.weight)
    assert not list((result.output_dir / "final").glob("*.bin"))


def test_runs_repeat_themselves(elsewhere: Path):
    """The same config and seed give the same metrics, whatever ran before."""
    torch.manual_seed(99)
    first = fastpref.train(QUICKSTART, ["train.steps=3"])
    torch.manual_seed(7)
    second = fastpref.train(QUICKSTART, ["train.steps=3"])
    assert second.output_dir == Path("runs/quickstart-dpo-2")
    assert first.eval_metrics == second.eval_metrics


def test_a_run_from_the_cache_is_the_run_without_it(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Fresh and cached tokens give the same metrics, and `cache=False` does not create the folder."""
    monkeypatch.setenv("FASTPREF_CACHE", str(elsewhere / "cache"))
    found = []
    for cache in (False, True, True):
        found.append(fastpref.train(QUICKSTART, ["train.steps=2"], cache=cache).eval_metrics)
        assert (elsewhere / "cache").exists() == cache
    assert found[0] == found[1] == found[2]
    assert capsys.readouterr().out.count("from the cache") == 1


def test_an_occupied_folder_is_kept(elsewhere: Path):
    """An output.dir that is not empty is refused; --force replaces a run, but no other folder."""
    fastpref.train(QUICKSTART, ["train.steps=1", "output.dir=here"])
    before = (Path("here") / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="--force"):
        fastpref.train(QUICKSTART, ["train.steps=2", "output.dir=here"])
    assert (Path("here") / "metrics.jsonl").read_text() == before
    fastpref.train(QUICKSTART, ["train.steps=2", "output.dir=here"], force=True)
    assert rows(Path("here"))[-1]["step"] == 2
    other = Path("other")
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no run"):
        fastpref.train(QUICKSTART, ["output.dir=other"], force=True)
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.0.path=missing.jsonl", "missing.jsonl"),
        ("model.name=./no-model", "no-model"),
        ("tokens.chat_template=./none.jinja", "none.jinja"),
        ("tokens.max_length=2", "0 of 246 rows used, 246 dropped: without room for their question"),
    ],
)
def test_mistakes_write_nothing(elsewhere: Path, override: str, message: str):
    """A mistake in the config is reported before anything is written."""
    with pytest.raises(UserError, match=message):
        fastpref.train(QUICKSTART, [override, "train.steps=1", "train.batch=2"])
    assert not list(elsewhere.iterdir())
