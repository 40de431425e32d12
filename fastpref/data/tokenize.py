"""From prompts and completions to token ids, with the boundary between them where the tokens say it is."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from fastpref.config import TokensConfig
from fastpref.data.formats import Content, Paired, Unpaired
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
    merged: int = 0

    def __str__(self) -> str:
        said = [f"{self.kept} of {self.rows} rows used"]
        words = {
            "prompts_cut": "prompts cut from the left",
            "responses_cut": "responses cut from the right",
            "overlong": "dropped as too long",
            "empty": "dropped with an empty response",
            "equal": "dropped with equal responses",
            "promptless": "dropped without a prompt",
            "merged": "with a token across the end of the prompt",
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
    ends = EndTokens.of(tokenizer)
    counts = Counts(rows=len(rows))
    examples = []
    for row in rows:
        example = _example(row, tokenizer, ends, options, counts)
        if example is not None:
            examples.append(example)
    counts.kept = len(examples)
    return examples, counts


def use_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Set a template given in the config: Jinja, or a file that holds it."""
    if template is None:
        return
    if "{" not in template:
        try:
            template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"tokens.chat_template: {template}: cannot be read: {error}") from None
    tokenizer.chat_template = template


@dataclass(frozen=True)
class EndTokens:
    """The tokens that end a response."""

    text: int  # after plain text: EOS
    chat: int  # after a chat template's assistant turn

    def __contains__(self, token: int) -> bool:
        return token in (self.text, self.chat)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "EndTokens":
        eos = _only_id(tokenizer.eos_token_id)
        turn = _turn_end(tokenizer)
        text, chat = eos if eos is not None else turn, turn if turn is not None else eos
        if text is None or chat is None:
            raise UserError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        return cls(text, chat)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts after an assistant's words."""
    if not tokenizer.chat_template:
        return None
    marker = "fastpref"
    chat = [{"role": "user", "content": "-"}, {"role": "assistant", "content": marker}]
    try:
        rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return None
    tail = _encode(tokenizer, str(rendered).rpartition(marker)[2].lstrip())
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return tail[0] if tail and tail[0] in special else None


def _example(
    row: SourceRow, tokenizer: PreTrainedTokenizerBase, ends: EndTokens, options: TokensConfig, counts: Counts
) -> Example | None:
    content = row.content
    prompt_ids, full_ids, end = _render(content, _responses(content), tokenizer, ends, row.place)
    shared = _common_prefix([prompt_ids, *full_ids])
    prompt = prompt_ids[:shared]
    completions = [_ended(ids[shared:], end, ends, tokenizer) for ids in full_ids]
    counts.merged += shared < len(prompt_ids)

    if any(not ids or (len(ids) == 1 and ids[0] in ends) for ids in completions):
        return _refuse(row, "a response is empty", "empty", options.strict, counts)
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


def _responses(content: Paired | Unpaired) -> list[Content]:
    return [content.chosen, content.rejected] if isinstance(content, Paired) else [content.completion]


def _render(
    content: Paired | Unpaired,
    responses: list[Content],
    tokenizer: PreTrainedTokenizerBase,
    ends: EndTokens,
    place: str,
) -> tuple[Ids, list[Ids], int]:
    """Token ids of the prompt and of the prompt with each response, and the token that ends a response."""
    prompt = content.prompt
    if isinstance(prompt, str):
        texts = [prompt, *(prompt + str(response) for response in responses)]
        return *_with_bos(tokenizer, [_encode(tokenizer, text) for text in texts], force=True), ends.text
    if not tokenizer.chat_template:
        raise UserError(f"{place}: the row is a chat, and the tokenizer has no chat template; set tokens.chat_template")
    answered = prompt[-1]["role"] == "assistant"  # the response goes on after an assistant's turn
    try:
        texts = [_chat(tokenizer, prompt, generation_prompt=not answered)]
        texts += [_chat(tokenizer, [*prompt, *response]) for response in responses if isinstance(response, list)]
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{place}: the chat template refuses this row: {error}") from None
    return *_with_bos(tokenizer, [_encode(tokenizer, text) for text in texts], force=False), ends.chat


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[Any], *, generation_prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))


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
    return next((i for i in range(shortest) if any(ids[i] != first[i] for ids in sequences)), shortest)


def _ended(ids: Ids, end: int, ends: EndTokens, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The response with its end token once: further ones and white space after it go, a missing one is added."""
    words = len(ids)
    while words and (ids[words - 1] in ends or _is_blank(tokenizer, ids[words - 1])):
        words -= 1
    stop = next((at for at in range(words, len(ids)) if ids[at] in ends), None)
    if stop is None:
        return [*ids, end] if ids else []
    return [*ids[:stop], end if end in ids[stop:] else ids[stop]]


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
