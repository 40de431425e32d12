"""All spellings of one conversation are read the same way: the prompt is the question, a completion is the answer."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastpref.config import Config
from fastpref.data import render
from fastpref.data.rows import overlap
from fastpref.data.rows.auto import detect
from fastpref.data.rows.content import Paired, RowContent
from fastpref.data.rows.formats import find_format
from fastpref.data.sources import Prepared, notes_on_text, prepare
from fastpref.errors import UserError
from tests.support.chats import says, system, tokenize
from tests.support.toy_tokenizers import chatml, gemma, toy_tokenizer, trained_chatml, trained_llama3

Row = dict[str, Any]
Chat = list[dict[str, Any]]

Q, YES, NO = "Name a river in Peru.", "The Ucayali.", "The Thames."
SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}


def user(words: str = Q) -> Row:
    return {"role": "user", "content": words}


SYSTEM = system("Be brief.")
EARLIER = [user("Is Peru far away?"), says("From Chile it is not.")]
ASKED: dict[str, Chat] = {  # the prompts with which every spelling is tried
    "one turn": [user()],
    "system": [SYSTEM, user()],
    "turns": [*EARLIER, user()],
    "system and turns": [SYSTEM, *EARLIER, user()],
}


def sharegpt(chat: Chat) -> Chat:
    return [{"from": SHAREGPT[turn["role"]], "value": turn["content"]} for turn in chat]


def parts(chat: Chat) -> Chat:
    return [{**turn, "content": [{"type": "text", "text": turn["content"], "image": None}]} for turn in chat]


def alpaca(asked: Chat) -> Row:
    system = {"system": asked[0]["content"]} if asked[0] == SYSTEM else {"system": ""}
    history = [[EARLIER[0]["content"], EARLIER[1]["content"]]] if EARLIER[0] in asked else []
    return {"instruction": "Name a river", "input": "in Peru.", **system, "history": history}


def hh(chat: Chat) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in chat)


def without_system(chat: Chat) -> Row:
    return {"system": chat[0]["content"]} if chat[0] == SYSTEM else {}


def body(chat: Chat) -> Chat:
    return [turn for turn in chat if turn != SYSTEM]


PAIRS: dict[str, Any] = {  # prompt → row
    "prompt of messages, answers as messages": lambda p: {"prompt": p, "chosen": [says(YES)], "rejected": [says(NO)]},
    "answers as one message": lambda p: {"prompt": p, "chosen": says(YES), "rejected": says(NO)},
    "answers as text": lambda p: {"prompt": p, "chosen": YES, "rejected": NO},
    "messages": lambda p: {"messages": p, "chosen": [says(YES)], "rejected": [says(NO)]},
    "implicit prompt": lambda p: {"chosen": [*p, says(YES)], "rejected": [*p, says(NO)]},
    "prompt and whole conversations": lambda p: {
        "prompt": p, "chosen": [*p, says(YES)], "rejected": [*p, says(NO)],
    },
    "ultrafeedback_binarized": lambda p: {
        "prompt": p[-1]["content"], "prompt_id": "1", "chosen": [*p, says(YES)], "rejected": [*p, says(NO)],
        "messages": [*p, says(YES)], "score_chosen": 8.0, "score_rejected": 2.0,
    },
    "ultrafeedback_binarized, first question": lambda p: {
        "prompt": body(p)[0]["content"], "chosen": [*p, says(YES)], "rejected": [*p, says(NO)],
        "messages": [*p, says(YES)],
    },
    "messages are the chosen conversation, answers as text": lambda p: {
        "messages": [*p, says(YES)], "chosen": YES, "rejected": NO,
    },
    "messages are the rejected conversation, answers as messages": lambda p: {
        "messages": [*p, says(NO)], "chosen": [says(YES)], "rejected": [says(NO)],
    },
    "messages are the chosen conversation, whole conversations": lambda p: {
        "messages": [*p, says(YES)], "chosen": [*p, says(YES)], "rejected": [*p, says(NO)],
    },
    "messages are the chosen conversation, one answer whole": lambda p: {
        "messages": [*p, says(YES)], "chosen": [*p, says(YES)], "rejected": NO,
    },
    "messages end with an empty answer": lambda p: {"messages": [*p, says("")], "chosen": YES, "rejected": NO},
    "one completion whole, the other an answer": lambda p: {
        "prompt": p, "chosen": [*p, says(YES)], "rejected": [says(NO)],
    },
    "only the last question is repeated": lambda p: {
        "prompt": p, "chosen": [p[-1], says(YES)], "rejected": [p[-1], says(NO)],
    },
    "repeated with other white space": lambda p: {
        "prompt": p,
        "chosen": [*p[:-1], user(" Name a  river\nin Peru."), says(YES)],
        "rejected": [*p[:-1], user("Name a river\tin Peru.\n"), says(NO)],
    },
    "history, then conversations": lambda p: {
        "prompt": p[:-1], "chosen": [p[-1], says(YES)], "rejected": [p[-1], says(NO)],
    },
    "system beside the conversations": lambda p: {
        **without_system(p), "chosen": [*body(p), says(YES)], "rejected": [*body(p), says(NO)],
    },
    "system in the prompt alone": lambda p: {
        "prompt": p, "chosen": [*body(p), says(YES)], "rejected": [*body(p), says(NO)],
    },
    "system in the conversations alone": lambda p: {
        "prompt": body(p), "chosen": [*p, says(YES)], "rejected": [*p, says(NO)],
    },
    "system everywhere": lambda p: {
        **without_system(p), "prompt": p, "chosen": [*p, says(YES)], "rejected": [*p, says(NO)],
    },
    "ShareGPT": lambda p: {
        "conversations": sharegpt(p), "chosen": sharegpt([says(YES)])[0], "rejected": sharegpt([says(NO)])[0],
    },
    "ShareGPT and whole conversations": lambda p: {
        "conversations": sharegpt(p), "chosen": sharegpt([*p, says(YES)]), "rejected": sharegpt([*p, says(NO)]),
    },
    "conversations of both kinds": lambda p: {
        "conversations": sharegpt([*p, says(YES)]), "chosen": [*p, says(YES)], "rejected": [*p, says(NO)],
    },
    "torchtune": lambda p: {
        "chosen_conversations": [*p, says(YES)], "rejected_conversations": [*p, says(NO)],
    },
    "torchtune in ShareGPT's words": lambda p: {
        "chosen_conversations": sharegpt([*p, says(YES)]), "rejected_conversations": sharegpt([*p, says(NO)]),
    },
    "ms-swift": lambda p: {"messages": [*p, says(YES)], "rejected_response": NO},
    "ms-swift, whole": lambda p: {"messages": [*p, says(YES)], "rejected_messages": [*p, says(NO)]},
    "LLaMA-Factory's alpaca": lambda p: {**alpaca(p), "chosen": YES, "rejected": NO},
    "parts": lambda p: {"prompt": parts(p), "chosen": parts([says(YES)]), "rejected": parts([says(NO)])},
    "parts and whole conversations": lambda p: {
        "prompt": p, "chosen": parts([*p, says(YES)]), "rejected": parts([*p, says(NO)]),
    },
    "JSON in text": lambda p: {
        "prompt": json.dumps(p), "chosen": json.dumps([says(YES)]), "rejected": json.dumps(says(NO)),
    },
    "JSON of conversations beside a text": lambda p: {
        "prompt": p[-1]["content"], "chosen": json.dumps([*p, says(YES)]), "rejected": json.dumps([*p, says(NO)]),
    },
    "Python's text of lists": lambda p: {"prompt": str(p), "chosen": str([says(YES)]), "rejected": str([says(NO)])},
    "white space around what is repeated": lambda p: {
        "prompt": p, "chosen": [*p[:-1], user(Q + " "), says(YES)], "rejected": [*p[:-1], user(Q + "\n"), says(NO)],
    },
    "hh-rlhf": lambda p: {
        **without_system(p), "chosen": hh([*body(p), says(YES)]), "rejected": hh([*body(p), says(NO)]),
    },
    "hh-rlhf with a prompt": lambda p: {
        **without_system(p), "prompt": hh(body(p)) + "\n\nAssistant:", "chosen": " " + YES, "rejected": " " + NO,
    },
    "hh-rlhf, prompt and all": lambda p: {
        **without_system(p), "prompt": hh(body(p)) + "\n\nAssistant:",
        "chosen": hh([*body(p), says(YES)]), "rejected": hh([*body(p), says(NO)]),
    },
}  # fmt: skip
SINGLES: dict[str, Any] = {  # prompt → row with a bad completion, without its label
    "prompt of messages": lambda p: {"prompt": p, "completion": [says(NO)]},
    "text": lambda p: {"prompt": p, "completion": NO},
    "messages": lambda p: {"messages": [*p, says(NO)]},
    "conversations": lambda p: {"conversations": sharegpt([*p, says(NO)])},
    "prompt and whole conversation": lambda p: {"prompt": p, "completion": [*p, says(NO)]},
    "text prompt and whole conversation": lambda p: {"prompt": p[-1]["content"], "completion": [*p, says(NO)]},
    "whole conversation": lambda p: {"completion": [*p, says(NO)]},
    "prompt holds the answer": lambda p: {"prompt": [*p, says(NO)], "completion": NO},
    "messages hold the answer": lambda p: {"messages": [*p, says(NO)], "completion": [says(NO)]},
    "system in the completion alone": lambda p: {"prompt": body(p), "completion": [*p, says(NO)]},
    "LLaMA-Factory's alpaca": lambda p: {**alpaca(p), "output": NO},
    "parts": lambda p: {"messages": parts([*p, says(NO)])},
    "JSON in text": lambda p: {"messages": json.dumps([*p, says(NO)])},
    "hh-rlhf": lambda p: {**without_system(p), "prompt": hh(body(p)) + "\n\nAssistant:", "completion": " " + NO},
}
TOKENIZERS = (trained_chatml, trained_llama3, chatml)


def read(row: Row) -> RowContent:
    form = detect(row)
    assert form is not None
    return form.read(row)


def prepared(folder: Path, rows: list[Row], loss: str = "dpo", **data: Any) -> Prepared:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    raw = {"model": {"name": "m"}, "data": [{"path": str(path), **data}], "loss": {"type": loss}}
    return prepare(Config.model_validate(raw))


def tokens(made: Prepared, tokenizer: Any) -> list[tuple[list[int], tuple[list[int], ...]]]:
    options = Config.model_validate({"model": {"name": "m"}, "data": [{"path": "p"}]}).tokens
    examples, _ = tokenize(made.train, tokenizer, options)
    return [(example.prompt, example.completions) for example in examples]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("spelling", PAIRS)
def test_every_spelling_of_a_pair_has_the_same_tokens(tmp_path: Path, spelling: str, asked: str):
    """Whatever columns, repeated turns and form of text a row has, its tokens are those of the turns."""
    turns = ASKED[asked]
    row = PAIRS[spelling](turns)
    if spelling.startswith("LLaMA-Factory"):
        turns = [*turns[:-1], user("Name a river\nin Peru.")]
    made = prepared(tmp_path, [row])
    for tokenizer in (new() for new in TOKENIZERS):
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ((prompt_ids, (chosen, rejected)),) = tokens(made, tokenizer)
        assert tokenizer.decode(prompt_ids) == prompt
        assert tokenizer.decode(chosen[:-1]) == YES
        assert tokenizer.decode(rejected[:-1]) == NO


@pytest.mark.parametrize("tag", [{"label": False}, {"kto_tag": False}, {"label": "false"}, {"kto_tag": 0}], ids=str)
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("spelling", SINGLES)
def test_every_spelling_of_a_single_completion_has_the_same_tokens(
    tmp_path: Path, spelling: str, asked: str, tag: dict[str, Any]
):
    """This holds for KTO's single completions too, whose label column has several names."""
    turns = ASKED[asked]
    row = SINGLES[spelling](turns)
    if spelling.startswith("LLaMA-Factory"):
        turns = [*turns[:-1], user("Name a river\nin Peru.")]
    made = prepared(tmp_path, [row | tag], "kto")
    assert [getattr(row.content, "label", None) for row in made.train] == [False]
    tokenizer = chatml()
    ((prompt_ids, (completion,)),) = tokens(made, tokenizer)
    assert tokenizer.decode(prompt_ids) == tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(completion[:-1]) == NO


def test_a_file_of_all_spellings_is_read_alike_whichever_comes_first(tmp_path: Path):
    """The first row determines the format of a file, and each row determines where its own prompt is."""
    spellings = [
        "prompt of messages, answers as messages", "messages", "implicit prompt", "ultrafeedback_binarized", "ShareGPT",
        "messages are the chosen conversation, answers as text", "prompt and whole conversations", "parts",
    ]  # fmt: skip
    rows = [PAIRS[spelling](ASKED["turns"]) for spelling in spellings]
    for first in range(len(rows)):
        prompt_ids = tokens(prepared(tmp_path, rows[first:] + rows[:first]), chatml())
        assert len(prompt_ids) == len(rows)
        assert all(row == prompt_ids[0] for row in prompt_ids)


def test_marks_of_turns_do_not_tell_them_apart():
    """Ids, names and times of a turn do not make it different; a call and reasoning do."""
    marked = {"prompt": [user() | {"id": 1}], "chosen": [user() | {"id": 2}, says(YES)],
              "rejected": [user() | {"id": 3}, says(NO)]}  # fmt: skip
    assert render(marked, tokenizer=chatml())["chosen"] == YES + "<|im_end|>"
    thought = {**says("a"), "reasoning_content": "hm"}
    rows = [{"chosen": [user(), thought, user(), says(YES)], "rejected": [user(), other, user(), says(NO)]}
            for other in (thought, says("a"))]  # fmt: skip
    prompts = [read(row).prompt for row in rows]
    assert prompts == [[user(), thought, user()], [user()]]


def test_results_that_completions_begin_with_belong_to_the_prompt():
    """Tool results with which both completions begin belong to the prompt; different ones are kept."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result, other = {"role": "tool", "content": "4"}, {"role": "tool", "content": "5"}
    row = {"prompt": [user(), call], "chosen": [result, says(YES)], "rejected": [result, says(NO)]}
    content = read(row)
    assert content.prompt == [user(), call, result]
    assert content.by_name == {"chosen": [says(YES)], "rejected": [says(NO)]}
    row["rejected"] = [other, says(NO)]
    assert read(row).by_name["rejected"] == [other, says(NO)]


def test_messages_beside_a_prompt_are_read_if_the_completions_are_of_them():
    """Messages next to a prompt are read if they contain the completions; else they are ignored, with a remark."""
    row = {"prompt": Q, "messages": [SYSTEM, *EARLIER, user(), says(YES)], "chosen": YES, "rejected": NO}
    assert read(row).prompt == [SYSTEM, *EARLIER, user()]
    row["messages"] = [user("Name a lake."), says("Lake Chad.")]
    assert (read(row).prompt, read(row).remarks) == ([user()], (overlap.OTHER_MESSAGES,))
    row |= {"chosen": [user(), says(YES)], "rejected": [user(), says(NO)]}
    assert (read(row).prompt, read(row).remarks) == ([user()], (overlap.OTHER_MESSAGES,))


def test_text_and_chats_in_one_file_are_all_chats(tmp_path: Path):
    """If one of the first hundred rows has messages, all rows become chats; a later one is an error."""
    text, chat = {"prompt": Q, "chosen": YES, "rejected": NO}, {"prompt": [user()], "chosen": YES, "rejected": NO}
    for rows in ([text, chat], [chat, text]):
        assert [row.content.prompt for row in prepared(tmp_path, rows).train] == [[user()]] * 2
    with pytest.raises(UserError, match=r"rows\.jsonl:101: there are messages, a system prompt or tools here"):
        prepared(tmp_path, [text] * 100 + [chat])


NAMED: dict[str, tuple[Any, bool]] = {  # row of the named format, and whether it has all turns of the prompt
    "chat_template.default": (lambda p: {"messages": p, "chosen": [*p, says(YES)], "rejected": [*p, says(NO)]}, True),
    "chat_template.argilla": (lambda p: {"chosen": [*p, says(YES)], "rejected": [*p, says(NO)]}, True),
    "chatml.argilla_chat": (lambda p: {"chosen": [*p, says(YES)], "rejected": [*p, says(NO)]}, True),
    "chatml.ultra": (
        lambda p: {"prompt": body(p)[0]["content"], "chosen": [*p, says(YES)], "rejected": [*p, says(NO)]}, True,
    ),
    "chatml.default": (
        lambda p: {**without_system(p), "prompt": Q, "chosen": f"{Q} {YES}", "rejected": f"{Q}\n{NO}"}, False,
    ),
    "chatml.intel": (
        lambda p: {**without_system(p), "question": Q, "chosen": f"{Q} {YES}", "rejected": f"{Q} {NO}"}, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", NAMED)
def test_named_formats_drop_what_is_repeated(name: str, asked: str):
    """Named formats remove the prompt from the completions too."""
    row, all_turns = NAMED[name]
    turns = ASKED[asked] if all_turns else [turn for turn in ASKED[asked] if turn == SYSTEM or turn["content"] == Q]
    made = render(row(ASKED[asked]), name, tokenizer=chatml())
    assert made["prompt"] == chatml().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert (made["chosen"], made["rejected"]) == (YES + "<|im_end|>", NO + "<|im_end|>")


def test_a_function_of_ones_own_is_read_so_too(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "def read(row): return {'prompt': row['p'], 'chosen': row['c'], 'rejected': row['r']}"
    )
    row = {"p": [user()], "c": [user(), says(YES)], "r": [user(), says(NO)]}
    made = prepared(tmp_path, [row], format=f"{tmp_path}/mine.py:read")
    assert made.train[0].content.prompt == [user()]
    assert made.train[0].content.by_name == {"chosen": [says(YES)], "rejected": [says(NO)]}


# --- Text ----------------------------------------------------------------------------------------------------------

TEXTS: dict[str, tuple[tuple[str, str, str], tuple[str, str], tuple[str, ...]]] = {  # row, completions, remarks
    "repeated": ((Q, f"{Q} {YES}", f"{Q} {NO}"), (f" {YES}", f" {NO}"), (overlap.REPEATED,)),
    "repeated before a line end": (("Q: a lake?\nA:", "Q: a lake?\nA: Chad", "Q: a lake?\nA: No"), (" Chad", " No"),
                                   (overlap.REPEATED,)),
    "repeated without the space at its end": ((Q + " ", f"{Q}\n{YES}", f"{Q} {NO}"), (YES, NO), (overlap.REPEATED,)),
    "repeated with other white space": (("Name  a river\nin Peru.", f"{Q}\n{YES}", f" {Q} {NO}"),
                                        (f"\n{YES}", f" {NO}"), (overlap.REPEATED,)),
    "repeated with other white space, and a space at its end": (
        (f"\t{Q}\n\n", f"{Q} {YES}", f"Name a\nriver in Peru. {NO}"), (YES, NO), (overlap.REPEATED,),
    ),
    "by one only": ((Q, f"{Q} {YES}", NO), (f"{Q} {YES}", NO), (overlap.ONE_REPEATED,)),
    "a word by one only": (("Hello", "Hello there!", "No."), ("Hello there!", "No."), ()),
    "and nothing after it": ((Q, Q, f"{Q} {NO}"), (Q, f"{Q} {NO}"), (overlap.ONE_REPEATED,)),
    "in the midst of a word": (("The capital of", "The capital offence", "The capital of x"),
                               ("The capital offence", "The capital of x"), (overlap.ONE_REPEATED,)),
    "a word that may be chance": (("Hello", "Hello there!", "Hello you."), ("Hello there!", "Hello you."),
                                  (overlap.PERHAPS_REPEATED,)),
    "a greeting that goes on": (("Hello", "Hello! I am fine.", "Hello."), ("Hello! I am fine.", "Hello."), ()),
    "an empty prompt": (("", "yes", "no"), ("yes", "no"), ()),
}  # fmt: skip


@pytest.mark.parametrize(("row", "completions", "remarks"), TEXTS.values(), ids=TEXTS)
def test_a_text_prompt_is_dropped_if_every_completion_begins_with_it(
    row: tuple[str, str, str], completions: tuple[str, str], remarks: tuple[str, ...]
):
    """The whole prompt is removed if both completions begin with it and go on; one or two words get a remark."""
    content = read(dict(zip(("prompt", "chosen", "rejected"), row)))
    assert (content.prompt, tuple(content.by_name.values())) == (row[0], completions)
    assert content.remarks == remarks
    assert render(dict(zip(("prompt", "chosen", "rejected"), row)), "passthrough") == {
        "prompt": row[0], "chosen": completions[0], "rejected": completions[1]
    }  # fmt: skip


def test_a_single_completion_that_begins_with_its_prompt():
    row = {"prompt": Q, "completion": f"{Q} {YES}", "label": True}
    assert render(row, unpaired=True) == {"prompt": Q, "completion": f" {YES}", "label": True}
    table = {"field_prompt": "prompt", "prompt_format": "Q: {prompt}\nA:", "completion_format": "{completion}"}
    assert render(row, table, unpaired=True) == {"prompt": f"Q: {Q}\nA:", "completion": f" {YES}", "label": True}


def test_what_is_dropped_is_counted_in_a_note(tmp_path: Path):
    """One note counts the rows with a repeated prompt, and names the first."""
    again = [f"{i}. {Q} " if i % 2 else "" for i in range(6)]
    rows = [{"prompt": f"{i}. {Q}", "chosen": f"{again[i]}yes", "rejected": f"{again[i]}no"} for i in range(6)]
    made = prepared(tmp_path, rows)
    assert made.notes[1:] == [f"rows.jsonl: 3 of 6 rows: {overlap.REPEATED} (the first: {tmp_path}/rows.jsonl:2)"]


PLAIN_TEXTS: dict[str, tuple[str, dict, Any]] = {  # loss, row, format
    "pairs": ("dpo", {"prompt": Q, "chosen": YES, "rejected": NO}, "auto"),
    "labels": ("kto", {"prompt": Q, "completion": YES, "label": True}, "auto"),
    "a completion to imitate": ("sft", {"prompt": Q, "response": YES}, "auto"),
    "lists": ("pl", {"prompt": Q, "responses": [YES, NO], "scores": [1, 0]}, "auto"),
    "a table": ("dpo", {"q": Q, "chosen": YES, "rejected": NO}, {"field_prompt": "q"}),
    "a table of labels": ("kto", {"q": Q, "completion": YES, "label": True}, {"field_prompt": "q"}),
    "a table of lists": (
        "pl", {"q": Q, "responses": [YES, NO], "scores": [1, 0]}, {"type": "table.ranked", "field_prompt": "q"},
    ),
    "a function": ("dpo", {"q": Q, "chosen": YES, "rejected": NO}, "mine:read"),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "row", "form"), PLAIN_TEXTS.values(), ids=PLAIN_TEXTS)
def test_plain_text_for_a_chat_model_is_noted_with_the_line_to_paste(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, row: dict, form: Any
):
    """For a chat model, a note on plain text names the key that makes chats of it, which it does; nothing is noted once
    the key is set, or for a model without a chat template."""
    (tmp_path / "mine.py").write_text("def read(row): return {'prompt': row['q'], **row}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    made = prepared(tmp_path, [row], loss, format=form)
    assert made.train[0].content.prompt == Q
    (note,) = notes_on_text(made, chatml())
    assert note.endswith("to train chats, set chat = true under [[data]] (false: the text is meant as it is)")
    assert notes_on_text(made, toy_tokenizer()) == []
    for chat, prompt, answer in ((True, [user()], [says(YES)]), (False, Q, YES)):
        decided = prepared(tmp_path, [row], loss, format=form, chat=chat)
        assert decided.train[0].content.prompt == prompt
        assert next(iter(decided.train[0].content.by_name.values())) == answer
        assert notes_on_text(decided, chatml()) == []


def test_the_system_column_of_a_table_is_a_turn_of_its_chat():
    """A table's system column is a system turn, unless its prompt_format writes it."""
    row = {"prompt": Q, "chosen": YES, "rejected": NO, "system": "Be brief."}
    own = {"type": "table", "prompt_format": "{system} {prompt}"}
    for form, turns in (("table", [SYSTEM | {"content": "Be brief."}, user()]), (own, [user(f"Be brief. {Q}")])):
        found = find_format(form, unpaired=False, chat=True)
        assert found is not None
        assert found.read(row).prompt == turns


def test_rows_that_are_chats_cannot_be_text(tmp_path: Path):
    """data.chat = false is an error for rows that are chats, which says what they are."""
    row = {"prompt": [user()], "chosen": YES, "rejected": NO}
    with pytest.raises(
        UserError, match=r"data\.chat = false is for rows of plain text, and this is a chat: a prompt of"
    ):
        prepared(tmp_path, [row], chat=False)


def test_rows_that_need_no_note(tmp_path: Path):
    """Text that holds the turns already, and rows that become chats anyway, are not noted."""
    text = {"prompt": Q, "chosen": YES, "rejected": NO}
    turns = {**text, "prompt": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n"}
    assert notes_on_text(prepared(tmp_path, [turns]), chatml()) == []
    assert notes_on_text(prepared(tmp_path, [{**text, "system": "Be brief."}]), chatml()) == []


# --- Misread rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [
    {"prompt": [SYSTEM], "chosen": YES, "rejected": [says(NO)]},
    {"messages": [SYSTEM, says(YES)], "rejected_response": NO},
    {"messages": [SYSTEM], "chosen": [SYSTEM, says(YES)], "rejected": [says(NO)]},
], ids=str)  # fmt: skip
def test_a_system_turn_alone_is_a_prompt(row: Row):
    """A prompt can consist of a system turn alone."""
    assert read(row) == Paired([SYSTEM], [says(YES)], [says(NO)])


REMARKED: dict[str, tuple[Row, str]] = {
    "a prompt with an answer": ({"messages": [user(), says(YES)], "chosen": YES, "rejected": NO}, overlap.ANSWERED),
    "a text that is not in the conversations": (
        {"prompt": "[INST] " + Q, "chosen": [user(), says(YES)], "rejected": [user(), says(NO)]}, overlap.OTHER_PROMPT,
    ),
    "another system turn": (
        {"prompt": [SYSTEM, user()], "chosen": [{**SYSTEM, "content": "Be long."}, user(), says(YES)],
         "rejected": [{**SYSTEM, "content": "Be long."}, user(), says(NO)]}, overlap.OTHER_SYSTEM,
    ),
    "other turns before the last of rejected": (
        {"chosen": [user(), says("a"), user(), says(YES)], "rejected": [user(), says("b"), user(), says(NO)]},
        overlap.OTHER_TURNS,
    ),
    "tools in a column of another name": (
        {"prompt": [user()], "chosen": YES, "rejected": NO, "functions": [{"name": "f"}]},
        "the column functions is filled, and a prompt of messages with chosen and rejected does not read it",
    ),
    "columns that are not read": (
        {"prompt": Q, "chosen": YES, "rejected": NO, "context": "Peru has rivers.", "history": []},
        "the column context is filled, and text prompt, chosen and rejected does not read it",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "remark"), REMARKED.values(), ids=REMARKED)
def test_what_a_reading_leaves_out_is_said(tmp_path: Path, row: Row, remark: str):
    named = {"format": "chat_template.argilla"} if remark == overlap.OTHER_TURNS else {}
    made = prepared(tmp_path, [row], **named)
    assert made.notes[1:] == [f"rows.jsonl: 1 of 1 rows: {remark} (the first: {tmp_path}/rows.jsonl:1)"]


MISREAD: dict[str, tuple[Row, str]] = {
    "a prompt that ends with another answer": (
        {"prompt": [user(), says("Rome.")], "chosen": YES, "rejected": NO}, "the prompt ends with the assistant's turn",
    ),
    "messages that end with another answer": (
        {"messages": [user(), says("Rome.")], "chosen": [says(YES)], "rejected": [says(NO)]},
        "the prompt ends with the assistant's turn",
    ),
    "conversations about something else": (
        {"prompt": [user("Name a lake.")], "chosen": [user(), says(YES)], "rejected": [user(), says(NO)]},
        "chosen begins with a turn of role 'user', and not as the prompt does",
    ),
    "conversations that begin with different system turns": (
        {"chosen": [SYSTEM, user(), says(YES)], "rejected": [{**SYSTEM, "content": "x"}, user(), says(NO)]},
        "chosen and rejected do not begin with the same turn",
    ),
    "a system turn in one conversation alone": (
        {"chosen": [SYSTEM, user(), says(YES)], "rejected": [user(), says(NO)]},
        "chosen and rejected do not begin with the same turn",
    ),
    "conversations of two questions": (
        {"chosen": [user("a"), says(YES)], "rejected": [user("b"), says(NO)]},
        "chosen and rejected do not begin with the same turn",
    ),
    "a cell that looks like messages": (
        {"prompt": Q, "chosen": '[{"role": "assistant", "content": "yes}]', "rejected": "no"},
        "chosen looks like a list of messages, and is neither valid JSON nor",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), MISREAD.values(), ids=MISREAD)
def test_a_misread_row_is_an_error_and_can_be_left_out(tmp_path: Path, row: Row, message: str):
    good = {"prompt": [user()], "chosen": [says(YES)], "rejected": [says(NO)]}
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, [good, row])
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl:2: {message}")
    assert len(prepared(tmp_path, [good, row], on_error="drop").train) == 1


def test_single_completions_that_are_misread(tmp_path: Path):
    for row, message in (
        ({"prompt": [user(), says("x")], "completion": NO}, "the prompt ends with the assistant's turn"),
        ({"prompt": [user("x")], "completion": [user(), says(NO)]}, "completion begins with a turn of role 'user'"),
    ):
        with pytest.raises(UserError, match=message):
            prepared(tmp_path, [row | {"label": True}], "kto")


def test_transcripts_without_a_chat_template_are_written_as_they_are():
    """Without a chat template, a base model learns hh-rlhf's own text; the prompt ends where the answer begins."""
    tokenizer = gemma()
    tokenizer.chat_template = None
    row = {"chosen": hh([*EARLIER, user(), says(YES)]), "rejected": hh([*EARLIER, user(), says(NO)])}
    made = render(row, tokenizer=tokenizer)
    assert made == {"prompt": hh([*EARLIER, user()]) + "\n\nAssistant:", "chosen": f" {YES}", "rejected": f" {NO}"}
