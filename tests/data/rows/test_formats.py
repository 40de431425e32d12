"""Which format a row's columns indicate, what each row becomes, and the message about rows of no format."""

import re
from typing import Any

import pytest

from fastpref.data.rows.auto import AutoFormat, detect
from fastpref.data.rows.columns import read_label
from fastpref.data.rows.content import Paired, Unpaired, unpair

USER = {"role": "user", "content": "q"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "be kind"}
HUMAN = {"from": "human", "value": "q"}
GPT_YES, GPT_NO = {"from": "gpt", "value": "yes"}, {"from": "gpt", "value": "no"}

PAIR, CHAT = Paired("q", "yes", "no"), Paired([USER], [YES], [NO])
TEXTS, EXPLICIT = "text prompt, chosen and rejected", "a prompt of messages with chosen and rejected"
IMPLICIT = "chosen and rejected conversations that share their prompt"


def pair(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def talks(chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected}


ROWS: dict[str, tuple[dict[str, Any], str, Paired | Unpaired]] = {
    "text": (pair("q", "yes", "no"), TEXTS, PAIR),
    "text and columns of no concern": (
        pair("q", "yes", "no") | {"score": 3, "messages": None, "label": 1}, TEXTS, PAIR,
    ),
    "text prompt, answers as messages": (pair("q", [YES], [NO]), TEXTS, CHAT),
    "text prompt, answers as one message": (pair("q", YES, NO), TEXTS, CHAT),
    "text prompt, one answer of each kind": (pair("q", "yes", [NO]), TEXTS, CHAT),
    "text prompt, one answer of each kind, the other way": (pair("q", YES, "no"), TEXTS, CHAT),
    "explicit prompt": (pair([SYSTEM, USER], [YES], [NO]), EXPLICIT, Paired([SYSTEM, USER], [YES], [NO])),
    "explicit prompt, text answers": (pair([USER], "yes", "no"), EXPLICIT, CHAT),
    "explicit prompt, answers of several turns": (
        pair([USER], [YES, USER, YES], [NO]), EXPLICIT, Paired([USER], [YES, USER, YES], [NO]),
    ),
    "implicit prompt": (talks([SYSTEM, USER, YES], [SYSTEM, USER, NO]), IMPLICIT, Paired([SYSTEM, USER], [YES], [NO])),
    "implicit prompt beside its text": (pair("q", [USER, YES], [USER, NO]), IMPLICIT, CHAT),
    "implicit prompt of several turns": (
        talks([USER, YES, USER, YES], [USER, YES, USER, NO]), IMPLICIT, Paired([USER, YES, USER], [YES], [NO]),
    ),
    "implicit prompt, all turns after the split": (
        talks([USER, YES, USER, YES], [USER, NO]), IMPLICIT, Paired([USER], [YES, USER, YES], [NO]),
    ),
    "implicit prompt, equal answers": (talks([USER, YES], [USER, YES]), IMPLICIT, Paired([USER], [YES], [YES])),
    "implicit prompt in ShareGPT's words": (talks([HUMAN, GPT_YES], [HUMAN, GPT_NO]), IMPLICIT, CHAT),
    "messages and answers": (
        {"messages": [USER], "chosen": YES, "rejected": NO}, "messages with chosen and rejected", CHAT,
    ),
    "ShareGPT": (
        {"conversations": [HUMAN], "chosen": GPT_YES, "rejected": GPT_NO},
        "ShareGPT conversations with chosen and rejected", CHAT,
    ),
    "ShareGPT, text answers": (
        {"conversations": [HUMAN], "chosen": "yes", "rejected": "no"},
        "ShareGPT conversations with chosen and rejected", CHAT,
    ),
    "labelled text": (
        {"prompt": "q", "completion": "yes", "label": True}, "prompt, completion and label", Unpaired("q", "yes", True),
    ),
    "labelled answer to messages": (
        {"prompt": [USER], "completion": "no", "label": 0}, "prompt, completion and label",
        Unpaired([USER], [NO], False),
    ),
    "labelled message to text": (
        {"prompt": "q", "completion": [YES], "label": 1}, "prompt, completion and label", Unpaired([USER], [YES], True),
    ),
    "labelled messages": (
        {"messages": [SYSTEM, USER, YES], "label": "True"}, "messages and label", Unpaired([SYSTEM, USER], [YES], True),
    ),
    "labelled ShareGPT": (
        {"conversations": [HUMAN, GPT_NO], "label": "false"}, "conversations and label", Unpaired([USER], [NO], False),
    ),
}  # fmt: skip


def detected(row: dict[str, Any]) -> AutoFormat:
    form = detect(row)
    assert form is not None
    return form


@pytest.mark.parametrize(("row", "name", "content"), ROWS.values(), ids=ROWS)
def test_a_rows_columns_say_its_format(row: dict[str, Any], name: str, content: Paired | Unpaired):
    """`detect` names the format of the columns and their types, and reading gives the prompt and its completions."""
    form = detected(row)
    assert form.name == name
    assert form.read(row) == content


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"text": "q"},
        {"prompt": "q", "chosen": "yes"},
        {"prompt": "q", "chosen": "yes", "rejected": None},
        {"chosen": "q yes", "rejected": "q no"},
        {"chosen": [YES], "rejected": [NO]},
        {"prompt": "q", "completion": "yes"},
        {"completion": "yes", "label": True},
        {"messages": [], "label": True},
        {"messages": "q", "label": True},
        {"prompt": 3, "chosen": 1, "rejected": 2},
    ],
    ids=str,
)
def test_columns_of_no_format(row: dict[str, Any]):
    """A row that lacks a column of every format, or has other types in it, has no format."""
    assert detect(row) is None


ROLES = {
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function", "tool"), "tool"),
    **{"human": "user", "user": "user", "system": "system", "developer": "developer"},
}


@pytest.mark.parametrize(("given", "role"), ROLES.items(), ids=ROLES)
def test_roles_have_one_name(given: str, role: str):
    """Roles get the template's names, whether ShareGPT's are written as `from`/`value` or as `role`/`content`."""
    for turn in ({"from": given, "value": "x"}, {"role": given, "content": "x"}):
        row = {"prompt": [turn, USER], "chosen": "yes", "rejected": "no"}
        assert detected(row).read(row) == Paired([{"role": role, "content": "x"}, USER], [YES], [NO])


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def test_other_keys_of_a_message_pass_through():
    """Other keys that templates read (calls, reasoning, names) are kept, unless a table has filled them with None."""
    filled = {"tool_calls": None, "reasoning_content": None, "name": None}
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"}
    result = {"role": "tool", "content": "4°", "name": "weather"}
    row = {"messages": [{**USER, **filled}, calling, {**result, "tool_calls": None}, {**YES, **filled}], "label": True}
    assert detected(row).read(row) == Unpaired(
        [USER, {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "hm"}, result], [YES], True
    )


def test_none_beside_a_tool_calls_name_goes_too():
    """A key of a tool call that is None is removed; nulls in its arguments were removed when the table was read."""
    filled = {**CALL, "id": None, "function": {"name": "weather", "arguments": {"city": "Oslo"}, "strict": None}}
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [filled]}], "label": True}
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert detected(row).read(row) == Unpaired([USER], [calling], True)


GOOD = pair([USER], "yes", "no"), pair("q", "yes", "no"), talks([USER, YES], [USER, NO])
LABELLED = {"messages": [USER, YES], "label": True}
BAD_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # a good row, a bad one's changes, the message
    "unknown role": (
        GOOD[0], {"prompt": [{"role": "usr", "content": "q"}]},
        "prompt has a turn of role 'usr'; known roles are system, developer, user, assistant, tool, human, gpt",
    ),
    "a role that is no word": (
        GOOD[0], {"prompt": [{"role": {"a": 1}, "content": "q"}]},
        "prompt has a turn of role {'a': 1}; known roles are",
    ),
    "no role": (
        GOOD[0], {"prompt": [{"content": "q"}]},
        "prompt holds {'content': 'q'}, a message has role and content (or from and value)",
    ),
    "a message that is text": (
        GOOD[0], {"prompt": ["q"]}, "prompt holds 'q', a message has role and content (or from and value)",
    ),
    "no content": (
        LABELLED, {"messages": [USER, {"role": "assistant", "content": None}]},
        "messages has a turn of role 'assistant' without content",
    ),
    "an empty prompt of messages": (GOOD[0], {"prompt": []}, "prompt is empty"),
    "a missing completion": (GOOD[1], {"chosen": None}, "chosen is missing"),
    "a missing prompt": (GOOD[1], {"prompt": None}, "prompt is missing (null)"),
    "a completion that is a number": (GOOD[1], {"rejected": 3}, "rejected must be text or a list of messages, got 3"),
    "nothing shared": (
        GOOD[2], {"rejected": [SYSTEM, NO]},
        "chosen and rejected do not begin with the same turn, so there is no prompt",
    ),
    "a conversation of one turn": (
        GOOD[2], talks([YES], [YES]), "chosen and rejected do not begin with the same turn, so there is no prompt",
    ),
    "labelled messages that end with the user": (
        LABELLED, {"messages": [USER, YES, USER]},
        "messages ends with a turn of role 'user'; a completion ends with the assistant's",
    ),
    "labelled messages of one turn": (
        LABELLED, {"messages": [YES]}, "messages must end with an assistant turn that answers something before it",
    ),
    "a bad label": (LABELLED, {"label": "good"}, "label must be true or false, 0 or 1, got 'good'"),
}  # fmt: skip


@pytest.mark.parametrize(("good", "changes", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_is_not_of_the_format(good: dict[str, Any], changes: dict[str, Any], message: str):
    """A later row of another shape is refused with its column, its value and what is known."""
    form = detected(good)
    form.read(good)
    with pytest.raises(ValueError, match=re.escape(message)):
        form.read(good | changes)


@pytest.mark.parametrize(
    ("value", "label"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), (0.0, False)]
    + [
        (word, word.strip().lower() == "true")
        for word in ("true", "True", "TRUE", " true\n", "false", "False", "FALSE")
    ],
    ids=repr,
)
def test_labels(value: Any, label: bool):
    """A label is a boolean, 0 or 1, or true/false in any case."""
    assert read_label(value) is label


@pytest.mark.parametrize(
    "value", [None, "", "1", "0", "yes", "good", "t", 2, -1, 0.5, float("nan"), [True], {"label": True}], ids=repr
)
def test_anything_else_is_no_label(value: Any):
    """Other values are refused by name, and never read as true."""
    with pytest.raises(ValueError, match=re.escape(f"got {value!r}")):
        read_label(value)


def test_a_pair_is_a_good_and_a_bad_completion():
    """A pair becomes two rows with the same prompt: chosen is true and rejected is false."""
    assert unpair(PAIR) == (Unpaired("q", "yes", True), Unpaired("q", "no", False))
    assert unpair(CHAT) == (Unpaired([USER], [YES], True), Unpaired([USER], [NO], False))
