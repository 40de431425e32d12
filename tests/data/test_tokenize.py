"""Token ids compared with their text: where the prompt ends, how a completion ends, what is cut and what is dropped.

The tokenizers are toys (one token per byte) with the templates and special tokens of real families
(toy_tokenizers.py).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastpref.data.example import Counts, Example
from fastpref.data.rows.content import Message, Paired, Ranked, RowContent, Unpaired
from fastpref.data.tokenize import use_chat_template
from fastpref.errors import UserError
from tests.support.chats import says, tokenized, user
from tests.support.paths import QUICKSTART_MODEL as QUICKSTART
from tests.support.toy_tokenizers import CHATML, chatml, chatml_smol, gemma, llama3, plain, toy_tokenizer


def quickstart() -> PreTrainedTokenizerBase:
    """Return the tokenizer of examples/quickstart."""
    return AutoTokenizer.from_pretrained(QUICKSTART)


Make = Callable[[], PreTrainedTokenizerBase]
FAMILIES: dict[str, Make] = {make.__name__: make for make in (chatml, chatml_smol, llama3, gemma, plain, quickstart)}
EVERY_FAMILY = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=special)
    return list(encoded["input_ids"])


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    return str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, **options))


def only(tokenizer: PreTrainedTokenizerBase, content: RowContent, **options: Any) -> Example:
    examples, _ = tokenized(tokenizer, content, **options)
    assert len(examples) == 1
    return examples[0]


# --- The boundary --------------------------------------------------------------------------------------------------

CHATS: dict[str, tuple[list[Message], list[Message], list[Message]]] = {
    "one turn": ([user("What is it?")], [says("A dog.")], [says("A cat.")]),
    "several turns": ([user("Hi"), says("Hello!"), user("And?")], [says("So.")], [says("") | {"content": "No"}]),
    "several turns in a completion": ([user("Hi")], [says("a"), user("b"), says("c")], [says("d")]),
    "letters beyond ASCII": ([user("Où ça ? 🎉")], [says("là — «ici»")], [says("日本")]),
    "words of templates": ([user("user\nassistant")], [says("assistant\n\nuser")], [says("model: a")]),
    "a completion that begins like the other": ([user("Hi")], [says("Yes, it is.")], [says("Yes, it was.")]),
    "an assistant's turn before the completion": ([user("Hi"), says("Well")], [says("yes")], [says("no")]),
}


@EVERY_FAMILY
@pytest.mark.parametrize(("prompt", "chosen", "rejected"), CHATS.values(), ids=CHATS)
def test_prompt_and_completion_are_the_rendered_conversation(
    make: Make, prompt: list[Message], chosen: list[Message], rejected: list[Message]
):
    """Prompt and completion tokens, joined, are those of the whole conversation as the template writes it.

    The prompt includes the template's generation prompt. Only the completion's end differs: white space after its end
    token is removed, and a template without an end token gets EOS.
    """
    tokenizer = make()
    example = only(tokenizer, Paired(prompt, chosen, rejected))
    answered = prompt[-1]["role"] == "assistant"
    assert example.prompt == encode(tokenizer, render(tokenizer, prompt, add_generation_prompt=not answered))
    for turns, ids in zip((chosen, rejected), example.completions):
        whole = render(tokenizer, [*prompt, *turns])
        ours = decode(tokenizer, example.prompt + ids)
        ended = whole if make is plain else whole.rstrip()
        assert example.prompt + ids == encode(tokenizer, ours)
        assert ours == ended + ("</s>" if make is plain else "")


@EVERY_FAMILY
@pytest.mark.parametrize("special", [False, True], ids=["a plain prompt", "a prompt with special tokens"])
def test_prompt_and_completion_are_the_joined_text(make: Make, special: bool):
    """Text is tokenised as a whole: prompt and completion tokens, joined, are those of the joined texts, then EOS."""
    tokenizer = make()
    prompt = f"Q: {tokenizer.eos_token if special else '?'} A:"
    example = only(tokenizer, Paired(prompt, " é yes", "no\n"))
    assert example.prompt == encode(tokenizer, prompt, special=True)
    for text, ids in zip((" é yes", "no\n"), example.completions):
        assert example.prompt + ids == [*encode(tokenizer, prompt + text, special=True), tokenizer.eos_token_id]


MERGES = [("a", "b"), ("ab", "a"), ("b", "b"), ("Ġ", "a")]


@EVERY_FAMILY
def test_a_list_is_its_completions_one_by_one(make: Make):
    """A list has the tokens of its pairs, in its own order, with its scores and its weight."""
    tokenizer = make()
    prompt, answers = [user("Hi")], [[says(words)] for words in ("Hello!", "Well", "No")]
    whole = only(tokenizer, Ranked(prompt, tuple(answers), (2.0, 3.0, -1.0), weight=0.5))
    first = only(tokenizer, Paired(prompt, answers[0], answers[1], weight=0.5, margin=0.25))
    second = only(tokenizer, Paired(prompt, answers[2], answers[0]))
    assert whole.prompt == first.prompt == second.prompt
    assert whole.completions == (*first.completions, second.completions[0])
    assert (whole.scores, whole.weight, whole.margin) == ((2.0, 3.0, -1.0), 0.5, None)
    assert (first.scores, first.weight, first.margin) == ((), 0.5, 0.25)
    assert (second.weight, second.margin) == (1.0, None)
    assert whole.names == ("completion 0", "completion 1", "completion 2")


@pytest.mark.parametrize(
    ("answers", "counter", "message"),
    [
        (("a", "b", "a"), "equal", "completion 0 and completion 2 are equal"),
        (("a", "", "b"), "empty", "completion 1 is empty"),
        (
            ("a", "b" * 9 + "c", "b" * 9 + "d"),
            "overlong",
            "completion 1 and completion 2 are equal once cut to tokens.max",
        ),
    ],
)
def test_lists_that_cannot_be_used(answers: tuple[str, ...], counter: str, message: str):
    """A list with an empty completion, or with two of the same tokens, is dropped and counted, or is an error."""
    row = Ranked("q", answers, tuple(map(float, range(len(answers)))))
    examples, counts = tokenized(plain(), row, max_length=10)
    assert (examples, getattr(counts, counter), counts.rows) == ([], 1, 1)
    with pytest.raises(UserError, match=re.escape(f"rows.jsonl, row 0: {message}")):
        tokenized(plain(), row, strict=True, max_length=10)


def test_a_token_across_the_boundary_belongs_to_the_completion():
    """If the prompt's last letter and a completion's first letter make one token, the prompt ends before it.

    This holds for both completions, and the row is counted.
    """
    tokenizer = toy_tokenizer(merges=MERGES)
    a, b, c, x, ab, end = (ids for text in ("a", "b", "c", "x", "ab", "</s>") for ids in encode(tokenizer, text))
    (merged, apart), counts = tokenized(tokenizer, Paired("xa", "b", "c"), Paired("xa", "c", "cb"))
    assert (merged.prompt, merged.completions) == ([x], ([ab, end], [a, c, end]))
    assert (apart.prompt, apart.completions) == ([x, a], ([c, end], [c, b, end]))
    assert counts.merged == 1
    assert str(counts) == "2 of 2 rows used, 1 with a token across the prompt's end"


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.text("ab x\n", max_size=6),
    chosen=st.text("ab x\n", max_size=5),
    rejected=st.text("ab x\n", max_size=5),
    chat=st.booleans(),
)
def test_the_prompt_is_the_longest_common_prefix(prompt: str, chosen: str, rejected: str, chat: bool):
    """The prompt's tokens are the longest common prefix of all three tokenised texts, however tokens merge.

    Joined with a completion they are that text's tokens; a row counts as merged if a token crosses the boundary.
    """
    tokenizer = MERGING
    content = Paired([user(prompt)], [says(chosen)], [says(rejected)]) if chat else Paired(prompt, chosen, rejected)
    examples, counts = tokenized(tokenizer, content)
    if chat:
        texts = [render(tokenizer, [user(prompt)], add_generation_prompt=True)]
        texts += [render(tokenizer, [user(prompt), says(words)]) for words in (chosen, rejected)]
    else:
        texts = [prompt, prompt + chosen, prompt + rejected]
    alone, *full = (encode(tokenizer, text) for text in texts)
    prefix = 0
    while prefix < min(map(len, (alone, *full))) and len({ids[prefix] for ids in (alone, *full)}) == 1:
        prefix += 1
    assert counts.merged == (counts.kept and prefix < len(alone))
    assert counts.kept == len(examples) == 1 - counts.empty - counts.promptless - counts.equal
    for example in examples:
        assert example.prompt == alone[:prefix]
        for ids, completion in zip(full, example.completions):
            assert completion[-1] == tokenizer.eos_token_id
            joined = example.prompt + completion[:-1]
            assert joined == ids[: len(joined)]
            assert not decode(tokenizer, ids[len(joined) :]).replace("<|im_end|>", "").strip()


MERGING = toy_tokenizer(CHATML, eos="<|im_end|>", special=["<|im_start|>"], merges=[*MERGES, ("Ċ", "a"), ("Ċ", "Ċ")])


def test_a_generation_prompt_that_says_more():
    """If the generation prompt has more than a finished turn (a thinking block), the prompt is their common part."""
    more = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
    tokenizer = toy_tokenizer(more, eos="<|im_end|>", special=["<|im_start|>"])
    example = only(tokenizer, Paired([user("q")], [says("yes")], [says("no")]))
    assert decode(tokenizer, example.prompt) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert [decode(tokenizer, ids) for ids in example.completions] == ["yes<|im_end|>", "no<|im_end|>"]


# --- The end of a completion -----------------------------------------------------------------------------------------

ENDINGS = ["", "{end}", "{end}\n", "{end}{end}", "{end}\n{end}\n", " \n{end} ", "{end}{end}{end} \n "]


@EVERY_FAMILY
@pytest.mark.parametrize("ending", ENDINGS, ids=repr)
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_a_completion_ends_with_its_end_token_once(make: Make, ending: str, chat: bool):
    """A completion ends with exactly one end token, whether the data have none, several, or space after it."""
    tokenizer = make()
    turn_ends = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
    end = turn_ends.get(make.__name__, str(tokenizer.eos_token)) if chat else str(tokenizer.eos_token)
    answers = [words + ending.format(end=end) for words in ("yes", "no")]
    if chat:
        content = Paired([user("q")], [says(answers[0])], [says(answers[1])])
    else:
        content = Paired("q ", answers[0], answers[1])
    for words, completion in zip(("yes", "no"), only(tokenizer, content).completions):
        text = decode(tokenizer, completion)
        assert text.endswith(end)
        assert text.count(end) == 1
        assert text.removesuffix(end).strip() == words


@pytest.mark.parametrize(
    ("make", "turn_end"),
    [(llama3, "<|eot_id|>"), (gemma, "<end_of_turn>"), (chatml, "<|im_end|>")],
    ids=["llama3", "gemma", "chatml"],
)
def test_a_turn_ends_with_the_templates_token(make: Make, turn_end: str):
    """Chats end with the template's end of a turn and texts with EOS; an EOS next to the turn's end is removed."""
    tokenizer = make()
    eos = str(tokenizer.eos_token)
    for words in ("no", f"no{turn_end}{eos}", f"no{eos}"):
        chat = only(tokenizer, Paired([user("q")], [says("yes")], [says(words)]))
        assert [decode(tokenizer, ids) for ids in chat.completions] == [f"yes{turn_end}", f"no{turn_end}"]
    text = only(tokenizer, Paired("q", "yes", "no"))
    assert [decode(tokenizer, ids) for ids in text.completions] == [f"yes{eos}", f"no{eos}"]


CALLS = (  # as gpt-oss and Llama 3.1: a call has another end than text
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}{{ '<|call|>' }}"
    "{% else %}{{ m.content + ('<|return|>' if loop.last and m.role == 'assistant' else '<|end|>') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"
)
BRACKETS = (  # as GLM: a call is in brackets, which are no end, and no token ends a turn
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' }}{{ call.function.arguments | tojson }}{{ '</tool_call>' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def calls() -> PreTrainedTokenizerBase:
    special = ["<|start|>", "<|message|>", "<|end|>", "<|call|>", "<|eom_id|>"]
    return toy_tokenizer(CALLS + "{# <|eom_id|> #}", eos="<|return|>", special=special)


def test_a_message_ends_with_what_its_template_ends_it_with():
    """Several tokens can end a turn; no turn gets a second end, and a bracket is no end."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "b"}}}]}
    tokenizer = calls()
    example = only(tokenizer, Paired([user("q")], [call], [says("no")]))
    assert [decode(tokenizer, ids) for ids in example.completions] == ['{"a": "b"}<|call|>', "no<|return|>"]
    special = ["<|user|>", "<|assistant|>", "<tool_call>", "</tool_call>"]
    tokenizer = toy_tokenizer(BRACKETS, eos="</s>", special=special)
    examples, _ = tokenized(tokenizer, Unpaired([user("q")], [call], True))
    assert decode(tokenizer, examples[0].completions[0]) == '<tool_call>{"a": "b"}</tool_call></s>'


TWO_ENDS = (  # as Command R 7B: one token ends a completion and another one the turn
    "{% for m in messages %}{{ '<|turn|>' + m.role + '<|completion|>' + m.content + '<|end_completion|><|end_turn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant<|completion|>' }}{% endif %}"
)
AWAITING = (  # as Gemma 4: a call's bracket is a special token, and the start of the result is its end
    "{% for m in messages %}{% if m.role == 'tool' %}{{ 'result' + m.content + '<result|>' }}"
    "{% else %}{{ '<|turn>' + m.role }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<|call>' }}{{ call.function.arguments | tojson }}{{ '<call|>' }}{% endfor %}"
    "{{ '<|result>' if m.tool_calls else m.content + '<turn|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>assistant' }}{% endif %}"
)


def test_an_end_of_several_tokens_is_kept_whole():
    """The end is the last end token that the template writes between turns; those before it are trained too."""
    special = ["<|turn|>", "<|completion|>", "<|end_completion|>", "<|end_turn|>"]
    tokenizer = toy_tokenizer(TWO_ENDS, eos="<|end_turn|>", special=special)
    example = only(tokenizer, Paired([user("q")], [says("a"), user("b"), says("yes")], [says("no<|end_turn|>")]))
    end = "<|end_completion|><|end_turn|>"
    assert decode(tokenizer, example.completions[0]).split("yes")[1] == end
    assert decode(tokenizer, example.completions[0]).startswith(f"a{end}")
    assert decode(tokenizer, only(tokenizer, Unpaired([user("q")], [says("no")], True)).completions[0]) == f"no{end}"


def test_the_bracket_of_a_call_is_no_end():
    """A call's bracket is no end, because an answer can have several calls."""
    special = ["<|turn>", "<turn|>", "<|call>", "<call|>", "<|result>", "<result|>"]
    tokenizer = toy_tokenizer(AWAITING, eos="<eos>", special=special)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    call = {"function": {"name": "f", "arguments": {"a": "b"}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    example = only(tokenizer, Paired([user("q")], [calling], [says("no")]))
    assert [decode(tokenizer, ids) for ids in example.completions] == [
        '<|call>{"a": "b"}<call|><|call>{"a": "b"}<call|><|result>', "no<turn|>",
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["<|return|>", "<|call|>", "<|end|>", "<|eom_id|>"])
def test_text_with_an_end_of_the_models_gets_no_second_one(end: str):
    """Text that ends with any token that ends a turn in this template gets no second end."""
    tokenizer = calls()
    example = only(tokenizer, Paired("q", f"yes{end}\n", "no"))
    assert [decode(tokenizer, ids) for ids in example.completions] == [f"yes{end}", "no<|return|>"]


def test_a_chat_templates_end_that_is_no_token():
    """If the template's end is plain text, EOS follows it, so that the model learns to stop, and the counts say so."""
    tokenizer = toy_tokenizer(CHATML, eos="</s>")
    (example,), counts = tokenized(tokenizer, Paired([user("q")], [says("yes")], [says("no")]))
    assert decode(tokenizer, example.completions[0]) == "yes<|im_end|></s>"
    assert str(counts).endswith(
        "1 that end with EOS because their format's end of a turn is no token of this tokenizer"
    )
    assert tokenized(plain(), Paired([user("q")], [says("yes")], [says("no")]))[1].foreign == 0


def test_without_eos_the_templates_token_ends_texts_too():
    """Without an EOS token, texts end with the template's end of a turn; without either there is an error."""
    tokenizer = toy_tokenizer(CHATML, eos=None, special=["<|im_start|>", "<|im_end|>"])
    assert decode(tokenizer, only(tokenizer, Unpaired("q", "yes", True)).completions[0]) == "yes<|im_end|>"
    with pytest.raises(UserError, match="no end-of-sequence token; set eos_token"):
        tokenized(toy_tokenizer(eos=None), Unpaired("q", "yes", True))


# --- BOS -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "in_text", "in_chat"),
    [(llama3, True, True), (gemma, True, True), (plain, True, False), (chatml_smol, False, True)],
    ids=["llama3", "gemma", "plain", "chatml_smol"],
)
@pytest.mark.parametrize("given_bos", [0, 1, 2])
def test_bos_at_most_once_and_first(make: Make, in_text: bool, in_chat: bool, given_bos: int):
    """If tokenizer or template want BOS, a sequence has one, as its first token, however many the data have.

    Text gets BOS from the tokenizer, chats only from the template.
    """
    tokenizer = make()
    bos, bos_id = str(tokenizer.bos_token) * given_bos, tokenizer.bos_token_id
    text = only(tokenizer, Paired(bos + "q", "yes", "no"))
    tokenizer.chat_template = f"{{{{ '{bos}' }}}}{tokenizer.chat_template}"
    chat = only(tokenizer, Paired([user("q")], [says("yes")], [says("no")]))
    for example, wanted in ((text, in_text), (chat, in_chat)):
        leading = next(at for at, token in enumerate(example.prompt) if token != bos_id)
        assert leading == (wanted or given_bos > 0)
        assert all(bos_id not in ids for ids in example.completions)
    assert bos_id not in text.prompt[1:]
    assert make is chatml_smol or bos_id not in chat.prompt[1:]  # its turns begin with BOS


def test_bos_alone_is_a_prompt():
    """An empty text prompt is BOS; without BOS the row has no prompt and is dropped."""
    tokenizer = plain()
    assert only(tokenizer, Paired("", "yes", "no")).prompt == [tokenizer.bos_token_id]
    examples, counts = tokenized(chatml(), Paired("", "yes", "no"))
    assert (examples, counts) == ([], Counts(rows=1, promptless=1))


# --- Lengths -------------------------------------------------------------------------------------------------------

P, C, R = "123456789", "abcd", "xy"  # with EOS the completions are 5 and 3 tokens, with BOS the prompt is 10
# options, prompt, completions, number of cut prompts and completions
LENGTHS: dict[str, tuple[dict[str, int], str, str, str, int, int]] = {
    "fits exactly": ({"max_length": 15}, f"<s>{P}", f"{C}</s>", f"{R}</s>", 0, 0),
    "prompt from the left": ({"max_length": 14}, "<s>23456789", f"{C}</s>", f"{R}</s>", 1, 0),
    "prompt as far as the longest completion asks": ({"max_length": 11}, "<s>56789", f"{C}</s>", f"{R}</s>", 1, 0),
    "half of it is the prompt's": ({"max_length": 10}, "<s>6789", f"{C}</s>", f"{R}</s>", 1, 0),
    "then completions from the right": ({"max_length": 8}, "<s>789", C, f"{R}</s>", 1, 1),
    "both completions": ({"max_length": 4}, "<s>9", C[:2], R, 1, 1),
    "one token of the prompt": ({"max_length": 3}, "9", C[:2], R, 1, 1),
    "prompt limit": ({"max_length": 15, "max_prompt_length": 4}, "<s>789", f"{C}</s>", f"{R}</s>", 1, 0),
    "prompt limit that fits": ({"max_length": 15, "max_prompt_length": 10}, f"<s>{P}", f"{C}</s>", f"{R}</s>", 0, 0),
    "both limits": ({"max_length": 8, "max_prompt_length": 3}, "<s>89", f"{C}</s>", f"{R}</s>", 1, 0),
    "a prompt limit beyond the length": (
        {"max_length": 12, "max_prompt_length": 99}, "<s>456789", f"{C}</s>", f"{R}</s>", 1, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "prompt", "chosen", "rejected", "prompts", "completions"), LENGTHS.values(), ids=LENGTHS
)
def test_long_rows_are_cut(
    limits: dict[str, int], prompt: str, chosen: str, rejected: str, prompts: int, completions: int
):
    """A text prompt is cut from the left, keeping BOS, down to half of the limit; then completions from the right. A
    prompt of which less than a quarter is left is counted by itself."""
    tokenizer = plain()
    (example,), counts = tokenized(tokenizer, Paired(P, C, R), **limits)
    assert decode(tokenizer, example.prompt) == prompt
    assert [decode(tokenizer, ids) for ids in example.completions] == [chosen, rejected]
    few = len(example.prompt) < (1 + len(P)) / 4
    lost: dict[str, Any] = {"prompts_lost": 1, "prompts_lost_first": example.row.place} if few else {}
    assert counts == Counts(rows=1, kept=1, prompts_cut=prompts, completions_cut=completions, **lost)
    assert len(example.prompt) + max(map(len, example.completions)) <= limits["max_length"]


@pytest.mark.parametrize("limits", [{"max_length": 14}, {"max_length": 99, "max_prompt_length": 9}], ids=str)
def test_long_rows_are_dropped_or_an_error(limits: dict[str, int]):
    """`overlong = "drop"` drops and counts exactly the rows that "truncate" would cut; "error" names the first one."""
    rows = [Paired(P[1:], C, R), Paired(P, C, R)]
    examples, counts = tokenized(plain(), *rows, overlong="drop", **limits)
    assert [example.row.place for example in examples] == ["rows.jsonl, row 0"]
    assert counts == Counts(rows=2, kept=1, overlong=1)
    with pytest.raises(UserError, match=r"^rows\.jsonl, row 1: 10 prompt and 5 completion tokens, more than"):
        tokenized(plain(), *rows, overlong="error", **limits)


def test_without_bos_a_cut_prompt_begins_anywhere():
    """A cut prompt gets no BOS if it had none."""
    assert decode(chatml(), only(chatml(), Paired(P, C, R), max_length=8).prompt) == "6789"


# --- Rows that cannot be used --------------------------------------------------------------------------------------

EQUAL: Any = ("equal", "chosen and rejected are equal", {})


def empty(completion: str) -> Any:
    return "empty", f"{completion} is empty", {}


UNUSABLE: dict[str, tuple[Paired | Unpaired, str, str, dict[str, Any]]] = {  # row, counter, message, options
    "an empty text": (Paired("q", "", "no"), *empty("chosen")),
    "an empty rejected text": (Paired("q", "yes", ""), *empty("rejected")),
    "only an end token": (Unpaired("q", "<|im_end|>", True), *empty("completion")),
    "an empty turn": (Paired([user("q")], [says("yes")], [says("")]), *empty("rejected")),
    "no turn": (Paired([user("q")], [], [says("no")]), *empty("chosen")),
    "an end token and a line end": (Paired([user("q")], [says("<|im_end|>\n")], [says("x")]), *empty("chosen")),
    "equal": (Paired("q", "yes", "yes"), *EQUAL),
    "equal but for the end token": (Paired("q", "yes", "yes<|im_end|>\n"), *EQUAL),
    "white space": (Paired("q", " \n", "no"), *empty("chosen")),
    "a turn of white space": (Paired([user("q")], [says("yes")], [says(" \n ")]), *empty("rejected")),
    "an empty last turn": (Paired([user("q")], [says("yes"), user("r"), says(" ")], [says("no")]), *empty("chosen")),
    "an empty turn between": (
        Paired([user("q")], [says("yes")], [says(""), user("r"), says("no")]), *empty("rejected"),
    ),
    "a block of no reasoning": (
        Paired([user("q")], [says("yes")], [says("<think>\n\n</think>\n\n")]), *empty("rejected"),
    ),
    "equal once cut": (
        Paired("q", "yes!", "yes?"), "overlong", "chosen and rejected are equal once cut to tokens.max_length",
        {"max_length": 4},
    ),
    "no prompt": (Paired("", "yes", "no"), "promptless", "the prompt has no tokens", {}),
}  # fmt: skip


@pytest.mark.parametrize(("content", "counter", "what", "options"), UNUSABLE.values(), ids=UNUSABLE)
def test_rows_that_cannot_be_used(content: Paired | Unpaired, counter: str, what: str, options: dict[str, Any]):
    """Rows with an empty or equal completions or no prompt are dropped and counted; strict makes them errors."""
    examples, counts = tokenized(chatml(), content, Unpaired("q", "ok", True), **options)
    assert [example.row.place for example in examples] == ["rows.jsonl, row 1"]
    assert (counts.rows, counts.kept, getattr(counts, counter)) == (2, 1, 1)
    with pytest.raises(UserError, match=rf"^rows\.jsonl, row 0: {what}; mend the row, or set tokens.strict = false"):
        tokenized(chatml(), content, strict=True, **options)


THINKS = CHATML.replace(  # as Qwen 3: writes a block for reasoning, also an empty one
    "+ m['content'] +", "+ ('<think></think>' if m['role'] == 'assistant' else '') + m['content'] +"
)


@pytest.mark.parametrize("template", [CHATML, THINKS, "{{ 'x' }}" + CHATML], ids=["plain", "thinks", "other"])
@pytest.mark.parametrize("empty", ["", "  ", "\n", "<|im_end|>\n", "\u00a0"], ids=repr)
def test_empty_is_what_the_message_says(template: str, empty: str):
    """A completion is empty if its message has no text, no call and no reasoning, whatever the template adds."""
    tokenizer = toy_tokenizer(template, eos="<|im_end|>", special=["<|im_start|>"])
    _, counts = tokenized(tokenizer, Paired([user("q")], [says("yes")], [says(empty)]))
    assert counts == Counts(rows=1, empty=1)


def test_counts_say_what_happened_and_no_more():
    """Every count that is not zero is named once."""
    assert str(Counts(rows=3, kept=3)) == "3 of 3 rows used"
    names = [field.name for field in fields(Counts) if not field.name.endswith("_first")]
    numbers: dict[str, Any] = {name: at + 10 for at, name in enumerate(names)}
    everything = Counts(**numbers, left_out_first="r:1: x")
    words = str(everything)
    assert words.startswith("11 of 10 rows used, ")
    assert words.endswith(" with words that the chat template leaves out (the first: r:1: x)")
    assert [part.split()[0] for part in words.split(", ")[1:]] == [str(at) for at in range(12, 10 + len(names))]


def test_examples_keep_their_order_row_and_label():
    """Examples keep the order of their rows, their place and their label; a pair has no label."""
    rows = [Paired("q", "yes", "no"), Unpaired("q", "yes", True), Unpaired([user("q")], [says("no")], False)]
    examples, counts = tokenized(chatml(), *rows)
    assert [example.label for example in examples] == [None, True, False]
    assert [len(example.completions) for example in examples] == [2, 1, 1]
    assert [(example.row.place, example.row.question) for example in examples] == [
        (f"rows.jsonl, row {at}", "q") for at in range(3)
    ]
    assert counts == Counts(rows=3, kept=3)


# --- Templates -----------------------------------------------------------------------------------------------------


def test_a_chat_without_a_template():
    """A chat for a tokenizer without a chat template is an error that names the row and the remedy."""
    with pytest.raises(UserError, match=r"^rows\.jsonl, row 0: the row is a chat, .*; set tokens.chat_template"):
        tokenized(toy_tokenizer(), Paired([user("q")], [says("yes")], [says("no")]))


def test_a_template_of_ones_own(tmp_path: Path):
    """`tokens.chat_template` is Jinja or a file with it, and replaces the tokenizer's own template."""
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML, encoding="utf-8")
    for template in (CHATML, str(path)):
        tokenizer = toy_tokenizer("{{ 'other' }}", eos="<|im_end|>", special=["<|im_start|>"])
        use_chat_template(tokenizer, template)
        assert tokenizer.chat_template == CHATML
    use_chat_template(tokenizer, None)
    assert tokenizer.chat_template == CHATML


def test_a_template_that_cannot_be_read(tmp_path: Path):
    """A missing file, a folder or a binary file gives one error that names the key and the file."""
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.jinja", tmp_path, binary):
        with pytest.raises(UserError, match=rf"^tokens\.chat_template: {path}: cannot be read: "):
            use_chat_template(chatml(), str(path))
