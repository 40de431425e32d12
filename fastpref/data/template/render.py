"""Render messages as text with a chat template."""

import re
from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fastpref.data.rows.content import Message, RowContent, RowError, Writing
from fastpref.data.template.keywords import key_of, keywords_of, on_day
from fastpref.data.template.traits import for_template, template_of
from fastpref.errors import UserError

Written = tuple[str, list[str]]  # the text of the prompt, and of the prompt with each completion
# The exceptions with which a template refuses messages.
REFUSALS = (TemplateError, TypeError, ValueError, KeyError)
_DEVELOPER = re.compile(r"['\"]developer['\"]")


def write_all(
    contents: Sequence[RowContent], tokenizer: PreTrainedTokenizerBase
) -> list[Written | RowError | UserError]:
    """Write many rows, chats with one call of the template. Returns each row's text or the error of `write`."""
    together: dict[tuple[str | None, str], list[int]] = {}
    for at, content in enumerate(contents):
        template = content.writing.chat_template
        if not isinstance(content.prompt, str) and not content.writing.tools and (template or tokenizer.chat_template):
            together.setdefault(key_of(content.writing), []).append(at)
    written: dict[int, Written] = {}
    for places in together.values():
        try:
            written |= zip(places, _write_chats([contents[at] for at in places], tokenizer))
        except REFUSALS:  # write each row alone, to find the refused ones
            continue
    results: list[Written | RowError | UserError] = []
    for at, content in enumerate(contents):
        try:
            results.append(written[at] if at in written else write(content, tokenizer))
        except (RowError, UserError) as error:
            results.append(error)
    return results


def _write_chats(chats: Sequence[RowContent], tokenizer: PreTrainedTokenizerBase) -> list[Written]:
    """Write chats that share a template and its keywords and have no tools, with two calls of the template."""
    writing = chats[0].writing
    asked: list[list[Message]] = []  # prompts that the assistant is to answer
    others: list[list[Message]] = []
    for chat in chats:
        prompt: Any = chat.prompt
        (others if _answered(prompt) else asked).append(prompt)
        others += [[*prompt, *completion] for completion in _turns(chat)]
    to_answer = iter(_apply_all(tokenizer, asked, writing, generation_prompt=True))
    written = iter(_apply_all(tokenizer, others, writing, generation_prompt=False))
    return [
        (next(written if _answered(chat.prompt) else to_answer), [next(written) for _ in _turns(chat)])
        for chat in chats
    ]


def write(content: RowContent, tokenizer: PreTrainedTokenizerBase) -> Written:
    """Return the text of the prompt, and of the prompt with each completion.

    Text is joined, without a BOS before the completion. Messages are written by the chat template, the prompt with its
    generation prompt unless it ends with an assistant's turn. Raises RowError for rows that the template refuses,
    UserError if there is no template.
    """
    prompt = content.prompt
    if isinstance(prompt, str):
        bos = str(tokenizer.bos_token or "")
        return prompt, [prompt + _without(bos, str(completion)) for completion in content.by_name.values()]
    if template_of(tokenizer, content.writing) is None:
        raise UserError("the row is a chat, and the tokenizer has no chat template; set tokens.chat_template")
    try:
        alone = apply(tokenizer, prompt, content.writing, generation_prompt=not _answered(prompt))
        full = [apply(tokenizer, [*prompt, *completion], content.writing) for completion in _turns(content)]
    except REFUSALS as error:
        message = f"the chat template refuses this row: {error}{_hint(str(error).lower(), prompt, _turns(content))}"
        raise RowError(message, "refused by the chat template") from None
    return alone, full


def _hint(refusal: str, prompt: list[Message], completions: Sequence[list[Message]]) -> str:
    """Return a hint to add to a template's message: what to do, or the roles of the row."""
    if "system" in refusal:
        return "; put the words of its system turn into the first question"
    if "role" not in refusal:
        return ""
    roles = list(dict.fromkeys(", ".join(turn["role"] for turn in [*prompt, *turns]) for turns in completions))
    return f"; the roles of this row's turns are {' or '.join(roles)}"


def apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], writing: Writing, *, generation_prompt: bool = False
) -> str:
    return _apply_all(tokenizer, [messages], writing, generation_prompt=generation_prompt)[0]


def _apply_all(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]], writing: Writing, *, generation_prompt: bool
) -> list[str]:
    if not conversations:
        return []
    template = template_of(tokenizer, writing)
    assert template is not None
    conversations = [
        for_template([_as_known(message, template) for message in messages], tokenizer, writing)
        for messages in conversations
    ]
    tools: Any = list(writing.tools) if writing.tools else None
    with on_day(template, writing.day):
        if any("content" in turn and turn["content"] is None for messages in conversations for turn in messages):
            # apply_chat_template removes nulls, which these templates need.
            given: dict[str, Any] = {**tokenizer.special_tokens_map, **keywords_of(writing)}
            nulls: Any = render_jinja_template(
                conversations, tools=tools, chat_template=template, add_generation_prompt=generation_prompt, **given
            )
            return nulls[0]
        written: Any = tokenizer.apply_chat_template(
            conversations,
            tools=tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **keywords_of(writing),
        )
    return written


def _as_known(message: Message, template: str) -> Message:
    """Turn a developer message into a system message for a template that does not know developers."""
    unknown = message["role"] == "developer" and not _DEVELOPER.search(template)
    return {**message, "role": "system"} if unknown else message


def common(a: str, b: str) -> int:
    """Return the length of the longest common prefix of two texts."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _answered(prompt: Any) -> bool:
    """Return whether the prompt ends with an assistant turn, which the completion continues."""
    return prompt[-1]["role"] == "assistant"


def _turns(chat: RowContent) -> list[list[Message]]:
    return [completion for completion in chat.by_name.values() if isinstance(completion, list)]


def _without(bos: str, completion: str) -> str:
    while bos and completion.startswith(bos):
        completion = completion.removeprefix(bos)
    return completion
