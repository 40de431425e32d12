"""Reference log-probabilities computed before training: they are right, computed once, and kept for one model only."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref.data.batch import PreferenceBatch, collate, completion_key
from fastpref.data.example import Example
from fastpref.data.mismatched import with_mismatched
from fastpref.model.load import load_model
from fastpref.step import precompute
from fastpref.step.logprob_store import LogprobStore
from fastpref.step.precompute import Precomputed, reference_folder
from tests.support.paths import QUICKSTART
from tests.support.tiny import config_for, examples, save_model, sharing_lists

CPU = torch.device("cpu")
PLAN = {"budget": 90, "device": CPU, "pad_token_id": 0}


class Counting:
    """A reference that counts completions, and gives each token a number that depends only on its content."""

    def __init__(self) -> None:
        self.completions = 0

    def __call__(self, batch: PreferenceBatch) -> Tensor:
        self.completions += len(batch.keys)
        return -(batch.of_tokens(batch.targets).float() + batch.offsets / 100)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
@pytest.mark.parametrize("looked_up", ["tree", "packed", "padded"])
@pytest.mark.parametrize("given", [examples(9), sharing_lists(9)], ids=["pairs", "lists"])
def test_any_batch_finds_its_numbers(layout, looked_up, given: list[Example], tmp_path: Path):
    """Whatever the layout and order of the precomputation and of the lookup, every token gets its own number."""
    found = Precomputed(Counting(), LogprobStore(tmp_path / "r"))
    found.complete(given, layout=layout, **PLAN)
    for part in ([8, 1, 4], [0], [3, 2]):
        batch = collate([given[i] for i in part], looked_up)
        assert torch.equal(found(batch), Counting()(batch))


def test_each_completion_is_computed_once(tmp_path: Path):
    """A completion is computed once, even if rows repeat, KTO pairs it with another prompt, or a later run needs it."""
    rows = examples(7, single=True)
    first = Counting()
    found = Precomputed(first, LogprobStore(tmp_path / "r"))
    asked = [*with_mismatched(rows[:4]), *rows, *with_mismatched(rows[:4])]
    assert found.complete(asked, layout="tree", **PLAN) == first.completions == 7 + 4
    batch = collate(with_mismatched(rows[:4]), "tree")
    assert torch.equal(found(batch), Counting()(batch))
    again = Counting()
    later = Precomputed(again, LogprobStore(tmp_path / "r"))
    assert later.complete(asked, layout="tree", **PLAN) == again.completions == 0
    assert torch.equal(later(batch), found(batch))


def test_a_stopped_pass_goes_on_where_it_was(tmp_path: Path):
    """After a stop, what was written is kept and only the rest is computed."""
    given = examples(6)
    Precomputed(Counting(), LogprobStore(tmp_path / "r")).complete(given[:4], layout="tree", **PLAN)
    rest = Counting()
    found = Precomputed(rest, LogprobStore(tmp_path / "r"))
    assert found.complete(given, layout="tree", **PLAN) == rest.completions == 4
    assert torch.equal(found(collate(given, "tree")), Counting()(collate(given, "tree")))


@pytest.mark.parametrize("harm", ["cut", "garbage"])
def test_a_harmed_file_is_computed_again(harm: str, tmp_path: Path):
    """A damaged file is named, and its numbers are computed again."""
    given = examples(4)
    Precomputed(Counting(), LogprobStore(tmp_path / "r")).complete(given, layout="tree", **PLAN)
    (file,) = (tmp_path / "r").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9] if harm == "cut" else b"\0" * 200)
    found = Precomputed(Counting(), LogprobStore(tmp_path / "r"))
    assert str(file) in found.store.notes[0]
    assert found.complete(given, layout="tree", **PLAN) == 8
    assert Precomputed(Counting(), LogprobStore(tmp_path / "r")).complete(given, layout="tree", **PLAN) == 0


def test_a_folder_that_cannot_be_written_costs_only_the_file(tmp_path: Path):
    """If the folder cannot be written, the run continues with its numbers in memory and a note."""
    (tmp_path / "r").write_text("a file is in the way")
    found = Precomputed(Counting(), LogprobStore(tmp_path / "r"))
    given = examples(3)
    assert found.complete(given, layout="tree", **PLAN) == 6
    assert "not kept" in found.store.notes[0]
    assert torch.equal(found(collate(given, "tree")), Counting()(collate(given, "tree")))


def test_the_key_knows_where_the_prompt_ends():
    """The same tokens with the prompt ending elsewhere are another completion."""
    keys = {
        completion_key([1, 2], [3]),
        completion_key([1], [2, 3]),
        completion_key([1, 2], [4]),
        completion_key([], [1, 2, 3]),
    }
    assert len(keys) == 4


def test_another_model_never_finds_these_numbers(tmp_path: Path):
    """Other weights, dtypes or config files give other folders; the same model elsewhere has the same folder."""
    folders = set()
    for name, seed in (("a", 0), ("b", 1)):
        config = config_for(save_model("llama", tmp_path / name, seed=seed))
        folders.add(reference_folder(config, load_model(config, CPU)))
    half = config_for(tmp_path / "a", "model.dtype=bfloat16", "lora={}")
    folders.add(reference_folder(half, load_model(half, CPU)))
    settings = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-5}))
    changed = config_for(tmp_path / "b")
    folders.add(reference_folder(changed, load_model(changed, CPU)))
    assert len(folders) == 4
    same = config_for(save_model("llama", tmp_path / "c", seed=0))
    assert reference_folder(same, load_model(same, CPU)) in folders


def test_another_precision_never_finds_these_numbers(llama: Path, monkeypatch: pytest.MonkeyPatch):
    """One set of float32 weights has other numbers with each mixed precision that a config and a card give it."""
    folders = set()
    for dtype, supported in (("auto", True), ("float32", True), ("auto", False)):
        config = config_for(llama, f"model.dtype={dtype}")
        loaded = load_model(config, CPU)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, supported=supported: supported)
            folders.add(reference_folder(config, loaded))
    folders.add(reference_folder(config_for(llama, "model.dtype=float32"), load_model(config_for(llama), CPU)))
    assert len(folders) == 3  # the last one is on a CPU, in float32 too


def test_another_computation_never_finds_these_numbers(llama: Path, monkeypatch: pytest.MonkeyPatch):
    """Other attention, liger's kernels, TF32 products and an older version of the format are kept apart."""
    config = config_for(llama)
    loaded = load_model(config, CPU)
    folders = {reference_folder(config, loaded), reference_folder(config, replace(loaded, liger=True))}
    with monkeypatch.context() as patch:
        patch.setattr(precompute, "VERSION", precompute.VERSION - 1)
        folders.add(reference_folder(config, loaded))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        folders.add(reference_folder(config, loaded))
    loaded.model.set_attn_implementation("eager")
    folders.add(reference_folder(config, loaded))
    assert len(folders) == 5


@pytest.mark.parametrize(("kind", "count"), [("llama", 1), ("llama-dynamic", 2), ("phi3-longrope", 2)])
def test_numbers_that_go_by_the_longest_row_are_kept_apart(kind: str, count: int, tmp_path: Path):
    """If RoPE depends on the length, another tokens.max_length gives another folder."""
    save_model(kind, tmp_path)
    configs = [config_for(tmp_path, f"tokens.max_length={length}") for length in (64, 128)]
    assert len({reference_folder(config, load_model(config, CPU)) for config in configs}) == count


@pytest.mark.parametrize(
    ("method", "model"), [("dpo", "lora"), ("dpo", "full"), ("kto", "lora"), ("ipo", "full")], ids="-".join
)
def test_a_run_is_the_same(method: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Precomputed and live references give the same metrics at every step."""
    monkeypatch.chdir(tmp_path)
    text = QUICKSTART.read_text().replace("quickstart/", f"{QUICKSTART.parent}/quickstart/")
    if model == "full":
        text = text[: text.index("[lora]")] + text[text.index("[loss]") :]
    Path("cfg.toml").write_text(text)
    logged = []
    for mode in ("adapter" if model == "lora" else "copy", "precompute"):
        result = fastpref.train(
            "cfg.toml",
            [f'loss={{type="{method}"}}', "train.steps=3", "train.batch=6", "eval.samples=0",
             f"reference.mode={mode}", f"output.dir={mode}", "train.learning_rate=1e-3"],
        )  # fmt: skip
        lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        logged.append([{k: v for k, v in row.items() if not k.endswith("per_second")} for row in rows])
    for live, looked_up in zip(*logged, strict=True):
        assert looked_up == pytest.approx(live, rel=1e-4, abs=1e-5)
