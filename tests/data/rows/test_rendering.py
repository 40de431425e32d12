"""Every named format, option and template: each row gives exactly the expected text, of which exactly the completion is
scored.

The scored tokens are those of a micro-batch, after real tokenizing and collating.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from fastpref.config import TokensConfig
from fastpref.config.formats import NAMES
from fastpref.data import render
from fastpref.data.batch import Layout, collate
from fastpref.data.rows.content import Paired, unpair
from fastpref.data.rows.formats import find_format
from fastpref.data.rows.rendering import choose
from fastpref.data.sources import SourceRow
from fastpref.errors import UserError
from tests.support.chats import says, system, tokenize, user
from tests.support.toy_tokenizers import (
    QWEN3,
    chatml,
    gemma,
    llama3,
    plain,
    trained_chatml,
    trained_gemma,
    trained_llama3,
)

LAYOUTS: tuple[Layout, ...] = ("tree", "packed", "padded")
Make = Callable[[], PreTrainedTokenizerBase]
FAMILIES: dict[str, Make] = {make.__name__: make for make in (trained_chatml, trained_llama3, trained_gemma)}
EVERY_FAMILY = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


def scored(
    row: dict[str, Any], format: Any, tokenizer: PreTrainedTokenizerBase, *, unpaired: bool = False, **options: Any
) -> list[str]:
    """Return the prompt and each completion as the model sees them: first what is not scored, then what is.

    All turns of a completion are scored, so that none is missing here; test_turns.py tests whose turns are scored.
    """
    content = choose(row, {"type": format, **options} if options else format, unpaired=unpaired).read(row)
    examples, _ = tokenize([SourceRow(content, "row")], tokenizer, TokensConfig(score="all"))
    assert len(examples) == 1
    batch = collate(examples, "padded")
    assert batch.attention_mask is not None
    texts = [str(tokenizer.decode(examples[0].prompt))]
    for sequence in range(batch.completions):
        ids = batch.of_tokens(batch.targets)[batch.segments == sequence].tolist()
        whole = batch.input_ids[sequence][batch.attention_mask[sequence].bool()].tolist()
        assert whole == examples[0].prompt + ids
        texts.append(str(tokenizer.decode(ids)))
    return texts


def values(made: dict[str, Any]) -> list[str]:
    return [text for name, text in made.items() if name != "label"]


# --- Text ----------------------------------------------------------------------------------------------------------

Q, S, YES, NO = "What?", "Be kind.", "yes", "no"


def turns(*words: str) -> list[dict[str, Any]]:
    """Return messages of the user and the assistant in turn."""
    return [(says if at % 2 else user)(each) for at, each in enumerate(words)]


FIVE = [system(S), *turns("q1", "a1", "q2", "a2", "q3")]
ANSWERS: dict[str, Any] = {"chosen": YES, "rejected": NO}


def talks(*prompt: dict[str, Any]) -> dict[str, Any]:
    """Return the answers as whole conversations after this prompt."""
    return {"chosen": [*prompt, says(YES)], "rejected": [*prompt, says(NO)]}


def sharegpt(words: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": Q}, {"from": "gpt", "value": words}]


# A format, a row of it, and the turns of its prompt. Every format exists as chatml.NAME and llama3.NAME.
PAIRS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "default, prompt": ("default", {"prompt": Q, "question": "other", **ANSWERS}, [user(Q)]),
    "default, input": ("default", {"input": Q, **ANSWERS}, [user(Q)]),
    "default, question": ("default", {"question": Q, **ANSWERS}, [user(Q)]),
    "default, instruction": ("default", {"instruction": Q, "chosen_response": YES, "rejected_response": NO}, [user(Q)]),
    "default, an empty input beside the instruction": (
        "default", {"input": "", "instruction": Q, **ANSWERS}, [user(Q)],
    ),
    "default, chosen first": (
        "default", {"prompt": Q, "chosen": YES, "chosen_response": "x", "rejected": None, "rejected_response": NO},
        [user(Q)],
    ),
    "default, system": ("default", {"system": S, "prompt": Q, **ANSWERS}, [system(S), user(Q)]),
    "default, empty system": ("default", {"system": "", "prompt": Q, **ANSWERS}, [user(Q)]),
    "default, null system": ("default", {"system": None, "prompt": Q, **ANSWERS}, [user(Q)]),
    "argilla": ("argilla", {"system": S, "instruction": Q, **ANSWERS}, [system(S), user(Q)]),
    "argilla_chat": ("argilla_chat", talks(user(Q)), [user(Q)]),
    "argilla_chat, every turn": ("argilla_chat", talks(*FIVE), FIVE),
    "argilla_chat, ShareGPT's names": ("argilla_chat", {"chosen": sharegpt(YES), "rejected": sharegpt(NO)}, [user(Q)]),
    "icr": ("icr", {"system": S, "input": Q, **ANSWERS}, [system(S), user(Q)]),
    "intel": ("intel", {"system": S, "question": Q, **ANSWERS}, [system(S), user(Q)]),
    "prompt_pairs": ("prompt_pairs", {"system": S, "prompt": Q, **ANSWERS}, [system(S), user(Q)]),
    "ultra": ("ultra", {"prompt": Q, **talks(user(Q))}, [user(Q)]),
    "ultra, system": ("ultra", {"system": S, "prompt": Q, **talks(user(Q))}, [system(S), user(Q)]),
    "ultra, every turn": ("ultra", {"prompt": "q1", **talks(*FIVE)}, FIVE),
    "ultra, answers alone": ("ultra", {"prompt": Q, **talks()}, [user(Q)]),
}  # fmt: skip
SINGLES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "argilla": ("argilla", {"system": S, "instruction": Q, "completion": YES}, [system(S), user(Q)]),
    "argilla_chat": ("argilla_chat", {"completion": turns(Q, YES)}, [user(Q)]),
    "argilla_chat, every turn": ("argilla_chat", {"completion": [*FIVE, says(YES)]}, FIVE),
    "intel": ("intel", {"system": S, "question": Q, "completion": YES}, [system(S), user(Q)]),
    "prompt_pairs": ("prompt_pairs", {"system": S, "prompt": Q, "completion": YES}, [system(S), user(Q)]),
    "ultra": ("ultra", {"prompt": Q, "completion": YES}, [user(Q)]),
}
WRITTEN: dict[str, tuple[Callable[[str, str], str], str, str, Make, str]] = {  # turn, generation prompt, end, BOS
    "chatml": (lambda r, c: f"<|im_start|>{r}\n{c}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>", chatml, ""),
    "llama3": (
        lambda r, c: f"<|start_header_id|>{r}<|end_header_id|>\n\n{c}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", llama3, "<|begin_of_text|>",
    ),
}  # fmt: skip
EVERY_TEMPLATE = pytest.mark.parametrize("family", WRITTEN)


@EVERY_TEMPLATE
@pytest.mark.parametrize(("name", "row", "prompt"), PAIRS.values(), ids=PAIRS)
def test_pairs_in_fixed_templates(family: str, name: str, row: dict[str, Any], prompt: list[dict[str, Any]]):
    """All turns have the family's markers, without BOS or anything after the end, and completion and end are scored.

    Tokenizing adds BOS if the tokenizer begins every text with one.
    """
    turn, generation, end, make, bos = WRITTEN[family]
    text = "".join(turn(each["role"], each["content"]) for each in prompt) + generation
    made = {"prompt": text, "chosen": YES + end, "rejected": NO + end}
    assert render(row, f"{family}.{name}") == made
    assert scored(row, f"{family}.{name}", make()) == [bos + text, YES + end, NO + end]


@EVERY_TEMPLATE
@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(("name", "row", "prompt"), SINGLES.values(), ids=SINGLES)
def test_single_completions_in_fixed_templates(
    family: str, name: str, row: dict[str, Any], prompt: list[dict[str, Any]], label: bool
):
    """This holds for KTO's single completions too, with the label."""
    turn, generation, end, make, bos = WRITTEN[family]
    text = "".join(turn(each["role"], each["content"]) for each in prompt) + generation
    row = {**row, "label": label}
    assert render(row, f"{family}.{name}", unpaired=True) == {"prompt": text, "completion": YES + end, "label": label}
    assert scored(row, f"{family}.{name}", make(), unpaired=True) == [bos + text, YES + end]


@pytest.mark.parametrize("name", sorted({f"{family}.{name}" for family in WRITTEN for name, _, _ in PAIRS.values()}))
def test_pairs_given_to_kto_in_any_format(name: str):
    """A format for single completions still reads rows that are pairs as pairs."""
    row = next(row for short, row, _ in PAIRS.values() if name.endswith(f".{short}"))
    paired, single = (find_format(name, unpaired=unpaired) for unpaired in (False, True))
    assert paired is not None
    assert single is not None
    assert single.read(row) == paired.read(row)
    with pytest.raises(UserError, match=r"^the row is a pair, two single completions for KTO"):
        render(row, name, unpaired=True)


@pytest.mark.parametrize("name", ["passthrough", "table", "chatml.prompt_pairs"])
def test_a_completion_is_a_single_completion_whatever_is_beside_it(name: str):
    """For KTO, a row with a completion is a single completion, even if it has a column `chosen`."""
    row = {"prompt": Q, "completion": YES, "label": False, "chosen": "x", "rejected": "y"}
    made = render(row, name, unpaired=True)
    assert str(made["completion"]).startswith(YES)
    assert made["label"] is False
    assert str(render(row, name)["chosen"]).startswith("x")


RANKED = [{"answer": f"of rank {rank}", "rank": rank} for rank in (3, 1, 7, 2)]
TEXTS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {  # format, row, prompt and completions
    "passthrough": (
        "passthrough", {"prompt": "Q: ", "chosen": " yes\n", "rejected": "no", "system": "s"}, ["Q: ", " yes\n", "no"],
    ),
    "table": ("table", {"prompt": Q, **ANSWERS, "system": S}, [Q, YES, NO]),
    "field_prompt, field_chosen, field_rejected": (
        {"field_prompt": "q", "field_chosen": "a", "field_rejected": "b"},
        {"q": Q, "a": YES, "b": NO, "prompt": "x", "chosen": "x", "rejected": "x"}, [Q, YES, NO],
    ),
    "field_system, prompt_format": (
        {"field_system": "rules", "prompt_format": "[{system}] {prompt} ->"}, {"prompt": Q, **ANSWERS, "rules": S},
        [f"[{S}] {Q} ->", YES, NO],
    ),
    "prompt_format without a system": (
        {"prompt_format": "[{system}] {prompt} {{}}"},
        {"prompt": "{x} {system}", "chosen": YES, "rejected": NO, "system": None}, ["[] {x} {system} {}", YES, NO],
    ),
    "chosen_format, rejected_format": (
        {"type": "table", "chosen_format": " {chosen}!", "rejected_format": "{rejected}?"},
        {"prompt": Q, "chosen": "{yes}", "rejected": NO}, [Q, " {yes}!", f"{NO}?"],
    ),
    "auto": ("auto", {"prompt": Q, **ANSWERS}, [Q, YES, NO]),
}  # fmt: skip


@pytest.mark.parametrize(("format", "row", "texts"), TEXTS.values(), ids=TEXTS)
def test_text(format: Any, row: dict[str, Any], texts: list[str]):
    """Text without turns is taken literally, and tokenizing adds EOS."""
    assert render(row, format) == dict(zip(("prompt", "chosen", "rejected"), texts))
    assert scored(row, format, plain()) == ["<s>" + texts[0], *(f"{text}</s>" for text in texts[1:])]


LISTS: dict[str, tuple[Any, dict[str, Any], list[str], list[float]]] = {  # format, row, texts, scores
    "nectar": (
        "zephyr.nectar", {"prompt": Q, "answers": RANKED},
        [f"<|user|>\n{Q}</s>\n<|assistant|>\n", "of rank 3", "of rank 1", "of rank 7", "of rank 2"], [-3, -1, -7, -2],
    ),
    "nectar, system": (
        "zephyr.nectar", {"prompt": Q, "answers": RANKED[:2], "system": S},
        [f"<|system|>\n{S}</s>\n<|user|>\n{Q}</s>\n<|assistant|>\n", "of rank 3", "of rank 1"], [-3, -1],
    ),
    "table.ranked": ("table.ranked", {"prompt": Q, "responses": [YES, NO], "best": 1}, [Q, YES, NO], [0, 1]),
    "columns of one's own": (
        {"type": "table.ranked", "field_prompt": "q", "field_responses": "a", "field_scores": "s"},
        {"q": Q, "a": [YES, NO], "s": [2, 0.5], "prompt": "x", "scores": [1, 1]}, [Q, YES, NO], [2, 0.5],
    ),
    "ranks of one's own, and a system": (
        {"type": "table.ranked", "field_ranks": "r", "field_system": "rules", "prompt_format": "[{system}] {prompt} ->",
         "response_format": " {response}!"},
        {"prompt": Q, "responses": [YES, NO], "r": [2, 1], "rules": S}, [f"[{S}] {Q} ->", f" {YES}!", f" {NO}!"],
        [-2, -1],
    ),
    "auto": ("auto", {"prompt": Q, "responses": [YES, NO], "ranks": [1, 4]}, [Q, YES, NO], [-1, -4]),
}  # fmt: skip


@pytest.mark.parametrize(("format", "row", "texts", "scores"), LISTS.values(), ids=LISTS)
def test_lists_of_texts(format: Any, row: dict[str, Any], texts: list[str], scores: list[float]):
    """A list of completions is taken literally too, each completion with its score."""
    assert render(row, format) == {"prompt": texts[0], "completions": texts[1:], "scores": scores}
    assert scored(row, format, plain()) == ["<s>" + texts[0], *(f"{text}</s>" for text in texts[1:])]


@pytest.mark.parametrize("format", ["passthrough", "auto", "table"])
def test_single_text(format: str):
    """Prompt, completion and label are taken literally."""
    row = {"prompt": Q, "completion": " yes", "label": 0}
    assert render(row, format, unpaired=True) == {"prompt": Q, "completion": " yes", "label": False}
    assert scored(row, format, plain(), unpaired=True) == [f"<s>{Q}", " yes</s>"]


def test_a_table_of_single_completions():
    """field_completion, field_label and completion_format are the table's options for KTO."""
    row = {"q": Q, "a": YES, "good": "False", "rules": S}
    options = {"field_prompt": "q", "field_completion": "a", "field_label": "good", "field_system": "rules"}
    written = {"prompt_format": "{system}|{prompt}", "completion_format": "<{completion}>"}
    made = render(row, {**options, **written}, unpaired=True)
    assert made == {"prompt": f"{S}|{Q}", "completion": f"<{YES}>", "label": False}


def test_every_named_format_is_here():
    """These tables have every named format, so that a new one must be added here."""
    text = {f"{family}.{name}" for family in WRITTEN for name, _, _ in PAIRS.values()}
    others = {format if isinstance(format, str) else "table" for format, *_ in (*TEXTS.values(), *LISTS.values())}
    chats = {f"chat_template.{name}" for name in ("ranked", "ultrafeedback", "distilabel")}  # in test_ranking.py
    assert set(NAMES) == text | others | chats | {chat.name for chat in CHATS.values()}


# --- Chats ---------------------------------------------------------------------------------------------------------

CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Looks out", "parameters": CITY}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TOOL_TURNS = [user("Weather?"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4 °C"}]


def im(*words: str) -> str:
    """Return ChatML turns of the given roles and texts, and then the assistant's header."""
    written = (f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(words[::2], words[1::2]))
    return "".join(written) + "<|im_start|>assistant\n"


@dataclass(frozen=True)
class Chat:
    """A row, and the prompt and completions that a Qwen 3 reads."""

    row: dict[str, Any]
    prompt: str
    completions: tuple[str, str] = (YES, NO)
    options: dict[str, Any] = field(default_factory=dict)
    name: str = "chat_template.default"


SYSTEM_Q = im("system", S, "user", Q)
FIVE_IM = im("system", S, "user", "q1", "assistant", "a1", "user", "q2", "assistant", "a2", "user", "q3")
TOOLS = f"# Tools\n{json.dumps(WEATHER)}"
CHATS: dict[str, Chat] = {
    "messages": Chat({"messages": [system(S), user(Q)], "chosen": says(YES), "rejected": [says(NO)]}, SYSTEM_Q),
    "a string": Chat({"messages": Q, **ANSWERS}, im("user", Q)),
    "system column": Chat({"system": S, "messages": Q, **ANSWERS}, SYSTEM_Q),
    "system column beside a system turn": Chat(
        {"system": "Other.", "messages": [system(S), user(Q)], **ANSWERS}, SYSTEM_Q
    ),
    "every turn of a completion": Chat(
        {"messages": [user("q")], "chosen": [says("a"), user("b"), says("c")], "rejected": NO}, im("user", "q"),
        ("a<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nc", "no"),
    ),
    "five turns": Chat({"messages": FIVE, **ANSWERS}, FIVE_IM),
    "field names": Chat(
        {"talk": [user(Q)], "good": YES, "bad": NO, "messages": "x"}, im("user", Q),
        options={"field_messages": "talk", "field_chosen": "good", "field_rejected": "bad"},
    ),
    "message_property_mappings and roles": Chat(
        {
            "messages": [{"speaker": "customer", "words": Q}],
            "chosen": {"speaker": "agent", "words": YES, "thoughts": "hm"},
            "rejected": {"speaker": "bot", "words": NO, "thoughts": None},
        },
        im("user", Q), ("<think>\nhm\n</think>\n\nyes", "no"),
        {
            "message_property_mappings": {"role": "speaker", "content": "words", "reasoning_content": "thoughts"},
            "roles": {"user": ["customer"], "assistant": ["agent", "bot"]},
        },
    ),
    "ShareGPT": Chat(
        {
            "conversations": [{"from": "system", "value": S}, {"from": "human", "value": Q}],
            "chosen": {"from": "gpt", "value": YES},
            "rejected": {"from": "gpt", "value": NO},
        },
        SYSTEM_Q, options={"field_messages": "conversations"},
    ),
    "tool calls and reasoning in a completion": Chat(
        {
            "messages": [user("Weather?")],
            "chosen": {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "look", "content": None},
            "rejected": says("Fine."),
        },
        im("user", "Weather?"), (f"<think>\nlook\n</think>\n\n{CALLED}", "Fine."),
    ),
    "tool calls in the prompt": Chat(
        {"messages": TOOL_TURNS, **ANSWERS},
        im("user", "Weather?", "assistant", CALLED, "user", "<tool_response>\n4 °C\n</tool_response>"),
    ),
    "tools column": Chat(
        {"messages": [system(S), user(Q)], "tools": [WEATHER], **ANSWERS}, im("system", f"{S}\n\n{TOOLS}", "user", Q)
    ),
    "tools as JSON": Chat(
        {"messages": Q, "functions": json.dumps([WEATHER]), **ANSWERS}, im("system", TOOLS, "user", Q),
        options={"tools": "functions"},
    ),
    "tools for all rows": Chat(
        {"messages": Q, **ANSWERS}, im("system", TOOLS, "user", Q), options={"tools": [WEATHER]}
    ),
    "a row's own tools": Chat(
        {"messages": Q, "tools": [WEATHER], **ANSWERS}, im("system", TOOLS, "user", Q), options={"tools": [CALL]}
    ),
    "argilla_chat": Chat(talks(*FIVE), FIVE_IM, name="chat_template.argilla_chat"),
    "argilla": Chat(
        {"system": S, "good": turns("q1", "a1", Q, YES), "bad": turns("q1", "a1", Q, NO)},
        im("system", S, "user", "q1", "assistant", "a1", "user", Q),
        options={"field_chosen": "good", "field_rejected": "bad"}, name="chat_template.argilla",
    ),
    "argilla, answers of another length": Chat(
        {"chosen": turns(Q, YES), "rejected": [says(NO)]}, im("user", Q), name="chat_template.argilla"
    ),
    "auto, system and tools": Chat(
        {"prompt": Q, "system": S, "tools": [WEATHER], **ANSWERS}, im("system", f"{S}\n\n{TOOLS}", "user", Q),
        name="auto",
    ),
    "auto, implicit prompt": Chat({**talks(*FIVE), "tools": []}, FIVE_IM, name="auto"),
}  # fmt: skip
SINGLE_CHATS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "messages": ({}, {"messages": [system(S), *turns(Q, YES)]}, [SYSTEM_Q, "yes"]),
    "messages and completion": ({}, {"messages": [user(Q)], "completion": YES}, [im("user", Q), "yes"]),
    "prompt and completion": ({}, {"prompt": Q, "completion": [says(YES)]}, [im("user", Q), "yes"]),
    "fields": (
        {"field_prompt": "q", "field_completion": "a", "field_label": "label", "field_messages": "x"},
        {"q": [user(Q)], "a": YES, "system": S, "tools": [WEATHER]},
        [im("system", f"{S}\n\n{TOOLS}", "user", Q), "yes"],
    ),
    "tool calls": (
        {}, {"messages": [user("Weather?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
        [im("user", "Weather?"), CALLED],
    ),
}  # fmt: skip


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_chats(chat: Chat):
    """The chat template writes messages with everything that it reads; a completion ends with its end-of-turn token."""
    tokenizer = trained_chatml()
    wanted = [chat.prompt, *(f"{text}<|im_end|>" for text in chat.completions)]
    assert values(render(chat.row, chat.name, tokenizer=tokenizer, **chat.options)) == wanted
    assert scored(chat.row, chat.name, tokenizer, **chat.options) == wanted


@pytest.mark.parametrize(("options", "row", "texts"), SINGLE_CHATS.values(), ids=SINGLE_CHATS)
@pytest.mark.parametrize("label", [True, False])
def test_single_chats(options: dict[str, Any], row: dict[str, Any], texts: list[str], label: bool):
    """The completion is the last turn of messages, or a completion after them or after a prompt."""
    tokenizer, row = trained_chatml(), {**row, "label": label}
    wanted = [texts[0], f"{texts[1]}<|im_end|>"]
    made = render(row, "chat_template.default", tokenizer=tokenizer, unpaired=True, **options)
    assert made == {"prompt": wanted[0], "completion": wanted[1], "label": label}
    assert scored(row, "chat_template.default", tokenizer, unpaired=True, **options) == wanted


IN_FAMILIES: dict[str, tuple[Make, str, str]] = {  # prompt, end
    "chatml": (trained_chatml, "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "llama3": (
        trained_llama3,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma": (trained_gemma, "<bos><start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "prompt", "end"), IN_FAMILIES.values(), ids=IN_FAMILIES)
def test_each_family_writes_a_chat_its_way(make: Make, prompt: str, end: str):
    """A chat has the family's BOS (once), roles and end, and is the same in every chat format."""
    rows = {
        "chat_template.default": {"messages": Q, **ANSWERS},
        "chat_template.argilla": talks(user(Q)),
        "chat_template.argilla_chat": talks(user(Q)),
        "auto": {"prompt": [user(Q)], "chosen": [says(YES)], "rejected": [says(NO)]},
    }
    for name, row in rows.items():
        assert values(render(row, name, tokenizer=make())) == [prompt, YES + end, NO + end]
        assert scored(row, name, make()) == [prompt, YES + end, NO + end]


def test_tools_in_another_family():
    """Llama 3.1 writes tools in the first question, a call as JSON, and a result with another role."""
    row = {"messages": TOOL_TURNS, "chosen": "Cold.", "rejected": {"role": "assistant", "tool_calls": [CALL]}}
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    call = json.dumps(CALL["function"])
    prompt = (
        f"<|begin_of_text|>{header('user')}{json.dumps(WEATHER)}\n\nWeather?<|eot_id|>"
        f"{header('assistant')}{call}<|eot_id|>{header('ipython')}4 °C<|eot_id|>{header('assistant')}"
    )
    texts = scored(row, "chat_template.default", trained_llama3(), tools=[WEATHER])
    assert texts == [prompt, "Cold.<|eot_id|>", f"{call}<|eot_id|>"]


# --- Chat templates ------------------------------------------------------------------------------------------------


def test_a_chat_template_of_the_format(tmp_path: Path):
    """A known name, Jinja or a file replaces the tokenizer's template, and its end of a turn is detected."""
    row = {"messages": Q, **ANSWERS}
    file = tmp_path / "mine.jinja"
    file.write_text(QWEN3)
    for template in ("chatml", QWEN3, str(file)):
        tokenizer = trained_chatml()
        tokenizer.chat_template = "{{ 'other' }}"
        assert scored(row, "chat_template.default", tokenizer, chat_template=template) == [
            im("user", Q),
            "yes<|im_end|>",
            "no<|im_end|>",
        ]
    for name in ("llama3", "gemma"):
        make, prompt, end = IN_FAMILIES[name]
        tokenizer = make()
        tokenizer.chat_template = None
        texts = scored(row, "chat_template.default", tokenizer, chat_template=name)
        assert texts == [prompt, YES + end, NO + end]
    own = scored(row, "chat_template.default", gemma(), chat_template="tokenizer_default")
    assert own == [IN_FAMILIES["gemma"][1], "yes<end_of_turn>", "no<end_of_turn>"]
    assert render(row, "chat_template.default", tokenizer=plain(), chat_template="zephyr") == {
        "prompt": "<|user|>\nWhat?</s>\n<|assistant|>\n",
        "chosen": "yes</s>",
        "rejected": "no</s>",
    }
    assert render(row, "chat_template.default", tokenizer=plain(), chat_template="phi_3")["prompt"] == (
        "<s><|user|>\nWhat?<|end|>\n<|assistant|>\n"
    )


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("options", "row", "message"),
    [
        ({"chat_template": "none.jinja"}, {}, "format.chat_template: none.jinja: cannot be read: "),
        ({"chat_template": "chatlm"}, {}, r".*; known names are tokenizer_default, chatml, llama3, gemma"),
        ({"chat_template": "{% if %}"}, {}, "the chat template refuses this row: "),
        ({"chat_template": "chatml"}, {"tools": [WEATHER]}, ".* refuses this row: this template cannot write tools"),
        ({"chat_template": "gemma"}, {"system": S}, ".* refuses this row: System role not supported"),
        (
            {"chat_template": "llama3"},
            {"messages": TOOL_TURNS},
            ".* refuses this row: this template cannot write tool calls",
        ),
        (
            {"chat_template": ALTERNATING},
            {"messages": [user("Weather?"), user("Well?")]},
            r".* refuses this row: roles must alternate; the roles of this row's turns are user, user, assistant$",
        ),
    ],
    ids=["no file", "no name", "no Jinja", "no tools", "no system", "no tool calls", "no two questions"],
)
def test_a_chat_template_that_will_not_do(options: dict[str, Any], row: dict[str, Any], message: str):
    """A template that cannot write everything in a row is refused."""
    base = {"messages": Q, **ANSWERS}
    with pytest.raises(UserError, match=message):
        render(base | row, "chat_template.default", tokenizer=chatml(), **options)


def test_chats_need_a_tokenizer():
    """Messages without a tokenizer, or with one without a template, are refused with a remedy."""
    row = {"messages": Q, **ANSWERS}
    with pytest.raises(UserError, match=r"give the tokenizer whose chat template writes it"):
        render(row, "chat_template.default")
    tokenizer = chatml()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template; set tokens\.chat_template"):
        render(row, "chat_template.default", tokenizer=tokenizer)


# --- Misleading completions ------------------------------------------------------------------------------------------

COMPLETIONS = [
    "a", "u", "user", "assistant", "model", " yes", "  yes", "\nyes", "\n\nyes", "yes\n", "yes ", "\tyes", "?",
    "What?", "<think>", "<|user|>", "<|im_start|>", "user\nWhat?", "</s>", "é", "🎉", "日本", "{{ x }}", "{prompt}",
    "▁",
]  # fmt: skip


def joined(tokenizer: PreTrainedTokenizerBase, made: dict[str, Any], completion: str) -> str:
    """Return prompt and completion as one text with BOS and an end, which is EOS if the completion has no end."""
    special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
    begins_with_bos = tokenizer.bos_token is None or made["prompt"].startswith(str(tokenizer.bos_token))
    bos = "" if begins_with_bos else str(tokenizer.bos_token)
    return bos + made["prompt"] + completion + ("" if completion.endswith(special) else str(tokenizer.eos_token))


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=False)
    return list(encoded["input_ids"])


def trims(make: Make, name: str) -> bool:
    return name.startswith("chat_template") and make is not trained_chatml


CASES = [
    (make, name, completion)
    for make in FAMILIES.values()
    for name in ("chat_template.default", "chatml.prompt_pairs", "passthrough")
    for completion in COMPLETIONS
    if completion.strip() or not trims(make, name)
    if make is not trained_gemma or "▁" not in completion  # is a space
]


@pytest.mark.parametrize(("make", "name", "completion"), CASES)
def test_whatever_a_completion_is_it_alone_is_scored(make: Make, name: str, completion: str):
    """The completion and its end are scored, even if it is one letter, a template's words or markers, or has space
    at its ends.

    A token of the prompt's last letters and the completion's first ones is scored too. Llama 3's and Gemma's templates
    trim a completion.
    """
    tokenizer = make()
    words = completion.strip() if trims(make, name) else completion
    row = {"messages" if name.startswith("chat_") else "prompt": Q, "chosen": completion, "rejected": "another"}
    made = render(row, name, tokenizer=tokenizer)
    prompt, chosen, rejected = scored(row, name, tokenizer)
    whole = joined(tokenizer, made, "").removesuffix(str(tokenizer.eos_token))
    across = whole.removeprefix(prompt)
    assert prompt + across == whole
    assert chosen.startswith(across + words)
    assert chosen.removeprefix(across + words) == rejected.removeprefix(across + "another") != ""
    if across:
        ids = tokens(tokenizer, whole)
        assert any(tokens(tokenizer, whole + text)[: len(ids)] != ids for text in (words, "another"))


@EVERY_FAMILY
def test_the_templates_own_markers_in_a_completion(make: Make):
    """A completion with turns of the template keeps them, and only its last end is its own."""
    tokenizer = make()
    _, prompt, end = next(family for family in IN_FAMILIES.values() if family[0] is make)
    inner = prompt.removeprefix(str(tokenizer.bos_token or ""))
    chosen = f"1{end}\n{inner}yes"
    row = {"messages": Q, "chosen": chosen, "rejected": "2"}
    assert scored(row, "chat_template.default", tokenizer)[1] == chosen + end


WORDS = st.lists(
    st.sampled_from([*"abe ?\n.é🎉", "user", "the answer", " is", "\n\n", "assistant", "  "]), max_size=8
).map("".join)
CACHED = {name: make() for name, make in FAMILIES.items()}


@EVERY_FAMILY
@pytest.mark.parametrize("name", ["chat_template.default", "chatml.prompt_pairs", "llama3.prompt_pairs", "passthrough"])
@settings(max_examples=60, deadline=None)
@given(prompt=WORDS, chosen=WORDS, rejected=WORDS, longest=st.integers(2, 80), kto=st.booleans())
def test_any_row(make: Make, name: str, prompt: str, chosen: str, rejected: str, longest: int, kto: bool):
    """In any row that is used, exactly the completion and its end are scored, no limit is exceeded, and something is
    scored.

    A token of the prompt's last letters and the completion's first ones is scored too.
    """
    tokenizer = CACHED[make.__name__]
    row = {"messages" if name.startswith("chat_") else "prompt": prompt, "chosen": chosen, "rejected": rejected}
    made = render(row, name, tokenizer=tokenizer)
    content = choose(row, name, unpaired=False).read(row)
    assert isinstance(content, Paired)
    rows = [SourceRow(part, "row") for part in (unpair(content) if kto else (content,))]
    whole, counts = tokenize(rows, tokenizer, TokensConfig(max_length=10_000))
    assert counts.kept + counts.empty + counts.equal + counts.promptless == len(rows)
    for example in whole:
        sides = ("chosen", "rejected") if example.label is None else ("chosen" if example.label else "rejected",)
        for side, ids in zip(sides, example.completions):
            text = joined(tokenizer, made, made[side])
            assert tokenizer.decode(example.prompt + ids) == text
            if not counts.merged:
                assert tokenizer.decode(ids) == text.removeprefix(str(tokenizer.decode(example.prompt)))
                assert str(tokenizer.decode(example.prompt)).endswith(made["prompt"])
                assert str(tokenizer.decode(ids)).startswith(made[side])
    short, _ = tokenize(rows, tokenizer, TokensConfig(max_length=longest))
    for layout in LAYOUTS if short else ():
        batch = collate(short, layout)
        assert batch.lengths.min() > 0
        assert all(len(e.prompt) + len(ids) <= longest and e.prompt for e in short for ids in e.completions)


# --- The end of a fixed template -----------------------------------------------------------------------------------


def test_the_end_of_a_fixed_template_is_the_end():
    """Nothing follows the template's end if the tokenizer has that token, and a text that contains it has it once."""
    tokenizer = llama3()
    tokenizer.chat_template = None  # a base model, where only the format defines how a turn ends
    row = {"prompt": Q, "chosen": YES, "rejected": f"{NO}<|eot_id|>"}
    assert scored(row, "llama3.prompt_pairs", tokenizer)[1:] == ["yes<|eot_id|>", "no<|eot_id|>"]
    row["rejected"] = f"{NO}<|end_of_text|>\n"
    assert scored(row, "llama3.prompt_pairs", tokenizer)[1:] == ["yes<|eot_id|>", "no<|eot_id|>"]


def test_a_fixed_template_that_is_not_the_tokenizers():
    """If the template's end is plain text, EOS follows it, so that the model learns to stop, and a note says so."""
    row = {"prompt": Q, **ANSWERS}
    assert scored(row, "chatml.prompt_pairs", llama3())[1:] == [
        "yes<|im_end|><|end_of_text|>",
        "no<|im_end|><|end_of_text|>",
    ]
    content = choose(row, "chatml.prompt_pairs", unpaired=False).read(row)
    _, counts = tokenize([SourceRow(content, "row")], llama3(), TokensConfig())
    assert str(counts).endswith(
        "1 that end with EOS because their format's end of a turn is no token of this tokenizer"
    )


def test_no_bos_before_a_completion():
    """A BOS in front of a completion in the data is removed; the sequence begins with its own."""
    row = {"prompt": "<s>Q", "chosen": "<s>yes", "rejected": "<s><s>no"}
    assert scored(row, "passthrough", plain()) == ["<s>Q", "yes</s>", "no</s>"]


def test_a_row_that_the_template_refuses_can_be_left_out():
    """With on_error = "drop", rows that the chat template refuses are counted; otherwise they are an error."""
    row = {"system": S, "messages": Q, **ANSWERS}
    content = choose(row, "chat_template.default", unpaired=False).read(row)
    examples, counts = tokenize([SourceRow(content, "row 3", droppable=True)], gemma(), TokensConfig())
    assert examples == []
    assert str(counts) == "0 of 1 rows used, 1 dropped: refused by the chat template"
    with pytest.raises(UserError, match=r"^row 3: the chat template refuses this row: System role not supported"):
        tokenize([SourceRow(content, "row 3")], gemma(), TokensConfig())


# --- The user's functions ------------------------------------------------------------------------------------------

MODULE = """
import beside

def pairs(row):
    return {"prompt": row["q"] + beside.MARK, "chosen": row["a"], "rejected": row["b"]}

def chats(row):
    return {"prompt": [{"role": "user", "content": row["q"]}], "completion": row["a"], "label": row["good"]}

def nothing(row): return None
def other(row): return {"prompt": "q", "chosen": "a"}
def wrong(row): return {"prompt": "q", "chosen": 3, "rejected": "b"}
def fails(row): return row["none"]
number = 3
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "beside.py").write_text('MARK = "?"')
    return str(tmp_path / "mine.py")


def test_a_function_of_ones_own(module: str):
    """The result of a function is read like a row with `auto`: text or messages, pairs or single completions."""
    row = {"q": "Q", "a": YES, "b": NO, "good": "true"}
    assert render(row, f"{module}:pairs") == {"prompt": "Q?", "chosen": YES, "rejected": NO}
    made = render(row, f"{module}:chats", unpaired=True, tokenizer=chatml())
    assert made == {"prompt": im("user", "Q"), "completion": "yes<|im_end|>", "label": True}
    assert module.rpartition("/")[0] not in sys.path


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "nothing returned None, not a dict of prompt, chosen and rejected, or prompt, completions and "),
        ("other", "other returned a dict of prompt, chosen, not of prompt, chosen and rejected, or "),
        ("wrong", "wrong returned a row where chosen must be text or a list of messages, got 3"),
        ("fails", "fails failed: KeyError: 'none'"),
        ("number", "mine.py has no function number"),
        ("absent", "mine.py has no function absent"),
    ],
)
def test_a_function_that_will_not_do(module: str, function: str, message: str):
    """The result of a function is checked, and its own errors are reported with the row."""
    with pytest.raises(UserError) as caught:
        render({"q": "Q"}, f"{module}:{function}")
    assert message in str(caught.value)


def test_a_module_that_is_not_there(tmp_path: Path):
    """A missing or broken module gives one message."""
    for name in ("no_such_module", str(tmp_path / "none.py")):
        with pytest.raises(UserError, match=r"cannot be imported: .*; it is looked for beside the config"):
            render({}, f"{name}:f")
    (tmp_path / "broken.py").write_text("1 +")
    with pytest.raises(UserError, match=r"broken\.py cannot be imported: SyntaxError"):
        render({}, f"{tmp_path / 'broken.py'}:f")


# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "format", "options", "message"),
    [
        ({"prompt": Q}, "auto", {}, "the columns prompt are of no format that auto knows; your own columns are named"),
        ({"prompt": Q}, "chatml.intle", {}, "there is no format 'chatml.intle' (did you mean 'chatml.intel'"),
        ({"prompt": Q}, "chatml.intel", {"x": 1}, "x: the format chatml.intel has no options"),
        (
            TEXTS["auto"][1],
            "chatml.intel",
            {},
            "there is no column question; the columns are prompt, chosen, rejected;",
        ),
        ({"prompt": [user(Q)], "chosen": YES, "rejected": NO}, "passthrough", {}, "prompt must be text, got [{'role'"),
        ({"prompt": Q, "completion": YES, "label": "maybe"}, "auto", {}, "label must be true or false, 0 or 1, got 'm"),
    ],
)
def test_a_row_that_cannot_be_rendered(row: dict[str, Any], format: str, options: dict[str, Any], message: str):
    """A row that cannot be rendered gives a UserError with the column and what is expected."""
    with pytest.raises(UserError) as caught:
        render(row, format, tokenizer=chatml(), **options)
    assert str(caught.value).startswith(message)


def test_importing_the_data_package_is_cheap():
    """`fastpref.data.render` and text formats import neither torch nor transformers."""
    program = (
        "import sys, fastpref.data\n"
        "assert not [m for m in sys.modules if m.startswith('fastpref.data.')]\n"
        "fastpref.data.render({'prompt': 'q', 'chosen': 'a', 'rejected': 'b'}, 'chatml.prompt_pairs')\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
