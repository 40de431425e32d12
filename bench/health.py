"""Runs that are ruined on purpose, and healthy ones: which of them the rules of `fastpref.health` find.

    python -m bench.health docs/health.md
    python -m bench.health docs/health.md --model FOLDER --data FILE [--capitals]

The first line trains the quickstart's model on its rows, some seconds a run; the second trains adapters of a model of
your own on pairs of your own, with the defaults of every loss. With --capitals the rejected completions are the chosen
ones in capitals, which a few steps learn. A ruined run is caught if one of the rules that are about its fault has a
verdict, or if the run is refused before its first step; any verdict on a healthy run is a false alarm. The tables
replace those between two marks of the page.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

import fastpref
from bench.faults import Case, Row, healthy, quickstart_healthy, quickstart_ruined, ruined
from bench.own_model import short_rows
from fastpref.config import load_config
from fastpref.errors import UserError
from fastpref.health import RULES, Watch, diagnose
from fastpref.report import read_run
from fastpref.run.environment import processor
from fastpref.run.history import METRICS, read_rows

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.toml"
FOLDER = QUICKSTART.parent / "quickstart"
HELDOUT = 40  # held-out rows of the quickstart
COMMON = ("output.save_every=stop",)


@dataclass(frozen=True)
class Subject:
    """A config with rows in place of its own, the runs of it, and the place of their figures in a page."""

    config: Path
    settings: Sequence[str]
    train: list[Row]
    heldout: list[Row]
    cases: Sequence[Case]
    marks: tuple[str, str]
    about: str = ""  # the model and its rows, for the page
    cached: bool = False  # whether runs share what they compute of the reference


def quickstart() -> Subject:
    """Return the quickstart's model and rows."""
    train, heldout = (
        [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "heldout")
    )
    marks = "<!-- battery: python -m bench.health docs/health.md -->", "<!-- end of the battery -->"
    cases = (*quickstart_ruined(), *quickstart_healthy())
    return Subject(QUICKSTART, ("train.batch=8", "eval.every=0.25"), train, heldout[:HELDOUT], cases, marks)


def own(model: Path, data: Path, folder: Path, steps: int, length: int, *, capitals: bool = False) -> Subject:
    """Return a model and pairs of your own, with a config that is written to a folder. Raises UserError."""
    train, heldout = short_rows(model, data, length, capitals=capitals)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.toml"
    config.write_text(
        f'[model]\nname = {json.dumps(str(model.resolve()))}\n[lora]\n[[data]]\npath = "rows"\n[[eval.data]]\n'
        f'path = "rows"\n[tokens]\nmax_length = {length}\n[train]\nbatch = 4\ntokens_per_microbatch = {8 * length}\n',
        encoding="utf-8",
    )
    command = "python -m bench.health docs/health.md --model FOLDER --data FILE" + " --capitals" * capitals
    marks = f"<!-- battery: {command} -->", f"<!-- end{' of capitals' * capitals} -->"
    about = f"{model.name}, {len(train)} training and {len(heldout)} held-out rows of {data.name}, at most {length} "
    about += f"tokens, batches of 4, {steps} steps where none are named"
    return Subject(
        config, ("eval.every=0.34",), train, heldout, (*ruined(steps), *healthy(steps)), marks, about, cached=True
    )


@dataclass(frozen=True)
class Outcome:
    case: Case
    found: tuple[str, ...] = ()  # rules with a verdict
    refused: str = ""  # the message, if the run was refused
    answers: tuple[str, ...] = field(default=())  # after the training
    since: tuple[int, ...] = ()  # the step at which each rule of `found` had its verdict first
    passed: tuple[str, ...] = ()  # rules whose verdict was given during the run and holds no longer

    @property
    def right(self) -> bool:
        """True if a ruined run was caught, or a healthy one left alone."""
        if self.case.refused:
            return bool(self.refused)
        return bool(set(self.found) & set(self.case.faults)) if self.case.faults else not (self.found or self.refused)


def run(case: Case, subject: Subject, folder: Path) -> Outcome:
    """Train a case in a folder, or read the run that is there already."""
    out = folder / "out"
    if not (out / "final").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        heldout = subject.train[: len(subject.heldout)] if case.leaks else subject.heldout
        heldout = case.heldout(heldout) if case.heldout else heldout
        rows = case.rows(subject.train) if case.rows else subject.train
        settings = [f"data.0.path={_write(folder / 'train.jsonl', rows)}",
                    f"eval.data.0.path={_write(folder / 'heldout.jsonl', heldout)}",
                    f"output.dir={out}", *COMMON, *subject.settings, *case.settings]  # fmt: skip
        if case.reference:
            settings.append(f"reference.name={_disturbed(subject, folder / 'reference')}")
        try:
            fastpref.train(subject.config, settings, force=True, cache=subject.cached)
        except UserError as error:
            return Outcome(case, refused=str(error))
    return outcome(case, out)


def outcome(case: Case, out: Path) -> Outcome:
    """Read what the rules say of a run: at its end, and since which step, as they were asked while it went on."""
    end = read_run(out)
    answers = [sample.get("after") or "" for sample in end.facts.get("samples") or ()]
    found = tuple(verdict.rule for verdict in diagnose(end.history, end.known))
    watch, told = Watch(replace(end.known, steps=end.history.step, answers=())), {}
    for row in read_rows(out / METRICS):
        told |= {verdict.rule: row["step"] for verdict in watch.add(row)}
    since = tuple(told.get(name, end.history.step) for name in found)
    passed = tuple(verdict.rule for verdict in watch.health().passed)
    return Outcome(case, found, "", tuple(answers), since, passed)


def _write(place: Path, rows: list[Row]) -> Path:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


def _disturbed(subject: Subject, place: Path) -> Path:
    """Write the subject's model with noise in its weights."""
    source = Path(load_config(subject.config).model.name)
    shutil.copytree(source, place, dirs_exist_ok=True)
    torch.manual_seed(0)
    for file in place.glob("*.safetensors"):
        tensors = {name: t + 0.3 * t.float().std() * torch.randn_like(t) for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return place


def page(outcomes: Sequence[Outcome], about: str = "") -> str:
    """Return the figures and the two tables in Markdown."""
    of_ruin = [o for o in outcomes if o.case.faults or o.case.refused]
    of_health = [o for o in outcomes if o not in of_ruin]
    caught, alarms = sum(o.right for o in of_ruin), sum(not o.right for o in of_health)
    lines = [
        f"**{caught} of {len(of_ruin)} ruined runs are caught, and {alarms} of {len(of_health)} healthy runs have a "
        f"false alarm** ({len(RULES)} rules; {about}{'; ' * bool(about)}{processor()}, torch {torch.__version__}).",
        "",
        "| ruined on purpose | found, since step | caught |",
        "|---|---|---|",
    ]
    lines += [f"| {o.case.name} | {_found(o)} | {'yes' if o.right else '**no**'} |" for o in of_ruin]
    lines += ["", "| healthy | found, since step |", "|---|---|"]
    return "\n".join([*lines, *(f"| {o.case.name} | {_found(o)} |" for o in of_health)])


def _found(o: Outcome) -> str:
    """Return the rules with a verdict and the step of their first one, and those whose verdict has passed."""
    if o.refused:
        return "refused before the first step" if o.case.refused else o.refused
    found = ", ".join(f"`{name}` {step}" for name, step in zip(o.found, o.since)) or "nothing"
    return found + "".join(f"; `{name}` has passed" for name in o.passed)


def main(
    document: Annotated[Path | None, typer.Argument(help="The page whose table is replaced.")] = None,
    runs: Annotated[Path | None, typer.Option(help="A folder that keeps the runs; those in it are only read.")] = None,
    match: Annotated[str, typer.Option(help="Only the cases with these words in their name.")] = "",
    model: Annotated[Path | None, typer.Option(help="The folder of a model of yours.")] = None,
    data: Annotated[Path | None, typer.Option(help="A file of pairs, for that model.")] = None,
    steps: Annotated[int, typer.Option(help="The steps of a run of that model.")] = 40,
    length: Annotated[int, typer.Option(help="The most tokens of a prompt with its completion, for that model.")] = 128,
    capitals: Annotated[bool, typer.Option("--capitals", help="Reject the chosen completion in capitals.")] = False,
) -> None:
    """Train every case, and count what the rules find."""
    if (model is None) != (data is None):
        raise typer.BadParameter("--model and --data belong together")
    with tempfile.TemporaryDirectory() as scratch:
        place = runs or Path(scratch)
        try:
            subject = own(model, data, place, steps, length, capitals=capitals) if model and data else quickstart()
        except UserError as error:
            raise typer.BadParameter(str(error)) from None
        outcomes = []
        for at, case in enumerate(subject.cases):
            if match in case.name:
                outcomes.append(run(case, subject, place / f"{at:02d}"))
                if runs is None:
                    shutil.rmtree(place / f"{at:02d}")
    text = page(outcomes, subject.about)
    print(text)
    if document is not None and not match:
        begin, end = subject.marks
        before, _, rest = document.read_text(encoding="utf-8").partition(begin)
        _, _, after = rest.partition(end)
        document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
