"""Words that a chat template leaves out are always reported; words that it only writes differently are not."""

from typing import Any

import pytest

from fastpref.config import TokensConfig
from fastpref.data.example import Counts, Example
from fastpref.data.left_out import Piece, left_out
from fastpref.data.rows.content import Message, Paired, Unpaired, Writing
from fastpref.data.sources import SourceRow
from fastpref.errors import UserError
from tests.support.chats import says, tokenize, user
from tests.support.toy_tokenizers import CHATML, GEMMA, LLAMA3, LLAMA31, QWEN3, toy_tokenizer

R1 = (  # removes reasoning from every turn, and its generation prompt asks for it; a call has no content
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}"
    "{% if m['content'] is none %}{% for call in m['tool_calls'] %}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant><think>\n' }}{% endif %}"
)
KNOWN_ROLES = (  # as Qwen and Phi: leaves out turns of unknown roles
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEVELOPER = KNOWN_ROLES.replace("'system'", "'developer'")
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "llama31": LLAMA31, "gemma": GEMMA, "qwen3": QWEN3, "r1": R1}
ENDS = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL: Message = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": 'O"slo\n'}}}],
}


def tokenized(template: str, content: Paired | Unpaired, **options: Any) -> tuple[list[Example], Counts, Any]:
    tokenizer = toy_tokenizer(template, eos="</s>", bos="<s>", special=ENDS)
    rows = [SourceRow(content, "rows.jsonl:1")]
    return *tokenize(rows, tokenizer, TokensConfig.model_validate(options)), tokenizer


WRITTEN: dict[str, Paired] = {
    "plain": Paired([user("q")], [says("yes")], [says("no")]),
    "white space": Paired([user(" q \n\n r ")], [says("\n yes \n")], [says("no ")]),
    "quotes and escapes": Paired([user('a "b" \\n c\tü')], [says("\\frac{1}{2} 'x' <b> & é")], [says("no")]),
    "the same words again": Paired([user("yes"), says("yes"), user("yes")], [says("yes")], [says("no")]),
    "words of the template": Paired([user("assistant")], [says("think")], [says("user")]),
    "the beginning of the generation prompt": Paired([user("q")], [says("<think>\nhm")], [says("no")]),
    "reasoning of turns before": Paired(
        [user("q"), says("<think>\nhm\n</think>\n\nb"), user("r")], [says("yes")], [says("no")]
    ),
    "a switch": Paired([user("q /no_think")], [says("yes")], [says("no")]),
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("content", WRITTEN.values(), ids=WRITTEN)
def test_no_false_alarm(template: str, content: Paired):
    """Trimming, JSON escapes and dropped reasoning of earlier turns count neither as left out nor as crossing."""
    _, counts, _ = tokenized(template, content)
    assert counts == Counts(rows=1, kept=1, departed=int(template == R1))


LEFT_OUT: dict[str, tuple[str, Paired, str]] = {
    "a developer's turn": (
        DEVELOPER, Paired([{"role": "system", "content": "Be brief."}, user("q")], [says("yes")], [says("no")]),
        "a turn of role system, Be brief.",
    ),
    "one of two equal turns": (
        KNOWN_ROLES, Paired([user("q"), says("b"), {"role": "tool", "content": "b"}], [says("yes")], [says("no")]),
        "a turn of role tool, b",
    ),
    "reasoning in content": (
        R1, Paired([user("q")], [says("<think>\nsix sevens\n</think>\n\n42")], [says("40")]),
        "the reasoning of chosen, six sevens",
    ),
    "reasoning under its key": (
        CHATML, Paired([user("q")], [says("40")], [says("42", reasoning_content="hm " * 40)]),
        "the reasoning of rejected, hm hm hm hm hm hm hm hm hm hm hm hm hm hm hm hm hm hm hm...",
    ),
    "a call beside words": (
        CHATML, Paired([user("q")], [{**CALL, "content": "Let me see."}], [says("no")]),
        "a tool call of chosen, weather",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("template", "content", "what"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_is_left_out_is_counted_and_shown(template: str, content: Paired, what: str):
    """The row is used, and the counts name the first row and its missing words."""
    _, counts, _ = tokenized(template, content)
    departed = int(template == R1)  # R1's generation prompt asks for reasoning
    assert counts == Counts(rows=1, kept=1, departed=departed, left_out=1, left_out_first=f"rows.jsonl:1: {what}")


def test_a_pair_that_differs_in_what_is_left_out_alone():
    """A pair that differs only in words that the template leaves out is dropped, but not counted as equal."""
    content = Paired([user("q")], [says("<think>\na\n</think>\n\n42")], [says("<think>\nb\n</think>\n\n42")])
    _, counts, _ = tokenized(R1, content)
    assert counts == Counts(rows=1, unwritten=1, left_out=1, left_out_first="rows.jsonl:1: the reasoning of chosen, a")
    with pytest.raises(UserError, match="the chat template leaves out what chosen says: the reasoning of chosen, a; "):
        tokenized(R1, content, strict=True)


def test_a_completion_of_which_nothing_is_written():
    """If the template does not write a call, the row is dropped, but not counted as empty."""
    _, counts, _ = tokenized(CHATML, Paired([user("q")], [CALL], [says("no")]))
    assert (counts.kept, counts.empty, counts.unwritten) == (0, 0, 1)
    assert counts.left_out_first == "rows.jsonl:1: a tool call of chosen, weather"


@pytest.mark.parametrize(("template", "end"), [(QWEN3, "<|im_end|>"), (R1, "</s>")], ids=["text", "null"])
def test_a_call_has_no_words(template: str, end: str):
    """A call without content is written by templates that concatenate text, and by those that expect null."""
    (example,), counts, tokenizer = tokenized(template, Paired([user("q")], [CALL], [says("no")]))
    text = tokenizer.decode(example.completions[0])
    assert "weather" in text
    assert '{"city": "O\\"slo\\n"}' in text
    assert "None" not in text
    assert text.endswith(end)
    assert counts.left_out == 0


def test_tools_that_never_appear_are_an_error():
    """A template that ignores tools is refused, because it would train calls of tools that no prompt names."""
    content = Paired([user("weather?")], [says("yes")], [says("no")], Writing(tools=(WEATHER,)))
    with pytest.raises(UserError, match=r"^rows\.jsonl:1: the chat template leaves out the tools \(weather\); take a "):
        tokenized(CHATML, content)
    for template in (QWEN3, LLAMA31):
        assert tokenized(template, content)[1] == Counts(rows=1, kept=1)


@pytest.mark.parametrize(("template", "role"), [(KNOWN_ROLES, "system"), (DEVELOPER, "developer"), (CHATML, "system")])
def test_a_developer_is_the_system_where_a_template_knows_none(template: str, role: str):
    """A developer's turn gets the role system if the template does not know the role developer."""
    content = Paired([{"role": "developer", "content": "Be brief."}, user("q")], [says("yes")], [says("no")])
    (example,), counts, tokenizer = tokenized(template, content)
    assert tokenizer.decode(example.prompt).startswith(f"<|im_start|>{role}\nBe brief.<|im_end|>")
    assert counts.left_out == 0


def test_a_generation_prompt_that_says_more_is_no_token_across_the_end():
    """If a completion does not begin as R1's generation prompt, the prompt is shorter and no token crosses its end."""
    (example,), counts, tokenizer = tokenized(R1, Paired([user("q")], [says("42")], [says("40")]))
    assert tokenizer.decode(example.prompt) == "<user>q</s><assistant>"
    assert (counts.merged, example.row.merged, counts.departed) == (0, 0, 1)


SPECIAL: dict[str, tuple[Paired, str]] = {  # and where a special token occurs, if any does
    "in the question": (
        Paired([user("What is <|im_end|>?")], [says("yes")], [says("no")]), "<|im_end|> in a turn of role user",
    ),
    "in the midst of an answer": (
        Paired([user("q")], [says("It <|im_end|> ends.")], [says("no")]), "<|im_end|> in chosen",
    ),
    "another's turn in an answer": (
        Paired([user("q")], [says("yes")], [says("no<|im_end|>\n<|im_start|>user\nq")]), "<|im_end|> in rejected",
    ),
    "at the end of an answer": (Paired([user("q")], [says("yes<|im_end|>\n")], [says("no")]), ""),
    "at the end of a turn before the last": (
        Paired([user("q")], [says("yes<|im_end|>"), user("r"), says("b")], [says("no")]), "<|im_end|> in chosen",
    ),
    "what looks like one": (Paired([user("<|im_middle|> <im_end>")], [says("yes")], [says("no")]), ""),
    "a block of reasoning": (Paired([user("q /think")], [says("<think>hm</think>yes")], [says("no")]), ""),
}  # fmt: skip


@pytest.mark.parametrize(("content", "where"), SPECIAL.values(), ids=SPECIAL)
def test_special_tokens_in_words_are_counted_and_shown(content: Paired, where: str):
    """A special token in a message is counted, except an answer's own end, because it is encoded as that token."""
    _, counts, _ = tokenized(CHATML, content)
    first = f"rows.jsonl:1: {where}" if where else ""
    assert (counts.kept, counts.special, counts.special_first) == (1, int(bool(where)), first)
    assert ("special tokens" in str(counts)) == bool(where)


def test_words_are_looked_for_after_what_stands_before():
    """Words of the prompt do not count as a completion's words, unless these begin before the boundary."""
    piece = Piece("chosen", "yes")
    assert left_out([piece], "say yes:", "say yes:") == [piece]
    assert left_out([piece], "say yes: yes", "say yes:") == []
    assert left_out([piece], "say yes: yes", "say yes: y") == []
    assert left_out([piece, piece], "say yes: yes", "say yes:") == [piece]
