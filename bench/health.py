"""Runs that are ruined on purpose, and healthy ones: which of them the rules of `fastpref.health` find.

    python -m bench.health docs/health.md

Every run trains the quickstart's model on its rows for some seconds. A ruined run is caught if one of the rules that
are about its fault has a verdict, or if the run is refused before its first step; any verdict on a healthy run is a
false alarm. The table replaces the one between the two marks of the page.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file

import fastpref
from fastpref.config import load_config
from fastpref.config.losses import title_of
from fastpref.errors import UserError
from fastpref.health import RULES, diagnose
from fastpref.report import read_run
from fastpref.run.environment import processor

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.toml"
FOLDER = QUICKSTART.parent / "quickstart"
BEGIN, END = "<!-- battery: python -m bench.health docs/health.md -->", "<!-- end of the battery -->"
HELDOUT = 40  # held-out rows
COMMON = ("train.batch=8", "eval.every=0.25", "output.save_every=stop")
LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo", "cpo")
Row = dict[str, Any]
Change = Callable[[list[Row]], list[Row]]


@dataclass(frozen=True)
class Case:
    """A run, what its rows are made of, and the rules that are about its fault; none if it is healthy."""

    name: str
    settings: Sequence[str] = ()
    faults: Sequence[str] = ()
    rows: Change | None = None  # applied to the training rows
    heldout: Change | None = None  # applied to the first HELDOUT held-out rows
    reference: bool = False  # whether the reference is a disturbed copy of the model
    refused: bool = False  # whether it must be refused


def _swapped(rows: list[Row]) -> list[Row]:
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def _shuffled(count: int) -> Change:
    def change(rows: list[Row]) -> list[Row]:
        some = rows[:count]
        swapped = set(Random(0).sample(range(len(some)), len(some) // 2))
        return [_swapped([row])[0] if at in swapped else row for at, row in enumerate(some)]

    return change


def _said(end: str) -> Change:
    """Return the change that ends every chosen completion with these words."""

    def change(rows: list[Row]) -> list[Row]:
        return [row | {"chosen": [turn | {"content": turn["content"] + end} for turn in row["chosen"]]} for row in rows]

    return change


def _one_sided(rows: list[Row]) -> list[Row]:
    return [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]


def _nan(rows: list[Row]) -> list[Row]:
    return [*rows[:9], rows[9] | {"chosen": float("nan")}, *rows[10:]]


def _emptied(rows: list[Row]) -> list[Row]:
    nothing = {"chosen": [{"role": "assistant", "content": ""}]}
    return [row | nothing if at % 2 else row for at, row in enumerate(rows)]


def _nothing_asked(rows: list[Row]) -> list[Row]:
    return [row | {"prompt": [{"role": "user", "content": ""}]} for row in rows]


def _training_rows(rows: list[Row]) -> list[Row]:
    return _read("train")[:HELDOUT]


def _ruined() -> Iterator[Case]:
    many = ("overoptimised", "learning_rate_high")
    yield Case("chosen and rejected swapped in the training rows", ["train.learning_rate=2e-3"], ["swapped"], _swapped)
    yield Case(
        "labels shuffled, few rows",
        ["train.learning_rate=4e-3"],
        ["labels_shuffled"],
        _shuffled(24),
        _shuffled(HELDOUT),
    )
    yield Case("learning rate 100 times too high", ["train.learning_rate=8e-2"], ["learning_rate_high"])
    yield Case("learning rate 10,000 times too low", ["train.learning_rate=8e-8"], ["nothing_learnt"])
    yield Case("DPO, 60 steps instead of 40", ["train.steps=60"], many)
    yield Case("DPO, 80 steps", ["train.steps=80"], many)
    yield Case("SimPO, 80 steps", ["loss.type=simpo", "train.steps=80"], many)
    for loss in ("ipo", "kto"):
        ruin = (*many, "both_fall", "nll_rises", "rejected_rises")
        yield Case(
            f"{title_of(loss)}, learning rate 20 times too high",
            [f"loss.type={loss}", "train.learning_rate=1.6e-2"],
            ruin,
        )
    for loss in ("orpo", "cpo"):
        yield Case(
            f"{title_of(loss)}, learning rate 100 times too high",
            [f"loss.type={loss}", "train.learning_rate=8e-2"],
            (*many, "nll_rises", "loss_rises", "answers_repeat"),
        )
    yield Case(
        "SFT, 24 rows by heart",
        ["loss.type=sft", "train.steps=150", "train.learning_rate=3e-3"],
        ["heldout_gap", "entropy_collapses", "loss_below_band"],
        lambda rows: rows[:24],
    )
    yield Case("held-out rows that are training rows", [], ["heldout_leaks"], None, _training_rows)
    yield Case("prompts that ask nothing", [], ["no_question"], _nothing_asked)
    yield Case("KTO, good rows only", ["loss.type=kto"], ["labels_unbalanced"], _one_sided)
    yield Case("the chat template of another model", ["tokens.chat_template=llama3"],
               ["first_tokens", "template_foreign"])  # fmt: skip
    yield Case("completions cut before their end", ["tokens.max_length=36"], ["truncation", "no_end"])
    yield Case("every chosen completion ends with ###", ["train.steps=80"], ["accuracy_pinned", *many], _said(" ###"))
    yield Case("a row with NaN as its completion", [], [], _nan, refused=True)
    yield Case("12 rows, each 20 times", [], ["rows_repeat"], lambda rows: rows[:12] * 20)
    yield Case("the reference is another model", [], ["first_loss"], reference=True)
    yield Case("every second chosen completion is empty", [], ["rows_dropped"], _emptied)
    yield Case("a batch larger than the data", ["train.batch=300", "train.steps=12"], ["batch_large"])
    yield Case("3 held-out rows", [], ["heldout_few"], None, lambda rows: rows[:3])


def _healthy() -> Iterator[Case]:
    for loss in LOSSES:
        yield Case(f"{title_of(loss)}, the quickstart", [f"loss.type={loss}"])
        yield Case(
            f"{title_of(loss)}, half the learning rate, 60 steps, another seed",
            [f"loss.type={loss}", "train.learning_rate=4e-4", "train.steps=60", "train.seed=7"],
        )
    yield Case("SFT", ["loss.type=sft"])
    yield Case("DPO, all weights", ["lora=false", "train.learning_rate=2e-4"])


RUINED, HEALTHY = tuple(_ruined()), tuple(_healthy())


@dataclass(frozen=True)
class Outcome:
    case: Case
    found: tuple[str, ...] = ()  # rules with a verdict
    refused: str = ""  # the message, if the run was refused
    answers: tuple[str, ...] = field(default=())  # after the training

    @property
    def right(self) -> bool:
        """True if a ruined run was caught, or a healthy one left alone."""
        if self.case.refused:
            return bool(self.refused)
        return bool(set(self.found) & set(self.case.faults)) if self.case.faults else not (self.found or self.refused)


def run(case: Case, folder: Path) -> Outcome:
    """Train a case in a folder, or read the run that is there already."""
    out = folder / "out"
    if not (out / "final").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        settings = [f"data.0.path={_write(folder / 'train.jsonl', _read('train'), case.rows)}",
                    f"eval.data.0.path={_write(folder / 'heldout.jsonl', _read('heldout')[:HELDOUT], case.heldout)}",
                    f"output.dir={out}", *COMMON, *case.settings]  # fmt: skip
        if case.reference:
            settings.append(f"reference.name={_disturbed(folder / 'reference')}")
        try:
            fastpref.train(QUICKSTART, settings, force=True, cache=False)
        except UserError as error:
            return Outcome(case, refused=str(error))
    known = read_run(out)
    answers = [sample.get("after") or "" for sample in known.facts.get("samples") or ()]
    return Outcome(case, tuple(verdict.rule for verdict in diagnose(known.history, known.known)), "", tuple(answers))


def _read(name: str) -> list[Row]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _write(place: Path, rows: list[Row], change: Change | None) -> Path:
    changed = rows if change is None else change(rows)
    place.write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    return place


def _disturbed(place: Path) -> Path:
    """Write the quickstart's model with noise in its weights."""
    source = Path(load_config(QUICKSTART).model.name)
    shutil.copytree(source, place, dirs_exist_ok=True)
    torch.manual_seed(0)
    for file in place.glob("*.safetensors"):
        tensors = {name: t + 0.3 * t.float().std() * torch.randn_like(t) for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return place


def page(outcomes: Sequence[Outcome]) -> str:
    """Return the figures and the two tables in Markdown."""
    ruined = [o for o in outcomes if o.case.faults or o.case.refused]
    healthy = [o for o in outcomes if o not in ruined]
    caught, alarms = sum(o.right for o in ruined), sum(not o.right for o in healthy)
    lines = [
        f"**{caught} of {len(ruined)} ruined runs are caught, and {alarms} of {len(healthy)} healthy runs have a false "
        f"alarm** ({len(RULES)} rules; {processor()}, torch {torch.__version__}).",
        "",
        "| ruined on purpose | found | caught |",
        "|---|---|---|",
    ]
    for o in ruined:
        found = (
            "refused before the first step" if o.refused else ", ".join(f"`{name}`" for name in o.found) or "nothing"
        )
        lines.append(f"| {o.case.name} | {found} | {'yes' if o.right else '**no**'} |")
    lines += ["", "| healthy | found |", "|---|---|"]
    for o in healthy:
        lines.append(f"| {o.case.name} | {', '.join(f'`{name}`' for name in o.found) or o.refused or 'nothing'} |")
    return "\n".join(lines)


def main(
    document: Annotated[Path | None, typer.Argument(help="The page whose table is replaced.")] = None,
    runs: Annotated[Path | None, typer.Option(help="A folder that keeps the runs; those in it are only read.")] = None,
    match: Annotated[str, typer.Option(help="Only the cases with these words in their name.")] = "",
) -> None:
    """Train every case, and count what the rules find."""
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = []
        for at, case in enumerate((*RUINED, *HEALTHY)):
            if match in case.name:
                folder = (runs or Path(scratch)) / f"{at:02d}"
                outcomes.append(run(case, folder))
                if runs is None:
                    shutil.rmtree(folder)
    text = page(outcomes)
    print(text)
    if document is not None and not match:
        before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
