"""Tiny tokenizers with the habits of real ones: a token a byte, the merges asked for, and a chat template."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
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
PLAIN = (  # no token ends a turn
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def toy_tokenizer(
    chat_template: str | None = None,
    *,
    eos: str | None = "</s>",
    bos: str | None = None,
    adds_bos: bool = False,  # to every text it encodes
    special: Iterable[str] = (),
    merges: Sequence[tuple[str, str]] = (),
) -> PreTrainedTokenizerFast:
    """Bytes of UTF-8 as tokens, after `merges` of neighbours within a word; `special` tokens beside eos and bos."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    inner: Any = Tokenizer(models.BPE({symbol: at for at, symbol in enumerate(symbols)}, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    specials = list(dict.fromkeys(token for token in (bos, eos, *special) if token is not None))
    inner.add_special_tokens(specials)
    if bos is not None and adds_bos:
        inner.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, inner.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


def chatml() -> PreTrainedTokenizerFast:
    """As Qwen: no BOS, a turn ends with EOS and a newline."""
    return toy_tokenizer(CHATML, eos="<|im_end|>", special=["<|im_start|>"])


def chatml_smol() -> PreTrainedTokenizerFast:
    """As SmolLM2: the token that begins a turn is also called BOS."""
    return toy_tokenizer(CHATML, eos="<|im_end|>", bos="<|im_start|>")


def llama3() -> PreTrainedTokenizerFast:
    """BOS from the template and from the tokenizer; a turn ends with another token than a text."""
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return toy_tokenizer(LLAMA3, eos="<|end_of_text|>", bos="<|begin_of_text|>", adds_bos=True, special=headers)


def gemma() -> PreTrainedTokenizerFast:
    """BOS as Llama 3, roles under other names, no system turn, white space around a turn's text removed."""
    return toy_tokenizer(GEMMA, eos="<eos>", bos="<bos>", adds_bos=True, special=["<start_of_turn>", "<end_of_turn>"])


def plain() -> PreTrainedTokenizerFast:
    """A template without any special token; EOS has to end the response."""
    return toy_tokenizer(PLAIN, eos="</s>", bos="<s>", adds_bos=True)
