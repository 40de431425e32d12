"""Ollama's template writes what the chat template writes, or there is none."""

from typing import Any

import pytest

from fastpref.export.chat_text import turns_of
from fastpref.export.modelfile import modelfile
from tests.support.toy_tokenizers import (
    CHATML,
    QWEN3,
    chatml,
    gemma,
    llama3,
    plain,
    toy_tokenizer,
)

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
UPPER = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + '\n' }}{% endfor %}{{ 'assistant: ' }}"
FIRST = "{{ messages[0]['content'] }}{% for m in messages[1:] %}{{ ' [' + m['content'] + ']' }}{% endfor %}{{ ' > ' }}"
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>")
TALK = [
    {"role": "system", "content": "Answer\nbriefly."}, {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Yes,\n\nhello."}, {"role": "user", "content": "What is 1 + 1?"},
]  # fmt: skip


def tokenizer(template: str) -> Any:
    return toy_tokenizer(template, eos="<|im_end|>", special=["<|im_start|>"])


FOUND = {
    "chatml": chatml, "llama3": llama3, "gemma": gemma, "plain": plain,
    "a system turn by default": lambda: tokenizer(DEFAULT_SYSTEM), "tools": lambda: tokenizer(QWEN3),
}  # fmt: skip


@pytest.mark.parametrize("make", FOUND.values(), ids=FOUND)
def test_turns_are_what_the_chat_template_writes(make: Any):
    """The turns that were found write conversations as the chat template does, without BOS, which Ollama adds."""
    made = make()
    turns = turns_of(made, {}, ENDS)
    assert turns is not None
    for talk in (TALK, TALK[1:], TALK[1:2]):
        if talk[0]["role"] == "system" and turns.system is None:
            continue
        text = made.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert turns.written(talk) == text.removeprefix(made.bos_token or "")
    assert (turns.system is None) == (make is gemma)


def test_the_end_of_a_turn_belongs_to_it():
    """Where turns can be divided in several ways, each ends with its end token and the line end after it."""
    turns = turns_of(tokenizer(DEFAULT_SYSTEM), {}, ENDS)
    assert turns is not None
    assert turns.user == ("<|im_start|>user\n", "<|im_end|>\n")
    assert turns.template() == (
        "{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}{{ range .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ end }}'
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ end }}'
        '{{ if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}'
        "{{ end }}<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", [UPPER, FIRST])
def test_a_template_that_is_no_sequence_of_turns(template: str):
    """None is written for it, and the Modelfile says so."""
    assert turns_of(tokenizer(template), {}, ENDS) is None
    text = modelfile("x.gguf", None, ["<|im_end|>"], 4096, None)
    assert "TEMPLATE" not in text
    assert "llama-server --jinja" in text


def test_the_modelfile():
    """It names the file, the template, the ends that can be written, a modest context, and the licence."""
    text = modelfile("x.gguf", "T{{ .Content }}", ["<|im_end|>", '"'], 131072, "Mine.\n")
    assert text.splitlines()[1:] == [
        "FROM ./x.gguf", 'TEMPLATE """T{{ .Content }}"""', 'PARAMETER stop "<|im_end|>"', "PARAMETER num_ctx 8192",
        'LICENSE """Mine."""',
    ]  # fmt: skip
