"""Find the token that ends a completion, and ensure that it stands there exactly once."""

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastpref.data.example import Ids
from fastpref.data.rows.content import PLAIN, Content, Message, RowContent, Writing
from fastpref.data.template.keywords import key_of
from fastpref.data.template.render import REFUSALS, apply
from fastpref.data.template.traits import template_of
from fastpref.errors import UserError

_MARK = "fastpref"
_QUESTION = {"role": "user", "content": "-"}
_MESSAGE_ENDS = ("<|eom_id|>",)  # templates write it if a keyword asks for it


@dataclass(frozen=True)
class End:
    """The token that ends a completion, and the tokens that count as an end if the completion has one already."""

    token: int
    known: frozenset[int]
    foreign: bool = False  # whether the text's own end is not a token of this tokenizer


class EndTokens:
    """Finds the end of completions once for each writing."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        self._special = set(added) | set(tokenizer.all_special_ids)
        # Tokens that may end a turn if a template writes them last. Tokens such as </tool_call> do not.
        self._controls = {id for id, token in added.items() if token.special and "tool" not in token.content}
        self._controls |= set(tokenizer.all_special_ids)
        self._found: dict[tuple[bool, Any], End] = {}
        self._others: dict[Any, frozenset[int]] = {}
        self._blank: dict[int, bool] = {}

    def of(self, content: RowContent) -> End:
        """Return the end of completions: for text its own end or EOS, for chats the template's token after one."""
        chat = not isinstance(content.prompt, str)
        key = chat, key_of(content.writing) if chat else content.writing.end
        if key not in self._found:
            self._found[key] = self._find(chat, content.writing)
        return self._found[key]

    def of_completion(self, end: End, completion: Content, ids: Ids) -> End:
        """Return the end of this completion of a chat: the token with which the template ends its last message.

        Tool calls may end with another token than words do. `ids` are those of the completion as the template writes
        it.
        """
        ends = list[int]()  # from the last token backwards
        for token in reversed(ids):
            if token in self._controls:
                ends.append(token)
            elif not self._is_blank(token):
                break
        if not ends or end.token in ends or isinstance(completion, str):
            return end
        known = [token for token in ends if token in end.known]
        last = (known or ends)[-1]
        words = completion[-1].get("content")
        of_data = isinstance(words, str) and words.rstrip().endswith(str(self._tokenizer.decode([last])).strip())
        return end if of_data else replace(end, token=last, known=end.known | set(known or ends))

    def texts(self, end: End) -> list[str]:
        """Return the tokens that count as an end, as text."""
        return [str(self._tokenizer.decode([token])) for token in sorted(end.known)]

    def ended(self, ids: Ids, end: End) -> Ids:
        """Return the completion with one end token: remove further ones and white space after it, add a missing one."""
        words = len(ids)
        while words and (ids[words - 1] in end.known or self._is_blank(ids[words - 1])):
            words -= 1
        stop = next((at for at in range(words, len(ids)) if ids[at] in end.known), None)
        if stop is None:
            kept = ids[:words] if end.foreign else ids  # drop a template's white space after an end that is no token
            return [*kept, end.token] if ids else []
        return [*ids[:stop], end.token if end.token in ids[stop:] else ids[stop]]

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not str(self._tokenizer.decode([token])).strip()
        return self._blank[token]

    def _find(self, chat: bool, writing: Writing) -> End:
        eos = only_id(self._tokenizer.eos_token_id)
        turn, spelled = self._turn_end(writing if chat else PLAIN)
        own = self._one_token(writing.end) if writing.end and not chat else None
        token = next((id for id in ((turn, eos) if chat else (own, eos, turn)) if id is not None), None)
        if token is None:
            raise UserError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        known = frozenset(id for id in (own, eos, turn) if id is not None)
        foreign = spelled if chat else writing.end is not None and own is None
        return End(token, known | self._other_ends(writing if chat else PLAIN), foreign)

    def _turn_end(self, writing: Writing) -> tuple[int | None, bool]:
        """Return the special token that the chat template writes after an answer, and whether it writes text
        there instead.

        If there are several (Cohere's end of a completion and of a turn), return the last one that is also there when
        more turns follow. A token that ends the whole text (Phi's) is not.
        """
        words = {"role": "assistant", "content": _MARK}
        tail = self._after_mark([_QUESTION, words], writing)
        if tail and tail[0] in self._special:
            return self._last_shared(tail, self._after_mark([_QUESTION, words, _QUESTION], writing)), False
        return None, bool(tail) and not self._special.intersection(tail)

    def _last_shared(self, tail: Ids, other: Ids) -> int:
        """Return the last special token in the common prefix of two tails, or else the first in `tail`."""
        last = tail[0]
        for ours, theirs in zip(tail, other):
            if ours != theirs or ours not in self._special:
                break
            last = ours
        return last

    def _other_ends(self, writing: Writing) -> frozenset[int]:
        """Return the tokens that end other turns: earlier ones, tool calls, Llama's messages."""
        key = key_of(writing)
        if key not in self._others:
            words = {"role": "assistant", "content": _MARK}
            call = {"type": "function", "function": {"name": "f", "arguments": {"a": _MARK}}}
            calling = {"role": "assistant", "content": "", "tool_calls": [call]}
            tail = self._after_mark([_QUESTION, words], writing)
            earlier = self._after_mark([_QUESTION, words, _QUESTION], writing)
            earlier = [self._last_shared(earlier, tail)] if earlier else []
            called = self._after_mark([_QUESTION, calling], writing)[-1:]
            writes = template_of(self._tokenizer, writing) or ""
            ids: Any = self._tokenizer.convert_tokens_to_ids([name for name in _MESSAGE_ENDS if name in writes])
            self._others[key] = frozenset({*earlier, *called, *ids} & self._controls)
        return self._others[key]

    def _after_mark(self, chat: list[Message], writing: Writing) -> Ids:
        """Return the tokens that the template writes after the last mark, without white space around them."""
        if template_of(self._tokenizer, writing) is None:
            return []
        try:
            text = apply(self._tokenizer, chat, replace(writing, tools=None))
        except REFUSALS:
            return []
        return encode(self._tokenizer, text.rpartition(_MARK)[2].strip()) if _MARK in text else []

    def _one_token(self, end: str) -> int | None:
        ids = encode(self._tokenizer, end)
        return ids[0] if len(ids) == 1 and ids[0] in self._special else None


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> Ids:
    encoded: Any = tokenizer(text, add_special_tokens=special)
    return list(encoded["input_ids"])


def only_id(token_id: Any) -> int | None:
    """Return a token id such as `eos_token_id`, whose type allows lists too, or None if it is not an int."""
    return token_id if isinstance(token_id, int) else None
