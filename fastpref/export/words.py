"""llama.cpp's names for the rules by which BPE tokenizers divide text into words (`tokenizer.ggml.pre`).

A rule is recognised by what tokenizer.json says, not by what a tokenizer does to a sample: two rules that agree on a
sample may differ elsewhere, and a wrong name gives other tokens without any message.
"""

from collections.abc import Mapping
from typing import Any

from fastpref.errors import UserError

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_QWEN35 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_CASED}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (what divides the text, whether a word that is a token needs no merges) → the name. Each name also sets in llama.cpp
# whether BOS is added, which the file says explicitly.
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
}


def word_rule(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the rule of a tokenizer.json. Raises UserError if none is known to be the same."""
    parts = _parts(tokenizer.get("pre_tokenizer"))
    whole = bool(tokenizer["model"].get("ignore_merges"))
    name = None if parts is None else _NAMES.get((parts, whole))
    if name is None:
        raise UserError(
            "tokenizer.json: its pre_tokenizer is none of those for which llama.cpp has a rule that is known to be the "
            f"same ({', '.join(_NAMES.values())}), and another rule would give other tokens without any message"
        )
    return name


def _parts(rule: Any) -> tuple[str, ...] | None:
    """Return what divides the text: regular expressions, "digits" and "words" (those of GPT-2), or None if unknown."""
    if not isinstance(rule, Mapping):
        return None
    kind = rule.get("type")
    if kind == "Sequence":
        inner = [_parts(part) for part in rule["pretokenizers"]]
        return None if any(part is None for part in inner) else tuple(word for part in inner for word in part or ())
    if kind == "ByteLevel" and not rule.get("add_prefix_space", True):
        return ("words",) if rule.get("use_regex", True) else ()
    if kind == "Digits" and rule.get("individual_digits"):
        return ("digits",)
    if kind == "Split" and rule.get("behavior") == "Isolated" and not rule.get("invert"):
        pattern = rule.get("pattern") or {}
        return (str(pattern["Regex"]),) if "Regex" in pattern else None
    return None


def is_last_bytes(rule: Any) -> bool:
    """Return whether a rule ends by writing bytes as letters, as GPT-2 does and llama.cpp's BPE expects."""
    while isinstance(rule, Mapping) and rule.get("type") == "Sequence":
        rule = rule["pretokenizers"][-1] if rule["pretokenizers"] else None
    return isinstance(rule, Mapping) and rule.get("type") == "ByteLevel"
