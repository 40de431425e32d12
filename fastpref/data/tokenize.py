"""From prompts and completions to token ids, with the boundary between them where the tokens say it is."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from fastpref.config import TokensConfig
from fastpref.data.chat import apply, write
from fastpref.data.chat_templates import load_chat_template
from fastpref.data.content import Paired, RowError, Unpaired, Writing
from fastpref.data.sources import SourceRow
from fastpref.errors import UserError

Ids = list[int]


@dataclass(frozen=True)
class Example:
    """A prompt and its completions: chosen and rejected, or a single one with its label."""

    prompt: Ids  # at least one token
    completions: tuple[Ids, ...]  # at least one token each
    label: bool | None
    row: SourceRow


@dataclass
class Counts:
    """What tokenising did to the rows."""

    rows: int = 0
    kept: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    overlong: int = 0
    empty: int = 0
    equal: int = 0
    promptless: int = 0
    refused: int = 0
    merged: int = 0
    foreign: int = 0

    def __str__(self) -> str:
        said = [f"{self.kept} of {self.rows} rows used"]
        words = {
            "prompts_cut": "prompts cut from the left",
            "responses_cut": "responses cut from the right",
            "overlong": "dropped as too long",
            "empty": "dropped with an empty response",
            "equal": "dropped with equal responses",
            "promptless": "dropped without a prompt",
            "refused": "dropped as the chat template refuses them",
            "merged": "with a token across the end of the prompt",
            "foreign": "that end with EOS because their format's end of a turn is no token of this tokenizer",
        }
        said += [
            f"{getattr(self, f.name)} {words[f.name]}"
            for f in fields(self)
            if f.name in words and getattr(self, f.name)
        ]
        return ", ".join(said)


def tokenize(
    rows: Sequence[SourceRow], tokenizer: PreTrainedTokenizerBase, options: TokensConfig
) -> tuple[list[Example], Counts]:
    """Token ids of every row that can be used, and counts of what was cut or dropped.

    A prompt's tokens are the longest common prefix of the prompt's and of every prompt-with-response's, so a token
    that reaches across the boundary belongs to the response. A response ends with the end-of-turn token exactly
    once. Raises UserError naming a row that the template refuses, or that `options` makes an error of.
    """
    ends = _EndTokens(tokenizer)
    counts = Counts(rows=len(rows))
    examples = []
    for row in rows:
        example = _example(row, tokenizer, ends, options, counts)
        if example is not None:
            examples.append(example)
    counts.kept = len(examples)
    return examples, counts


def use_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Set the template of a config's tokens.chat_template: a known name, Jinja, or a file that holds it."""
    loaded = load_chat_template(template, "tokens.chat_template")
    if loaded is not None:
        tokenizer.chat_template = loaded


@dataclass(frozen=True)
class End:
    """The token that ends a response, and those that count as an end where the response has one already."""

    token: int
    known: frozenset[int]
    foreign: bool = False  # the text's own end is no token of this tokenizer


class _EndTokens:
    """The end of each way of writing, found once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        self._found: dict[tuple[bool, str | None], End] = {}

    def of(self, content: Paired | Unpaired) -> End:
        """EOS for text, unless it writes its own end; for chats what the template puts after an assistant's words."""
        chat = not isinstance(content.prompt, str)
        key = chat, content.writing.chat_template if chat else content.writing.end
        if key not in self._found:
            self._found[key] = self._find(*key)
        return self._found[key]

    def _find(self, chat: bool, writing: str | None) -> End:
        eos = _only_id(self._tokenizer.eos_token_id)
        turn = self._turn_end(writing if chat else None)
        own = self._one_token(writing) if writing and not chat else None
        token = next((id for id in ((turn, eos) if chat else (own, eos, turn)) if id is not None), None)
        if token is None:
            raise UserError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        known = frozenset(id for id in (own, eos, turn) if id is not None)
        return End(token, known, foreign=not chat and writing is not None and own is None)

    def _turn_end(self, template: str | None) -> int | None:
        """The special token that the chat template puts after an assistant's words."""
        if not (template or self._tokenizer.chat_template):
            return None
        marker = "fastpref"
        chat = [{"role": "user", "content": "-"}, {"role": "assistant", "content": marker}]
        try:
            rendered = apply(self._tokenizer, chat, Writing(chat_template=template))
        except (TemplateError, TypeError, ValueError):
            return None
        tail = _encode(self._tokenizer, rendered.rpartition(marker)[2].lstrip())
        return tail[0] if tail and tail[0] in self._special else None

    def _one_token(self, end: str) -> int | None:
        ids = _encode(self._tokenizer, end)
        return ids[0] if len(ids) == 1 and ids[0] in self._special else None


def _example(
    row: SourceRow, tokenizer: PreTrainedTokenizerBase, ends: _EndTokens, options: TokensConfig, counts: Counts
) -> Example | None:
    content = row.content
    end = ends.of(content)
    try:
        prompt_text, full_texts = write(content, tokenizer)
    except RowError as error:
        if not row.droppable:
            raise UserError(f"{row.place}: {error}") from None
        counts.refused += 1
        return None
    except UserError as error:
        raise UserError(f"{row.place}: {error}") from None
    encoded = [_encode(tokenizer, text) for text in (prompt_text, *full_texts)]
    prompt_ids, full_ids = _with_bos(tokenizer, encoded, force=isinstance(content.prompt, str))
    shared = _common_prefix([prompt_ids, *full_ids])
    prompt = prompt_ids[:shared]
    completions = [_ended(ids[shared:], end, tokenizer) for ids in full_ids]
    counts.merged += shared < len(prompt_ids)
    counts.foreign += end.foreign

    for name, ids in zip(content.responses, completions):
        if not ids or (len(ids) == 1 and ids[0] in end.known):
            return _refuse(row, f"{name} is empty", "empty", options.strict, counts)
    if not prompt:
        return _refuse(row, "the prompt has no tokens", "promptless", options.strict, counts)
    fitted = _fit(row, prompt, completions, _only_id(tokenizer.bos_token_id), options, counts)
    if fitted is None:
        return None
    prompt, completions = fitted
    if len(completions) == 2 and completions[0] == completions[1]:
        return _refuse(row, "chosen and rejected are equal", "equal", options.strict, counts)
    return Example(prompt, tuple(completions), content.label if isinstance(content, Unpaired) else None, row)


def _refuse(row: SourceRow, what: str, counter: str, strict: bool, counts: Counts) -> None:
    if strict:
        raise UserError(f"{row.place}: {what}; mend the row, or set tokens.strict = false to drop such rows")
    setattr(counts, counter, getattr(counts, counter) + 1)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> Ids:
    encoded: Any = tokenizer(text, add_special_tokens=special)
    return list(encoded["input_ids"])


def _only_id(token_id: Any) -> int | None:
    """`eos_token_id` and its like, whose type also allows what they never are."""
    return token_id if isinstance(token_id, int) else None


def _with_bos(tokenizer: PreTrainedTokenizerBase, sequences: list[Ids], *, force: bool) -> tuple[Ids, list[Ids]]:
    """One BOS at most: a second one goes; `force` adds one where the tokenizer would (a template brings its own)."""
    bos = _only_id(tokenizer.bos_token_id)
    if bos is not None:
        adds = force and bos in _encode(tokenizer, "", special=True)[:1]
        for at, ids in enumerate(sequences):
            leading = next((i for i, token in enumerate(ids) if token != bos), len(ids))
            sequences[at] = [bos] * (leading > 0 or adds) + ids[leading:]
    return sequences[0], sequences[1:]


def _common_prefix(sequences: list[Ids]) -> int:
    shortest = min(map(len, sequences))
    first = sequences[0]
    if all(ids[:shortest] == first[:shortest] for ids in sequences):  # the usual case, compared at once
        return shortest
    return next((i for i in range(shortest) if any(ids[i] != first[i] for ids in sequences)), shortest)


def _ended(ids: Ids, end: End, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The response with its end token once: further ones and white space after it go, a missing one is added."""
    words = len(ids)
    while words and (ids[words - 1] in end.known or _is_blank(tokenizer, ids[words - 1])):
        words -= 1
    stop = next((at for at in range(words, len(ids)) if ids[at] in end.known), None)
    if stop is None:
        return [*ids, end.token] if ids else []
    return [*ids[:stop], end.token if end.token in ids[stop:] else ids[stop]]


def _is_blank(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return not str(tokenizer.decode([token])).strip()


def _fit(
    row: SourceRow, prompt: Ids, completions: list[Ids], bos: int | None, options: TokensConfig, counts: Counts
) -> tuple[Ids, list[Ids]] | None:
    """Bring an over-long row within the limits: the prompt from the left first, then the responses from the right."""
    longest = max(map(len, completions))
    prompt_limit = min(options.max_prompt_length or options.max_length, options.max_length)
    if len(prompt) <= prompt_limit and len(prompt) + longest <= options.max_length:
        return prompt, completions
    if options.overlong == "error":
        raise UserError(
            f"{row.place}: {len(prompt)} prompt and {longest} response tokens, more than tokens.max_length = "
            f"{options.max_length} or max_prompt_length allows"
        )
    if options.overlong == "drop":
        counts.overlong += 1
        return None
    keep = max(1, min(prompt_limit, options.max_length - longest))
    if keep < len(prompt):
        counts.prompts_cut += 1
        begins = prompt[:1] if prompt[0] == bos and keep > 1 else []
        prompt = begins + prompt[len(prompt) - keep + len(begins) :]
    room = options.max_length - len(prompt)
    if longest > room:
        counts.responses_cut += 1
        completions = [ids[:room] for ids in completions]
    return prompt, completions
