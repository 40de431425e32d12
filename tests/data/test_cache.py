"""Cached examples equal tokenised ones; only what changes them causes a cache miss; damage is repaired."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastpref.config import Config, load_config
from fastpref.data import cache, fingerprint
from fastpref.data.cache import Tokenized, load_examples
from fastpref.data.example import Example, Origin
from fastpref.data.sources import prepare
from fastpref.data.table import in_memory
from fastpref.data.template.named import KNOWN
from fastpref.data.tokenize import BATCH, use_chat_template
from fastpref.errors import UserError
from tests.support.chats import tokenize
from tests.support.lists import of_lists
from tests.support.toy_tokenizers import CHATML, PLAIN, chatml, toy_tokenizer

USER = {"role": "user", "content": "Où ça?"}
ROWS = [
    {"prompt": [USER], "chosen": "là 🎉", "rejected": "no"},
    {"prompt": "q" * 27, "chosen": "yes", "rejected": "a rather long answer, which is cut"},
    {"prompt": "q", "chosen": "same", "rejected": "same"},
    {"prompt": "r", "chosen": "yes", "rejected": "no"},
    {"prompt": "r", "chosen": "yes", "rejected": "no"},
]
LISTS = [
    {"prompt": "q", "responses": ["a", "bc", "def"], "scores": [1, 3.5, 2], "weight": 0.5},
    {"prompt": "r", "responses": ["gh", "i"], "scores": [-1, 2], "weight": 2},
]
CONFIG = """
[model]
name = "m"
[[data]]
path = "pairs.jsonl"
[[eval.data]]
path = "heldout.jsonl"
[tokens]
max_length = 64
duplicates = "drop"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a config with its data, set an empty cache, and return the folder."""
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cfg.toml").write_text(CONFIG)
    write(tmp_path / "pairs.jsonl", ROWS)
    write(tmp_path / "heldout.jsonl", ROWS[:1])
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "cfg.toml", overrides)


def load(folder: Path, *overrides: str, tokenizer: PreTrainedTokenizerBase | None = None, **how: Any) -> Tokenized:
    loaded = config(folder, *overrides)
    tokenizer = tokenizer or chatml()
    use_chat_template(tokenizer, loaded.tokens.chat_template)
    return load_examples(loaded, tokenizer, **how)


def is_hit(result: Tokenized) -> bool:
    return any("from the cache" in note for note in result.notes)


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache" / "tokens").iterdir() if path.is_dir())


def everything(result: Tokenized) -> Any:
    notes = [note for note in result.notes if "cache" not in note]
    return list(result.train), list(result.heldout), result.counts, result.duplicates, result.left_out, notes


# --- The same examples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_cached_run_is_an_uncached_one(folder: Path, loss: str):
    """Examples, counts and notes are those of `tokenize`, without the cache and when it is written or read."""
    override = f"loss.type={loss}"
    earlier = [{"role": "user", "content": "q" * 30}, {"role": "assistant", "content": "ok"}]
    long = {"prompt": [*earlier, USER], "chosen": "yes", "rejected": "a rather long answer, which is cut"}
    write(folder / "pairs.jsonl", [*ROWS, long])
    rows, counts = tokenize(prepare(config(folder, override)).train, chatml(), config(folder).tokens)
    assert any(row.row.prompt_cut for row in rows)
    assert counts.kept == len(rows) > 0
    result = [load(folder, override, cache=False), load(folder, override), load(folder, override)]
    assert [is_hit(one) for one in result] == [False, False, True]
    assert list(result[0].train) == rows
    assert result[0].counts["train"] == counts
    assert (result[0].duplicates, result[0].left_out) == (1, 0)
    for other in result[1:]:
        assert everything(other) == everything(result[0])


def test_examples_are_a_sequence(folder: Path):
    """Length, indices from either end, slices, and lengths without decoding agree with the list of all examples."""
    result = load(folder).train
    rows = list(result)
    assert all(isinstance(row, Example) and type(row.prompt[0]) is int for row in rows)
    assert len(result) == len(rows) == 3
    assert [result[i] for i in range(-3, 3)] == rows * 2
    assert result[1:] == rows[1:]
    assert result[::-1] == rows[::-1]
    for outside in (3, -4):
        with pytest.raises(IndexError):
            result[outside]
    assert result.prompt_lengths.tolist() == [len(row.prompt) for row in rows]
    assert result.completion_lengths.tolist() == [[len(ids) for ids in row.completions] for row in rows]
    assert result.labels is None


@pytest.mark.parametrize("cached", [True, False])
def test_rows_of_several_batches_stay_in_order(folder: Path, cached: bool):
    """If rows are written in several batches, each is there once, in order, with its line, label and lengths."""
    count = 2 * BATCH + 1
    write(
        folder / "pairs.jsonl",
        [{"prompt": f"{at}", "completion": "x" * (1 + at % 7), "label": at % 3 == 0} for at in range(count)],
    )
    result = load(folder, "loss.type=kto", cache=cached).train
    assert [Path(row.row.place).name for row in result] == [f"pairs.jsonl:{at + 1}" for at in range(count)]
    assert [row.row.question for row in result] == [str(at) for at in range(count)]
    assert result.labels is not None
    assert result.labels.tolist() == [row.label for row in result] == [at % 3 == 0 for at in range(count)]
    assert result.completion_lengths.tolist() == [[2 + at % 7] for at in range(count)]


def test_what_is_not_scored_is_kept(folder: Path):
    """The cache keeps spans of context, the number of cut turns and their lengths."""
    turns = [{"role": "user", "content": "q"}]
    several = [{"role": "assistant", "content": "a"}, *turns, {"role": "assistant", "content": "b"}]
    write(
        folder / "pairs.jsonl",
        [
            {"prompt": turns, "chosen": several, "rejected": "no"},
            {"prompt": "q", "chosen": "yes", "rejected": "no"},
            {"prompt": [*turns, {"role": "assistant", "content": "x" * 80}, *turns], "chosen": "c", "rejected": "d"},
        ],
    )
    made, again = load(folder, "tokens.max_length=90").train, load(folder, "tokens.max_length=90").train
    assert list(made) == list(again)
    assert [bool(row.contexts) for row in again] == [True, False, False]
    assert [row.row.turns_cut for row in again] == [0, 0, 2]
    assert again.context_lengths.tolist() == [
        [len(ids) - row.scored(which) for which, ids in enumerate(row.completions)] for row in again
    ]


def test_lists_weights_and_margins_are_kept(folder: Path):
    """The cache keeps lists of several lengths with scores and weights, and pairs with margins; `digest` tells them."""
    write(folder / "lists.jsonl", LISTS)
    whole = of_lists(config(folder, "data.0.path=lists.jsonl"))
    made, again = (load_examples(whole, chatml()) for _ in range(2))
    assert not is_hit(made)
    assert is_hit(again)
    assert everything(made) == everything(again) == everything(load_examples(whole, chatml(), cache=False))
    assert [(row.scores, row.weight, row.margin) for row in again.train] == [
        ((1, 3.5, 2), 0.5, None),
        ((-1, 2), 2, None),
    ]
    assert [tuple(map(len, row.completions)) for row in again.train] == [(2, 3, 4), (3, 2)]
    assert again.train.completions.tolist() == [3, 2]
    assert again.train.completion_lengths.tolist() == [[2, 3, 4], [3, 2, 0]]
    assert again.train.context_lengths.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert again.train.labels is None
    assert again.train.ranked
    assert not again.heldout.ranked
    assert not is_hit(load(folder, "data.0.path=lists.jsonl"))
    write(folder / "pairs.jsonl", [row | {"margin": 0.25} for row in ROWS])
    assert [row.margin for row in load(folder).train] == [0.25] * 3


def test_a_digest_knows_every_number(folder: Path):
    """`digest` changes with a score, a weight, a margin and the split of tokens, and with nothing else."""

    def digest(*examples: Example) -> str:
        return in_memory([examples]).digest()

    pair = Example([1], ([2, 3], [4]), None, Origin("a"))
    ranked = replace(pair, scores=(1.0, 2.0))
    others = [
        ranked,
        replace(ranked, scores=(2.0, 1.0)),
        replace(pair, weight=2.0),
        replace(pair, margin=2.0),
        replace(pair, margin=0.0),
        replace(pair, completions=([2], [3, 4])),
    ]
    assert len({digest(example) for example in (pair, *others)}) == 1 + len(others)
    assert digest(pair, replace(pair, weight=2.0)) != digest(replace(pair, weight=2.0), pair)
    assert digest(replace(pair, row=Origin("b"))) == digest(pair)


def test_nothing_held_out_is_an_empty_sequence(folder: Path):
    """Without held-out rows the sequence is empty, with a fresh cache and from it."""
    for _ in range(2):
        result = load(folder, "eval.data=[]")
        assert (len(result.heldout), list(result.heldout)) == (0, [])
        assert len(result.heldout.prompt_lengths) == len(result.heldout.completion_lengths) == 0


def test_a_run_of_no_use_is_an_error_and_leaves_no_entry(folder: Path):
    """If no row can be used, every run raises the error, and the cache keeps nothing."""
    write(folder / "pairs.jsonl", ROWS[2:3])
    for _ in range(2):
        with pytest.raises(UserError, match="no training row can be used: 0 of 1 rows used, 1 dropped: with equal"):
            load(folder)
    assert entries(folder) == []


# --- What is another run -------------------------------------------------------------------------------------------


def edit(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


MISSES: dict[str, list[str] | Callable[[Path], None]] = {
    "a row": edit("pairs.jsonl", json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[3]) + "\n"),
    "a held-out row": edit("heldout.jsonl", json.dumps(ROWS[3]) + "\n"),
    "the code of a function": edit("mine.py", "def read(row):\n    return dict(row)\n"),
    "a file of a template": edit("own.jinja", CHATML + " "),
    "another file": ["data.0.path=heldout.jsonl"],
    "format": ["data.0.format=mine:read"],
    "options of a format": ['data.0.format={type="chat_template.default", field_messages="prompt"}'],
    "weight": ["data.0.weight=2"],
    "rows": ["data.0.rows=2"],
    "pairs": ["data.0.path=lists.jsonl", "data.0.pairs=all"],
    "min_difference": ["data.0.path=lists.jsonl", "data.0.min_difference=2"],
    "on_error": ["data.0.on_error=drop"],
    "no held-out rows": ["eval.data=[]"],
    "a fraction": ["eval={fraction=0.5}"],
    "max_length": ["tokens.max_length=63"],
    "max_prompt_length": ["tokens.max_prompt_length=60"],
    "score": ["tokens.score=all"],
    "overlong": ["tokens.overlong=drop"],
    "duplicates": ["tokens.duplicates=keep"],
    "single completions": ["loss.type=kto"],
    "a chat template": ["tokens.chat_template=zephyr"],
}
HITS: dict[str, list[str]] = {
    "nothing": [],
    "learning rate": ["train.learning_rate=1"],
    "another paired loss": ["loss.type=orpo"],
    "beta": ["loss.beta=0.7"],
    "seed, batch, layout": ["train.seed=1", "train.batch=3", "train.layout=packed", "train.tokens_per_microbatch=9"],
    "output": ["output.dir=elsewhere"],
    "adapters": ["lora={rank=2}"],
    "evaluations": ["eval.every=3", "eval.samples=2"],
    "the name of a model with the same tokenizer": ["model.name=n", "model.dtype=float32"],
}
USES = {
    "the code of a function": "data.0.format=mine:read",
    "a file of a template": "tokens.chat_template=own.jinja",
    "pairs": "data.0.path=lists.jsonl",
    "min_difference": "data.0.path=lists.jsonl",
}


@pytest.mark.parametrize("name", MISSES)
def test_what_changes_the_tokens_misses(folder: Path, name: str):
    """Each change of one input of the fingerprint causes a cache miss; undoing it causes a hit."""
    edit("mine.py", "def read(row):\n    return row\n")(folder)
    edit("own.jinja", CHATML)(folder)
    write(folder / "lists.jsonl", LISTS)
    base = [USES[name]] if name in USES else []
    assert not is_hit(load(folder, *base))
    assert is_hit(load(folder, *base))
    change = MISSES[name]
    if callable(change):
        change(folder)
        assert not is_hit(load(folder, *base))
    else:
        assert not is_hit(load(folder, *change))
        assert is_hit(load(folder, *base))
    assert len(entries(folder)) == 2


@pytest.mark.parametrize("name", HITS)
def test_what_does_not_change_the_tokens_hits(folder: Path, name: str):
    """A change of any other setting causes a cache hit."""
    load(folder)
    assert is_hit(load(folder, *HITS[name]))
    assert len(entries(folder)) == 1


def test_a_tokenizer_is_its_content(folder: Path):
    """Tokenizers with the same vocabulary, merges, special tokens and template share an entry; all others do not."""

    def made(template: str = CHATML, **how: Any) -> PreTrainedTokenizerBase:
        return toy_tokenizer(template, **{"eos": "<|im_end|>", "special": ["<|im_start|>"]} | how)

    load(folder, tokenizer=made())
    assert is_hit(load(folder, tokenizer=made()))
    others = [
        made(PLAIN),
        made(merges=[("e", "s")]),
        made(bos="<s>"),
        made(bos="<s>", adds_bos=True),
        made(special=["<|im_start|>", "<more>"]),
    ]
    assert not any(is_hit(load(folder, tokenizer=other)) for other in others)
    same_vocabulary = made()
    same_vocabulary.eos_token = "<|im_start|>"
    assert not is_hit(load(folder, tokenizer=same_vocabulary))


def test_a_later_version_or_library_misses(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Entries of an older fastpref, or of older libraries that render or encode text, are not used."""
    load(folder)
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "VERSION", fingerprint.VERSION + 1)
        assert not is_hit(load(folder))
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "version", lambda name: f"{name} 0")
        assert not is_hit(load(folder))
    assert is_hit(load(folder))


def test_a_template_that_writes_the_date_is_of_the_runs_day(folder: Path):
    """If a template calls `strftime_now`, it renders the day of the run, and the fingerprint includes that day."""
    day, later = date(2026, 11, 26), date(2027, 1, 1)
    dated = f"tokens.chat_template={json.dumps('{{ strftime_now(' + repr('%d %b %Y') + ') }}' + CHATML)}"
    for override, misses in ((dated, True), ("tokens.overlong=drop", False)):
        first = load(folder, override, day=day)
        assert is_hit(load(folder, override, day=later)) != misses
        again = load(folder, override, day=day)
        assert is_hit(again)
        assert everything(again) == everything(first) == everything(load(folder, override, day=day, cache=False))
        written = chatml().decode(first.heldout[0].prompt)
        assert str(written).startswith("26 Nov 2026") == misses


def test_the_ends_of_training_completions_are_kept(folder: Path):
    """The tokens that end uncut training completions are the same without the cache, with it, and from it."""
    by_text = toy_tokenizer(CHATML, eos="</s>", special=["<|im_start|>", "<|im_end|>"])
    texts = f"{CONFIG}[[data]]\npath = 'texts.jsonl'\n"
    write(folder / "texts.jsonl", [{"prompt": "t", "chosen": "yes", "rejected": "no"}])
    (folder / "cfg.toml").write_text(texts)
    ends = {by_text.get_vocab()[token] for token in ("<|im_end|>", "</s>")}  # the ends of the chats and of the texts
    for cached in (False, True, True):
        assert set(load(folder, tokenizer=by_text, cache=cached).ends) == ends
    for name in ("pairs", "heldout"):
        write(folder / f"{name}.jsonl", [{"prompt": "t", "chosen": "yes", "rejected": "no"}])
    assert load(folder, "tokens.max_length=2", tokenizer=by_text).ends == ()


@pytest.mark.parametrize(("second", "wanted"), [("chatml", "chatml"), ("gemma", None), (None, None)])
def test_the_template_of_all_chats_is_kept(folder: Path, second: str | None, wanted: str | None):
    """The template that rendered every chat is recorded, with or without the cache; of two, none is, with a note."""
    write(folder / "pairs.jsonl", [{"messages": [USER], "chosen": "là", "rejected": "no"}])
    write(folder / "more.jsonl", [{"messages": [USER], "chosen": "ici", "rejected": "no"}])
    form = {"pairs": "chatml", "more": second}
    sources = [
        f'{{ path = "{name}.jsonl", format = {{ type = "chat_template.default", chat_template = "{template}" }} }}'
        if template else f'{{ path = "{name}.jsonl" }}'
        for name, template in form.items()
    ]  # fmt: skip
    for cached in (False, True, True):
        result = load(folder, f"data=[{', '.join(sources)}]", cache=cached)
        assert result.chat_template == (KNOWN[wanted] if wanted else None)
        assert any("2 chat templates write" in note for note in result.notes) == (wanted is None)


def test_folders_and_tables_are_known_by_their_content(folder: Path):
    """A folder of save_to_disk and a parquet file cause a hit with the same rows, and a miss with other rows."""
    for path, save in (("saved", "save_to_disk"), ("rows.parquet", "to_parquet")):
        override = f"data.0.path={path}"
        getattr(Dataset.from_list(ROWS[1:]), save)(folder / path)
        assert not is_hit(load(folder, override))
        assert is_hit(load(folder, override))
        getattr(Dataset.from_list(ROWS[1:4]), save)(folder / path)
        assert not is_hit(load(folder, override))


# --- Damage --------------------------------------------------------------------------------------------------------


def _load_in_a_process(folder: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    result = load(folder)
    results.put((is_hit(result), [row.prompt for row in result.train]))


def test_two_processes_make_one_cache(folder: Path):
    """Of several processes that start at once, one makes the tokens and the others read them."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_load_in_a_process, args=(folder, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    result = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert sorted(hit for hit, _ in result) == [False, True, True]
    assert [prompts for _, prompts in result] == [[row.prompt for row in load(folder).train]] * 3
    assert [path.suffix for path in entries(folder)] == [""]


def _stop_while_writing(folder: Path, ready: Any) -> None:
    original = cache.tokenize_batches

    def slow(*arguments: Any):
        yield from original(*arguments)
        ready.set()
        time.sleep(60)

    cache.tokenize_batches = slow
    load(folder)


def test_a_killed_writer_leaves_nothing_that_counts(folder: Path):
    """After a writer is killed with its lock and half a file, the next run does not wait, and makes the whole entry."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_stop_while_writing, args=(folder, ready))
    process.start()
    assert ready.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=60)
    assert [path.suffix for path in entries(folder)] == [".tmp"]
    whole = load(folder)
    assert not is_hit(whole)
    assert everything(load(folder)) == everything(load(folder, cache=False))
    assert [path.suffix for path in entries(folder)] == [""]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _other_columns(path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"prompt": [[1]]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    manifest = path.with_name("manifest.json")
    content = json.loads(manifest.read_text())
    content["files"]["train"] = path.stat().st_size
    manifest.write_text(json.dumps(content))


def _other_count(path: Path) -> None:
    content = json.loads(path.read_text())
    content["counts"]["train"]["kept"] += 1
    path.write_text(json.dumps(content))


HARM: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a truncated file": ("train.arrow", _truncate),
    "an empty file": ("heldout.arrow", lambda path: path.write_bytes(b"")),
    "a file with other bytes": ("train.arrow", lambda path: path.write_bytes(b"x" * path.stat().st_size)),
    "a file with other columns": ("train.arrow", _other_columns),
    "no file": ("train.arrow", Path.unlink),
    "no manifest": ("manifest.json", Path.unlink),
    "a truncated manifest": ("manifest.json", _truncate),
    "a manifest of something else": ("manifest.json", lambda path: path.write_text("[]")),
    "a manifest of another count": ("manifest.json", _other_count),
}


@pytest.mark.parametrize(("file", "harm"), HARM.values(), ids=HARM)
def test_a_harmed_entry_is_made_again(folder: Path, file: str, harm: Callable[[Path], Any]):
    """A damaged entry is not used but made again, with a note, and can be read from then on."""
    good = everything(load(folder))
    (entry,) = entries(folder)
    harm(entry / file)
    result = load(folder)
    assert not is_hit(result)
    assert any(note.startswith("the cache held these tokens, but ") and "made again" in note for note in result.notes)
    assert everything(result) == good
    again = load(folder)
    assert is_hit(again)
    assert everything(again) == good


def test_an_unwritable_folder_is_a_note(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """If nothing can be written, the run continues with the same examples, and a note says why nothing is kept."""
    good = load(folder, cache=False)
    (folder / "file").write_text("")
    monkeypatch.setenv("FASTPREF_CACHE", str(folder / "file" / "cache"))
    result = load(folder)
    assert everything(result)[:3] == everything(good)[:3]
    assert result.notes[-1].startswith(f"the cache in {folder}/file/cache cannot be used, so nothing is kept for later")
    assert (folder / "file").read_text() == ""


def test_a_full_disk_is_a_note_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """If writing fails in the middle, the run continues and removes the partial entry."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    result = load(folder)
    assert "No space left on device" in result.notes[-1]
    assert len(result.train) == 3
    assert entries(folder) == []


def test_no_cache_writes_nothing(folder: Path):
    """Without the cache, its folder is neither created nor read."""
    before = set(folder.rglob("*"))
    load(folder, cache=False)
    assert set(folder.rglob("*")) == before
    load(folder)
    assert not is_hit(load(folder, cache=False))


def test_the_folder_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch):
    """FASTPREF_CACHE names the folder; if it is unset or empty, the folder is ~/.cache/fastpref."""
    monkeypatch.setenv("HOME", "/home/someone")
    default = "/home/someone/.cache/fastpref"
    for value, wanted in (("/data/cache", "/data/cache"), ("~/c", "/home/someone/c"), ("", default), (None, default)):
        monkeypatch.delenv("FASTPREF_CACHE", raising=False)
        if value is not None:
            monkeypatch.setenv("FASTPREF_CACHE", value)
        assert cache.cache_folder() == Path(wanted)
