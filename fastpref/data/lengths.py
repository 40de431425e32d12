"""How many tokens of a row that is too long stay."""

from fastpref.data.example import Ids, Spans


def kept_prompt(max_length: int) -> int:
    """Tokens of a prompt that no response is long enough to take: half of what a row may have, at least one."""
    return max(1, max_length // 2)


def kept_response(max_length: int, longest: int) -> int:
    """Tokens of its responses that a question must leave room for: a quarter of what a row may have, or the longest."""
    return min(longest, max(1, max_length // 4))


def cut(ids: Ids, context: Spans, room: int) -> tuple[Ids, Spans]:
    """The first `room` tokens of a completion, and no unscored ones at its end: computing them would teach nothing."""
    if len(ids) <= room:
        return ids, context
    clipped = tuple((start, min(stop, room)) for start, stop in context if start < room)
    if clipped and clipped[-1][1] == room:
        room, clipped = clipped[-1][0], clipped[:-1]
    return ids[:room], clipped
