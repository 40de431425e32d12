"""Rows with several completions: how good each is, in every form of data set, and the pairs that are made of them."""

import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpref.data.rows.auto import detect
from fastpref.data.rows.content import Content, Ranked, RowError
from fastpref.data.rows.formats import find_format, fitting
from fastpref.data.rows.ranking import make_pairs
from tests.support.chats import says, system, user

Q, A, B, C = "Capital of Norway?", "Oslo.", "Bergen.", "Rome."
CHAT = [user(Q)]
TEXTS = {"prompt": Q, "responses": [A, B, C]}
ULTRA = {
    "instruction": Q,
    "completions": [
        {"response": A, "overall_score": 9.0, "fine-grained_score": 4.5, "model": "a"},
        {"response": B, "overall_score": 6.0, "fine-grained_score": 4.75, "model": "b"},
    ],
}
WITHOUT_OVERALL = [{"response": A, "fine-grained_score": 4.5}, {"response": B, "fine-grained_score": 4.75}]


def chat(*answers: str, prompt: Content = CHAT, scores: tuple[float, ...]) -> Ranked:
    return Ranked(prompt, tuple([says(answer)] for answer in answers), scores)


# --- Forms of rows -------------------------------------------------------------------------------------------------

AUTO: dict[str, tuple[dict[str, Any], str, Ranked]] = {  # row, name of its format, content
    "scores": (
        TEXTS | {"scores": [3, 1.5, -2]}, "text prompt, responses and scores", Ranked(Q, (A, B, C), (3, 1.5, -2)),
    ),
    "ranks": (TEXTS | {"ranks": [2, 1, 3]}, "text prompt, responses and ranks", Ranked(Q, (A, B, C), (-2, -1, -3))),
    "the best": (TEXTS | {"best": 1}, "text prompt, responses and best", Ranked(Q, (A, B, C), (0, 1, 0))),
    "a prompt of messages": (
        {"prompt": CHAT, "responses": [A, B], "scores": [1, 0]}, "prompt, responses and scores",
        chat(A, B, scores=(1, 0)),
    ),
    "a text prompt and messages": (
        {"prompt": Q, "responses": [[says(A)], says(B)], "scores": [1, 0]}, "prompt, responses and scores",
        chat(A, B, scores=(1, 0)),
    ),
    "whole conversations": (
        {"responses": [[*CHAT, says(A)], [*CHAT, says(B)], [*CHAT, says(C)]], "scores": [1, 0, 2]},
        "responses and scores", chat(A, B, C, scores=(1, 0, 2)),
    ),
    "text with a system prompt": (
        TEXTS | {"best": 0, "system": "Be brief."}, "prompt, responses and best, with system",
        chat(A, B, C, prompt=[system("Be brief."), *CHAT], scores=(1, 0, 0)),
    ),
    "UltraFeedback": (ULTRA, "instruction, completions and overall_score", chat(A, B, scores=(9, 6))),
    "UltraFeedback without overall scores": (
        ULTRA | {"completions": WITHOUT_OVERALL}, "instruction, completions and fine-grained_score",
        chat(A, B, scores=(4.5, 4.75)),
    ),
    "distilabel": (
        {"instruction": Q, "generations": [A, B], "ratings": [4, 5]}, "instruction, generations and ratings",
        chat(A, B, scores=(4, 5)),
    ),
    "distilabel before 1.0": (
        {"input": Q, "generations": [A, B], "rating": [4.0, 5.0], "rationale": ["", ""]},
        "input, generations and rating", chat(A, B, scores=(4, 5)),
    ),
    "Nectar": (
        {"prompt": f"\n\nHuman: {Q}\n\nAssistant: ", "answers": [{"answer": A, "rank": 1}, {"answer": B, "rank": 4}]},
        "a transcript of Human and Assistant, answers and rank", chat(A, B, scores=(-1, -4)),
    ),
    "answers of Stack Exchange": (
        {"question": Q, "answers": [{"text": A, "pm_score": 3, "selected": True}, {"text": B, "pm_score": 0}]},
        "question, answers and pm_score", chat(A, B, scores=(3, 0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "name", "content"), AUTO.values(), ids=AUTO)
def test_auto_knows_lists_of_completions(row: dict[str, Any], name: str, content: Ranked):
    """The columns say which completions there are and how good each is: higher scores are better, lower ranks are."""
    form = detect(row)
    assert form is not None
    assert form.name == name
    read = form.read(row)
    assert replace(read, writing=content.writing) == content


@pytest.mark.parametrize(
    "row",
    [
        TEXTS,
        {"prompt": Q, "responses": [], "scores": []},
        {"prompt": Q, "responses": A, "scores": [1]},
        {"responses": [A, B], "scores": [1, 2]},
        TEXTS | {"best": "1"},
        TEXTS | {"best": True},
    ],
    ids=str,
)
def test_what_is_no_list_with_scores(row: dict[str, Any]):
    """Without a prompt, a list of completions or numbers beside it, a row has no format."""
    assert detect(row) is None


def test_chosen_and_rejected_come_first():
    """A row that has a pair beside a list is a pair, as in the sets of SimPO's authors."""
    row = TEXTS | {"scores": [1, 2, 3], "chosen": A, "rejected": B}
    form = detect(row)
    assert form is not None
    assert form.name == "text prompt, chosen and rejected"


NAMED: dict[str, tuple[Any, dict[str, Any], Ranked]] = {
    "ranked": ("chat_template.ranked", TEXTS | {"ranks": [1, 2, 3]}, chat(A, B, C, scores=(-1, -2, -3))),
    "ranked, other columns and roles": (
        {"type": "chat_template.ranked", "field_prompt": "talk", "field_responses": "all_generated_responses",
         "field_scores": "all_rm_scores", "roles": {"user": ["guest"]}},
        {"talk": [{"role": "guest", "content": Q}], "all_generated_responses": [A, B], "all_rm_scores": [0.1, 0.2],
         "chosen": B, "rejected": A},
        chat(A, B, scores=(0.1, 0.2)),
    ),
    "ranked, the one of several columns that is named": (
        {"type": "chat_template.ranked", "field_best": "best"}, TEXTS | {"best": 2, "scores": [3, 2, 1]},
        chat(A, B, C, scores=(0, 0, 1)),
    ),
    "ultrafeedback": ("chat_template.ultrafeedback", ULTRA, chat(A, B, scores=(9, 6))),
    "ultrafeedback, the mean of the aspects": (
        {"type": "chat_template.ultrafeedback", "field_scores": "fine-grained_score"}, ULTRA,
        chat(A, B, scores=(4.5, 4.75)),
    ),
    "distilabel": (
        "chat_template.distilabel", {"instruction": Q, "generations": [A, B], "ratings": [4, 5]},
        chat(A, B, scores=(4, 5)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("format", "row", "content"), NAMED.values(), ids=NAMED)
def test_named_formats_of_lists(format: Any, row: dict[str, Any], content: Ranked):
    """A named format reads its own columns, or those that its options name, and makes chats of them."""
    form = find_format(format, unpaired=False)
    assert form is not None
    assert form.read(row) == content


def test_the_format_of_unknown_columns_is_named():
    """Rows with a list under another prompt's name are told the format that reads them."""
    assert fitting({"query", "responses", "scores"}, unpaired=False) == [
        '{ type = "chat_template.ranked", field_prompt = "query", field_responses = "responses" }'
    ]
    assert fitting({"query", "responses"}, unpaired=False) == []


def test_only_one_column_says_how_good():
    """Options that name two columns of scores are refused."""
    with pytest.raises(ValueError, match="field_best: field_scores says already how good the completions are"):
        find_format({"type": "chat_template.ranked", "field_scores": "a", "field_best": "b"}, unpaired=False)


# --- Bad rows ------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str, str]] = {  # changes, message, kind
    "fewer scores": (
        {"scores": [1, 2]}, "responses has 3 completions, and scores has 2 numbers",
        "with another number of scores than of completions",
    ),
    "more scores": (
        {"scores": [1, 2, 3, 4]}, "responses has 3 completions, and scores has 4 numbers",
        "with another number of scores than of completions",
    ),
    "NaN": ({"scores": [1, float("nan"), 2]}, "scores holds nan; a score is a finite number", "with a score or rank"),
    "infinity": ({"scores": [1, 2, float("inf")]}, "scores holds inf; a score is", "with a score or rank"),
    "more than float32 holds": ({"scores": [1, 2, 1e300]}, "scores holds 1e+300; a score is", "with a score or rank"),
    "a very long number": ({"scores": [1, 2, 10**400]}, "scores holds 1000", "with a score or rank"),
    "a null": ({"scores": [1, None, 2]}, "scores holds None; a score is", "with a score or rank"),
    "a word": ({"scores": [1, "2", 2]}, "scores holds '2'; a score is", "with a score or rank"),
    "a truth": ({"scores": [1, True, 2]}, "scores holds True; a score is", "with a score or rank"),
    "no scores": ({"scores": None}, "nothing says how good the responses are", "without scores, ranks or best"),
    "one number": ({"scores": 3}, "nothing says how good the responses are", "without scores, ranks or best"),
    "one completion": (
        {"responses": [A], "scores": [1]}, "responses has 1 completion, and a comparison needs two",
        "with fewer than two completions",
    ),
    "no completions": (
        {"responses": []}, "responses has no completions, and a comparison needs two", "with fewer than two completions"
    ),
    "text": ({"responses": A}, "responses must be a list of completions, got 'Oslo.'", "with a value of another type"),
    "all tied": (
        {"scores": [2, 2, 2.0]}, "all responses have score 2, so none is better", "with completions of one score",
    ),
    "all of one rank": (
        {"scores": None, "ranks": [3, 3, 3]}, "all responses have rank 3, so none", "with completions of one score",
    ),
    "the best of others": (
        {"scores": None, "best": 3}, "best is 3; it is the number of one of the responses, 0 to 2", "whose best",
    ),
    "the best from behind": ({"scores": None, "best": -1}, "best is -1; it is the number", "whose best completion is"),
    "two orders": (
        {"best": 1}, "the columns scores and best all say how good the responses are; name one of them, such as format "
        '= { type = "chat_template.ranked", field_scores = "scores" }', "with several columns of scores",
    ),
    "a completion that is a number": (
        {"responses": [A, 3, C]}, "responses[1] must be text or a list of messages, got 3", "with a value of another",
    ),
    "a completion that is a table": (
        {"responses": [A, {"model": "x"}, C]},
        "responses[1] is {'model': 'x'}; a completion is text, a message, messages, or a table with one of them under "
        "response, answer, completion or text", "with a completion that is none",
    ),
    "a margin": (
        {"margin": 1.0}, "the column margin is filled, and a margin is one of a pair: here is a list of completions; ",
        "with a margin, which only a pair can have",
    ),
    "a weight of 0": ({"weight": 0}, "weight holds 0; a weight is a number above 0", "with a weight that is no number"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message", "kind"), BAD.values(), ids=BAD)
def test_a_row_that_cannot_be_ranked(changes: dict[str, Any], message: str, kind: str):
    """A mistake in a list is refused with its column and its value, and has a kind by which it is counted."""
    form = find_format("chat_template.ranked", unpaired=False)
    assert form is not None
    with pytest.raises(RowError, match=re.escape(message)) as caught:
        form.read(TEXTS | {"scores": [3, 2, 1]} | changes)
    assert caught.value.kind.startswith(kind)


def test_a_completion_without_the_score_of_the_others():
    """A table without the key that the first row has is a mistake."""
    form = detect(ULTRA)
    assert form is not None
    row = ULTRA | {"completions": [ULTRA["completions"][0], {"response": B, "overall_score": None}]}
    with pytest.raises(RowError, match="which has no overall_score"):
        form.read(row)


# --- Pairs ---------------------------------------------------------------------------------------------------------

PAIRS: dict[str, tuple[list[float], Any, float, list[tuple[int, int]], int, int]] = {  # …, pairs, tied, close
    "best-worst": ([1, 3, 0, 2], "best-worst", 0, [(1, 2)], 0, 0),
    "best-rest": ([1, 3, 0, 2], "best-rest", 0, [(1, 3), (1, 0), (1, 2)], 0, 0),
    "all": ([1, 3, 0, 2], "all", 0, [(1, 3), (1, 0), (1, 2), (3, 0), (3, 2), (0, 2)], 0, 0),
    "adjacent": ([1, 3, 0, 2], "adjacent", 0, [(1, 3), (3, 0), (0, 2)], 0, 0),
    "two of the best": ([5, 1, 5], "best-worst", 0, [(0, 1)], 0, 0),
    "two of the worst": ([1, 5, 1], "best-worst", 0, [(1, 0)], 0, 0),
    "a tie with the best": ([5, 1, 5], "best-rest", 0, [(0, 1)], 1, 0),
    "ties in all": ([5, 1, 5, 1], "all", 0, [(0, 1), (0, 3), (2, 1), (2, 3)], 2, 0),
    "ties of neighbours": ([5, 1, 5, 1], "adjacent", 0, [(2, 1)], 2, 0),
    "the best alone": ([0, 1, 0], "all", 0, [(1, 0), (1, 2)], 1, 0),
    "a least difference": ([1, 3, 0, 2], "all", 2, [(1, 0), (1, 2), (3, 2)], 0, 3),
    "a least difference that is met but for rounding": ([4.2, 4.3], "best-worst", 0.1, [(1, 0)], 0, 0),
    "none far enough": ([1, 2], "best-worst", 1.5, [], 0, 1),
    "ties and a least difference": ([1, 1, 2, 4], "all", 2, [(3, 2), (3, 0), (3, 1)], 1, 2),
}


@pytest.mark.parametrize(("scores", "pairing", "least", "pairs", "tied", "close"), PAIRS.values(), ids=PAIRS)
def test_pairs_of_a_list(scores: list[float], pairing: Any, least: float, pairs: Any, tied: int, close: int):
    """Each way makes the pairs that it names, better first; ties and small differences are left out and counted."""
    made = make_pairs(scores, pairing, least)
    assert (list(made.of), made.tied, made.close) == (pairs, tied, close)


@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=6).filter(lambda scores: len(set(scores)) > 1), st.integers(0, 3)
)
def test_all_pairs_contain_the_others(scores: list[float], least: int):
    """`all` is every two completions whose scores differ enough; the other ways make some of them, and all add up."""
    every = set(combinations(range(len(scores)), 2))
    far = {pair for pair in every if abs(scores[pair[0]] - scores[pair[1]]) >= max(least, 1)}
    counts = {"best-worst": 1, "best-rest": len(scores) - 1, "all": len(every), "adjacent": len(scores) - 1}
    for pairing, count in counts.items():
        made = make_pairs(scores, pairing, least)  # pyright: ignore[reportArgumentType]
        assert len(made.of) + made.tied + made.close == count
        assert all(scores[better] > scores[worse] for better, worse in made.of)
        unordered = {(min(pair), max(pair)) for pair in made.of}
        assert len(unordered) == len(made.of)
        assert unordered <= far if pairing != "all" else unordered == far
