"""`render`: the texts of one row before they are tokenised, for users who want to see what a format does."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastpref.data.rows.auto import Chat, detect
from fastpref.data.rows.columns import MARGIN, MISSING_COLUMN, WEIGHT, column
from fastpref.data.rows.content import Paired, Ranked, Row, RowContent, RowError, Unpaired, imitated
from fastpref.data.rows.formats import explained, find_format
from fastpref.data.rows.reading import Format
from fastpref.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    row: Row,
    format: str | Mapping[str, Any] = "auto",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    unpaired: bool = False,
    supervised: bool = False,
    chat: Chat = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Return a row's texts in a format: {"prompt", "chosen", "rejected"}, {"prompt", "completion", "label"} or, of a
    row with a list of completions, {"prompt", "completions", "scores"}; with "weight" and "margin" if the row has them.

    `format` and its `options` are those of [[data]] (docs/data.md). Formats that make messages need a `tokenizer` for
    its chat template; a completion is then the text after the part that it shares with the prompt, up to its end token.
    `chat` is that of [[data]]: true makes chats of plain text. `unpaired` reads single completions (KTO), where a
    format supports both, and `supervised` those that SFT imitates: {"prompt", "completion"}. Raises UserError for a row
    that is not of the format, or that SFT leaves out.
    """
    form = choose(row, _with(format, options), unpaired=unpaired or supervised, supervised=supervised, chat=chat)
    try:
        content = form.read(row)
        if supervised:
            content = imitated(content)
            if content is None:
                raise UserError("the row is labelled false, and SFT imitates those labelled true")
        elif isinstance(content, Unpaired) and content.label is None:
            column(row, form.label)  # which raises RowError, because it is not there
        if unpaired and isinstance(content, Paired):
            raise UserError("the row is a pair, two single completions for KTO; render it with unpaired=False")
        prompt, completions = _texts(content, tokenizer)
    except RowError as error:
        message = str(error)
        if error.kind == MISSING_COLUMN:
            message = explained(message, row, unpaired=unpaired, supervised=supervised, auto=format != "auto")
        raise UserError(message) from None
    texts: dict[str, Any] = {"prompt": prompt}
    if isinstance(content, Ranked):
        texts |= {"completions": completions, "scores": list(content.scores)}
    else:
        texts |= zip(content.by_name, completions)
    others = {name: getattr(content, name, None) for name in ("label", WEIGHT, MARGIN)}
    return texts | {name: value for name, value in others.items() if value is not None}


def choose(
    row: Row, format: str | Mapping[str, Any], *, unpaired: bool, supervised: bool = False, chat: Chat = "auto"
) -> Format:
    """Return the named format, or the one that fits the row's columns. Raises UserError if there is none."""
    try:
        form = find_format(format, unpaired=unpaired, supervised=supervised, chat=chat)
        form = form or detect(row, supervised=supervised, chat=chat)
    except ValueError as error:  # RowError is a ValueError
        raise UserError(str(error)) from None
    if form is None:
        message = f"the columns {', '.join(map(str, row))} are of no format that auto knows"
        raise UserError(explained(message, row, unpaired=unpaired, supervised=supervised))
    return form


def _with(format: str | Mapping[str, Any], options: Mapping[str, Any]) -> str | Mapping[str, Any]:
    if not options:
        return format
    return {**({"type": format} if isinstance(format, str) else format), **options}


def _texts(content: RowContent, tokenizer: "PreTrainedTokenizerBase | None") -> tuple[str, list[str]]:
    if isinstance(content.prompt, str):
        return content.prompt, [str(completion) for completion in content.by_name.values()]
    if tokenizer is None:
        raise UserError("the row is a chat; give the tokenizer whose chat template writes it, tokenizer=...")
    from fastpref.data.template.render import common, write

    prompt, full = write(content, tokenizer)
    shared = min(common(prompt, text) for text in full)
    special = [str(token) for token in (*tokenizer.added_tokens_decoder.values(), *tokenizer.all_special_tokens)]
    return prompt[:shared], [_to_end(text[shared:], tuple(special)) for text in full]


def _to_end(completion: str, special: tuple[str, ...]) -> str:
    """Remove the line end that a template writes after the end token."""
    stripped = completion.rstrip()
    return stripped if special and stripped.endswith(special) else completion
