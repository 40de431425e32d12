"""From prompts and completions to token ids, with the boundary between them where the tokens say it is."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastpref.config import TokensConfig
from fastpref.data.chat import write_all
from fastpref.data.chat_templates import load_chat_template
from fastpref.data.content import RowError, Unpaired
from fastpref.data.ends import EndTokens, encode, only_id
from fastpref.data.example import Counts, Example, Ids, Origin
from fastpref.data.sources import SourceRow
from fastpref.data.template_keywords import of_run
from fastpref.errors import UserError

BATCH = 1000  # rows written and encoded at once
_QUESTION = 500  # characters of it that are kept


def tokenize(
    rows: Sequence[SourceRow], tokenizer: PreTrainedTokenizerBase, options: TokensConfig, day: date | None = None
) -> tuple[list[Example], Counts]:
    """Token ids of every row that can be used, and counts of what was cut or dropped: `tokenize_batches` in one."""
    counts = Counts()
    batches = tokenize_batches(rows, tokenizer, options, counts, day)
    return [example for batch in batches for example in batch], counts


def tokenize_batches(
    rows: Sequence[SourceRow],
    tokenizer: PreTrainedTokenizerBase,
    options: TokensConfig,
    counts: Counts,
    day: date | None = None,
    templates: set[str | None] | None = None,
) -> Iterator[list[Example]]:
    """Token ids of every row that can be used, some rows at a time; `counts` grows by what was cut or dropped.

    A prompt's tokens are the longest common prefix of the prompt's and of every prompt-with-response's, so a token
    that reaches across the boundary belongs to the response. A response ends with the end-of-turn token exactly
    once. Templates that write the date write that of `day` (None: today). `templates` gets those that wrote a row,
    None for the tokenizer's. Raises UserError naming a row that the template refuses, or that `options` makes an error
    of.
    """
    encoder = _Encoder(tokenizer, options, counts, day)
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        if templates is not None:
            templates |= {row.content.writing.chat_template for row in some if not isinstance(row.content.prompt, str)}
        yield encoder.examples(some)


def use_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Set the template of a config's tokens.chat_template: a known name, Jinja, or a file that holds it."""
    loaded = load_chat_template(template, "tokens.chat_template")
    if loaded is not None:
        tokenizer.chat_template = loaded


class _Encoder:
    """What the rows of a data set share."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TokensConfig, counts: Counts, day: date | None):
        self._tokenizer, self._options, self._counts, self._day = tokenizer, options, counts, day
        self._ends = EndTokens(tokenizer)
        self._bos = only_id(tokenizer.bos_token_id)
        self._adds_bos = self._bos is not None and self._bos in encode(tokenizer, "", special=True)[:1]

    def examples(self, rows: Sequence[SourceRow]) -> list[Example]:
        """The usable ones of these rows. One call of the tokenizer for all their texts."""
        keywords = self._options.chat_template_kwargs or {}
        rows = [replace(row, content=of_run(row.content, keywords, self._day)) for row in rows]
        self._counts.rows += len(rows)
        written, texts = [], []
        for row, text in zip(rows, write_all([row.content for row in rows], self._tokenizer)):
            if isinstance(text, RowError) and row.droppable:
                self._counts.refused += 1
            elif isinstance(text, RowError | UserError):
                raise UserError(f"{row.place}: {text}")
            else:
                written.append((row, 1 + len(text[1])))
                texts += [text[0], *text[1]]
        if not texts:
            return []
        encoded: Any = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        ids = iter(encoded["input_ids"])
        made = [self._example(row, [next(ids) for _ in range(many)]) for row, many in written]
        examples = [example for example in made if example is not None]
        self._counts.kept += len(examples)
        return examples

    def _example(self, row: SourceRow, encoded: list[Ids]) -> Example | None:
        content, counts = row.content, self._counts
        end = self._ends.of(content)
        prompt_ids, *full_ids = [self._with_bos(ids, force=isinstance(content.prompt, str)) for ids in encoded]
        shared = _common_prefix([prompt_ids, *full_ids])
        whole = prompt_ids[:shared]
        responses = [self._ends.ended(ids[shared:], end) for ids in full_ids]
        merged = len(prompt_ids) - shared
        counts.merged += merged > 0
        counts.foreign += end.foreign

        for name, ids in zip(content.responses, responses):
            if not ids or (len(ids) == 1 and ids[0] in end.known):
                return self._refuse(row, f"{name} is empty", "empty")
        if not whole:
            return self._refuse(row, "the prompt has no tokens", "promptless")
        fitted = self._fit(row, whole, responses)
        if fitted is None:
            return None
        prompt, completions = fitted
        if len(completions) == 2 and completions[0] == completions[1]:
            return self._refuse(row, "chosen and rejected are equal", "equal")
        origin = Origin(
            place=str(row.place),
            question=row.question[:_QUESTION],
            prompt_cut=len(whole) - len(prompt),
            completions_cut=tuple(len(ids) - len(left) for ids, left in zip(responses, completions)),
            merged=merged,
        )
        return Example(prompt, tuple(completions), content.label if isinstance(content, Unpaired) else None, origin)

    def _refuse(self, row: SourceRow, what: str, counter: str) -> None:
        if self._options.strict:
            raise UserError(f"{row.place}: {what}; mend the row, or set tokens.strict = false to drop such rows")
        setattr(self._counts, counter, getattr(self._counts, counter) + 1)

    def _with_bos(self, ids: Ids, *, force: bool) -> Ids:
        """One BOS at most: a second one goes; `force` adds one where the tokenizer would, as a template does."""
        bos = self._bos
        if bos is None or (bos not in ids[:1] and not (force and self._adds_bos)):
            return ids
        leading = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        return [bos, *ids[leading:]]

    def _fit(self, row: SourceRow, prompt: Ids, completions: list[Ids]) -> tuple[Ids, list[Ids]] | None:
        """Bring an over-long row within the limits: the prompt from the left first, then the responses."""
        options, counts = self._options, self._counts
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
            begins = prompt[:1] if prompt[0] == self._bos and keep > 1 else []
            prompt = begins + prompt[len(prompt) - keep + len(begins) :]
        room = options.max_length - len(prompt)
        if longest > room:
            counts.responses_cut += 1
            completions = [ids[:room] for ids in completions]
        return prompt, completions


def _common_prefix(sequences: list[Ids]) -> int:
    shortest = min(map(len, sequences))
    first = sequences[0]
    if all(ids[:shortest] == first[:shortest] for ids in sequences):  # the usual case, compared at once
        return shortest
    return next((i for i in range(shortest) if any(ids[i] != first[i] for ids in sequences)), shortest)
