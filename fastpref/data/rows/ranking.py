"""Rows with several completions of one prompt: read how good each is, and make pairs of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastpref.config.data import Pairing
from fastpref.data.rows.columns import column, read_number
from fastpref.data.rows.content import Paired, Ranked, Row, RowError, shown

LISTS = ("responses", "completions", "generations", "answers")
"""The columns in which data sets keep the completions of a prompt."""
Kind = Literal["scores", "ranks", "best"]
ORDERS: dict[str, Kind] = {
    "scores": "scores", "ratings": "scores", "rating": "scores", "ranks": "ranks", "best": "best",
}  # fmt: skip
"""The columns that say how good the completions are."""
_KEYS: dict[str, Kind] = {
    "overall_score": "scores", "score": "scores", "rating": "scores", "fine-grained_score": "scores",
    "pm_score": "scores", "rank": "ranks",
}  # fmt: skip
"""The keys that say it in a completion that is a table, the first of them first."""
_TEXTS = ("response", "answer", "completion", "text")
_NO_NUMBER = "with a score or rank that is no number"


@dataclass(frozen=True)
class Order:
    """Where a row says how good its completions are."""

    kind: Kind
    name: str  # a column, or a key of each completion
    inside: bool  # whether it is a key


@dataclass(frozen=True)
class Pairs:
    """The pairs of a row, each as the numbers of a better and a worse completion, and how many were left out."""

    of: tuple[tuple[int, int], ...]
    tied: int = 0
    close: int = 0


def find_order(row: Row, responses: str) -> Order | None:
    """Return where a row says how good the completions in its column `responses` are, None if it does not.

    Raises RowError if several columns say it, because they may differ.
    """
    answers = row.get(responses)
    if not isinstance(answers, list) or not answers:
        return None
    if all(isinstance(answer, Mapping) for answer in answers):
        for name, kind in _KEYS.items():
            if all(answer.get(name) is not None for answer in answers):
                return Order(kind, name, inside=True)
    names = [name for name, kind in ORDERS.items() if _is_order(row.get(name), kind)]
    if len(names) > 1:
        raise RowError(
            f"the columns {' and '.join(names)} all say how good the {responses} are; name one of them, such as "
            f'format = {{ type = "chat_template.ranked", field_{ORDERS[names[0]]} = "{names[0]}" }}',
            "with several columns of scores",
        )
    return Order(ORDERS[names[0]], names[0], inside=False) if names else None


def order_in(responses: str, named: tuple[Kind, str] | None) -> Callable[[Row], Order | None]:
    """Return a function from a row to the order that its format names: a column, or a key of each completion.

    Without a name it returns None, which leaves the choice to `read_ranked`.
    """

    def order(row: Row) -> Order | None:
        if named is None:
            return None
        answers = row.get(responses)
        tables = isinstance(answers, list) and any(isinstance(answer, Mapping) for answer in answers)
        return Order(*named, inside=tables and named[1] not in row)

    return order


def read_ranked(row: Row, responses: str, order: Order | None) -> tuple[dict[str, Any], tuple[float, ...]]:
    """Return the completions of a row by their names in messages, and the score of each, higher is better.

    A rank becomes a score below zero; the best of a row has score 1 and the others 0. With `order` None the row's
    columns say what it is. Raises RowError.
    """
    answers = column(row, responses)
    if not isinstance(answers, list):
        raise RowError(
            f"{responses} must be a list of completions, got {shown(answers)}", "with a value of another type"
        )
    if len(answers) < 2:
        raise RowError(
            f"{responses} has {len(answers) or 'no'} completion{'s' * (not answers)}, and a comparison needs two",
            "with fewer than two completions",
        )
    order = order or find_order(row, responses)
    if order is None:
        raise RowError(
            f"nothing says how good the {responses} are; scores, ranks (1 is best) or best (the number of one, from "
            f"0 on) do, and the columns are {', '.join(map(str, row))}",
            "without scores, ranks or best",
        )
    scores = _scores(row, responses, answers, order)
    if len(set(scores)) == 1:
        number = f"rank {-scores[0]:g}" if order.kind == "ranks" else f"score {scores[0]:g}"
        raise RowError(f"all {responses} have {number}, so none is better", "with completions of one score")
    return {
        f"{responses}[{at}]": read_answer(answer, f"{responses}[{at}]") for at, answer in enumerate(answers)
    }, scores


def read_answer(answer: Any, name: str) -> Any:
    """Return the text or messages of a completion, which may be in a table with its score. Raises RowError."""
    if not isinstance(answer, Mapping) or answer.get("role") or answer.get("from"):
        return answer
    key = next((key for key in _TEXTS if answer.get(key) is not None), None)
    if key is None:
        raise RowError(
            f"{name} is {shown(answer)}; a completion is text, a message, messages, or a table with one of them under "
            f"{', '.join(_TEXTS[:-1])} or {_TEXTS[-1]}",
            "with a completion that is none",
        )
    return answer[key]


def make_pairs(scores: Sequence[float], pairing: Pairing, least: float = 0.0) -> Pairs:
    """Return the pairs of a row's completions with these scores, of which two at least differ.

    `best-worst` is one pair; `best-rest` compares the best with every other one, `all` every two, and `adjacent` each
    with the next worse one. Of completions with the same score the first comes first. Pairs of the same score are left
    out as tied, others whose scores differ by less than `least` as too close.
    """
    ranking = sorted(range(len(scores)), key=lambda at: -scores[at])
    best, *rest = ranking
    candidates = {
        "best-worst": [(best, min(rest, key=lambda at: scores[at]))],
        "best-rest": [(best, other) for other in rest],
        "all": [(one, other) for place, one in enumerate(ranking) for other in ranking[place + 1 :]],
        "adjacent": list(zip(ranking, rest)),
    }[pairing]
    differing = [(one, other) for one, other in candidates if scores[one] != scores[other]]
    kept = tuple(pair for pair in differing if _far(scores[pair[0]] - scores[pair[1]], least))
    return Pairs(kept, tied=len(candidates) - len(differing), close=len(differing) - len(kept))


def as_pair(row: Ranked, better: int, worse: int) -> Paired:
    """Return two completions of a row as a pair."""
    chosen, rejected = row.completions[better], row.completions[worse]
    return Paired(row.prompt, chosen, rejected, row.writing, row.remarks, row.weight)


def _scores(row: Row, responses: str, answers: Sequence[Any], order: Order) -> tuple[float, ...]:
    if order.inside:
        for answer in answers:
            if not isinstance(answer, Mapping) or answer.get(order.name) is None:
                raise RowError(f"{responses} holds {shown(answer)}, which has no {order.name}", _NO_NUMBER)
        values = [answer[order.name] for answer in answers]
    else:
        values = column(row, order.name)
    if order.kind == "best":
        if not isinstance(values, int) or isinstance(values, bool) or not 0 <= values < len(answers):
            raise RowError(
                f"{order.name} is {shown(values)}; it is the number of one of the {responses}, 0 to {len(answers) - 1}",
                "whose best completion is none of its own",
            )
        return tuple(float(at == values) for at in range(len(answers)))
    if not isinstance(values, list):
        raise RowError(f"{order.name} must be a list of numbers, got {shown(values)}", "with a value of another type")
    if len(values) != len(answers):
        raise RowError(
            f"{responses} has {len(answers)} completions, and {order.name} has {len(values)} numbers",
            "with another number of scores than of completions",
        )
    what = f"{'a rank' if order.kind == 'ranks' else 'a score'} is a finite number"
    numbers = [read_number(value, order.name, what, _NO_NUMBER) for value in values]
    return tuple(-number if order.kind == "ranks" else number for number in numbers)


def _far(difference: float, least: float) -> bool:
    return difference >= least or math.isclose(difference, least)  # 4.3 and 4.2 differ by 0.1


def _is_order(value: Any, kind: str) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) if kind == "best" else isinstance(value, list)
