"""The runs of `bench.health`: ruined by one fault each, or healthy; each is some settings and a change of the rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from fastpref.config.losses import title_of

LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo", "cpo")
TOO_FAR = ("overoptimised", "learning_rate_high")
Row = dict[str, Any]
Change = Callable[[list[Row]], list[Row]]


@dataclass(frozen=True)
class Case:
    """A run, what its rows are made of, and the rules that are about its fault; none if it is healthy."""

    name: str
    settings: Sequence[str] = ()
    faults: Sequence[str] = ()
    rows: Change | None = None  # applied to the training rows
    heldout: Change | None = None  # applied to the held-out rows
    leaks: bool = False  # whether training rows are held out
    reference: bool = False  # whether the reference is a disturbed copy of the model
    refused: bool = False  # whether it must be refused


def swapped(rows: list[Row]) -> list[Row]:
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def shuffled(count: int) -> Change:
    def change(rows: list[Row]) -> list[Row]:
        some = rows[:count]
        exchanged = set(Random(0).sample(range(len(some)), len(some) // 2))
        return [swapped([row])[0] if at in exchanged else row for at, row in enumerate(some)]

    return change


def said(end: str) -> Change:
    """Return the change that ends every chosen completion with these words."""

    def change(rows: list[Row]) -> list[Row]:
        return [row | {"chosen": [turn | {"content": turn["content"] + end} for turn in row["chosen"]]} for row in rows]

    return change


def one_sided(rows: list[Row]) -> list[Row]:
    return [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]


def broken(rows: list[Row]) -> list[Row]:
    return [*rows[:9], rows[9] | {"chosen": float("nan")}, *rows[10:]]


def emptied(rows: list[Row]) -> list[Row]:
    nothing = {"chosen": [{"role": "assistant", "content": ""}]}
    return [row | nothing if at % 2 else row for at, row in enumerate(rows)]


def nothing_asked(rows: list[Row]) -> list[Row]:
    return [row | {"prompt": [{"role": "user", "content": ""}]} for row in rows]


def quickstart_ruined() -> Iterator[Case]:
    """Yield the ruined runs of the quickstart's model."""
    yield Case("chosen and rejected swapped in the training rows", ["train.learning_rate=2e-3"], ["swapped"], swapped)
    yield Case(
        "labels shuffled, few rows",
        ["train.learning_rate=4e-3"],
        ["labels_shuffled"],
        shuffled(24),
        shuffled(40),
    )
    yield Case("learning rate 100 times too high", ["train.learning_rate=8e-2"], ["learning_rate_high"])
    yield Case("learning rate 10,000 times too low", ["train.learning_rate=8e-8"], ["nothing_learnt"])
    yield Case("DPO, 60 steps instead of 40", ["train.steps=60"], TOO_FAR)
    yield Case("DPO, 80 steps", ["train.steps=80"], TOO_FAR)
    yield Case("SimPO, 80 steps", ["loss.type=simpo", "train.steps=80"], TOO_FAR)
    for loss in ("ipo", "kto"):
        ruin = (*TOO_FAR, "both_fall", "nll_rises", "rejected_rises")
        yield Case(
            f"{title_of(loss)}, learning rate 20 times too high",
            [f"loss.type={loss}", "train.learning_rate=1.6e-2"],
            ruin,
        )
    for loss in ("orpo", "cpo"):
        yield Case(
            f"{title_of(loss)}, learning rate 100 times too high",
            [f"loss.type={loss}", "train.learning_rate=8e-2"],
            (*TOO_FAR, "nll_rises", "loss_rises", "answers_repeat"),
        )
    yield Case(
        "SFT, 24 rows by heart",
        ["loss.type=sft", "train.steps=150", "train.learning_rate=3e-3"],
        ["heldout_gap", "entropy_collapses", "loss_below_band"],
        lambda rows: rows[:24],
    )
    yield Case("held-out rows that are training rows", [], ["heldout_leaks"], leaks=True)
    yield Case("prompts that ask nothing", [], ["no_question"], nothing_asked)
    yield Case("KTO, good rows only", ["loss.type=kto"], ["labels_unbalanced"], one_sided)
    yield Case("the chat template of another model", ["tokens.chat_template=llama3"],
               ["first_tokens", "template_foreign"])  # fmt: skip
    yield Case("completions cut before their end", ["tokens.max_length=36"], ["truncation", "no_end"])
    yield Case("every chosen completion ends with ###", ["train.steps=80"], ["accuracy_pinned", *TOO_FAR], said(" ###"))
    yield Case("a row with NaN as its completion", [], [], broken, refused=True)
    yield Case("12 rows, each 20 times", [], ["rows_repeat"], lambda rows: rows[:12] * 20)
    yield Case("the reference is another model", [], ["first_loss"], reference=True)
    yield Case("every second chosen completion is empty", [], ["rows_dropped"], emptied)
    yield Case("a batch larger than the data", ["train.batch=300", "train.steps=12"], ["batch_large"])
    yield Case("3 held-out rows", [], ["heldout_few"], None, lambda rows: rows[:3])


def quickstart_healthy() -> Iterator[Case]:
    """Yield the healthy runs of the quickstart's model."""
    for loss in LOSSES:
        yield Case(f"{title_of(loss)}, the quickstart", [f"loss.type={loss}"])
        yield Case(
            f"{title_of(loss)}, half the learning rate, 60 steps, another seed",
            [f"loss.type={loss}", "train.learning_rate=4e-4", "train.steps=60", "train.seed=7"],
        )
    yield Case("SFT", ["loss.type=sft"])
    yield Case("DPO, all weights", ["lora=false", "train.learning_rate=2e-4"])


def ruined(steps: int) -> Iterator[Case]:
    """Yield the ruined runs of any model, of so many steps where the training itself goes wrong."""
    long, begun, rate = [f"train.steps={steps}"], ["train.steps=3"], "train.learning_rate="
    yield Case("DPO, chosen and rejected swapped in the training rows", long, ["swapped"], swapped)
    yield Case("DPO, learning rate 100 times too high", [*long, f"{rate}1e-2"], TOO_FAR)
    yield Case("KTO, learning rate 100 times too high", ["loss.type=kto", *long, f"{rate}1e-2"], TOO_FAR)
    yield Case("SimPO, learning rate 100 times too high", ["loss.type=simpo", *long, f"{rate}1e-2"], TOO_FAR)
    yield Case(
        "DPO, 8 rows, learning rate 5 times too high",
        [*long, f"{rate}5e-4"],
        ["heldout_gap", "loss_below_band", "overoptimised"],
        lambda rows: rows[:8],
    )
    yield Case("DPO, the chat template of another model", [*begun, "tokens.chat_template=llama3"],
               ["first_tokens", "template_foreign"])  # fmt: skip
    yield Case("DPO, 8 rows, each 8 times", begun, ["rows_repeat"], lambda rows: rows[:8] * 8)
    yield Case("DPO, held-out rows that are training rows", begun, ["heldout_leaks"], leaks=True)
    yield Case("KTO, good rows only", ["loss.type=kto", *begun], ["labels_unbalanced"], one_sided)
    yield Case("DPO, every chosen completion ends with </s>", long, ["accuracy_pinned"], said("</s>"))
    yield Case("DPO, a few steps at the default learning rate", long, ["nothing_learnt"])


def healthy(steps: int) -> Iterator[Case]:
    """Yield the healthy runs of any model: every loss at three times the default learning rate, as they are short."""
    for loss in LOSSES:
        yield Case(title_of(loss), [f"loss.type={loss}", f"train.steps={steps}", "train.learning_rate=3e-4"])
