"""Rows of supervised training: what each form of row becomes, what is scored of it, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastpref.config import load_config
from fastpref.data import render
from fastpref.data.cache import Tokenized, load_examples
from fastpref.data.rows.messages import OPENING, TRAILING
from fastpref.errors import UserError
from tests.support.toy_tokenizers import trained_chatml

U, A, S = ({"role": role, "content": words} for role, words in
           (("user", "What?"), ("assistant", "Nine."), ("system", "Be kind.")))  # fmt: skip
ASKED, KIND = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>system\nBe kind.<|im_end|>\n"
ANSWER = "Nine.<|im_end|>"
MORE = f"{ANSWER}\n{ASKED}{ANSWER}"
BAD = {"role": "assistant", "content": "Go away."}
SHAREGPT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Nine."}]

ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    # form: (row, its prompt, its completion)
    "plain text": ({"prompt": "What?", "completion": " Nine."}, "What?", " Nine."),
    "plain response": ({"prompt": "What?", "response": " Nine."}, "What?", " Nine."),
    "messages": ({"messages": [U, A]}, ASKED, ANSWER),
    "several turns": ({"messages": [U, A, U, A]}, ASKED, MORE),
    "a system turn": ({"messages": [S, U, A]}, KIND + ASKED, ANSWER),
    "a system column": ({"system": "Be kind.", "messages": [U, A]}, KIND + ASKED, ANSWER),
    "a question at the end": ({"messages": [U, A, U]}, ASKED, ANSWER),
    "an untrained last turn": ({"messages": [U, A, U, A | {"weight": 0}]}, ASKED, ANSWER),
    "an opening": ({"messages": [A, U, A]}, f"<|im_start|>assistant\n{ANSWER}\n{ASKED}", ANSWER),
    "sharegpt": ({"conversations": SHAREGPT}, ASKED, ANSWER),
    "messages as JSON": ({"messages": json.dumps([U, A])}, ASKED, ANSWER),
    "prompt and completion as messages": ({"prompt": [U], "completion": [A]}, ASKED, ANSWER),
    "a prompt of messages, and text": ({"prompt": [U], "completion": "Nine."}, ASKED, ANSWER),
    "messages and a response": ({"messages": [U], "response": "Nine."}, ASKED, ANSWER),
    "alpaca": ({"instruction": "What?", "input": "", "output": "Nine."}, ASKED, ANSWER),
    "alpaca with input": ({"instruction": "What", "input": "now?", "output": "Nine."},
                          ASKED.replace("What?", "What\nnow?"), ANSWER),
    "alpaca with a history": ({"instruction": "What?", "output": "Nine.", "history": [["What?", "Nine."]]},
                              f"{ASKED}{ANSWER}\n{ASKED}", ANSWER),
    "question and answer": ({"question": "What?", "answer": "Nine."}, ASKED, ANSWER),
    "query and response": ({"query": "What?", "response": "Nine."}, ASKED, ANSWER),
    "input and output": ({"input": "What?", "output": "Nine."}, ASKED, ANSWER),
    "a text prompt and a system": ({"system": "Be kind.", "prompt": "What?", "completion": "Nine."},
                                   KIND + ASKED, ANSWER),
    "a transcript": ({"prompt": "\n\nHuman: What?\n\nAssistant:", "response": " Nine."}, ASKED, ANSWER),
    "a conversation as completion": ({"completion": [U, A]}, ASKED, ANSWER),
    "a pair": ({"prompt": [U], "chosen": [A], "rejected": [BAD]}, ASKED, ANSWER),
    "a pair of conversations": ({"chosen": [U, A], "rejected": [U, BAD]}, ASKED, ANSWER),
    "a list": ({"prompt": [U], "responses": [[BAD], [A]], "scores": [1, 2]}, ASKED, ANSWER),
    "ranks": ({"prompt": [U], "responses": [[BAD], [A]], "ranks": [2, 1]}, ASKED, ANSWER),
    "labelled true": ({"prompt": [U], "completion": [A], "label": True}, ASKED, ANSWER),
    "messages labelled true": ({"messages": [U, A, U, A], "label": True}, f"{ASKED}{ANSWER}\n{ASKED}", ANSWER),
}  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "completion"), ROWS.values(), ids=ROWS)
def test_auto_reads_a_row(row: dict[str, Any], prompt: str, completion: str):
    """`auto` finds the prompt and the completion; nothing else of the row reaches the text."""
    assert render(row, tokenizer=trained_chatml(), supervised=True) == {"prompt": prompt, "completion": completion}


NAMED: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "chat_template.default, messages": ("chat_template.default", {"messages": [U, A, U, A]}, ASKED, MORE),
    "chat_template.default, columns": (
        {"type": "chat_template.default", "field_prompt": "q", "field_completion": "a"}, {"q": "What?", "a": "Nine."},
        ASKED, ANSWER),
    "chat_template.default, roles": (
        {"type": "chat_template.default", "field_messages": "talk", "roles": {"assistant": ["bot"]}},
        {"talk": [U, A | {"role": "bot"}]}, ASKED, ANSWER),
    "chat_template.default, a pair": (
        "chat_template.default", {"messages": [U], "chosen": A, "rejected": BAD}, ASKED, ANSWER),
    "table": ({"field_prompt": "q", "field_completion": "a"}, {"q": "What?", "a": " Nine."}, "What?", " Nine."),
    "passthrough": ("passthrough", {"prompt": "What?", "completion": " Nine."}, "What?", " Nine."),
    "chatml": ("chatml.prompt_pairs", {"prompt": "What?", "completion": "Nine."}, ASKED, ANSWER),
}  # fmt: skip


@pytest.mark.parametrize(("form", "row", "prompt", "completion"), NAMED.values(), ids=NAMED)
def test_a_named_format_needs_no_label(form: Any, row: dict[str, Any], prompt: str, completion: str):
    """Formats of single completions read rows without a label."""
    options = {"supervised": True, "tokenizer": trained_chatml()}
    assert render(row, form, **options) == {"prompt": prompt, "completion": completion}


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "labelled false": ("auto", {"prompt": [U], "completion": [A], "label": False}, "labelled false"),
    "no assistant": ("auto", {"messages": [U]}, "no trained turn of the assistant"),
    "nothing asked": ("auto", {"messages": [S, A]}, "no trained turn of the assistant that answers something"),
    "text alone": ("auto", {"text": "What? Nine."}, "the columns text are of no format that auto knows"),
    "no completion": ("passthrough", {"prompt": "What?"}, "there is no column completion"),
    "a label that is none": ("auto", {"prompt": "a", "completion": "b", "label": "x"}, "label must be true or false"),
}


@pytest.mark.parametrize(("form", "row", "message"), REFUSED.values(), ids=REFUSED)
def test_a_row_without_something_to_imitate_is_refused(form: Any, row: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        render(row, form, tokenizer=trained_chatml(), supervised=True)


def test_kto_still_needs_labels():
    """A format that reads unlabelled rows for SFT names the missing column for KTO."""
    with pytest.raises(UserError, match="there is no column good"):
        render({"prompt": "a", "completion": "b"}, {"field_label": "good"}, unpaired=True)


# --- Whole sources ---------------------------------------------------------------------------------------------------


def load(folder: Path, lines: list[dict[str, Any]], *overrides: str, loss: str = "sft") -> Tokenized:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = folder / "cfg.toml"
    path.write_text(f'[model]\nname = "m"\n[loss]\ntype = "{loss}"\n[[data]]\npath = "rows.jsonl"\n')
    return load_examples(load_config(path, list(overrides)), trained_chatml(), cache=False)


def scored(data: Tokenized, at: int = 0) -> str:
    """Return the text of an example's scored tokens."""
    example, tokenizer = data.train[at], trained_chatml()
    off = {place for span in example.context(0) for place in range(*span)}
    return str(tokenizer.decode([i for place, i in enumerate(example.completions[0]) if place not in off]))


def test_only_the_assistants_words_are_scored(tmp_path: Path):
    """Of a conversation every turn of the assistant is scored with its end, or with tokens.score = "all" what lies
    between them too; one with weight 0 is not."""
    talk = [U, A, U | {"content": "And?"}, A | {"content": "Ten.", "weight": 0}, U, A | {"content": "Two."}]
    data = load(tmp_path, [{"messages": talk}])
    assert scored(data) == "Nine.<|im_end|>Two.<|im_end|>"
    assert "And?" in scored(load(tmp_path, [{"messages": talk}], "tokens.score=all"))
    assert (data.train[0].label, data.train[0].names) == (None, ("completion",))


def test_rows_of_other_losses_serve(tmp_path: Path):
    """Of pairs the chosen, of lists the best, of labelled rows the true ones are imitated, and the notes say so. A
    margin, which another loss takes of the same file, is left alone, and a weight is kept."""
    pairs = [{"prompt": [U], "chosen": [A], "rejected": [BAD], "margin": 1.0, "weight": 2.0}] * 2
    data = load(tmp_path, pairs)
    assert [scored(data, at) for at in range(2)] == [ANSWER] * 2
    assert (data.train[0].weight, data.train[0].margin) == (2.0, None)
    notes = "\n".join(data.notes)
    assert "sft takes the chosen completion of 2 pairs" in notes
    assert "the column margin is that of pairs, and sft has no use for it" in notes
    labelled = [{"prompt": [U], "completion": [A if good else BAD], "label": good} for good in (True, False, True)]
    data = load(tmp_path, labelled)
    assert [scored(data, at) for at in range(len(data.train))] == [ANSWER] * 2
    assert "takes the rows labelled true, and leaves out 1 labelled false" in "\n".join(data.notes)


def test_turns_that_are_not_scored_are_counted(tmp_path: Path):
    """The assistant's opening and turns after its last one are kept out of the loss, and a note counts such rows."""
    notes = "\n".join(load(tmp_path, [{"messages": [A, U, A]}, {"messages": [U, A, U]}, {"messages": [U, A]}]).notes)
    assert f"1 of 3 rows: {OPENING}" in notes
    assert f"1 of 3 rows: {TRAILING}" in notes


MISTAKES: dict[str, tuple[list[dict[str, Any]], list[str], str, str]] = {
    "all false": ([{"prompt": [U], "completion": [A], "label": False}] * 2, [], "sft",
                  "all 2 rows are labelled false, and sft imitates those labelled true"),
    "pairs of lists": ([{"messages": [U, A]}], ["data.0.pairs=all"], "sft",
                       "pairs: sft takes the chosen or the best completion of each row"),
    "completions for dpo": ([{"prompt": [U], "completion": [A]}], [], "dpo",
                            'single completions without a label, as these are, are read by loss.type = "sft"'),
    "messages for kto": ([{"messages": [U, A]}], [], "kto", 'are read by loss.type = "sft"'),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "overrides", "loss", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message(
    tmp_path: Path, lines: list[dict[str, Any]], overrides: list[str], loss: str, message: str
):
    with pytest.raises(UserError, match=message):
        load(tmp_path, lines, *overrides, loss=loss)
