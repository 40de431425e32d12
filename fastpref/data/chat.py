"""From messages to the text that a chat template makes of them."""

from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from fastpref.data.content import Message, Paired, RowError, Unpaired, Writing
from fastpref.errors import UserError


def write(content: Paired | Unpaired, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """The text of the prompt, and of the prompt with each response.

    Text is joined, without a BOS before the response. Messages are written by the chat template, the prompt with its
    generation prompt, unless the response goes on after an assistant's turn. Raises RowError for what the template
    refuses, UserError if there is none.
    """
    prompt = content.prompt
    if isinstance(prompt, str):
        bos = str(tokenizer.bos_token or "")
        return prompt, [prompt + _without(bos, str(response)) for response in content.responses.values()]
    if not (content.writing.chat_template or tokenizer.chat_template):
        raise UserError("the row is a chat, and the tokenizer has no chat template; set tokens.chat_template")
    answered = prompt[-1]["role"] == "assistant"
    try:
        alone = apply(tokenizer, prompt, content.writing, generation_prompt=not answered)
        full = [
            apply(tokenizer, [*prompt, *response], content.writing)
            for response in content.responses.values()
            if isinstance(response, list)
        ]
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise RowError(f"the chat template refuses this row: {error}", "refused by the chat template") from None
    return alone, full


def apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], writing: Writing, *, generation_prompt: bool = False
) -> str:
    tools: Any = list(writing.tools) if writing.tools else None
    written = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=writing.chat_template,
        tokenize=False,
        add_generation_prompt=generation_prompt,
    )
    return str(written)


def _without(bos: str, response: str) -> str:
    while bos and response.startswith(bos):
        response = response.removeprefix(bos)
    return response
