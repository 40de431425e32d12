"""Check the keywords that users give to a chat template."""

import math
from collections.abc import Mapping
from typing import Any

_TAKEN = {  # arguments of `apply_chat_template` itself
    "self", "conversation", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "kwargs",
}  # fmt: skip
_GIVEN = {  # variables that it passes to the template
    "messages", "strftime_now", "raise_exception", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token",
    "cls_token", "mask_token",
}  # fmt: skip
RESERVED = frozenset(_TAKEN | _GIVEN)
"""Names that no keyword can have, because the row, the tokenizer or the rendering sets them."""


def check_keywords(keywords: Mapping[str, Any]) -> None:
    """Raise ValueError for a reserved name, or a value that JSON cannot hold."""
    for name, value in keywords.items():
        if name in RESERVED:
            raise ValueError(f"{name} is no keyword that can be set: it is filled for every row")
        if not _is_json(value):
            raise ValueError(f"{name} must be true, false, a number, text, a list or a table, got {value!r}")


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_json(inner) for name, inner in value.items())
    return isinstance(value, bool | int | str) or value is None or (isinstance(value, float) and math.isfinite(value))
