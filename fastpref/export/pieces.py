"""Scores for a SentencePiece vocabulary that transformers holds as BPE merges.

llama.cpp joins the two neighbours whose joint text has the highest score, the first such two if there are several. BPE
joins the two that are first in its list of merges. Both give the same tokens if every two tokens whose joint text is a
token are in the list, and if the merges that make a token stand together in it. SentencePiece's own vocabularies are
so; a BPE that was trained otherwise is not, and is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastpref.errors import UserError

SPACE = "▁"
_UNLIKE = "tokenizer.json: llama.cpp would not make the same tokens of it: "


def scores(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], added: set[str]) -> dict[str, float]:
    """Return a score for each token that merges make. Raises UserError if scores cannot say what the merges say."""
    order: dict[str, float] = {}
    listed: set[tuple[str, str]] = set()
    last = None
    for pair in merges:
        joint = pair[0] + pair[1]
        if joint != last and joint in order:
            raise UserError(f"{_UNLIKE}the merges that make {joint!r} do not stand together")
        order.setdefault(joint, -float(len(order)))
        listed.add((pair[0], pair[1]))
        last = joint
    for token in vocabulary:
        if token in added:
            continue
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in vocabulary and right in vocabulary and (left, right) not in listed:
                raise UserError(f"{_UNLIKE}{left!r} and {right!r} would become {token!r}, which no merge does")
    return order


def space_prefix(tokenizer: Mapping[str, Any]) -> bool | None:
    """Return whether a space is put before a text and after each special token; None if only before a text.

    Raises UserError for a normalisation that llama.cpp does not do.
    """
    prefix: bool | None = False
    spaces = False
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        if step == {"type": "Prepend", "prepend": SPACE} and not spaces:
            prefix = True
        elif step.get("type") == "Replace" and step.get("content") == SPACE and step["pattern"] == {"String": " "}:
            spaces = True
        else:
            raise UserError(f"{_UNLIKE}its normalizer has a step {step.get('type')}")
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "Metaspace" and step.get("replacement") == SPACE and not step.get("split", True):
            spaces = True
            scheme = step.get("prepend_scheme", "always")
            prefix = None if scheme == "first" and not prefix else prefix or scheme == "always"
        elif not (kind == "Split" and step.get("pattern") == {"String": " "} and spaces):  # finds no space any more
            raise UserError(f"{_UNLIKE}its pre_tokenizer has a step {kind}")
    if not spaces:
        raise UserError(f"{_UNLIKE}it does not write spaces as {SPACE}")
    return prefix


def is_byte(token: str) -> bool:
    """Return whether a token stands for a byte, as <0x0A> does."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _steps(rule: Any, name: str) -> list[Mapping[str, Any]]:
    if rule is None:
        return []
    return list(rule[name]) if rule.get("type") == "Sequence" else [rule]
