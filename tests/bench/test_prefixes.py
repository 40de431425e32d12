"""The profile prefixes: its data sets share what they say, and every layout computes the same steps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from bench.__main__ import app
from bench.prefixes import LAYOUTS, compare_layouts, lay_trees, layout_tokens
from bench.profiles import PREFIXES
from bench.results import TREES, TRL, markdown
from bench.step_data import TOKENIZER, best_against_rest, each_turn, shared_beginnings, tool_prompt, under_system_prompt
from fastpref.data.example import Example, Origin
from fastpref.data.forest import encode, lay_out

TINY = replace(
    PREFIXES,
    shape=replace(PREFIXES.shape, hidden=128, layers=2, vocab=1024, batch=3),
    tool_tokens=100,
    completions=3,
    turns=2,
    repeats=1,
)


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def pair(name: str, system: str = "") -> dict[str, Any]:
    """Return a pair whose messages are named after it."""
    prompt = message("system", system) * bool(system) + message("user", f"{name}?")
    return {"prompt": prompt} | {side: message("assistant", name + side) for side in ("chosen", "rejected")}


def words(row: dict[str, Any]) -> list[str]:
    """Return the contents of a row's messages, its prompt's first."""
    return [message["content"] for part in ("prompt", "chosen", "rejected") for message in row[part]]


PAIRS = [pair("a", system="be kind"), pair("b"), pair("c"), pair("d")]


def test_a_system_prompt_comes_before_the_rows_own() -> None:
    assert list(map(words, under_system_prompt(PAIRS[:2], "tools"))) == [
        ["tools\n\nbe kind", "a?", "achosen", "arejected"],
        ["tools", "b?", "bchosen", "brejected"],
    ]


def test_the_chosen_is_compared_with_every_other_completion() -> None:
    """Three completions of a prompt are two pairs; there are as many pairs as were given."""
    assert list(map(words, best_against_rest(PAIRS, 3))) == [
        ["be kind", "a?", "achosen", "arejected"],
        ["be kind", "a?", "achosen", "brejected"],
        ["b?", "bchosen", "brejected"],
        ["b?", "bchosen", "crejected"],
    ]


def test_a_conversation_goes_on_with_what_was_chosen() -> None:
    """Each turn is a pair whose prompt is the conversation so far, under the system prompt of its first turn."""
    assert list(map(words, each_turn(PAIRS[:3], 2))) == [
        ["be kind", "a?", "achosen", "arejected"],
        ["be kind", "a?", "achosen", "b?", "bchosen", "brejected"],
        ["c?", "cchosen", "crejected"],
    ]


@pytest.mark.parametrize("tokens", [100, 1000])
def test_the_tool_prompt_has_the_tokens_asked_for(tokens: int) -> None:
    """It has at most one schema more, and each of its lines but the first is a JSON schema of its own."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    text = tool_prompt(tokenizer, tokens)
    first, *schemas = text.splitlines()
    shorter = "\n".join([first, *schemas[:-1]])
    assert len(tokenizer(shorter).input_ids) < tokens <= len(tokenizer(text).input_ids)
    assert len({json.loads(schema)["name"] for schema in schemas}) == len(schemas)


def test_data_sets_have_as_many_pairs() -> None:
    sets = shared_beginnings(PAIRS, AutoTokenizer.from_pretrained(TOKENIZER), 100, 3, 2)
    assert [len(rows) for rows in sets.values()] == [4, 4, 4, 4]


# --- layouts ----------------------------------------------------------------------------------------------------------

SYSTEM, QUESTION, OTHER = (list(range(at, at + 20)) for at in (100, 200, 300))
GOOD, BAD, WORSE = (list(range(at, at + 8)) for at in (400, 500, 600))


def example(prompt: list[int], *completions: list[int]) -> Example:
    return Example(prompt, completions, None, Origin("rows"))


def test_tokens_are_counted_by_hand() -> None:
    """Two pairs share a question and the chosen answer, and a third only the system prompt."""
    examples = [
        example(SYSTEM + QUESTION, GOOD, BAD),
        example(SYSTEM + QUESTION, GOOD, WORSE),
        example(SYSTEM + OTHER, GOOD[:3], BAD),
    ]
    assert {layout: layout_tokens(examples, layout) for layout in LAYOUTS} == {
        "padded": 6 * 48,
        "packed": 5 * 48 + 43,
        "trees": 2 * (40 + 8 + 8) + 40 + 3 + 8,
        "forest": 20 + (20 + 8 + 8 + 8) + (20 + 3 + 8),
    }


def test_trees_are_forests_side_by_side() -> None:
    """Each pair of sequences is laid out as if it were alone, after those before it; afterwards `lay_out` is back."""
    sequences = [encode(ids) for ids in (SYSTEM + GOOD, SYSTEM + BAD, SYSTEM + GOOD, SYSTEM + WORSE)]
    laid, one, two = lay_trees(sequences, [20] * 4), lay_out(sequences[:2], [20] * 2), lay_out(sequences[2:], [20] * 2)
    assert laid.ids.tolist() == [*one.ids, *two.ids] == [*SYSTEM, *GOOD, *BAD, *SYSTEM, *GOOD, *WORSE]
    assert [node.parent for node in laid.forest.nodes] == [None, 0, 0, None, 3, 3]
    assert [node.end for node in laid.forest.nodes] == [36, 28, 36, 72, 64, 72]
    assert laid.paths[:2] == one.paths
    assert laid.paths[2:] == ((slice(36, 64),), (slice(36, 56), slice(64, 72)))
    examples = [example(SYSTEM, GOOD, BAD), example(SYSTEM, GOOD, WORSE)]
    assert (layout_tokens(examples, "trees"), layout_tokens(examples, "forest")) == (72, 44)


# --- the profile ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return list(compare_layouts(TINY, None, None))


def test_every_layout_is_right_and_computes_no_more_than_the_one_before(records: list[dict[str, Any]]) -> None:
    """forest ≤ trees ≤ packed ≤ padded; a forest saves over trees wherever examples share; losses are the same."""
    assert len(records) == 4
    for record in records:
        rows = {row["method"]: row for row in record["rows"]}
        assert list(rows) == [TRL, *LAYOUTS]
        assert [row["note"] for row in rows.values()] == [""] * 5
        tokens = [rows[layout]["tokens"] for layout in ("forest", TREES, "packed", "padded")]
        assert tokens == sorted(tokens)
        assert (tokens[0] < tokens[1]) or record["what"] == "pairs as they are"
        assert rows["forest"]["loss"] == pytest.approx(rows["padded"]["loss"], rel=1e-4)
        assert rows[TRL]["loss"] == pytest.approx(rows["padded"]["loss"], rel=0.02)
        assert abs(rows["padded"]["loss"] - 0.6931) > 1e-4  # the adapters are not the empty ones
        assert all(len(row["ms"]) == 1 and row["bytes"] > 0 for row in rows.values())


def test_the_table_has_every_row(records: list[dict[str, Any]]) -> None:
    """A method of the profile has its speed over TRL's and over the trees'; a wrong one has its fault and no ratio."""
    machine = {"processor": "A", "device": "cpu", "threads": 1, "python": "3", "versions": {}, "commit": "c"}
    empty: dict[str, list[Any]] = {"head": [], "scaling": [], "steps": []}
    words = {"command": "c", "date": "d", "seconds": 1, "rule": TINY.rule, "machine": machine}
    broken = records[0] | {"rows": [row | {"note": "wrong: loss off by 1e-02"} for row in records[0]["rows"]]}
    table = [line for line in markdown(empty | words | {"prefixes": [*records, broken]}).splitlines() if "| " in line]
    assert len(table) == 1 + 5 * 5
    assert all("1.00 ± 0.00" in table[at] for at in (1, 4))  # TRL over TRL, and trees over trees
    assert all("wrong: loss off by 1e-02 | | |" in line for line in table[-5:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "prefixes", "--only", "head"], "--profile prefixes: --only, --match, --base and --gate are for"),
        (["--profile", "quick", "--pairs", "3"], "--profile quick: --model, --data and --pairs are for"),
        (["--profile", "prefixes", "--data", "nowhere.json"], "--data nowhere.json: no such file or folder"),
    ],
)
def test_mistakes_are_said_in_one_message(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())


def test_the_command_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.profiles.PREFIXES", TINY)
    found = CliRunner().invoke(app, ["--profile", "prefixes", "--pairs", "2", "--output", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert "a step is 2 pairs" in (tmp_path / "results.md").read_text()
    assert [record["pairs"] for record in json.loads((tmp_path / "results.json").read_text())["prefixes"]] == [2] * 4
