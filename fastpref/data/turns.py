"""Find the unscored turns of a completion in its rendered text, and remove the oldest turns of a prompt."""

from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from fastpref.data.rows.content import Message, RowError, Writing
from fastpref.data.rows.messages import SYSTEM_ROLES, is_trained, untrained
from fastpref.data.template.render import REFUSALS, apply, common

_MARK = "\ue000fastpref\ue001"  # private-use characters, which no data set has at the end of a turn
TextSpans = list[tuple[int, int]]
_Write = Callable[..., str]  # writes messages with the chat template of a row


def contexts(
    tokenizer: PreTrainedTokenizerBase, writing: Writing, prompt: list[Message], completion: list[Message], full: str
) -> TextSpans:
    """Return the unscored spans of the completion in `full`, the template's text of prompt and completion.

    Unscored are the turns of other speakers and turns with a weight of 0 (or train or loss = false). A span begins
    after the token that ends the previous assistant turn, and stops where the assistant's next words begin, so it
    includes the text that the template writes around turns. A template may write a turn differently once others follow
    it. Each boundary is therefore sought where `full` agrees with the text of the conversation up to there, or else by
    replacing a message with a mark. Raises RowError if a boundary cannot be found, or if the last turn is not scored.
    """
    if not is_trained(completion[-1]):
        off = ", ".join(untrained(completion[-1]))
        raise RowError(
            f"the last turn of a completion has {off} 0 or false, so nothing follows that could be compared; "
            "leave that turn out, or the row",
            "whose last turn is not to be trained",
        )
    if len(completion) < 2:
        return []
    spans: TextSpans = []
    conversation, write = [*prompt, *completion], partial(apply, tokenizer, writing=writing)
    special = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    try:
        for begin, stop in _runs(completion):
            first, last = len(prompt) + begin, len(prompt) + stop
            lowest = spans[-1][1] if spans else 0
            start = _end_of_turn(write, special, conversation, first, full, lowest) if begin else 0
            spans.append((start, max(start, _begin_of_turn(write, conversation, last, full, start))))
    except RowError:
        raise
    except REFUSALS as error:
        raise _untold(str(error)) from None
    return [span for span in spans if span[0] < span[1]]


def exchanges(prompt: Sequence[Message]) -> list[int]:
    """Return the indices at which the exchanges of a prompt begin. The last exchange is the question.

    Each but the first begins with a user turn. System turns at the front belong to no exchange.
    """
    front = next((at for at, turn in enumerate(prompt) if turn["role"] not in SYSTEM_ROLES), len(prompt))
    return [front, *(at for at, turn in enumerate(prompt) if at > front and turn["role"] == "user")]


def without_oldest(prompt: list[Message], many: int) -> list[Message]:
    """Return a prompt without its `many` oldest exchanges. System turns at its front stay."""
    begins = exchanges(prompt)
    return [*prompt[: begins[0]], *prompt[begins[many] :]]


def _runs(completion: Sequence[Message]) -> list[tuple[int, int]]:
    """Return the ranges of unscored messages before each scored one; a range between two scored ones is empty."""
    runs, begin = [], 0
    for at, message in enumerate(completion):
        if is_trained(message):
            if at:
                runs.append((begin, at))
            begin = at + 1
    return runs


def _end_of_turn(
    write: _Write, special: list[str], conversation: list[Message], stop: int, full: str, lowest: int
) -> int:
    """Return where the assistant's turn before message `stop` ends in `full`, after its end token."""
    alone = write(conversation[:stop]).rstrip()
    if full.startswith(alone):
        return len(alone)
    following, ends = _place_of(write, conversation, stop, full), False
    while end := next((token for token in special if alone.endswith(token)), ""):  # a last turn may end with two
        if (at := full.rfind(end, lowest, following)) >= 0:
            return at + len(end)
        alone, ends = alone.removesuffix(end).rstrip(), True
    content = conversation[stop - 1].get("content")
    answer = content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""
    for words in (alone[-40:], answer[-40:]):
        if words and (at := full.rfind(words, lowest, following)) >= 0:
            at += len(words)
            rest = full[at:following]
            end = next((token for token in special if ends and rest.lstrip().startswith(token)), "")
            return at + rest.index(end) + len(end)
    raise _untold(f"the turn that ends with {alone[-40:]!r} is written otherwise once others follow it")


def _begin_of_turn(write: _Write, conversation: list[Message], at: int, full: str, start: int) -> int:
    """Return where the words of the assistant's message `at` begin in `full`, after its generation prompt."""
    asked = write(conversation[:at], generation_prompt=True)
    if full.startswith(asked):  # the usual case
        return len(asked)
    before = write(conversation[:at]).rstrip()
    agreed = common(asked, full)
    if agreed >= len(before):
        return agreed
    own = conversation[at - 1]["role"] == "assistant"  # between two assistant turns there is only a generation prompt
    if own and conversation[at - 1].get("tool_calls"):
        return start
    marked = {**conversation[at - 1], "content": _MARK}
    _, mark, tail = write([*conversation[: at - 1], marked], generation_prompt=True).rpartition(_MARK)
    whole = write([*conversation[: at - 1], marked, *conversation[at:]])
    if own and (not mark or _MARK not in whole):
        return start
    if not mark or _MARK not in whole:
        raise _untold(f"it leaves out a turn of role {marked['role']!r}")
    end = len(full) - common(whole[::-1], full[::-1])
    return end + common(full[end:], tail)


def _place_of(write: _Write, conversation: list[Message], at: int, full: str) -> int:
    """Return where the content of message `at` begins in `full`. For an assistant message, return where its turn
    begins, or a later position.
    """
    marked = {**conversation[at], "content": _MARK}
    return common(write([*conversation[:at], marked, *conversation[at + 1 :]]), full)


def _untold(why: str) -> RowError:
    return RowError(
        "the turns inside a completion cannot be told apart in what the chat template writes "
        f'({why}); tokens.score = "all" scores them all',
        "refused by the chat template",
    )
