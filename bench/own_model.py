"""The rows of a file of pairs, short enough for a length, for the runs of `bench.health` with a model of your own."""

import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from bench.faults import Row
from fastpref.config.data import DataConfig
from fastpref.config.model import ModelConfig
from fastpref.data.opening import open_records
from fastpref.data.rows.auto import detect
from fastpref.data.rows.content import Content, Paired, RowError
from fastpref.errors import UserError

HELDOUT = 0.2  # the share of the rows that is held out
FEWEST = 40  # rows
_SENTENCE = re.compile(r".+?(?:[.!?。!?](?=\s|$)|\n|$)\s*", re.DOTALL)
Count = Callable[[str], int]  # returns the number of tokens of a text


def short_rows(model: Path, data: Path, length: int, *, capitals: bool = False) -> tuple[list[Row], list[Row]]:
    """Return training and held-out rows of a file of pairs as `prompt`, `chosen` and `rejected`, each a list of turns.

    A prompt, and each completion, has at most 3/8 of `length` in tokens; the rest is for the chat template. Of a longer
    prompt its last turn is taken, and of a longer completion its first sentences. Rows for which that is not enough,
    and those whose sides are equal then, are left out. With `capitals` the rejected side is the chosen one in capitals,
    a preference that a few steps learn. Raises UserError if fewer than 40 rows are left.
    """
    from fastpref.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name=str(model)))
    most = 3 * length // 8
    records = open_records(DataConfig(path=str(data)))

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    rows = [_short(records[at], count, most, capitals=capitals) for at in range(len(records))]
    kept = list({str(row["prompt"]): row for row in rows if row is not None}.values())
    if len(kept) < FEWEST:
        raise UserError(
            f"{data}: {len(kept)} of {len(records)} rows are pairs whose question and first sentences have at most "
            f"{most} tokens each, and {FEWEST} are needed; use a larger --length or another file"
        )
    Random(0).shuffle(kept)
    heldout = round(HELDOUT * len(kept))
    return kept[heldout:], kept[:heldout]


def _short(record: dict[str, Any], count: Count, most: int, *, capitals: bool) -> Row | None:
    try:
        form = detect(record, chat=True)
        row = form.read(record) if form is not None else None
    except RowError:
        return None
    if not isinstance(row, Paired):
        return None
    prompt = _spoken(row.prompt)
    if prompt is None:
        return None
    if sum(count(turn["content"]) for turn in prompt) > most:
        prompt = prompt[-1:]
    sides = (row.chosen, _in_capitals(row.chosen) if capitals else row.rejected)
    chosen, rejected = (_first_sentences(side, count, most) for side in sides)
    if count(prompt[-1]["content"]) > most or not chosen or not rejected or chosen == rejected:
        return None
    return {"prompt": prompt, "chosen": _said(chosen), "rejected": _said(rejected)}


def _spoken(content: Content) -> list[dict[str, str]] | None:
    """Return the turns with their words alone; None for text, or turns that have other parts."""
    if isinstance(content, str) or not content or any(not isinstance(turn.get("content"), str) for turn in content):
        return None
    return [{"role": turn["role"], "content": turn["content"]} for turn in content]


def _in_capitals(content: Content) -> Content:
    turns = _spoken(content)
    return content if turns is None else [turn | {"content": turn["content"].upper()} for turn in turns]


def _first_sentences(side: Content, count: Count, most: int) -> str:
    """Return as many whole sentences of a completion of one turn as have at most so many tokens; "" for none."""
    turns = _spoken(side)
    if turns is None or len(turns) != 1:
        return ""
    kept = ""
    for sentence in _SENTENCE.findall(turns[0]["content"]):
        if count(kept + sentence) > most:
            break
        kept += sentence
    return kept.strip()


def _said(words: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": words}]
