"""Tokenise prompts and completions. A completion begins where its tokens first differ from those of the prompt."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastpref.config import TokensConfig
from fastpref.data.example import Counts, Example, Ids, Origin, Spans
from fastpref.data.left_out import (
    Piece,
    SpecialWords,
    completion_pieces,
    left_out,
    plain,
    prompt_pieces,
    says_something,
    tool_names,
)  # fmt: skip
from fastpref.data.lengths import cut, kept_completion, kept_prompt
from fastpref.data.rows.content import Message, Paired, Ranked, RowContent, RowError, Unpaired, Writing
from fastpref.data.sources import SourceRow
from fastpref.data.template.ends import EndTokens, encode, only_id
from fastpref.data.template.keywords import key_of, of_run
from fastpref.data.template.named import load_chat_template
from fastpref.data.template.render import REFUSALS, Written, apply, write, write_all
from fastpref.data.turns import TextSpans, contexts, exchanges, without_oldest
from fastpref.errors import UserError

BATCH = 1000  # rows that are rendered and tokenised at once
_QUESTION = 500  # characters of a question that its example keeps


def tokenize_batches(
    rows: Sequence[SourceRow],
    tokenizer: PreTrainedTokenizerBase,
    options: TokensConfig,
    counts: Counts,
    day: date | None,
    templates: set[str | None],
) -> Iterator[list[Example]]:
    """Yield the examples of every usable row, some rows at a time, and add the cut and dropped ones to `counts`.

    A prompt's tokens are the longest common prefix of the tokens of the prompt and of the prompt with each completion,
    so a token that reaches across the boundary belongs to the completion. A completion ends with the end-of-turn token
    exactly once. Chat templates that write the date write `day` (None: today). The chat templates of the rows are added
    to `templates`, with None for the tokenizer's own. Raises UserError naming a row that the template refuses, or one
    that `options` make an error.
    """
    encoder = _Encoder(tokenizer, options, counts, day)
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        templates |= {encoder.own_template(row) for row in some if not isinstance(row.content.prompt, str)}
        yield encoder.examples(some)


def use_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Set the chat template of tokens.chat_template: a known name, Jinja, or a file of it."""
    loaded = load_chat_template(template, "tokens.chat_template")
    if loaded is not None:
        tokenizer.chat_template = loaded


@dataclass(frozen=True)
class _Draft:
    """The texts of a row before they are encoded."""

    row: SourceRow
    texts: list[str]
    """The prompt, the prompt with each completion, and each of those up to every boundary of an unscored span."""
    spans: list[TextSpans]  # the unscored spans of each completion
    missing: dict[str, list[Piece]]  # what the template leaves out of "prompt" and of each completion
    unwritten: str | None = None  # a completion that the template leaves out altogether
    turns_cut: int = 0
    whole: int | None = None  # tokens of the prompt before its oldest turns were removed


class _Encoder:
    """Encodes the rows of one data set."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TokensConfig, counts: Counts, day: date | None):
        self._tokenizer, self._options, self._counts, self._day = tokenizer, options, counts, day
        self._ends = EndTokens(tokenizer)
        self._bos = only_id(tokenizer.bos_token_id)
        self._adds_bos = self._bos is not None and self._bos in encode(tokenizer, "", special=True)[:1]
        self._specials = SpecialWords(tokenizer)
        self._writes_tools: set[Any] = set()  # keys of writings whose template is known to write the tools

    def examples(self, rows: Sequence[SourceRow]) -> list[Example]:
        """Encode rows with one call of the tokenizer. Returns the examples of the usable ones."""
        keywords = self._options.chat_template_kwargs or {}
        rows = [replace(row, content=of_run(row.content, keywords, self._day)) for row in rows]
        self._counts.rows += len(rows)
        rows = [row for row in rows if self._says_something(row)]
        drafts = []
        for row, text in zip(rows, write_all([row.content for row in rows], self._tokenizer)):
            try:
                if isinstance(text, RowError | UserError):
                    raise text
                drafts.append(self._checked(self._draft(row, text)))
            except RowError as error:
                if not row.droppable:
                    raise UserError(f"{row.place}: {error}") from None
                self._counts.refused += 1
            except UserError as error:
                raise UserError(f"{row.place}: {error}") from None
        results = [self._example(*parts) for parts in zip(drafts, self._encoded(drafts))]
        examples = [example for example in results if example is not None]
        self._counts.kept += len(examples)
        return examples

    def own_template(self, row: SourceRow) -> str | None:
        """Return the chat template that writes a row if it is not the tokenizer's, else None."""
        writing = row.content.writing
        return writing.chat_template or (None if self._tokenizer.chat_template else writing.without_template)

    # --- texts ---------------------------------------------------------------------------------------------------

    def _says_something(self, row: SourceRow) -> bool:
        """Return whether no assistant turn of a completion is empty. Text that the template adds does not count."""
        ends = self._ends.texts(self._ends.of(row.content))
        for name, completion in row.content.by_name.items():
            turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            own = [turn for turn in turns if turn["role"] == "assistant"]
            if not own or not all(says_something(turn, ends) for turn in own):
                self._refuse(row, f"{name} is empty", "empty")
                return False
        return True

    def _draft(self, row: SourceRow, text: Written) -> _Draft:
        content, (alone, full) = row.content, text
        spans: list[TextSpans] = [[] for _ in full]
        if not isinstance(content.prompt, str) and self._options.score == "assistant":
            completions = [completion for completion in content.by_name.values() if isinstance(completion, list)]
            spans = [
                contexts(self._tokenizer, content.writing, content.prompt, completion, whole)
                for completion, whole in zip(completions, full)
            ]
        until = [whole[:place] for whole, of in zip(full, spans) for span in of for place in span]
        return _Draft(row, [alone, *full, *until], spans, {})

    def _checked(self, draft: _Draft) -> _Draft:
        """Record and count the words that the template leaves out. Raises RowError if it leaves out all tools."""
        content, (alone, *full) = draft.row.content, draft.texts
        prompt, writing = content.prompt, content.writing
        if isinstance(prompt, str):
            return draft
        asked = prompt_pieces(prompt, writing.tools)
        missing = {"prompt": left_out(asked, alone)}
        unwritten = None
        special = next(filter(None, map(self._specials.find, asked)), None)
        for (name, completion), text in zip(content.by_name.items(), full):
            assert not isinstance(completion, str)
            pieces = completion_pieces(completion, name)
            special = special or self._special_in_completion(content, pieces, completion_pieces(completion[-1:], name))
            missing[name] = left_out(pieces, text, alone)
            if missing[name] and len(missing[name]) == len(
                {plain(piece.words) for piece in pieces if plain(piece.words)}
            ):
                unwritten = unwritten or name
        if writing.tools and (names := tool_names(writing.tools)):
            self._check_tools(prompt, writing, names, alone, len(missing["prompt"]))
        if special:
            self._counts.special += 1
            self._counts.special_first = self._counts.special_first or f"{draft.row.place}: {special}"
        pieces = [piece for parts in missing.values() for piece in parts]
        if pieces:
            self._counts.left_out += 1
            self._counts.left_out_first = self._counts.left_out_first or f"{draft.row.place}: {pieces[0]}"
        return replace(draft, missing=missing, unwritten=unwritten)

    def _special_in_completion(self, content: RowContent, pieces: Sequence[Piece], last: Sequence[Piece]) -> str | None:
        """Return a special token in a completion's words, except end tokens at the end of its last turn, or None."""
        for piece in pieces:
            if special := self._specials.find(piece):
                if piece not in last:
                    return special
                ends = self._ends.texts(self._ends.of(content))
                words = piece.words.rstrip()
                while end := next((end for end in ends if end and words.endswith(end)), ""):
                    words = words.removesuffix(end).rstrip()
                if special := self._specials.find(replace(piece, words=words)):
                    return special
        return None

    def _check_tools(self, prompt: list[Message], writing: Writing, names: list[str], text: str, missing: int) -> None:
        """Raise RowError if the template writes the same with and without the tools."""
        key = key_of(writing)
        if key in self._writes_tools and not missing:
            return
        asks = prompt[-1]["role"] != "assistant"
        bare = apply(self._tokenizer, prompt, replace(writing, tools=None), generation_prompt=asks)
        if bare == text:
            raise RowError(
                f"the chat template leaves out the tools ({', '.join(names[:3])}{', …' * (len(names) > 3)}); take a "
                "model or tokens.chat_template that writes them, or rows without tools",
                "refused by the chat template",
            )
        self._writes_tools.add(key)

    # --- tokens --------------------------------------------------------------------------------------------------

    def _encoded(self, drafts: Sequence[_Draft]) -> list[list[Ids]]:
        texts = [text for draft in drafts for text in draft.texts]
        if not texts:
            return []
        encoded: Any = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        ids = iter(encoded["input_ids"])
        return [[next(ids) for _ in draft.texts] for draft in drafts]

    def _example(self, draft: _Draft, encoded: list[Ids]) -> Example | None:
        row, content, counts = draft.row, draft.row.content, self._counts
        text = isinstance(content.prompt, str)
        end = self._ends.of(content)
        prompt_ids, *full_ids = [self._with_bos(ids, force=text) for ids in encoded]
        full_ids, until = full_ids[: len(draft.spans)], full_ids[len(draft.spans) :]
        shared = _common_prefix([prompt_ids, *full_ids])
        whole = prompt_ids[:shared]
        completions = [ids[shared:] for ids in full_ids]
        ends = [self._ends.of_completion(end, *parts) for parts in zip(content.by_name.values(), completions)]
        completions = [self._ends.ended(ids, own) for ids, own in zip(completions, ends)]
        alone, *full = draft.texts[: 1 + len(draft.spans)]
        follows = all(written.startswith(alone) for written in full)
        merged = len(prompt_ids) - shared if follows else 0

        for name, ids, own in zip(content.by_name, completions, ends):
            if not ids or (len(ids) == 1 and ids[0] in own.known):
                if not draft.missing.get(name):
                    return self._refuse(row, f"{name} is empty", "empty")
                return self._refuse_unwritten(draft, name)
        if draft.unwritten:
            return self._refuse_unwritten(draft, draft.unwritten)
        if not whole:
            return self._refuse(row, "the prompt has no tokens", "promptless")
        if equal := _equal(completions, content):
            lost = [name for name in content.by_name if draft.missing.get(name)]
            return self._refuse_unwritten(draft, lost[0]) if lost else self._refuse(row, equal, "equal")

        room = self._room(draft, whole, max(map(len, completions)))
        if isinstance(room, _Draft):
            return self._example(room, *self._encoded([room]))
        if room is None:
            return None
        prompt = self._end_of(whole, room)
        placed = [
            self._contexts(spans, ids, until, shared, len(of))
            for spans, ids, of in zip(draft.spans, full_ids, completions)
        ]
        fitted = [cut(*parts, self._options.max_length - len(prompt)) for parts in zip(completions, placed)]
        kept, spans = [ids for ids, _ in fitted], tuple(context for _, context in fitted)
        lost = tuple(len(ids) - len(left) for ids, left in zip(completions, kept))
        if equal := _equal(kept, content):
            return self._refuse(row, f"{equal} once cut to tokens.max_length", "overlong")
        origin = Origin(
            place=str(row.place),
            question=row.question[:_QUESTION],
            prompt_cut=(draft.whole or len(whole)) - len(prompt),
            turns_cut=draft.turns_cut,
            completions_cut=lost,
            merged=merged,
        )
        label = content.label if isinstance(content, Unpaired) else None
        example = Example(
            prompt,
            tuple(kept),
            label,
            origin,
            spans if any(spans) else (),
            scores=content.scores if isinstance(content, Ranked) else (),
            weight=1.0 if content.weight is None else content.weight,
            margin=content.margin if isinstance(content, Paired) else None,
        )
        if not all(map(example.scored, range(len(kept)))):
            return self._refuse(row, "nothing scored is left of a completion cut to tokens.max_length", "overlong")
        counts.merged += merged > 0
        counts.departed += not follows
        counts.foreign += end.foreign
        counts.turns_cut += draft.turns_cut > 0
        counts.prompts_cut += len(prompt) < len(whole)
        counts.completions_cut += any(lost)
        if len(prompt) < len(whole) / 4:
            counts.prompts_lost += 1
            counts.prompts_lost_first = counts.prompts_lost_first or str(row.place)
        return example

    def _contexts(self, spans: TextSpans, full: Ids, until: list[Ids], shared: int, many: int) -> Spans:
        """Convert spans of a completion's text to spans of its tokens. A token that crosses a span's end is scored.

        `until` holds the tokens of the text up to each boundary; those of this completion are removed from its front.
        """
        places = [_common_prefix([until.pop(0), full]) - shared for span in spans for _ in span]
        inside = [min(max(0, place), many - 1) for place in places]
        return tuple((a, b) for a, b in zip(inside[::2], inside[1::2]) if a < b)

    def _refuse(self, row: SourceRow, what: str, counter: str) -> None:
        if self._options.strict:
            raise UserError(f"{row.place}: {what}; mend the row, or set tokens.strict = false to drop such rows")
        setattr(self._counts, counter, getattr(self._counts, counter) + 1)

    def _refuse_unwritten(self, draft: _Draft, name: str) -> None:
        pieces = draft.missing[name]
        self._refuse(draft.row, f"the chat template leaves out what {name} says: {pieces[0]}", "unwritten")

    def _with_bos(self, ids: Ids, *, force: bool) -> Ids:
        """Remove a second BOS. With `force`, add one if the tokenizer would, as a template does."""
        bos = self._bos
        if bos is None or (bos not in ids[:1] and not (force and self._adds_bos)):
            return ids
        leading = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        return [bos, *ids[leading:]]

    # --- lengths -------------------------------------------------------------------------------------------------

    def _room(self, draft: _Draft, prompt: Ids, longest: int) -> "int | _Draft | None":
        """Return how many tokens of the prompt to keep, or the row without its oldest turns, or None to drop it."""
        options, row = self._options, draft.row
        most = min(options.max_prompt_length or options.max_length, options.max_length)
        if len(prompt) <= most and len(prompt) + longest <= options.max_length:
            return len(prompt)
        if options.overlong == "error":
            raise UserError(
                f"{row.place}: {len(prompt)} prompt and {longest} completion tokens, more than tokens.max_length = "
                f"{options.max_length} or max_prompt_length allows"
            )
        if options.overlong == "drop":
            self._counts.overlong += 1
            return None
        limit = min(most, max(kept_prompt(options.max_length), options.max_length - longest))
        if len(prompt) <= limit or isinstance(row.content.prompt, str):
            return min(limit, len(prompt))
        if draft.turns_cut == 0 and (shorter := self._without_oldest(draft, row.content.prompt, limit, len(prompt))):
            return shorter
        if len(prompt) <= min(most, options.max_length - kept_completion(options.max_length, longest)):
            return len(prompt)
        self._counts.unasked_first = self._counts.unasked_first or f"{row.place}, {len(prompt):,} tokens"
        return self._refuse(row, "its question is longer than tokens.max_length leaves room for", "unasked")

    def _without_oldest(self, draft: _Draft, prompt: list[Message], limit: int, whole: int) -> _Draft | None:
        """Return the row without as many of its oldest exchanges as it takes to fit, or None if it has only one."""
        content, many = draft.row.content, len(exchanges(prompt)) - 1
        if many < 1:
            return None

        def fits(dropped: int) -> bool:
            left = without_oldest(prompt, dropped)
            asks = left[-1]["role"] != "assistant"
            return (
                len(encode(self._tokenizer, apply(self._tokenizer, left, content.writing, generation_prompt=asks)))
                <= limit
            )

        try:
            dropped = 1 + bisect_left(range(1, many), True, key=fits)
            left = without_oldest(prompt, dropped)
            row = replace(draft.row, content=replace(content, prompt=left))
            shorter = self._draft(row, write(row.content, self._tokenizer))
        except REFUSALS:  # the template may refuse a conversation without its beginning
            return None
        return replace(
            shorter, missing=draft.missing, unwritten=draft.unwritten, turns_cut=len(prompt) - len(left), whole=whole
        )

    def _end_of(self, prompt: Ids, keep: int) -> Ids:
        """Return the last tokens of a prompt, after its BOS if it has one and there is room."""
        if keep >= len(prompt):
            return prompt
        begins = prompt[:1] if prompt[0] == self._bos and keep > 1 else []
        return begins + prompt[len(prompt) - keep + len(begins) :]


def _equal(completions: Sequence[Ids], content: RowContent) -> str | None:
    """Return which two completions of a row have the same tokens, in words, or None."""
    names: dict[tuple[int, ...], str] = {}
    for name, ids in zip(content.by_name, completions):
        if (other := names.setdefault(tuple(ids), name)) != name:
            return f"{other} and {name} are equal"
    return None


def _common_prefix(sequences: list[Ids]) -> int:
    shortest = min(map(len, sequences))
    first = sequences[0]
    if all(ids[:shortest] == first[:shortest] for ids in sequences):  # the usual case, compared at once
        return shortest
    return next((i for i in range(shortest) if any(ids[i] != first[i] for ids in sequences)), shortest)
