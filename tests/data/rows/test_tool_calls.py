"""All spellings of a tool call are read the same way, and a chat template gets the call in the form that it needs."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastpref.data import render
from fastpref.data.template.traits import traits_of
from fastpref.errors import UserError
from tests.support.toy_tokenizers import QWEN3, chatml, toy_tokenizer, trained_chatml

ARGUMENTS = {"city": "Malmö", "days": 2}
SPELLED = json.dumps(ARGUMENTS)
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
ASKED = {"role": "user", "content": "Cold in Malmö?"}
RESULT = {"role": "tool", "content": "4 °C"}
SAYS = {"role": "assistant", "content": "Yes."}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Malmö", "days": 2}}\n</tool_call>'


def calling(*calls: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


def function(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"function": {"name": "weather", "arguments": arguments}, **more}


SPELLINGS: dict[str, dict[str, Any]] = {  # an assistant's turn with a tool call
    "OpenAI's, a mapping from JSON": calling(function(SPELLED, type="function")),
    "OpenAI's, with an id": calling(function(SPELLED, type="function", id="call_1")),
    "JSON encoded twice": calling(function(json.dumps(SPELLED))),
    "a bare call": calling({"name": "weather", "arguments": ARGUMENTS}),
    "a bare call, arguments as text": calling({"name": "weather", "arguments": SPELLED}),
    "Llama's": calling({"name": "weather", "parameters": ARGUMENTS}),
    "parameters under function": calling({"function": {"name": "weather", "parameters": ARGUMENTS}}),
    "LangChain's": calling({"name": "weather", "args": ARGUMENTS, "id": "call_1", "type": "tool_call"}),
    "Anthropic's": calling({"name": "weather", "input": SPELLED}),
    "of a table, with nulls": calling({"name": "weather", "arguments": ARGUMENTS, "function": None, "id": None}),
    "a call as text": calling(json.dumps({"name": "weather", "arguments": ARGUMENTS})),
    "calls as text": {"role": "assistant", "content": "", "tool_calls": json.dumps([function(SPELLED)])},
    "a function as text": calling({"function": json.dumps({"name": "weather", "arguments": ARGUMENTS})}),
    "function_call": {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": SPELLED}},
    "function_call beside no tool calls": {
        "role": "assistant", "tool_calls": [], "function_call": {"name": "weather", "arguments": SPELLED},
    },
    "ShareGPT": {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": ARGUMENTS})},
    "ShareGPT, text in text": {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": SPELLED})},
    "ShareGPT, a list": {"from": "function_call", "value": json.dumps([{"name": "weather", "arguments": ARGUMENTS}])},
    "ms-swift": {"role": "tool_call", "content": json.dumps({"name": "weather", "arguments": ARGUMENTS})},
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_call_is_written_alike(spelling: str):
    """Every spelling gives the same text in the prompt, in a completion, and for KTO."""
    turn, tokenizer = SPELLINGS[spelling], trained_chatml()
    answer = render({"prompt": [ASKED], "chosen": [turn], "rejected": "No."}, tokenizer=tokenizer)
    assert answer["chosen"] == CALLED + "<|im_end|>"
    asked = render({"messages": [ASKED, turn, RESULT], "chosen": "Yes.", "rejected": "No."}, tokenizer=tokenizer)
    assert f"<|im_start|>assistant\n{CALLED}<|im_end|>\n" in asked["prompt"]
    single = render({"messages": [ASKED, turn], "label": True}, tokenizer=tokenizer, unpaired=True)
    assert single["completion"] == CALLED + "<|im_end|>"


@pytest.mark.parametrize("turn", [
    {"from": "observation", "value": "4 °C"}, {"role": "tool", "content": "4 °C", "tool_call_id": "call_1"},
    {"role": "tool_response", "content": "4 °C"}, {"role": "function", "name": "weather", "content": "4 °C"},
], ids=str)  # fmt: skip
def test_results_of_tools(turn: dict[str, Any]):
    """Results have the role `tool`, and the template gets their names and ids."""
    named = QWEN3.replace(
        "{{ '<|im_start|>user\n<tool_response>\n'",
        "{{ m.name }}{{ m.tool_call_id }}{{ '<|im_start|>user\n<tool_response>\n'",
    )
    tokenizer = trained_chatml()
    tokenizer.chat_template = named
    row = {"messages": [ASKED, SPELLINGS["function_call"], turn], "chosen": "Yes.", "rejected": "No."}
    marked = f"{turn.get('name', '')}{turn.get('tool_call_id', '')}<|im_start|>user\n<tool_response>\n4 °C\n"
    assert f"<|im_end|>\n{marked}" in render(row, tokenizer=tokenizer)["prompt"]


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no JSON": (calling(function("{city: Malmö}")), "chosen: what weather is called with is not valid JSON"),
    "a list": (calling(function("[1]")), "chosen calls weather with arguments '[1]', which are no JSON object"),
    "twice called with": (
        calling({"name": "weather", "arguments": ARGUMENTS, "args": {"days": 3}}),
        "chosen calls weather with both arguments and args",
    ),
    "called with under another name": (
        calling({"function": {"name": "weather", "kwargs": ARGUMENTS}}),
        "chosen calls weather with kwargs, which is not",
    ),
    "no name": (calling({"function": {"arguments": {}}}), "chosen has a tool call {'function': {'arguments': {}}}"),
    "words": ({"from": "function_call", "value": "I call the weather."}, "chosen: a tool call is not valid JSON"),
    "no call": ({"from": "function_call", "value": "7"}, "chosen has a tool call 7; a call has a name and arguments"),
}


@pytest.mark.parametrize(("turn", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_call_that_is_none(turn: dict[str, Any], message: str):
    """A turn that should have a call but has none is an error."""
    with pytest.raises(UserError) as caught:
        render({"prompt": [ASKED], "chosen": [turn], "rejected": "No."}, tokenizer=trained_chatml())
    assert str(caught.value).startswith(message)


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TOOLS: dict[str, Any] = {
    "a list": [TOOL],
    "JSON": json.dumps([TOOL]),
    "JSON encoded twice": json.dumps(json.dumps([TOOL])),
    "a list of JSON": [json.dumps(TOOL)],
    "JSON of a list of JSON": json.dumps([json.dumps(TOOL)]),
    "bare": [TOOL["function"]],
    "JSON of bare ones": json.dumps([TOOL["function"]]),
    "one": TOOL,
}


@pytest.mark.parametrize("tools", TOOLS.values(), ids=TOOLS)
def test_every_spelling_of_tools_is_written_alike(tools: Any):
    row = {"messages": [ASKED], "chosen": "Yes.", "rejected": "No."}
    wanted = render(row | {"tools": [TOOL]}, tokenizer=trained_chatml())
    assert '"name": "weather"' in wanted["prompt"]
    assert render(row | {"tools": tools}, tokenizer=trained_chatml()) == wanted
    assert render(row | {"tools": tools}, "chat_template.default", tokenizer=trained_chatml()) == wanted


# --- What a template needs -----------------------------------------------------------------------------------------

TEXT_ONLY = (  # concatenates the arguments with text, as DeepSeek's does
    "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] or '') }}{% for call in m['tool_calls'] or [] %}"
    "{{ call['function']['name'] + ' ' + call['function']['arguments'] }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PYTHON = TEXT_ONLY.replace("' ' + call['function']['arguments']", "' ' ~ call['function']['arguments']")
EITHER = TEXT_ONLY.replace(
    "call['function']['arguments'] }}",
    "(call['function']['arguments'] if call['function']['arguments'] is string "
    "else call['function']['arguments'] | tojson) }}",
)


@pytest.mark.parametrize(
    ("template", "as_text"), [(TEXT_ONLY, True), (PYTHON, True), (EITHER, False), (QWEN3, False)],
    ids=["joins text", "writes Python", "either", "JSON"],
)  # fmt: skip
def test_arguments_are_text_where_the_template_wants_text(template: str, as_text: bool):
    """A trial finds out whether arguments must be text; it is always JSON that is encoded once."""
    assert traits_of(template).arguments_as_text is as_text
    for spelling in ("OpenAI's, a mapping from JSON", "a bare call"):
        row = {"prompt": [ASKED], "chosen": [SPELLINGS[spelling]], "rejected": "No."}
        written = render(row, tokenizer=toy_tokenizer(template, eos="<|im_end|>"))["chosen"]
        assert '{"city": "Malmö", "days": 2}' in written
        assert "'" not in written
        assert "\\" not in written


@pytest.mark.parametrize("condition", ["m['content'] is string", "m['content'] is none", "m['content'] is not defined"])
@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}], ids=str)
def test_a_turn_that_only_calls_is_written_whatever_its_content_is(condition: str, content: dict[str, Any]):
    """Missing, null and empty content are equal: the template gets the one with which it writes the call."""
    template = EITHER.replace("{% for call in", "{% if " + condition + " %}{% for call in", 1)
    template = template.replace("{% endfor %}{{ '\n' }}", "{% endfor %}{% endif %}{{ '\n' }}", 1)
    turn = {"role": "assistant", **content, "tool_calls": [CALL]}
    row = {"prompt": [ASKED], "chosen": [turn], "rejected": "No."}
    assert json.dumps(ARGUMENTS, ensure_ascii=False) in render(row, tokenizer=toy_tokenizer(template))["chosen"]


PARTS = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "lake."}]
LINES = (  # writes each part on its own line
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] + '\n' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONLY_PARTS = LINES.replace("{% if m['content'] is string %}{{ m['content'] }}{% else %}", "").replace(
    "{% endif %}", "", 1
)
SILENT = LINES.replace("{% else %}{% for part in m['content'] %}{{ part['text'] + '\n' }}{% endfor %}", "")
WRITTEN: dict[str, tuple[str, str, str]] = {  # template → text of the parts, and of a single text
    "iterates": (LINES, "Name a \nlake.\n", "Name a lake."),
    "only iterates": (ONLY_PARTS, "Name a \nlake.\n", "Name a lake.\n"),
    "leaves lists out": (SILENT, "Name a lake.", "Name a lake."),
    "writes lists as Python does": (
        SILENT.replace("if m['content'] is string", "if true"), "Name a lake.", "Name a lake.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("template", "of_parts", "of_text"), WRITTEN.values(), ids=WRITTEN)
def test_parts_are_joined_unless_the_template_iterates(template: str, of_parts: str, of_text: str):
    """Parts are joined unless the template iterates over them; a template that needs parts gets text as one part."""
    tokenizer = toy_tokenizer(template, eos="<|im_end|>", special=["<|im_start|>"])
    for content, written in ((PARTS, of_parts), ("Name a lake.", of_text), (PARTS[1:], of_text.replace("Name a ", ""))):
        row = {"prompt": [{"role": "user", "content": content}],
               "chosen": [{"role": "assistant", "content": content}], "rejected": "No."}  # fmt: skip
        made = render(row, tokenizer=tokenizer)
        assert made["prompt"] == f"<|im_start|>user\n{written}<|im_end|>\n<|im_start|>assistant\n"
        assert made["chosen"] == f"{written}<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi_3", "zephyr"])
def test_named_templates_join_parts(name: str):
    row = {"messages": [{"role": "user", "content": PARTS}], "chosen": "yes", "rejected": "no"}
    made = render(row, "chat_template.default", chat_template=name, tokenizer=chatml())
    assert "Name a lake." in made["prompt"]
    assert "type" not in made["prompt"]


IMAGE = {"type": "image", "image": "lake.png"}
MEDIA: dict[str, tuple[dict[str, Any], str]] = {
    "an image part": (
        {"prompt": [{"role": "user", "content": [IMAGE, *PARTS]}], "chosen": "yes", "rejected": "no"},
        "prompt has a turn of role 'user' with a part of type 'image'; only parts of text are read: images, video",
    ),
    "an image_url in a completion": (
        {"prompt": [ASKED], "chosen": [{"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]}],
         "rejected": "no"}, "chosen has a turn of role 'assistant' with a part of type 'image_url'",
    ),
    **{
        f"a column {name}": (
            {"prompt": "q", "chosen": "yes", "rejected": "no", name: value}, f"the column {name} is filled",
        )
        for name, value in (("image", "a.png"), ("images", ["a.png"]), ("images", [{"bytes": None, "path": "a.png"}]),
                            ("videos", ["a.mp4"]), ("audio", {"path": "a.wav"}), ("audios", ["a.wav"]))
    },
    "parts that are none": (
        {"prompt": [{"role": "user", "content": [7]}], "chosen": "yes", "rejected": "no"},
        "prompt has a turn of role 'user' with the part 7; a part has a type, and text under text",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), MEDIA.values(), ids=MEDIA)
def test_images_are_refused(row: dict[str, Any], message: str):
    """Images are refused in every format, because a model that does not see one must not learn the answer."""
    with pytest.raises(UserError) as caught:
        render(row, tokenizer=chatml())
    assert str(caught.value).startswith(message)
    if "column" in message:
        for name in ("passthrough", "chatml.default"):
            with pytest.raises(UserError, match="images, video and audio are not read"):
                render(row, name)


@pytest.mark.parametrize("empty", [None, [], "", [None], {"bytes": None, "path": None}], ids=str)
def test_an_empty_column_of_images_is_none(empty: Any):
    row = {"prompt": "q", "chosen": "yes", "rejected": "no", "images": empty}
    assert render(row) == {"prompt": "q", "chosen": "yes", "rejected": "no"}


def test_the_templates_of_families(tmp_path: Path):
    """A trial finds out which of the templates in TRL iterate over parts, and which need arguments as text."""
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    wanted = {  # roles whose parts it writes, roles for which it takes only parts, arguments as text
        "qwen3": ("", "", False), "qwen2_5": ("", "", False), "llama3": ("", "", False), "llama3_1": ("", "", False),
        "gptoss": ("", "", False), "deepseek_r1_distill": ("", "", True),
        "deepseekv3": ("", "", True), "gemma3": ("assistant user", "", False),
        "idefics3": ("assistant developer system tool user", "assistant developer system tool user", False),
    }  # fmt: skip
    files = {name: folder / f"{name}.jinja" for name in wanted}
    for name, file in files.items():
        if file.is_file():
            traits = traits_of(file.read_text(encoding="utf-8"))
            result = " ".join(sorted(traits.iterates)), " ".join(sorted(traits.needs_parts)), traits.arguments_as_text
            assert result == wanted[name], name
