"""How a response ends: with which token, and with that once."""

from dataclasses import dataclass, replace
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from fastpref.data.chat import apply
from fastpref.data.content import Paired, Unpaired, Writing
from fastpref.data.example import Ids
from fastpref.data.template_keywords import key_of
from fastpref.errors import UserError


@dataclass(frozen=True)
class End:
    """The token that ends a response, and those that count as an end where the response has one already."""

    token: int
    known: frozenset[int]
    foreign: bool = False  # the text's own end is no token of this tokenizer


class EndTokens:
    """The end of each way of writing, found once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        self._found: dict[tuple[bool, Any], End] = {}
        self._blank: dict[int, bool] = {}

    def of(self, content: Paired | Unpaired) -> End:
        """EOS for text, unless it writes its own end; for chats what the template puts after an assistant's words."""
        chat = not isinstance(content.prompt, str)
        key = chat, key_of(content.writing) if chat else content.writing.end
        if key not in self._found:
            self._found[key] = self._find(chat, content.writing)
        return self._found[key]

    def ended(self, ids: Ids, end: End) -> Ids:
        """The response with its end token once: further ones and white space after it go, a missing one is added."""
        words = len(ids)
        while words and (ids[words - 1] in end.known or self._is_blank(ids[words - 1])):
            words -= 1
        stop = next((at for at in range(words, len(ids)) if ids[at] in end.known), None)
        if stop is None:
            return [*ids, end.token] if ids else []
        return [*ids[:stop], end.token if end.token in ids[stop:] else ids[stop]]

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not str(self._tokenizer.decode([token])).strip()
        return self._blank[token]

    def _find(self, chat: bool, writing: Writing) -> End:
        eos = only_id(self._tokenizer.eos_token_id)
        turn = self._turn_end(writing if chat else Writing())
        own = self._one_token(writing.end) if writing.end and not chat else None
        token = next((id for id in ((turn, eos) if chat else (own, eos, turn)) if id is not None), None)
        if token is None:
            raise UserError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        known = frozenset(id for id in (own, eos, turn) if id is not None)
        return End(token, known, foreign=not chat and writing.end is not None and own is None)

    def _turn_end(self, writing: Writing) -> int | None:
        """The special token that the chat template puts after an assistant's words."""
        if not (writing.chat_template or self._tokenizer.chat_template):
            return None
        marker = "fastpref"
        chat = [{"role": "user", "content": "-"}, {"role": "assistant", "content": marker}]
        try:
            rendered = apply(self._tokenizer, chat, replace(writing, tools=None))
        except (TemplateError, TypeError, ValueError):
            return None
        tail = encode(self._tokenizer, rendered.rpartition(marker)[2].lstrip())
        return tail[0] if tail and tail[0] in self._special else None

    def _one_token(self, end: str) -> int | None:
        ids = encode(self._tokenizer, end)
        return ids[0] if len(ids) == 1 and ids[0] in self._special else None


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> Ids:
    encoded: Any = tokenizer(text, add_special_tokens=special)
    return list(encoded["input_ids"])


def only_id(token_id: Any) -> int | None:
    """`eos_token_id` and its like, whose type also allows what they never are."""
    return token_id if isinstance(token_id, int) else None
