"""Turns in the tokens: which turns of a completion are scored, and which turns a long prompt loses.

The templates are toys of each kind that families have: an end for every turn, another end for the last, or no end;
reasoning that is dropped once another turn follows; tool results in JSON.
"""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from fastpref.data.example import Counts, Example
from fastpref.data.rows.content import Message, Paired, Unpaired, Writing
from fastpref.errors import UserError
from tests.support.chats import says, tokenized, user
from tests.support.toy_tokenizers import CHATML, LLAMA3, PLAIN, QWEN3, toy_tokenizer

PHI3 = (  # the last turn has a second end
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
HARMONY = (  # as gpt-oss: the last turn has another end than an earlier one, and so has a call
    "{% for m in messages %}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{{ '<|start|>assistant to=' + call.name + '<|message|>' }}{{ call.arguments | tojson }}{{ '<|call|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start|>f to=assistant<|message|>' }}{{ m.content | tojson }}{{ '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
    "{{ '<|return|>' if m.role == 'assistant' and loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
THINKING = (  # as Qwen 3: reasoning is written only after the last question, as an empty block if there is none
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% set answer = m.content.split('</think>')[-1].strip() %}"
    "{% if loop.index0 > ns.last %}"
    "{% set thought = m.content.split('</think>')[0].replace('<think>', '') if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + thought.strip() + '\n</think>\n\n' }}{% endif %}"
    "{{ answer }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GLM = (  # as GLM: a turn has no end of its own; the next role's token ends it
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' and '</think>' in m.content and loop.index0 < ns.last %}"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def _made(template: str, eos: str, *special: str, bos: str | None = None) -> Callable[[], PreTrainedTokenizerBase]:
    return lambda: toy_tokenizer(template, eos=eos, bos=bos, special=special)


ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
FAMILIES: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], str, str]] = {  # maker, a turn's end, the last end
    "chatml": (_made(CHATML, "<|im_end|>", "<|im_start|>"), "<|im_end|>", "<|im_end|>"),
    "chatml of a base model": (_made(CHATML, "</s>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"),
    "qwen3": (_made(QWEN3, "<|im_end|>", "<|im_start|>"), "<|im_end|>", "<|im_end|>"),
    "llama3": (
        _made(LLAMA3, "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", bos="<s>"),
        "<|eot_id|>", "<|eot_id|>",
    ),
    "phi3": (_made(PHI3, "<|endoftext|>", "<|end|>", *ROLES), "<|end|>", "<|end|>"),
    "harmony": (
        _made(HARMONY, "<|return|>", "<|start|>", "<|message|>", "<|end|>", "<|call|>"), "<|end|>", "<|return|>",
    ),
    "thinking": (_made(THINKING, "<|im_end|>", "<|im_start|>"), "<|im_end|>", "<|im_end|>"),
    "glm": (_made(GLM, "<|endoftext|>", *ROLES), "", "<|endoftext|>"),
    "plain": (_made(PLAIN, "</s>"), "", "\n</s>"),
}  # fmt: skip
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def scored(tokenizer: PreTrainedTokenizerBase, example: Example, which: int = 0) -> list[str]:
    """Return the texts of a completion's scored spans."""
    ids, begin, texts = example.completions[which], 0, []
    for start, stop in (*example.context(which), (len(ids), len(ids))):
        texts.append(str(tokenizer.decode(ids[begin:start])))
        begin = stop
    assert sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) == example.scored(which)
    return texts


# --- Whose words are scored ----------------------------------------------------------------------------------------


@EVERY_FAMILY
@pytest.mark.parametrize("words", ["Well?", "Well?\n", "one", "two", "<|x|> é", "no " * 30], ids=repr)
def test_the_assistants_words_and_their_ends_are_scored(family: str, words: str):
    """In a completion of several turns, the user's turns and all markup of the template around them are context."""
    make, end, last = FAMILIES[family]
    tokenizer = make()
    (example,), counts = tokenized(tokenizer, Paired([user("q")], [says("one"), user(words), says("two")], [says("x")]))
    first, second = scored(tokenizer, example)
    opening = "<|message|>" if family == "harmony" else ""
    assert first == f"{opening}one{end}"
    block = "<think>\n\n</think>\n\n" if family == "thinking" else ""
    assert second.removeprefix(block) == f"{opening}two{last}"
    assert words.strip() in tokenizer.decode(example.completions[0])
    assert scored(tokenizer, example, 1)[0].endswith(f"x{last}")
    assert counts.kept == 1


@EVERY_FAMILY
def test_all_is_scored_where_that_is_asked_for(family: str):
    """`score = "all"` gives the same tokens without context, as TRL does; single turns never have context."""
    tokenizer = FAMILIES[family][0]()
    several = Paired([user("q")], [says("one"), user("Well?"), says("two")], [says("x")])
    (assistant,), _ = tokenized(tokenizer, several)
    (everything,), _ = tokenized(tokenizer, several, score="all")
    assert everything.contexts == ()
    assert (everything.prompt, everything.completions) == (assistant.prompt, assistant.completions)
    assert assistant.contexts[0]
    single = Paired([user("q"), says("b"), user("c")], [says("one")], [says("x")])
    assert tokenized(tokenizer, single) == tokenized(tokenizer, single, score="all")


@pytest.mark.parametrize("family", ["chatml", "llama3", "plain"])
def test_all_is_what_trl_scores(family: str):
    """With `score = "all"`, prompt and completions are TRL's texts, except for final white space and a missing end."""
    data_utils = pytest.importorskip("trl.data_utils")
    tokenizer = FAMILIES[family][0]()
    row = {"prompt": [user("q")], "chosen": [says("one"), user("Well?"), says("two")], "rejected": [says("x")]}
    texts = data_utils.apply_chat_template(
        {name: [dict(turn) for turn in turns] for name, turns in row.items()}, tokenizer
    )
    (example,), _ = tokenized(tokenizer, Paired(row["prompt"], row["chosen"], row["rejected"]), score="all")
    assert tokenizer.decode(example.prompt) == texts["prompt"]
    for name, ids in zip(("chosen", "rejected"), example.completions):
        assert str(tokenizer.decode(ids)).removesuffix("</s>").strip() == texts[name].strip()
    assert example.scored(0) == len(example.completions[0])


@pytest.mark.parametrize("family", ["thinking", "glm"])
def test_turns_that_are_written_otherwise_once_others_follow(family: str):
    """Reasoning that the template drops from an earlier turn moves no boundary, and is counted as left out."""
    make, end, last = FAMILIES[family]
    completion = [says("<think>\nhm\n</think>\n\none"), user("Well?"), says("<think>\nso\n</think>\n\ntwo")]
    (example,), counts = tokenized(make(), Paired([user("q")], completion, [says("x")]))
    assert scored(make(), example) == [f"one{end}", f"<think>\nso\n</think>\n\ntwo{last}"]
    assert counts.left_out_first == "rows.jsonl, row 0: the reasoning of chosen, hm"


@pytest.mark.parametrize("family", ["chatml", "thinking", "llama3", "phi3"])
def test_between_two_turns_of_the_assistants_its_header_is_context(family: str):
    """Between two successive turns of the assistant, the header is context, however the first one is written."""
    make, end, last = FAMILIES[family]
    tokenizer = make()
    (example,), _ = tokenized(tokenizer, Paired([user("q")], [says("one"), says("two")], [says("x")]))
    first, second = scored(tokenizer, example)
    assert (first.rpartition("\n")[2], second.rpartition("\n")[2]) == (f"one{end}", f"two{last}")
    assert "assistant" not in first + second


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}], ids=str)
@pytest.mark.parametrize("family", ["chatml", "thinking", "llama3", "phi3", "harmony", "glm"])
def test_turns_that_data_leave_out_are_context(family: str, off: dict[str, Any]):
    """A turn of weight 0 is context; as the last turn it is an error, because nothing would be trained."""
    make, end, last = FAMILIES[family]
    tokenizer, silent = make(), says("zero") | off
    completion = [says("one") | {"weight": 1}, user("r"), silent, user("s"), says("two") | {"train": True}]
    (example,), _ = tokenized(tokenizer, Paired([user("q")], completion, [silent, user("r"), says("x")]))
    first, second = scored(tokenizer, example)
    assert first.endswith(f"one{end}")
    assert second.endswith(f"two{last}")
    assert "zero" in tokenizer.decode(example.completions[0])
    assert "zero" not in "".join((first, second, *scored(tokenizer, example, 1)))
    with pytest.raises(UserError, match=r"^rows.jsonl, row 0: the last turn of a completion has \w+ 0 or false"):
        tokenized(tokenizer, Paired([user("q")], [silent], [says("x")]))


def test_results_of_tools_are_not_scored():
    """A call and its end are scored; the tool's result, written as JSON, is not."""
    call: Message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "b"}}}]}
    completion = [call, {"role": "tool", "content": 'It is "x".\n'}, {"role": "tool", "content": "y"}, says("two")]
    for family, first, second in (
        ("harmony", ' to=f<|message|>{"a": "b"}<|call|>', "<|message|>two<|return|>"),
        ("qwen3", '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call><|im_end|>', "two<|im_end|>"),
    ):
        tokenizer = FAMILIES[family][0]()
        (example,), _ = tokenized(tokenizer, Paired([user("q")], completion, [says("x")]))
        assert scored(tokenizer, example) == [first, second]


def test_a_completion_that_begins_with_another_turn():
    """If a completion begins with another turn, it is context from the first token on."""
    tokenizer = FAMILIES["chatml"][0]()
    (example,), _ = tokenized(tokenizer, Paired([user("q"), says("w")], [user("b"), says("two")], [says("x")]))
    assert scored(tokenizer, example) == ["", "two<|im_end|>"]


def test_pairs_that_differ_in_the_context_alone_are_pairs():
    """Two completions with the same scored text after different turns are not equal."""
    tokenizer = FAMILIES["chatml"][0]()
    chosen, rejected = ([says("a"), user(words), says("b")] for words in ("yes", "no"))
    (example,), counts = tokenized(tokenizer, Paired([user("q")], chosen, rejected))
    assert scored(tokenizer, example, 0) == scored(tokenizer, example, 1)
    assert (counts.kept, counts.equal) == (1, 0)


def test_a_token_across_a_boundary_is_the_assistants():
    """A token of the header's last letters and the assistant's first ones is scored."""
    tokenizer = toy_tokenizer(PLAIN, merges=[("Ġ", "t")])
    (example,), _ = tokenized(tokenizer, Paired([user("q")], [says("one"), user("b"), says("two")], [says("x")]))
    assert scored(tokenizer, example) == ["one", " two\n</s>"]


def test_turns_that_cannot_be_told_apart_are_refused():
    """If a template leaves out a turn and writes the others differently, turns cannot be located: this is an error."""
    template = (
        "{% for m in messages %}{{ (loop.revindex if m.role == 'assistant' else '') ~ m.role }}"
        "{{ '' if m.role == 'tool' else m.content }}{{ '<e>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
    )
    tokenizer = toy_tokenizer(template, eos="<e>")
    content = Paired([user("q")], [says("a"), {"role": "tool", "content": "t"}, says("b")], [says("x")])
    with pytest.raises(UserError, match=r'row 0: the turns inside a completion cannot be told .*tokens.score = "all"'):
        tokenized(tokenizer, content)
    assert tokenized(tokenizer, content, score="all")[1].kept == 1


# --- Long prompts --------------------------------------------------------------------------------------------------

SYSTEM: Message = {"role": "system", "content": "Be brief."}
CHAT = [SYSTEM, user("one"), says("1"), user("two"), says("2"), user("three?")]


def long_row(tokenizer: PreTrainedTokenizerBase, kept: int, answer: int) -> tuple[Paired, list[Message]]:
    """Return a chat with a completion of `answer` tokens, and its system turn and last `kept` messages."""
    completion = [says("x" * (answer - 1))]
    return Paired(CHAT, completion, [says("y")]), [SYSTEM, *CHAT[-kept:]]


@pytest.mark.parametrize("kept", [5, 3, 1])
def test_turns_are_cut_whole_from_the_front(kept: int):
    """The fewest oldest exchanges are removed; system turn and question stay; the template renders the rest again."""
    tokenizer = FAMILIES["chatml"][0]()
    content, left = long_row(tokenizer, kept, 20)
    wanted = str(tokenizer.apply_chat_template(left, tokenize=False, add_generation_prompt=True))
    limit = len(tokenizer(wanted)["input_ids"]) + 20
    (example,), counts = tokenized(tokenizer, content, max_length=limit)
    assert tokenizer.decode(example.prompt) == wanted
    assert len(example.completions[0]) == 20
    assert example.row.turns_cut == 5 - kept
    assert counts == Counts(rows=1, kept=1, turns_cut=kept < 5)
    if kept > 1:
        (shorter,), _ = tokenized(tokenizer, content, max_length=limit - 1)
        assert shorter.row.turns_cut == 5 - kept + 2


def test_a_long_completion_does_not_eat_the_prompt():
    """A prompt that fits in half of the limit stays whole, and so does a question; the completions are cut."""
    tokenizer = FAMILIES["chatml"][0]()
    prompt = str(tokenizer.apply_chat_template([user("q")], tokenize=False, add_generation_prompt=True))
    size = len(tokenizer(prompt)["input_ids"])
    for limit in (2 * size, size + size // 2, size + 7):
        (example,), counts = tokenized(tokenizer, Paired([user("q")], [says("x" * 500)], [says("y")]), max_length=limit)
        assert tokenizer.decode(example.prompt) == prompt
        assert len(example.completions[0]) == limit - size
        assert counts == Counts(rows=1, kept=1, completions_cut=1)


def test_a_row_whose_question_does_not_fit_is_dropped():
    """A turn is never cut: if a question leaves too little room for an answer, the row is dropped and counted."""
    tokenizer = FAMILIES["chatml"][0]()
    content = Paired([user("a"), says("b"), user("q" * 100)], [says("x" * 100)], [says("y")])
    examples, counts = tokenized(tokenizer, content, max_length=130)
    asked = tokenizer.apply_chat_template([user("q" * 100)], add_generation_prompt=True)
    size = len(asked["input_ids"])  # pyright: ignore[reportArgumentType, reportCallIssue]
    first = f"rows.jsonl, row 0, {size} tokens"
    assert (examples, counts) == ([], Counts(rows=1, unasked=1, unasked_first=first))
    assert str(counts) == f"0 of 1 rows used, 1 dropped: without room for their question (the first: {first})"
    with pytest.raises(UserError, match=r"^rows\.jsonl, row 0: its question is longer than tokens\.max_length"):
        tokenized(tokenizer, content, max_length=130, strict=True)
    with pytest.raises(UserError, match=r"prompt and 101 completion tokens, more than tokens\.max_length"):
        tokenized(tokenizer, content, max_length=130, overlong="error")
    examples, counts = tokenized(tokenizer, content, max_length=200, max_prompt_length=100)
    assert (examples, counts.unasked) == ([], 1)


def test_a_cut_completion_ends_with_what_is_scored():
    """Context at the end of a cut completion is removed; a completion without any scored token left is dropped."""
    tokenizer = FAMILIES["chatml"][0]()
    content = Unpaired([user("q")], [says("one"), user("x" * 300), says("two")], True)
    size = len(tokenized(tokenizer, content)[0][0].prompt)
    (example,), counts = tokenized(tokenizer, content, max_length=size + 50)
    assert scored(tokenizer, example) == ["one<|im_end|>"]
    assert counts.completions_cut == 1
    late = Unpaired([user("q"), says("w")], [user("x" * 300), says("two")], True)
    assert tokenized(tokenizer, late, max_length=size + 60)[1] == Counts(rows=1, overlong=1)


def test_tools_stay_when_turns_go():
    """If turns are removed, the tools are still in the prompt."""
    tokenizer = FAMILIES["qwen3"][0]()
    tools = ({"type": "function", "function": {"name": "weather"}},)
    content = Paired([user("x" * 200), says("1"), user("q")], [says("yes")], [says("no")], Writing(tools=tools))
    (example,), counts = tokenized(tokenizer, content, max_length=200)
    text = tokenizer.decode(example.prompt)
    assert counts.turns_cut == 1
    assert "weather" in text
    assert "xx" not in text
    assert text.count("<|im_start|>assistant") == 1
