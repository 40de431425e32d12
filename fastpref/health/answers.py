"""Rules on the answers to held-out prompts, before and after the training."""

import re
import unicodedata
from collections import Counter
from itertools import pairwise

from fastpref.health.rule import UNASKED, Known, Unasked, Verdict, percent, rule
from fastpref.run.history import History

_UNITS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[^\w\s]")  # words, signs, CJK characters


@rule("answers_repeat")
def _answers_repeat(h: History, known: Known) -> Verdict | Unasked | None:
    """Find answers that say the same words again and again, which they did not do before."""
    if not known.answers:
        return UNASKED
    before, after = (_mean(list(map(repetition, side))) for side in zip(*known.answers))
    if after < 0.3 or after - before < 0.2:
        return None
    return Verdict(
        f"the answers to held-out prompts repeat themselves: {percent(after)} of their pairs of words have been said "
        f"before in the same answer, and {percent(before)} before the training.",
        f"Train for fewer steps, or use {known.smaller_rate(3)}.",
        (0, h.step),
        {"repeated before": before, "repeated after": after},
        "alarm",
    )


@rule("answers_length")
def _answers_length(h: History, known: Known) -> Verdict | Unasked | None:
    """Find answers that are empty, or far shorter or longer than before."""
    if not known.answers:
        return UNASKED
    before, after = (_mean([len(_UNITS.findall(text)) for text in side]) for side in zip(*known.answers))
    shorter, longer = before >= 6 and after <= before / 3, after >= 20 and after >= 3 * before
    if not (shorter or longer):
        return None
    message = f"the answers to held-out prompts have {after:.0f} words and signs, and {before:.0f} before the training."
    return Verdict(
        message if after >= 1 else "the model answers held-out prompts with nothing.",
        "Compare the lengths of both sides in `fastpref preview`, and read the answers in the report; if they are "
        f"worse, train for fewer steps or use {known.smaller_rate(3)}.",
        (0, h.step),
        {"words before": before, "words after": after},
        "warning" if after >= 1 else "alarm",
    )


@rule("answers_language")
def _answers_language(h: History, known: Known) -> Verdict | Unasked | None:
    """Find answers in another script than before, or of characters that no text has."""
    before, after = (_scripts(" ".join(side)) for side in zip(*known.answers)) if known.answers else ({}, {})
    if sum(before.values()) < 10 or sum(after.values()) < 10:
        return UNASKED
    kept = sum(after[script] for script in before if script != _BROKEN) / sum(after.values())
    if kept > 0.7:
        return None
    return Verdict(
        f"only {percent(kept)} of the letters in the answers to held-out prompts are of a script that the answers "
        f"before the training had ({', '.join(sorted(before)).lower()}).",
        "Read the answers in the report and some rows with `fastpref preview`; if the data are in the wanted language, "
        f"train for fewer steps, or use {known.smaller_rate(3)}.",
        (0, h.step),
        {"share of letters": kept},
    )


_BROKEN = "REPLACEMENT"


def repetition(text: str) -> float:
    """Return the share of the pairs of neighbouring words that were there before in the same text."""
    units = _UNITS.findall(text.lower())
    pairs = list(pairwise(units))
    return 1 - len(set(pairs)) / len(pairs) if len(pairs) >= 8 else 0.0


def _scripts(text: str) -> Counter[str]:
    """Count the letters of each script, by the first word of their names in Unicode, and broken characters."""
    letters = (c for c in text if c.isalpha() or c == "\ufffd")
    return Counter(unicodedata.name(letter, _BROKEN).split()[0] for letter in letters)


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values)
