"""Rules on the answers to held-out prompts, before and after the training."""

import re
import unicodedata
from collections import Counter
from itertools import pairwise

from fastpref.health.rule import UNASKED, Known, Unasked, Verdict, percent, rule
from fastpref.run.history import History

SEVERAL = 3  # answers that say something about a model; one or two may repeat themselves in a healthy one
_UNITS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|([^\w\s])\1*")  # CJK characters, words, signs


@rule("answers_repeat")
def _answers_repeat(h: History, known: Known) -> Verdict | Unasked | None:
    """Find answers that say the same words again and again, which they did not do before."""
    if not known.answers:
        return UNASKED
    before, after = (_mean(list(map(repetition, side))) for side in zip(*known.answers))
    several = len(known.answers) >= SEVERAL
    if after < (0.3 if several else 0.5) or after - before < 0.2:
        return None
    return Verdict(
        f"{_answered(known)} {'repeat themselves' if len(known.answers) > 1 else 'repeats itself'}: {percent(after)} "
        f"of the pairs of words were there before in the same answer, and {percent(before)} before the training.",
        f"Train for fewer steps, or use {known.smaller_rate(3)}."
        if several
        else f"Read more answers, with eval.samples={SEVERAL + 2}; if they repeat too, train for fewer steps, or use "
        f"{known.smaller_rate(3)}.",
        (0, h.step),
        {"repeated before": before, "repeated after": after},
        "alarm" if several else "warning",
    )


@rule("answers_length")
def _answers_length(h: History, known: Known) -> Verdict | Unasked | None:
    """Find answers that are empty, or far shorter or longer than before, and than the completions that are learnt."""
    if not known.answers:
        return UNASKED
    before, after = (_mean([len(_units(text)) for text in side]) for side in zip(*known.answers))
    shorter, longer = before >= 6 and after <= before / 3, after >= 20 and after >= 3 * before
    if known.lengths is not None and after >= 1:  # a word is a token or more
        shorter, longer = shorter and after < known.lengths[0] / 2, longer and after > known.lengths[1]
    if not (shorter or longer):
        return None
    has = "has" if len(known.answers) == 1 else "have"
    message = f"{_answered(known)} {has} {after:.0f} words and signs, and {before:.0f} before the training."
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
    """Find answers in another script than before and than the prompts, or of characters that no text has."""
    before, after = (_scripts(" ".join(side)) for side in zip(*known.answers)) if known.answers else ({}, {})
    if sum(before.values()) < 10 or sum(after.values()) < 10:
        return UNASKED
    known_before = sorted((before.keys() | _scripts(" ".join(known.asked)).keys()) - {_BROKEN})
    kept = sum(after[script] for script in known_before) / sum(after.values())
    if kept > 0.7:
        return None
    return Verdict(
        f"only {percent(kept)} of the letters in the answers to held-out prompts are of a script that the prompts, or "
        f"the answers before the training, had ({', '.join(known_before).lower() or 'none'}).",
        "Read the answers in the report and some rows with `fastpref preview`; if the data are in the wanted language, "
        f"train for fewer steps, or use {known.smaller_rate(3)}.",
        (0, h.step),
        {"share of letters": kept},
    )


_BROKEN = "REPLACEMENT"


def repetition(text: str) -> float:
    """Return the share of the pairs of neighbouring words that were there before in the same text."""
    pairs = list(pairwise(_units(text.lower())))
    return 1 - len(set(pairs)) / len(pairs) if len(pairs) >= 8 else 0.0


def _units(text: str) -> list[str]:
    """Return the words of a text, its signs, of which a run of the same is one, and single CJK characters.

    Marks that belong to letters, as the vowels of Hindi and Thai, are left out, so that they do not divide words.
    """
    letters = "".join(c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c)[0] != "M")
    return [unit.group() for unit in _UNITS.finditer(letters)]


def _answered(known: Known) -> str:
    """Return the subject of a sentence on the answers, of which one alone proves little."""
    count = len(known.answers)
    return "the one answer to a held-out prompt" if count == 1 else f"the {count} answers to held-out prompts"


def _scripts(text: str) -> Counter[str]:
    """Count the letters of each script, by the first word of their names in Unicode, and broken characters."""
    letters = (c for c in text if c.isalpha() or c == "\ufffd")
    return Counter(unicodedata.name(letter, _BROKEN).split()[0] for letter in letters)


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values)
