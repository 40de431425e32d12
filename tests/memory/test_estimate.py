"""`fastpref estimate` matches real runs, and proposes changes that make a step fit."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

import fastpref
import fastpref.memory.estimate as estimates
import fastpref.memory.process as processes
from fastpref.config import load_config
from fastpref.config.losses import KTO
from fastpref.data.cache import load_examples
from fastpref.data.longest import longest_of, longest_possible
from fastpref.memory.estimate import CARDS, Estimator, fit, proposal, usable
from fastpref.memory.measured import StepPeak
from fastpref.memory.process import Band, Card, Verdict, process
from fastpref.memory.step import StepMemory
from fastpref.memory.streaming import StreamedStep
from fastpref.model.load import load_model
from fastpref.model.tokenizer import load_tokenizer
from fastpref.sizes import GIB
from tests.support.command_line import run_command, succeed
from tests.support.counts import CONFIGS, compared, save_families
from tests.support.paths import QUICKSTART, QUICKSTART_MODEL, QUICKSTART_ROWS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LORA = "lora={rank=4}"


def qwen2(vocabulary: int, hidden: int, inner: int, layers: int, **options: Any) -> Qwen2Config:
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, **options)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_families(tmp_path_factory.mktemp("families"))


def write(folder: Path, model: Path, data: Path = QUICKSTART_ROWS) -> Path:
    path = folder / "cfg.toml"
    path.write_text(
        f'[model]\nname = "{model.as_posix()}"\n[[data]]\npath = "{data.as_posix()}"\nrows = 24\n'
        "[tokens]\nmax_length = 128\n[train]\nbatch = 6\nsteps = 4\n"
    )
    return path


def estimator(path: Path, device: torch.device, *overrides: str) -> Estimator:
    return Estimator(lambda more: load_config(path, [*overrides, *more]), device)


@pytest.mark.parametrize(("family", "overrides"), CONFIGS[::3], ids=str)
def test_an_estimate_is_what_a_run_takes(families: dict[str, Path], tmp_path: Path, family: str, overrides: list[str]):
    """An estimate is within 2 percent of the counted peak of a real run's steps, whatever the method, the layout, the
    adapters, the weights and the family. `python -m tests.support.counts` has the others of these configs."""
    assert abs(compared(tmp_path, families[family], overrides).error) < 0.02


def test_the_largest_microbatch_of_the_data(tmp_path: Path):
    """The largest micro-batch stays within the token budget, except for a single longer example."""
    path = write(tmp_path, QUICKSTART_MODEL)
    for overrides in ([], ["loss.type=kto"], ["train.layout=padded"], ["train.tokens_per_microbatch=90"]):
        counted = estimator(path, CPU, *overrides)
        config, largest = counted.config, counted.microbatch(counted.config)
        tokens = sum(len(e.prompt) + sum(map(len, e.completions)) for e in largest.examples)
        if config.train.layout != "padded" and not isinstance(config.loss, KTO):
            assert tokens == largest.tokens
        assert largest.tokens <= max(config.tokens_per_microbatch, max(map(_longest, largest.examples)))
        assert "24 rows" in largest.source or isinstance(config.loss, KTO)
        possible = longest_possible(config)
        assert largest.tokens <= max(possible.tokens, config.tokens_per_microbatch)


def _longest(example: Any) -> int:
    return len(example.completions) * len(example.prompt) + sum(map(len, example.completions))


@pytest.mark.parametrize("chats", [False, True], ids=["text", "chats"])
def test_a_smaller_max_length_cuts_the_rows(tmp_path: Path, chats: bool):
    """For a smaller tokens.max_length, the longest micro-batch is counted as if tokenised with it; for chats, whose
    turns are never split, it may be longer."""
    path = write(tmp_path, QUICKSTART_MODEL)
    prompts = [[{"role": "user", "content": "a b " * (n // 4)}] if chats else "a b c d e f " * n for n in range(1, 25)]
    rows = [{"prompt": p, "chosen": "x y " * (30 - n), "rejected": f"z {n}"} for n, p in enumerate(prompts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = [f"data.0.path={tmp_path}/rows.jsonl"]
    smaller = load_config(path, [*changed, "tokens.max_length=60"])
    estimators = (estimator(path, CPU, *changed, *more) for more in ([], ["tokens.max_length=60"]))
    examples = [e._examples for e in estimators if e._examples is not None]
    assert list(map(len, examples)) == [24, 24]
    cut, tokenised = (longest_of(smaller, e, "tree")[0].tokens for e in examples)
    assert cut >= tokenised if chats else cut == tokenised


def memory(gib: int, *, checkpointed: int, layers: int) -> StepMemory:
    return StepMemory(gib << 30, 0, 0, 0, 0, 0, 0, 0, layers, checkpointed, "tree")


def test_cards_and_layers():
    """A card with enough memory checkpoints no layer; a smaller one as few as linear interpolation allows. A step
    fits if the most that its process takes is less than the least that such a card has, does not fit if the least is
    more than the most, and is uncertain between."""
    most, least = memory(40, checkpointed=0, layers=31), memory(10, checkpointed=31, layers=31)
    by_card = {card: fit(most, least, Card.named(card)) for card in (*CARDS, 10, 11, 13)}
    checkpointed = {card: gpu.checkpointed for card, gpu in by_card.items() if gpu.fits}
    assert checkpointed == {13: 29, 16: 26, 24: 19, 48: 0, 80: 0}
    assert [card for card, gpu in by_card.items() if gpu.verdict is Verdict.UNCERTAIN] == [12, 11]
    assert [card for card, gpu in by_card.items() if gpu.verdict is Verdict.DOES_NOT] == [4, 6, 8, 10]
    assert all(fit(least, least, Card.named(card)).checkpointed == 31 for card in (16, 80))
    streamed = StreamedStep(replace(memory(2, checkpointed=31, layers=31), streamed=31, layer=GIB // 4, host=8 * GIB))
    by_card = {card: fit(most, least, Card.named(card), streamed) for card in (2, 3, 4, 10, 12)}
    assert [gpu.verdict.value for gpu in by_card.values()] == ["does not fit", "uncertain", *["fits"] * 2, "uncertain"]
    assert [gpu.streamed for gpu in by_card.values()] == [31, 31, 25, 3, 0]


@pytest.mark.parametrize(
    ("room", "overrides", "wanted"),
    [
        (0.9, ["train.checkpointing=false"], {"train.checkpointing=auto"}),
        (0.9, [LORA, "reference.mode=copy"], {"reference.mode=auto"}),
        (0.75, ["loss.type=orpo"], {"train.optimizer=adamw_8bit"}),
    ],
)
def test_the_smallest_change_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: float, overrides: list[str], wanted: set[str]
):
    """For a card that is slightly too small, the first sufficient change in the order of costs is proposed, and the
    step counted with it fits."""
    qwen2(4096, 256, 1024, 8).save_pretrained(tmp_path)
    overrides = ["tokens.max_length=256", *overrides]
    monkeypatch.setattr(processes, "LIBRARIES", Band(0, 0, 0))
    before = estimator(write(tmp_path, tmp_path), CUDA, *overrides)
    allowed = int(room * process(before.take()).high)
    change = proposal(before, Card(1, allowed, allowed))
    assert change.fits
    assert set(change.overrides) == wanted
    assert process(estimator(tmp_path / "cfg.toml", CUDA, *overrides, *change.overrides).take()).high <= allowed


def test_what_cannot_fit(tmp_path: Path):
    """If no change suffices, the proposal says that nothing fits."""
    qwen2(4096, 64, 64, 2).save_pretrained(tmp_path)
    assert not proposal(estimator(write(tmp_path, tmp_path), CUDA), Card(1, 1, 1)).fits


def test_the_command(tmp_path: Path):
    """A folder with only a config.json suffices; the table adds up, and --json has the same numbers."""
    qwen2(500, 64, 128, 4).save_pretrained(tmp_path)
    path = write(tmp_path, tmp_path, data=tmp_path / "none.jsonl")
    result = succeed("estimate", path, LORA, "--compare")
    assert result.err == ""
    refused = run_command("estimate", path, LORA, "loss.type=pl", "--compare")
    assert (refused.status, "TRL has no loss of lists such as pl" in refused.err) == (2, True)
    assert "the data are not on this machine" in result.out
    assert "255 tokens at once (from tokens.max_length = 128)" in result.out
    reference = "the same weights with the adapters off, computed once for each completion and remembered"
    assert f"reference: {reference}\n" in result.out
    assert "   8 GB  fits without gradient checkpointing" in result.out
    assert "TRL 1.16   Unsloth 2026.10   fastpref" in result.out
    counted = succeed("estimate", path, LORA, "--compare", "--json").json
    assert sum(counted["step"]["bytes"].values()) == counted["step"]["total"]
    assert counted["step"]["checkpointed"] == counted["step"]["layers"] == 4
    assert counted["uncheckpointed"]["checkpointed"] == 0
    assert (counted["card"], counted["fit"]["verdict"]) == (24, "fits")
    assert counted["reference"] == reference
    assert counted["changes"] is None
    assert counted["trl"]["total"] > 0 == counted["trl"]["host"] < counted["unsloth"]["host"]
    band = counted["step"]["process"]
    assert band["low"] < counted["step"]["total"] < band["likely"] < band["high"]
    fitting = {"card": 4, "verdict": "fits", "fits": True, "checkpointed": 0, "streamed": 0, "host": 0}
    assert counted["cards"][0] == fitting
    assert (counted["step"]["host"], counted["streamed"]) == (0, None)


def test_the_command_says_which_cards_need_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A GPU that is too small streams by itself, and needs no change for that; host memory is counted apart. With
    `model.streaming` false the command proposes it."""
    qwen2(500, 1024, 4096, 6).save_pretrained(tmp_path)
    path = write(tmp_path, tmp_path, data=tmp_path / "none.jsonl")
    monkeypatch.setattr(processes, "LIBRARIES", Band(0, 0, 0))
    monkeypatch.setattr(estimates, "CONTEXT", 0)
    options = ("lora={rank=2}", "loss.type=orpo", "tokens.max_length=16")
    held = estimator(path, CUDA, *options).take()
    small, large = int(0.9 * process(held).low), 2 * process(held).high
    monkeypatch.setattr(Card, "named", lambda size: Card(size, *[small if size == 4 else large] * 2))
    monkeypatch.setattr(estimates, "usable", lambda size: small if size == 4 else large)
    command = ("estimate", path, *options, "--card", "4")
    said = succeed(*command).out
    assert re.search(r"all 6 layers streamed: [\d.]+ MiB and [\d.]+ MiB of host memory, of which a micro-batch ", said)
    assert re.search(r"\n   4 GB  fits with [2-5] streamed layers, and [\d.]+ MiB of host memory\n", said)
    assert re.search(r"\n   6 GB  fits with", said)
    assert "To fit" not in said
    said = succeed(*command, "model.streaming=false").out
    assert "\n   4 GB  does not fit" in said
    assert re.search(r"To fit 4 GB \([\d.]+ MiB, and [\d.]+ MiB of host memory\), add\n  model.streaming=true", said)
    counted = succeed(*command, "model.streaming=true", "--json").json
    assert counted["step"]["streamed"] == counted["streamed"]["streamed"] == 6
    assert counted["step"]["host"] == counted["streamed"]["host"] > counted["step"]["copied"] / 3
    assert [(card["fits"], card["streamed"]) for card in counted["cards"]][1:] == [(True, 2)] * 7


def test_trl_makes_logits_and_copies_them(tmp_path: Path):
    """ORPO in TRL holds float32 logits of all padded positions, their gradient and the supervised term's log-softmax
    (more than 2.5 times the logits); DPO in TRL, which works in tiles, takes less than the logits."""
    qwen2(50_000, 64, 64, 2).save_pretrained(tmp_path)
    path = write(tmp_path, tmp_path, data=tmp_path / "none.jsonl")
    logits = 2 * 128 * 50_000 * 4
    orpo, dpo = (estimator(path, CUDA, LORA, f"loss.type={loss}", "tokens.max_length=128") for loss in ("orpo", "dpo"))
    assert orpo.take_as_trl().activations > 2.5 * logits
    assert dpo.take_as_trl().activations < logits
    assert orpo.take().activations + orpo.take().head < logits
    for step in (orpo, dpo):
        assert step.take_as_unsloth().activations + step.take_as_unsloth().head < logits


def test_others_checkpoint_by_default(tmp_path: Path):
    """The steps of TRL and Unsloth have gradient checkpointing whatever the config says, and Unsloth's keeps the inputs
    of layers in host memory. Both compute supervised losses without all logits at once."""
    qwen2(50_000, 64, 64, 4).save_pretrained(tmp_path)
    path = write(tmp_path, tmp_path, data=tmp_path / "none.jsonl")
    none = estimator(path, CUDA, LORA, "train.checkpointing=false", "loss.type=sft")
    assert none.take().checkpointed == 0
    for theirs in (none.take_as_trl(), none.take_as_unsloth()):
        assert theirs.checkpointed == theirs.layers == 4
    assert (none.take_as_trl().host, none.take_as_unsloth().host) == (0, 4 * 2 * 128 * 64 * 2)
    assert none.take_as_trl().activations < 128 * 50_000 * 4


def test_what_a_run_says_of_its_memory(tmp_path: Path):
    """A run states the estimate and the measured peak of its steps; on a CPU nothing is measured."""
    config = load_config(write(tmp_path, QUICKSTART_MODEL), [LORA])
    loaded = load_model(config, CPU)
    examples = load_examples(config, load_tokenizer(config.model)).train
    peak = StepPeak(CPU)
    peak.start()
    peak.end()
    assert peak.bytes == 0
    counted = estimator(tmp_path / "cfg.toml", CUDA, LORA, "model.liger=false", "model.attention=sdpa").take(layers=0)
    peak.bytes = round(1.02 * (counted.total - counted.overhead))
    assert re.fullmatch(r"memory of a step: estimated .*\(\+2\.0%\)", peak.against_estimate(config, examples, loaded))


@pytest.mark.gpu
def test_a_run_on_a_gpu_says_so(elsewhere: Path, capsys: pytest.CaptureFixture[str]):
    fastpref.train(QUICKSTART, ["train.steps=2"])
    assert "memory of a step: estimated" in capsys.readouterr().out


def test_nine_tenths_of_a_card_are_usable():
    assert usable(10) == (9 * 2**30)
