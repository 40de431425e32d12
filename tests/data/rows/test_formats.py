"""Which format a row's columns indicate, what each row becomes, and the message about rows of no format."""

import re
from typing import Any

import pytest

from fastpref.data.rows.auto import detect
from fastpref.data.rows.content import Paired, Unpaired, read_label, unpair

USER = {"role": "user", "content": "q"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "be kind"}
HUMAN, GPT_YES, GPT_NO = (
    {"from": "human", "value": "q"},
    {"from": "gpt", "value": "yes"},
    {"from": "gpt", "value": "no"},
)

PAIR, CHAT = Paired("q", "yes", "no"), Paired([USER], [YES], [NO])
ROWS: dict[str, tuple[dict[str, Any], str, Paired | Unpaired]] = {
    "text": ({"prompt": "q", "chosen": "yes", "rejected": "no"}, "text prompt, chosen and rejected", PAIR),
    "text and columns of no concern": (
        {"prompt": "q", "chosen": "yes", "rejected": "no", "score": 3, "messages": None, "label": 1},
        "text prompt, chosen and rejected",
        PAIR,
    ),
    "text prompt, answers as messages": (
        {"prompt": "q", "chosen": [YES], "rejected": [NO]},
        "text prompt, chosen and rejected",
        CHAT,
    ),
    "text prompt, answers as one message": (
        {"prompt": "q", "chosen": YES, "rejected": NO},
        "text prompt, chosen and rejected",
        CHAT,
    ),
    "text prompt, one answer of each kind": (
        {"prompt": "q", "chosen": "yes", "rejected": [NO]},
        "text prompt, chosen and rejected",
        CHAT,
    ),
    "text prompt, one answer of each kind, the other way": (
        {"prompt": "q", "chosen": YES, "rejected": "no"},
        "text prompt, chosen and rejected",
        CHAT,
    ),
    "explicit prompt": (
        {"prompt": [SYSTEM, USER], "chosen": [YES], "rejected": [NO]},
        "a prompt of messages with chosen and rejected",
        Paired([SYSTEM, USER], [YES], [NO]),
    ),
    "explicit prompt, text answers": (
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        "a prompt of messages with chosen and rejected",
        CHAT,
    ),
    "explicit prompt, answers of several turns": (
        {"prompt": [USER], "chosen": [YES, USER, YES], "rejected": [NO]},
        "a prompt of messages with chosen and rejected",
        Paired([USER], [YES, USER, YES], [NO]),
    ),
    "implicit prompt": (
        {"chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
        "chosen and rejected conversations that share their prompt",
        Paired([SYSTEM, USER], [YES], [NO]),
    ),
    "implicit prompt beside its text": (
        {"prompt": "q", "chosen": [USER, YES], "rejected": [USER, NO]},
        "chosen and rejected conversations that share their prompt",
        CHAT,
    ),
    "implicit prompt of several turns": (
        {"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]},
        "chosen and rejected conversations that share their prompt",
        Paired([USER, YES, USER], [YES], [NO]),
    ),
    "implicit prompt, all turns after the split": (
        {"chosen": [USER, YES, USER, YES], "rejected": [USER, NO]},
        "chosen and rejected conversations that share their prompt",
        Paired([USER], [YES, USER, YES], [NO]),
    ),
    "implicit prompt, equal answers": (
        {"chosen": [USER, YES], "rejected": [USER, YES]},
        "chosen and rejected conversations that share their prompt",
        Paired([USER], [YES], [YES]),
    ),
    "implicit prompt in ShareGPT's words": (
        {"chosen": [HUMAN, GPT_YES], "rejected": [HUMAN, GPT_NO]},
        "chosen and rejected conversations that share their prompt",
        CHAT,
    ),
    "messages and answers": (
        {"messages": [USER], "chosen": YES, "rejected": NO},
        "messages with chosen and rejected",
        CHAT,
    ),
    "ShareGPT": (
        {"conversations": [HUMAN], "chosen": GPT_YES, "rejected": GPT_NO},
        "ShareGPT conversations with chosen and rejected",
        CHAT,
    ),
    "ShareGPT, text answers": (
        {"conversations": [HUMAN], "chosen": "yes", "rejected": "no"},
        "ShareGPT conversations with chosen and rejected",
        CHAT,
    ),
    "labelled text": (
        {"prompt": "q", "completion": "yes", "label": True},
        "prompt, completion and label",
        Unpaired("q", "yes", True),
    ),
    "labelled answer to messages": (
        {"prompt": [USER], "completion": "no", "label": 0},
        "prompt, completion and label",
        Unpaired([USER], [NO], False),
    ),
    "labelled message to text": (
        {"prompt": "q", "completion": [YES], "label": 1},
        "prompt, completion and label",
        Unpaired([USER], [YES], True),
    ),
    "labelled messages": (
        {"messages": [SYSTEM, USER, YES], "label": "True"},
        "messages and label",
        Unpaired([SYSTEM, USER], [YES], True),
    ),
    "labelled ShareGPT": (
        {"conversations": [HUMAN, GPT_NO], "label": "false"},
        "conversations and label",
        Unpaired([USER], [NO], False),
    ),
}


@pytest.mark.parametrize(("row", "name", "content"), ROWS.values(), ids=ROWS)
def test_a_rows_columns_say_its_format(row: dict[str, Any], name: str, content: Paired | Unpaired):
    """`detect` names the format of the columns and their types, and reading gives the prompt and its responses."""
    form = detect(row)
    assert form is not None
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
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function": "tool",
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


@pytest.mark.parametrize(("given", "role"), ROLES.items(), ids=ROLES)
def test_roles_have_one_name(given: str, role: str):
    """Roles get the template's names, whether ShareGPT's are written as `from`/`value` or as `role`/`content`."""
    for turn in ({"from": given, "value": "x"}, {"role": given, "content": "x"}):
        row = {"prompt": [turn, USER], "chosen": "yes", "rejected": "no"}
        form = detect(row)
        assert form is not None
        assert form.read(row) == Paired([{"role": role, "content": "x"}, USER], [YES], [NO])


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def test_other_keys_of_a_message_pass_through():
    """Other keys that templates read (calls, reasoning, names) are kept, unless a table has filled them with None."""
    filled = {"tool_calls": None, "reasoning_content": None, "name": None}
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"}
    result = {"role": "tool", "content": "4°", "name": "weather"}
    row = {"messages": [{**USER, **filled}, calling, {**result, "tool_calls": None}, {**YES, **filled}], "label": True}
    form = detect(row)
    assert form is not None
    assert form.read(row) == Unpaired(
        [USER, {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "hm"}, result], [YES], True
    )


def test_none_beside_a_tool_calls_name_goes_too():
    """A key of a tool call that is None is removed; nulls in its arguments were removed when the table was read."""
    filled = {**CALL, "id": None, "function": {"name": "weather", "arguments": {"city": "Oslo"}, "strict": None}}
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [filled]}], "label": True}
    form = detect(row)
    assert form is not None
    content = form.read(row)
    assert isinstance(content, Unpaired)
    assert content.completion == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


BAD_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # a good first row, a bad one, the message
    "unknown role": (
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": [{"role": "usr", "content": "q"}], "chosen": "yes", "rejected": "no"},
        "prompt has a turn of role 'usr'; known roles are system, developer, user, assistant, tool, human, gpt",
    ),
    "a role that is no word": (
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": [{"role": {"a": 1}, "content": "q"}], "chosen": "yes", "rejected": "no"},
        "prompt has a turn of role {'a': 1}; known roles are",
    ),
    "no role": (
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": [{"content": "q"}], "chosen": "yes", "rejected": "no"},
        "prompt holds {'content': 'q'}, a message has role and content (or from and value)",
    ),
    "a message that is text": (
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": ["q"], "chosen": "yes", "rejected": "no"},
        "prompt holds 'q', a message has role and content (or from and value)",
    ),
    "no content": (
        {"messages": [USER, YES], "label": True},
        {"messages": [USER, {"role": "assistant", "content": None}], "label": True},
        "messages has a turn of role 'assistant' without content",
    ),
    "an empty prompt of messages": (
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": [], "chosen": "yes", "rejected": "no"},
        "prompt is empty",
    ),
    "a missing response": (
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": "q", "chosen": None, "rejected": "no"},
        "chosen is missing",
    ),
    "a missing prompt": (
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": None, "chosen": "yes", "rejected": "no"},
        "prompt is missing (null)",
    ),
    "a response that is a number": (
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": "q", "chosen": "yes", "rejected": 3},
        "rejected must be text or a list of messages, got 3",
    ),
    "nothing shared": (
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"chosen": [USER, YES], "rejected": [SYSTEM, NO]},
        "chosen and rejected do not begin with the same turn, so there is no prompt",
    ),
    "a conversation of one turn": (
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"chosen": [YES], "rejected": [YES]},
        "chosen and rejected do not begin with the same turn, so there is no prompt",
    ),
    "labelled messages that end with the user": (
        {"messages": [USER, YES], "label": True},
        {"messages": [USER, YES, USER], "label": True},
        "messages ends with a turn of role 'user'; a response ends with the assistant's",
    ),
    "labelled messages of one turn": (
        {"messages": [USER, YES], "label": True},
        {"messages": [YES], "label": True},
        "messages must end with an assistant turn that answers something before it",
    ),
    "a bad label": (
        {"messages": [USER, YES], "label": True},
        {"messages": [USER, YES], "label": "good"},
        "label must be true or false, 0 or 1, got 'good'",
    ),
}


@pytest.mark.parametrize(("first", "bad", "what"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_is_not_of_the_format(first: dict[str, Any], bad: dict[str, Any], what: str):
    """A later row of another shape is refused with its column, its value and what is known."""
    form = detect(first)
    assert form is not None
    form.read(first)
    with pytest.raises(ValueError, match=re.escape(what)):
        form.read(bad)


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


def test_a_pair_is_a_good_and_a_bad_response():
    """A pair becomes two rows with the same prompt: chosen is true and rejected is false."""
    assert unpair(PAIR) == (Unpaired("q", "yes", True), Unpaired("q", "no", False))
    assert unpair(CHAT) == (Unpaired([USER], [YES], True), Unpaired([USER], [NO], False))
