"""`fastpref preview` prints what a step computes: texts, marks, layouts, and numbers that can be checked by hand."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from fastpref.config import Config, load_config
from fastpref.data.batch import collate
from fastpref.data.cache import load_examples
from fastpref.data.example import Example, Origin
from fastpref.data.plan import Pass, StepPlan, plan_step, wanted_layout
from fastpref.preview.numbers import LAYOUTS, good_share, lengths, prompt_share, step_tokens
from fastpref.preview.preview import preview, read
from fastpref.preview.text import decoded, visible
from tests.support.lists import of_lists
from tests.support.paths import ROOT
from tests.support.toy_tokenizers import chatml, gemma, plain, toy_tokenizer

USER = {"role": "user", "content": "Hi"}
OTHER = {"prompt": [{"role": "user", "content": "Ho"}], "chosen": "Yes", "rejected": "N"}
SYSTEM = {"role": "system", "content": "You answer briefly, please."}
QUESTION = {"role": "user", "content": "What is the capital of France?"}
PAIR = {"prompt": [USER], "chosen": "Yes.", "rejected": "No"}
SINGLES = [
    {"prompt": [USER], "completion": "Yes.", "label": True},
    {"prompt": [USER], "completion": "No", "label": False},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))
    return tmp_path


def config_of(
    folder: Path, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase | None = None, *overrides: str
) -> Config:
    """Return a config with these rows, and with a model folder that has only a tokenizer."""
    (tokenizer or chatml()).save_pretrained(folder / "m")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "cfg.toml").write_text('[model]\nname = "m"\n[[data]]\npath = "rows.jsonl"\n[train]\nbatch = 2\n')
    return load_config(folder / "cfg.toml", overrides)


def shown(config: Config, *, colour: bool = False, width: int = 80, **how: Any) -> str:
    """Return the printed text, without spaces at the ends of lines."""
    system: Any = "standard" if colour else None
    console = Console(file=io.StringIO(), width=width, color_system=system, force_terminal=colour, highlight=False)
    preview(config, console=console, **how)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def part(text: str, title: str) -> str:
    """Return the lines below a title, up to the next one."""
    return re.split(r" ─{3,}\n", text.partition(title)[2].partition("\n")[2])[0].rpartition("\n")[0].strip("\n")


# --- Texts ---------------------------------------------------------------------------------------------------------

ROW_TEXTS: dict[str, tuple[list[dict[str, Any]], list[str], str]] = {
    "a pair": (
        [PAIR],
        [],
        """\
prompt       <|im_start|>user↵
21 tokens    Hi<|im_end|>↵
             <|im_start|>assistant↵
chosen       [[Yes.]]{{<|im_end|>}}
5 tokens
rejected     [[No]]{{<|im_end|>}}
3 tokens""",
    ),
    "prompts that are scored too": (
        [PAIR],
        ["loss={type='orpo', nll_on='all'}"],
        """\
prompt       <|im_start|>[[user↵
21 tokens    Hi<|im_end|>↵
             <|im_start|>assistant↵]]
chosen       [[Yes.]]{{<|im_end|>}}
5 tokens
rejected     [[No]]{{<|im_end|>}}
3 tokens""",
    ),
    "a completion for KTO": (
        SINGLES[1:],
        ["loss.type=kto"],
        """\
prompt       <|im_start|>user↵
21 tokens    Hi<|im_end|>↵
             <|im_start|>assistant↵
bad          [[No]]{{<|im_end|>}}
3 tokens""",
    ),
    "a completion for KTO beside another": (
        SINGLES,
        ["loss.type=kto"],
        """\
prompt       <|im_start|>user↵
21 tokens    Hi<|im_end|>↵
             <|im_start|>assistant↵
good         [[Yes.]]{{<|im_end|>}}
5 tokens""",
    ),
    "what is cut": (
        [{"prompt": "0123456789", "chosen": "abcdef", "rejected": "x"}],
        ["tokens.max_length=6"],
        """\
prompt       (7 tokens cut) …789
3 tokens
chosen       [[abc]]… (4 tokens cut)
3 tokens
rejected     [[x]]{{<|im_end|>}}
2 tokens""",
    ),
    "turns of others in a completion, and turns that were cut": (
        [
            {
                "prompt": [USER, {"role": "assistant", "content": "x" * 90}, USER],
                "chosen": [{"role": "assistant", "content": "a"}, USER, {"role": "assistant", "content": "b"}],
                "rejected": "No",
            }
        ],
        ["tokens.max_length=100"],
        """\
prompt       (2 oldest turns, 113 tokens, left out)
21 tokens    <|im_start|>user↵
             Hi<|im_end|>↵
             <|im_start|>assistant↵
chosen       [[a<|im_end|>]]↵
26 tokens    <|im_start|>user↵
4 scored     Hi<|im_end|>↵
             <|im_start|>assistant↵
             [[b]]{{<|im_end|>}}
rejected     [[No]]{{<|im_end|>}}
3 tokens""",
    ),
    "what does not show itself, and what looks like markup": (
        [{"prompt": "[bold]a\tb [/] \n\\[", "chosen": "[red]\u200b \n", "rejected": "é🎉\r\x00"}],
        [],
        """\
prompt       [bold]a→b [/]·↵
17 tokens    \\[
chosen       [[[red]\\u200b·↵]]{{<|im_end|>}}
11 tokens
rejected     [[é🎉␍␀]]{{<|im_end|>}}
9 tokens""",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "overrides", "wanted"), ROW_TEXTS.values(), ids=ROW_TEXTS)
def test_a_row_is_written_as_it_is_scored(
    folder: Path, rows: list[dict[str, Any]], overrides: list[str], wanted: str, layout: str
):
    """Prompt, scored tokens, end and cut have their marks, and every layout prints the same."""
    printed = shown(config_of(folder, rows, None, *overrides, f"train.layout={layout}"))
    assert part(printed, "row 0: rows.jsonl:1") == wanted


def test_a_token_across_the_boundary(folder: Path):
    """The first scored token is marked where it begins in the prompt, and a line says so."""
    tokenizer = toy_tokenizer(eos="</s>", merges=[("a", "b")])
    config = config_of(folder, [{"prompt": "qa", "chosen": "b!", "rejected": "c"}], tokenizer)
    assert (
        part(shown(config), "row 0: rows.jsonl:1")
        == """\
prompt       q
1 token
chosen       <<ab>>[[!]]{{</s>}}
3 tokens
rejected     <<a>>[[c]]{{</s>}}
3 tokens
The last token of the prompt is part of a completion's first token, and scored
with it."""
    )


def test_in_colour_there_are_no_marks(folder: Path):
    """With colour, a style marks each token's use, and the text has no marks."""
    printed = shown(config_of(folder, [PAIR]), colour=True)
    assert "\x1b[32mYes.\x1b[0m\x1b[1;7;32m<|im_end|>\x1b[0m" in printed
    assert "\x1b[35m<|im_start|>\x1b[0muser↵" in printed
    assert "[[" not in printed
    assert "{{" not in printed


def test_no_color_has_marks(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """With NO_COLOR, a terminal gets marks, as a file does."""
    monkeypatch.setenv("NO_COLOR", "1")
    printed = shown(config_of(folder, [PAIR]), colour=True)
    assert "[[Yes.]]{{<|im_end|>}}" in printed
    assert "\x1b[32m" not in printed


def test_long_texts_are_shortened_unless_asked_for(folder: Path):
    """A long part is shortened to its beginning and end and the number of tokens between; with `full` it is whole."""
    config = config_of(folder, [{"prompt": "q", "chosen": "x" * 1000, "rejected": "y"}])
    short = re.sub(r"\s+", "", part(shown(config), "row 0:"))
    assert short.count("x") == 120 + 39  # the last token shown is the end
    assert "]]…841" in short
    whole = re.sub(r"\s+", "", part(shown(config, full=True), "row 0:"))
    assert whole.count("x") == 1000


@pytest.mark.parametrize("make", [chatml, gemma, plain])
def test_the_spans_of_a_text_are_the_text(make: Any):
    """Decoded span by span, characters of several tokens stay whole, and nothing is lost or added."""
    tokenizer = make()
    text = " a  é\n🎉日本 \ufffd z"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for first in (0, 1):
        spans = decoded(tokenizer, ids, first, [None] * (len(ids) - first))  # pyright: ignore[reportArgumentType]
        assert [stop for _, stop, _ in spans][-1] == len(ids) - first
        assert [start for start, _, _ in spans][1:] == [stop for _, stop, _ in spans][:-1]
        assert "".join(piece for _, _, piece in spans) == tokenizer.decode(ids)[first:]
        assert "🎉" in [piece for _, _, piece in spans]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a b", "a b"),
        ("a \n", "a·↵\n"),
        ("a  ", "a··"),
        ("\t\r\x1b\x7f", "→␍␛\\u007f"),
        ("\u202e\U000e0041\u00a0", "\\u202e\\U000e0041\\u00a0"),
    ],
)
def test_what_does_not_show_itself_is_shown(text: str, wanted: str):
    """Control characters, direction marks and special spaces are escaped, so that none reaches the terminal."""
    assert visible(text) == wanted


# --- Layouts -------------------------------------------------------------------------------------------------------

LAYOUT_TEXTS: dict[str, tuple[list[dict[str, Any]], list[str], str]] = {
    "trees": (
        [PAIR, OTHER],
        ["train.layout=tree"],
        """\
micro-batch 1 of 1: tree, 1 row of 56 tokens
at      0  row 0: prompt 21
at     21  ├─ chosen 5
at     26  └─ rejected 3
at     29  row 1: prompt 21
at     50  ├─ chosen 4
at     54  └─ rejected 2
tokens: tree 56 · packed 98 · padded 104; trees save 43% of packed, 46% of
padded""",
    ),
    "what rows share": (
        [
            {"prompt": [SYSTEM, QUESTION], "chosen": "It is Paris, of course", "rejected": "It is Paris, of today"},
            {"prompt": [SYSTEM, USER], "chosen": "Hello.", "rejected": "Bye"},
            {"prompt": [SYSTEM, QUESTION], "chosen": "Lyon", "rejected": "It is Paris, of today"},
        ],
        ["train.batch=3"],
        """\
micro-batch 1 of 1: tree, 1 row of 146 tokens
at      0  rows 0, 1, 2: prompt 43
at     43  ├─ rows 0, 2: prompt 43
at     86  │  ├─ row 0 chosen, row 0 rejected, row 2 rejected 16
at    102  │  │  ├─ row 0: chosen 7
at    109  │  │  └─ row 0 rejected, row 2 rejected 6
at    115  │  └─ row 2: chosen 5
at    120  └─ row 1: prompt 15
at    135     ├─ chosen 7
at    142     └─ rejected 4
tokens: tree 146 · packed 543 · padded 654; trees save 73% of packed, 78% of
padded""",
    ),
    "packed": (
        [PAIR],
        ["train.layout=packed"],
        """\
micro-batch 1 of 1: packed, 1 row of 50 tokens
at      0  row 0: prompt 21 ── chosen 5
at     26  row 0: prompt 21 ── rejected 3
tokens: tree 29 · packed 50 · padded 52; trees save 42% of packed, 44% of padded""",
    ),
    "padded": (
        [PAIR],
        ["train.layout=padded"],
        """\
micro-batch 1 of 1: padded, 2 rows of 26 tokens
row 0: prompt 21 ── chosen 5 ── padding 0
row 0: prompt 21 ── rejected 3 ── padding 2
tokens: tree 29 · packed 50 · padded 52; trees save 42% of packed, 44% of padded""",
    ),
    "KTO in one micro-batch": (
        SINGLES,
        ["loss.type=kto"],
        """\
micro-batch 1 of 1: tree, 1 row of 29 tokens
at      0  rows 0, 1: prompt 21
at     21  ├─ row 0: good 5
at     26  └─ row 1: bad 3
tokens: tree 29 · packed 50 · padded 52; trees save 42% of packed, 44% of padded
mismatched completions for the KL, without gradient, after these prompts: 10
tokens""",
    ),
    "KTO in several": (
        SINGLES,
        ["loss.type=kto", "train.tokens_per_microbatch=28"],
        """\
micro-batch 1 of 2: tree, 1 row of 26 tokens
at      0  row 0: prompt 21 ── good 5
tokens: tree 26 · packed 26 · padded 26; trees save 0% of packed, 0% of padded""",
    ),
}


@pytest.mark.parametrize(("rows", "overrides", "wanted"), LAYOUT_TEXTS.values(), ids=LAYOUT_TEXTS)
def test_a_microbatch_is_drawn_as_it_lies(folder: Path, rows: list[dict[str, Any]], overrides: list[str], wanted: str):
    """The drawing shows the place and content of each node or row, and the cost of the micro-batch in other layouts."""
    printed = shown(config_of(folder, rows, None, *overrides))
    title, _, below = wanted.partition("\n")
    assert f"\n{title} ──" in printed
    assert part(printed, title) == below


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_read_back(layout: Any):
    """Prompt and completions read from a batch's tensors are those of its examples."""
    examples = [
        Example([1, 2, 3], ([4, 5], [6]), None, Origin("")),
        Example([7], ([8], [9, 10, 11]), None, Origin(""), ((), ((0, 1),))),
    ]
    for scored in (False, True):
        held = read(collate(examples, layout, score_prompts=scored))
        assert [(one.prompt, tuple(one.completions)) for one in held] == [(e.prompt, e.completions) for e in examples]
        assert [one.scored for one in held] == [[[True, True], [True]], [[True], [False, True, True]]]
        assert [one.prompt_scored for one in held] == [scored] * 2


def test_a_list_shows_all_completions_with_their_scores(folder: Path):
    """The preview of a loss of lists shows every completion with its score, and the weight of the row."""
    rows = [
        {"prompt": [USER], "responses": ["Yes.", "No", "Hm"], "scores": [1, 2.5, 0], "weight": 2},
        {"prompt": [USER], "responses": ["Ah", "Oh", "Uh"], "ranks": [1, 2, 3], "weight": 1},
    ]
    printed = shown(of_lists(config_of(folder, rows[:1])))
    assert (
        part(printed, "row 0: rows.jsonl:1, weight 2")
        == """\
prompt        <|im_start|>user↵
21 tokens     Hi<|im_end|>↵
              <|im_start|>assistant↵
completion 0  [[Yes.]]{{<|im_end|>}}
5 tokens
score 1
completion 1  [[No]]{{<|im_end|>}}
3 tokens
score 2.5
completion 2  [[Hm]]{{<|im_end|>}}
3 tokens
score 0"""
    )
    assert "├─ completion 0 5" in printed
    assert re.search(r"completion +3 +3 +5 +5\ncompletions a row +3 +3 +3 +3\n", printed)
    assert "a step of 1 lists" in printed


def test_pairs_show_weights_margins_and_what_is_left_out(folder: Path):
    """Each row shows its weight and margin; pairs that a list leaves out are counted with the dropped rows."""
    pairs = [PAIR | {"weight": 0.5, "margin": 3}, OTHER | {"weight": 1, "margin": 0}]
    printed = shown(config_of(folder, pairs))
    assert "row 0: rows.jsonl:1, weight 0.5, margin 3 ─" in printed
    assert "row 1: rows.jsonl:2, weight 1, margin 0 ─" in printed
    lists = [{"prompt": "q", "responses": ["a", "b", "c", "d"], "scores": [3, 3, 2, 1]}]
    printed = shown(config_of(folder, lists, None, "data.0.pairs=all", "data.0.min_difference=2"))
    for line in ("used +2", "dropped +4", "  with equal scores +1", "  with scores closer than data.min_difference +3"):
        assert re.search(f"\n{line}\n", printed), line


# --- Numbers -------------------------------------------------------------------------------------------------------

COUNTED = [  # tokens of prompt, chosen and rejected, including the end
    {"prompt": "12345", "chosen": "abc", "rejected": "x"},  # 5, 4, 2
    {"prompt": "12", "chosen": "ab", "rejected": "wxyz"},  # 2, 3, 5
    {"prompt": "1", "chosen": "a", "rejected": "b"},  # 1, 2, 2
    {"prompt": "1", "chosen": "same", "rejected": "same"},
    {"prompt": "1", "chosen": "", "rejected": "b"},
    {"prompt": "1", "chosen": "a", "rejected": "b"},
    {"prompt": 3, "chosen": "a", "rejected": "b"},
]


def test_the_numbers_are_those_of_a_hand(folder: Path):
    """Rows, lengths, shares and the cost of a step are those counted by hand."""
    config = config_of(folder, COUNTED, None, "tokens.duplicates=drop", "data.0.on_error=drop", "tokens.max_length=8")
    data = load_examples(config, chatml())
    assert [(part.name, part.percentiles) for part in lengths(data.train)] == [
        ("prompt", (1, 2, 4, 4)),  # the first one is cut to 4
        ("chosen", (2, 3, 4, 4)),
        ("rejected", (2, 2, 5, 5)),
    ]
    assert prompt_share(data.train) == (4 + 2 + 1) / (7 + 9 + 9)
    assert good_share(data.train) is None
    steps = step_tokens(data.train, config)  # one step, with the first two rows
    assert (steps.rows, steps.steps) == (2, 1)
    # with 16 tokens per micro-batch: two trees of 10 are two; packed 14 and 12; padded 2 rows of 8 and 2 of 7
    assert steps.tokens == {"tree": 20, "packed": 14 + 12, "padded": 16 + 14}
    printed = shown(config)
    assert (
        part(printed + "\n ───\n", "the data")
        == """\
rows                                  training
used                                         3
dropped                                      2
  with an empty completion                   1
  with equal completions                     1
prompts cut from the left                    1
completions cut from the right               0
with a token across the prompt's end         0
share of prompt tokens                     28%
duplicates left out before                   1
broken rows left out before                  1

training tokens  p5  p50  p95  max
prompt            1    2    4    4
chosen            2    3    4    4
rejected          2    2    5    5

a step of 2 pairs  tokens
tree                   20  1.00 ×  this config's layout
packed                 26  1.30 ×
padded                 30  1.50 ×"""
    )


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [(1000, {"tree": 39, "packed": 100, "padded": 104}), (28, dict.fromkeys(LAYOUTS, 100))],
)
def test_a_step_of_kto_counts_its_mismatched_completions(folder: Path, budget: int, tokens: dict[str, int]):
    """Mismatched completions follow the prompts of a single forest, and otherwise are a pass of their own."""
    config = config_of(folder, SINGLES, None, "loss.type=kto", f"train.tokens_per_microbatch={budget}")
    data = load_examples(config, chatml())
    assert step_tokens(data.train, config).tokens == tokens
    assert good_share(data.train) == 0.5
    printed = shown(config)
    assert "good completions                           50%" in printed
    assert "a step of 2 completions" in printed


# --- The command ---------------------------------------------------------------------------------------------------


def test_only_the_rows_asked_for(folder: Path):
    """The requested number of rows is shown, each row once, and at most all rows."""
    config = config_of(folder, [PAIR] * 3)
    for asked, wanted in ((1, 1), (3, 3), (9, 3)):
        assert shown(config, rows=asked).count("\nrow ") == wanted


def test_notes_come_first_and_again_from_the_cache(folder: Path):
    """Notes on the rows come first, also from the cache, which the second run names."""
    config = config_of(folder, [PAIR])
    first, second = shown(config), shown(config)
    assert first.startswith(
        "rows.jsonl: 1 rows of a prompt of messages with chosen and rejected\ntraining: 1 of 1 rows"
    )
    assert "from the cache" not in first
    assert f"from the cache, {folder}/cache/tokens/" in second
    assert first.splitlines()[2:] == second.splitlines()[3:]


def test_the_page_shows_what_is_printed(folder: Path):
    """docs/data.md has the exact preview of the quickstart's first row."""
    root = ROOT
    page = (root / "docs" / "data.md").read_text(encoding="utf-8")
    printed = shown(load_config(root / "examples" / "quickstart.toml"), rows=1)
    assert f"--rows 1`:\n\n```text\n{printed}\n```\n" in page


def test_a_layout_left_out_is_a_tree(folder: Path):
    """Without the model, an unset layout is shown as a tree."""
    config = config_of(folder, [PAIR])
    assert wanted_layout(config) == "tree"
    examples = load_examples(config, chatml()).train[:]
    plan = plan_step(config.loss, examples, "tree", config.tokens_per_microbatch)
    assert plan == StepPlan(Pass(examples, [[0]], "tree"))


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(folder: Path, width: int):
    """Long words and long lines are wrapped."""
    long = {"prompt": "word " * 60, "chosen": "x" * 150, "rejected": "日本" * 40}
    printed = shown(config_of(folder, [long, PAIR]), width=width)
    assert max(len(line) for line in printed.splitlines()[3:]) <= width  # after the notes
