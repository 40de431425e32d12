"""Remove overlaps of prompt and completions, so that turns of the prompt are not repeated in a completion.

The rows of every format pass through `untangle`. Data sets write a conversation in many ways: with the prompt in its
own column and again at the beginning of the completions, or with the chosen completion in the prompt already. After
`untangle` a prompt ends where the assistant is to answer, and a completion begins with the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastpref.data.rows.columns import REASONING
from fastpref.data.rows.content import Content, Message, Ranked, RowContent, RowError
from fastpref.data.rows.messages import SYSTEM_ROLES, as_turns, says
from fastpref.data.rows.parts import text_of

MISREAD = "whose prompt and completions do not part"
_NO_PROMPT = "without a shared prompt"
_SURE = 12  # bytes; a completion does not begin with a prompt of this length by accident
_SENTENCE_ENDS = (".", "?", "!", ":", "。", "？", "！", "：")

REPEATED = "the completions began with the whole prompt, which was dropped from them"
ONE_REPEATED = "one of the completions alone begins with the whole prompt, which was left in it"
PERHAPS_REPEATED = "the completions begin with the prompt, which was left in them: it is too short to tell from chance"
ANSWERED = "the prompt ended with one of the completions, which was dropped from it"
OTHER_PROMPT = "the text of the prompt is not in the conversations beside it, which were taken as they are"
OTHER_QUESTION = "the first question of chosen is not that of the column prompt, which was taken"
OTHER_TURNS = "before their last turns chosen and rejected differ, and only those of chosen were taken"
OTHER_MESSAGES = "the messages are not what the completions answer, and were not read: the prompt is beside them"
OTHER_SYSTEM = "the system turn differs from that of the conversations, which was taken"


def untangle(content: RowContent) -> RowContent:
    """Remove the prompt from the completions. If the prompt is empty, use the turns that the completions share.

    Raises RowError for a prompt that ends with the assistant's turn, and for a completion that begins with another
    speaker's turn which is not in the prompt: such rows are misread.
    """
    names = list(content.by_name)
    prompt, given = content.prompt, list(content.by_name.values())
    if isinstance(prompt, str) and all(isinstance(completion, str) for completion in given):
        texts = {name: str(completion) for name, completion in content.by_name.items()}
        answers, remarks = without_question(prompt, texts)
        return _with(content, prompt, list(answers.values()), remarks)
    chats = [says(completion) if isinstance(completion, str) else completion for completion in given]
    turns, answers, remarks = _untangle_chat(as_turns(prompt), chats, names, of_text=isinstance(prompt, str))
    return _with(content, turns, answers, remarks)


def without_question(question: str, answers: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Remove the question from the answers if all begin with it and continue. Returns the answers and remarks.

    A question of a word or two may begin its answers by chance ("Hi", "Hi there") and stays in them.
    """
    rest = {name: _after(question, answer) for name, answer in answers.items()}
    if not all(rest.values()):
        return dict(answers), (ONE_REPEATED,) if any(rest.values()) and _is_sure(question.strip()) else ()
    if not _is_sure(question.strip()):
        return dict(answers), (PERHAPS_REPEATED,)
    return {name: str(text) for name, text in rest.items()}, (REPEATED,)


def _is_sure(question: str) -> bool:
    sentence = question.endswith(_SENTENCE_ENDS) and len(question.split()) > 1
    return sentence or len(question.encode()) >= _SURE


def _after(question: str, answer: str) -> str | None:
    """Return what follows the question in an answer that begins with it, or None; a word must not be cut in two."""
    core = question.strip()
    if not core or answer.lstrip()[:1] != core[0]:
        return None
    if answer.startswith(question):
        rest = answer[len(question) :]
    elif answer.lstrip().startswith(core):
        rest = answer.lstrip()[len(core) :]
        rest = rest.lstrip() if question[-1].isspace() else rest
    else:  # the same words, but with different white space
        words = core.split()
        *beginning, last = answer.split(None, len(words))
        if beginning != words:
            return None
        before = answer[: len(answer) - len(last)]
        rest = last if question[-1].isspace() else before[len(before.rstrip()) :] + last
    ends = not question[-1].isalnum() or (rest and rest[0].isspace())
    return rest if rest.strip() and ends else None


def same(ours: Message, theirs: Message) -> bool:
    """Return whether two turns have the same role, words, reasoning and calls.

    White space, the form of content and ids may differ. A developer turn equals a system turn.
    """
    roles = {ours["role"], theirs["role"]}
    if len(roles) > 1 and not roles <= {*SYSTEM_ROLES}:
        return False
    our_words, their_words = text_of(ours).strip(), text_of(theirs).strip()
    if our_words != their_words and our_words.split() != their_words.split():
        return False
    return all(ours.get(name) == theirs.get(name) for name in REASONING) and _calls(ours) == _calls(theirs)


def _calls(message: Message) -> list[Any]:
    return [call.get("function") for call in message.get("tool_calls") or []]


def other_turns(prompt: Sequence[Message], completion: Sequence[Message]) -> tuple[str, ...]:
    """Return a remark if a completion, whose last turn alone is taken, has other turns before it than the prompt."""
    before, asked = (_split_system(list(turns))[1] for turns in (completion[:-1], prompt))
    return (OTHER_TURNS,) if before and not _equal(before, asked) else ()


# --- Chats ---------------------------------------------------------------------------------------------------------

_Turns = list[Message]


def _untangle_chat(
    prompt: _Turns, completions: list[_Turns], names: list[str], *, of_text: bool
) -> tuple[_Turns, list[_Turns], tuple[str, ...]]:
    remarks: list[str] = []
    system, asked = _split_system(prompt)
    systems, chats = zip(*(_split_system(completion) for completion in completions))
    greeted = not asked and len(chats) > 1 and any(turn["role"] == "user" for turn in chats[0][: _shared(chats)])
    whole = [greeted or _is_whole(chat, asked) for chat in chats]
    if not asked and not any(whole):
        system = _one_system(system, systems, whole, names, remarks)
        if system:  # the system turn alone is the prompt
            return system, list(chats), tuple(remarks)
    if not asked and not all(whole):
        raise _no_prompt(names, "begins with no user's turn, and the row has no prompt column", _NO_PROMPT)
    system = _one_system(system, systems, whole, names, remarks)
    if all(whole):
        asked, answers = _part_conversations(asked, list(chats), names, remarks, of_text=of_text)
    else:
        asked, answers = _part_answers(asked, list(chats), whole, names, remarks)
    results = bool(asked[-1].get("tool_calls")) and all(answer and answer[0]["role"] == "tool" for answer in answers)
    if asked[-1]["role"] == "assistant" and not results:
        raise RowError(
            "the prompt ends with the assistant's turn, and a completion would be a second one after it; end the "
            "prompt with the turn that is to be answered",
            MISREAD,
        )
    for name, answer in zip(names, answers):
        if answer and answer[0]["role"] not in ("assistant", "tool"):
            raise RowError(
                f"{name} begins with a turn of role {answer[0]['role']!r}, and not as the prompt does; a completion "
                "begins with the assistant's turn, or repeats the prompt",
                MISREAD,
            )
    return [*system, *asked], answers, tuple(remarks)


def _part_conversations(
    asked: _Turns, chats: list[_Turns], names: list[str], remarks: list[str], *, of_text: bool
) -> tuple[_Turns, list[_Turns]]:
    """Split conversations where they begin to differ. They begin with the first question or a turn of the prompt."""
    if not asked:
        return _part(chats, names)
    for start in range(len(asked)):
        rest = asked[start:]
        alike = any(_begins(chat, rest) for chat in chats) or asked[-1]["role"] == "assistant"
        if alike and all(_shared([rest, chat]) for chat in chats):
            shared = [_shared([rest, chat]) for chat in chats]  # turns that both have keep the prompt's words
            joined = [asked[: start + again] + chat[again:] for chat, again in zip(chats, shared)]
            explicit = len(chats) == 1 and len(asked) < len(joined[0]) and asked[-1]["role"] != "assistant"
            return (asked, [joined[0][len(asked) :]]) if explicit else _part(joined, names)
    if all(_holds(chat, asked) for chat in chats):
        return _part(chats, names)
    if asked[-1]["role"] == "assistant" and all(same(chat[0], chats[0][0]) for chat in chats):
        return _part([asked + chat for chat in chats], names)  # a history, and what came after it
    if of_text:
        remarks.append(OTHER_PROMPT)
        return _part(chats, names)
    return asked, chats


def _part(chats: list[_Turns], names: list[str]) -> tuple[_Turns, list[_Turns]]:
    """Split conversations into their shared first turns and the rest of each, which has at least its last answer.

    The rest of a single conversation is its last answer. Raises RowError if they share no turn.
    """
    at = len(chats[0]) - 1 if len(chats) == 1 else min(_shared(chats), min(map(len, chats)) - 1)
    while at and chats[0][at - 1]["role"] == "assistant":
        at -= 1
    if not at:
        raise _no_prompt(names, "must end with an assistant turn that answers something before it", "without a prompt")
    return chats[0][:at], [chat[at:] for chat in chats]


def _no_prompt(names: list[str], single: str, kind: str) -> RowError:
    """Return the error about a pair, or with the words `single` and its `kind` that about a single completion."""
    if len(names) == 1:
        return RowError(f"{names[0]} {single}", kind)
    return RowError(f"{' and '.join(names)} do not begin with the same turn, so there is no prompt", _NO_PROMPT)


def _part_answers(
    asked: _Turns, chats: list[_Turns], whole: Sequence[bool], names: list[str], remarks: list[str]
) -> tuple[_Turns, list[_Turns]]:
    """Split a prompt and its answers. Answers may repeat the prompt, which may end with an answer or an empty one."""
    for chat, is_whole in zip(chats, whole):
        if is_whole and len(chat) == _shared([asked, chat]) and chat[-1]["role"] == "assistant":
            asked, _ = _part([chat], names)  # the prompt was this whole conversation
    answers = [_after_prompt(asked, chat) if is_whole else chat for chat, is_whole in zip(chats, whole)]
    if _is_blank(asked[-1]) and len(asked) > 1:
        asked = asked[:-1]
    if asked[-1]["role"] == "assistant":
        for answer in answers:
            if 0 < len(answer) < len(asked) and _begins(asked[-len(answer) :], answer):
                asked = asked[: -len(answer)]
                remarks.append(ANSWERED)
                break
    if asked[-1].get("tool_calls"):  # all completions begin with the results of these calls
        results = next((at for at, turns in enumerate(zip(*answers)) if turns[0]["role"] != "tool"), 0)
        results = min(results, _shared(answers))
        asked, answers = asked + answers[0][:results], [answer[results:] for answer in answers]
    return asked, answers


def _after_prompt(asked: _Turns, chat: _Turns) -> _Turns:
    for start in range(len(asked)):
        if _begins(chat, asked[start:]) and len(chat) > len(asked) - start:
            return chat[len(asked) - start :]
    return chat


def _is_whole(chat: _Turns, asked: _Turns) -> bool:
    """Return whether a completion contains its prompt: it begins with another speaker's turn, or with the prompt."""
    if not chat:
        return False
    again = bool(asked) and len(chat) > len(asked) and _begins(chat, asked)
    return again or chat[0]["role"] not in ("assistant", "tool")


def _begins(chat: _Turns, turns: _Turns) -> bool:
    """Return whether a conversation begins with these turns."""
    return _shared([chat, turns]) == len(turns)


def _holds(chat: _Turns, turns: _Turns) -> bool:
    return any(_begins(chat[start:], turns) for start in range(len(chat) - len(turns) + 1))


def _shared(chats: Sequence[_Turns]) -> int:
    """Return how many turns all conversations begin with."""
    count = 0
    for turns in zip(*chats):
        if not all(same(turn, turns[0]) for turn in turns[1:]):
            break
        count += 1
    return count


def _one_system(
    system: _Turns, systems: Sequence[_Turns], whole: Sequence[bool], names: list[str], remarks: list[str]
) -> _Turns:
    """Return the system turns of the completions, or else those of the prompt. Raises RowError if they differ."""
    own = next((turns for turns in systems if turns), None)
    if own is None:
        return system
    of_prompt = _equal(system, own)
    for turns, is_whole in zip(systems, whole):
        if not _equal(turns, own) and (turns or (is_whole and not of_prompt)):
            raise RowError(
                f"{' and '.join(names)} do not begin with the same turn: their system turns differ, so there is no "
                "prompt",
                _NO_PROMPT,
            )
    if system and not of_prompt:
        remarks.append(OTHER_SYSTEM)
    return own


def _equal(ours: _Turns, theirs: _Turns) -> bool:
    return len(ours) == len(theirs) == _shared([ours, theirs])


def _split_system(turns: _Turns) -> tuple[_Turns, _Turns]:
    count = next((at for at, turn in enumerate(turns) if turn["role"] not in SYSTEM_ROLES), len(turns))
    return turns[:count], turns[count:]


def _is_blank(turn: Message) -> bool:
    """Return whether a turn is an empty assistant turn, a placeholder for an answer."""
    return turn["role"] == "assistant" and not text_of(turn).strip() and set(turn) <= {"role", "content"}


def _with(content: RowContent, prompt: Content, completions: Sequence[Content], remarks: tuple[str, ...]) -> RowContent:
    ranked = isinstance(content, Ranked)
    answers: dict[str, Any] = {"completions": tuple(completions)} if ranked else dict(zip(content.by_name, completions))
    return replace(content, prompt=prompt, **answers, remarks=tuple(dict.fromkeys((*content.remarks, *remarks))))
