"""Tiny tokenizers that behave like real ones: one token per byte, optional merges, and a chat template."""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (  # tools, tool calls, tool results, reasoning
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ '# Tools' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{% set call = call.function or call %}"
    '{{ \'<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}{{ call.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA31 = (  # tools are in the first question, a tool call is JSON, and a result has the role ipython
    "{{ bos_token }}{% set ns = namespace(tools=tools) %}{% for m in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'user' and ns.tools %}{% for tool in ns.tools %}{{ (tool | tojson) + '\n\n' }}{% endfor %}"
    "{% set ns.tools = none %}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content | trim }}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PLAIN = (  # no token ends a turn
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def toy_tokenizer(
    chat_template: str | None = None,
    *,
    eos: str | None = "</s>",
    bos: str | None = None,
    adds_bos: bool = False,  # to every encoded text
    special: Iterable[str] = (),
    merges: Sequence[tuple[str, str]] = (),
) -> PreTrainedTokenizerFast:
    """Make a tokenizer of UTF-8 bytes, with `merges` of neighbours within a word and `special` tokens."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    inner: Any = Tokenizer(models.BPE({symbol: at for at, symbol in enumerate(symbols)}, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return _finished(inner, chat_template, eos, bos, special, adds_bos=adds_bos)


def _finished(
    inner: Any, template: str | None, eos: str | None, bos: str | None, special: Iterable[str], *, adds_bos: bool = True
) -> PreTrainedTokenizerFast:
    """Add the special tokens and the chat template."""
    inner.add_special_tokens(list(dict.fromkeys(token for token in (bos, eos, *special) if token is not None)))
    if bos is not None and adds_bos:
        inner.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, inner.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def chatml() -> PreTrainedTokenizerFast:
    """Make a tokenizer like Qwen's: no BOS, and a turn ends with EOS and a newline."""
    return toy_tokenizer(CHATML, eos="<|im_end|>", special=["<|im_start|>"])


def chatml_smol() -> PreTrainedTokenizerFast:
    """Make a tokenizer like SmolLM2's: the token that begins a turn is BOS too."""
    return toy_tokenizer(CHATML, eos="<|im_end|>", bos="<|im_start|>")


def llama3() -> PreTrainedTokenizerFast:
    """Make a tokenizer like Llama 3's: template and tokenizer add BOS, and a turn has another end token than a text."""
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return toy_tokenizer(LLAMA3, eos="<|end_of_text|>", bos="<|begin_of_text|>", adds_bos=True, special=headers)


def gemma() -> PreTrainedTokenizerFast:
    """Make one like Gemma's: BOS as in Llama 3, other role names, no system turn, trimmed turns."""
    return toy_tokenizer(GEMMA, eos="<eos>", bos="<bos>", adds_bos=True, special=["<start_of_turn>", "<end_of_turn>"])


def plain() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose template has no special token, so that EOS must end the completion."""
    return toy_tokenizer(PLAIN, eos="</s>", bos="<s>", adds_bos=True)


# --- Trained -------------------------------------------------------------------------------------------------------

_CORPUS = [
    "What is the capital of Norway? The capital of Norway is Oslo.\n\nIt lies at the end of a fjord.",
    "user\nassistant\nsystem\n\nuser: a\nassistant: the answer is yes, and the question was no.\n",
    '{"name": "weather", "arguments": {"city": "Oslo"}}\n\n  indented   text, with   spaces\n\n\n',
    "the words of the answer, the words of the question; goodbye and hello, hello and goodbye!",
] * 4
_LLAMA3_WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _trained(kind: str) -> Any:
    return Tokenizer.from_str(_as_text(kind))


@cache
def _as_text(kind: str) -> str:
    """Return a small BPE: on bytes of words, on bytes of Llama 3's words, or on Gemma's letters and spaces."""
    inner: Any = Tokenizer(models.BPE())
    if kind == "gemma":
        inner.normalizer = normalizers.Replace(" ", "▁")
        inner.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
        model = json.loads(inner.to_str())["model"]
        tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
        vocabulary = {token: at for at, token in enumerate(tokens)}
        inner = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in model["merges"]], byte_fallback=True))
        inner.normalizer = normalizers.Replace(" ", "▁")
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        return inner.to_str()
    words = pre_tokenizers.Split(_LLAMA3_WORDS, "isolated") if kind == "llama3" else None
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_]) if words else bytes_
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    )
    return inner.to_str()


def trained_chatml() -> PreTrainedTokenizerFast:
    """Make a tokenizer like Qwen 3's: no BOS; its template writes tools, tool calls and reasoning."""
    return _finished(_trained("chatml"), QWEN3, "<|im_end|>", None, ["<|im_start|>"])


def trained_llama3() -> PreTrainedTokenizerFast:
    """Make one like Llama 3.1's: two or three line ends are one token; template and tokenizer add BOS."""
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return _finished(_trained("llama3"), LLAMA31, "<|end_of_text|>", "<|begin_of_text|>", headers)


def trained_gemma() -> PreTrainedTokenizerFast:
    """Make one like Gemma's: tokens cross word boundaries, and unknown letters are bytes."""
    return _finished(_trained("gemma"), GEMMA, "<eos>", "<bos>", ["<start_of_turn>", "<end_of_turn>"])
