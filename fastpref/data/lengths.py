"""Decide how many tokens of an overlong row are kept."""

from fastpref.data.example import Ids, Spans


def kept_prompt(max_length: int) -> int:
    """Return how many tokens of a prompt are kept however long a completion is: half of `max_length`, at least one."""
    return max(1, max_length // 2)


def kept_completion(max_length: int, longest: int) -> int:
    """Return how many tokens of its completions a question must leave room for: at most a quarter of `max_length`."""
    return min(longest, max(1, max_length // 4))


def cut(ids: Ids, context: Spans, room: int) -> tuple[Ids, Spans]:
    """Cut a completion to its first `room` tokens, then remove unscored tokens from its end: they train nothing."""
    if len(ids) <= room:
        return ids, context
    clipped = tuple((start, min(stop, room)) for start, stop in context if start < room)
    if clipped and clipped[-1][1] == room:
        room, clipped = clipped[-1][0], clipped[:-1]
    return ids[:room], clipped
