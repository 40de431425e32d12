"""The page that compares several runs: their numbers, their curves in common charts, and their answers."""

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastpref.report import tables
from fastpref.report.figures import compared, over_rows, style_of
from fastpref.report.heldout import held_out
from fastpref.report.page import RELOAD, samples, templates
from fastpref.report.source import Run
from fastpref.report.summary import Summary, summary
from fastpref.report.svg import number
from fastpref.report.tables import Table
from fastpref.run.history import HELDOUT, REPORT
from fastpref.run.times import day_and_time, duration

_OWN = {"output.dir"}  # keys in which two runs always differ


def render_comparison(runs: Sequence[Run], place: Path) -> str:
    """Return the page that is to be written to `place`. Everything that comes from data or models is escaped."""
    runs = _named_apart(runs)
    summaries = [summary(run) for run in runs]
    across = "rows" if over_rows(runs) else "steps"
    words = f"{across.capitalize()} from left to right; one colour a run."
    curves = [
        ("heldout", "Held out", f"{words} Points: evaluations.", compared(runs, HELDOUT)),
        ("training", "Training", f"{words} Running means of the logged steps.", compared(runs, "")),
    ]
    shown = [_numbers(summaries), _differences(runs)]
    return (
        templates()
        .get_template("comparison.html.j2")
        .render(
            title=f"{len(runs)} runs compared",
            reload=RELOAD if any(run.going_on for run in runs) else None,
            written="",
            runs=[_shown(at, of, place) for at, of in enumerate(summaries)],
            notes=list(_notes(runs)),
            tables=[table for table in shown if table.rows],
            curves=[part for part in curves if part[-1]],
            answers=_answers(runs),
        )
    )


def _named_apart(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with names that differ: those of their folders, or as much of the paths as it takes."""
    if len({run.name for run in runs}) == len(runs):
        return list(runs)
    folders = [run.folder.resolve() for run in runs]
    common = common_folder(runs)
    names = [folder.relative_to(common) if folder.is_relative_to(common) else folder for folder in folders]
    return [replace(run, name=name.as_posix()) for run, name in zip(runs, names)]


def common_folder(runs: Sequence[Run]) -> Path:
    """Return the folder that has all runs in it, or the working directory if they are on several drives."""
    try:
        return Path(os.path.commonpath([run.folder.resolve() for run in runs]))
    except ValueError:
        return Path.cwd()


def _shown(at: int, of: Summary, place: Path) -> dict[str, Any]:
    report = of.run.folder / REPORT
    link = None
    if report.is_file():
        try:
            relative = os.path.relpath(report.resolve(), place.resolve().parent)
            link = quote(Path(relative).as_posix())
        except ValueError:  # on another drive
            link = report.resolve().as_uri()
    return {"name": of.run.name, "style": style_of(at), "link": link, "health": of.run.health}


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    """Yield what must be known to compare the numbers."""
    losses = [run.known.loss for run in runs]
    if len({loss.type for loss in losses}) > 1:
        yield "The runs minimise different losses: compare accuracies and answers, not losses and rewards."
    elif len({str(loss) for loss in losses}) > 1:
        yield "The losses have different options, so their values and the rewards have different scales."
    configs = [_config(run) for run in runs]
    if all(configs) and len({str(_evaluated_on(config)) for config in configs}) > 1:
        yield "The runs do not hold out the same rows, so their held-out numbers differ by more than the training."
    if over_rows(runs):
        yield "The runs differ in the size of their batch, so the charts are drawn over training rows instead of steps."
    for run in runs:
        yield from (f"{run.name}: {note}" for note in run.notes)


def _config(run: Run) -> dict[str, Any]:
    return tomllib.loads(run.config) if run.config else {}


def _evaluated_on(config: Mapping[str, Any]) -> Any:
    held = config.get("eval", {})
    tokens = config.get("tokens", {})
    if held.get("data"):
        return held["data"], tokens
    return config.get("data"), held.get("fraction"), config.get("train", {}).get("seed"), tokens


def _numbers(summaries: Sequence[Summary]) -> Table:
    """Return a row for each fact and number, with a column for each run; a row that is empty for all is left out."""
    columns = [dict(_facts(of)) for of in summaries]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name) or "" for column in columns]) for name in names]
    head = ("", *(of.run.name for of in summaries))
    return Table("runs", "Runs", head, [row for row in rows if any(row[1])], numeric=False)


def _facts(of: Summary) -> Iterator[tuple[str, str]]:
    run, known = of.run, of.run.known
    yield "loss", known.loss.title
    yield "model", run.model or ""
    yield "state", of.state
    yield "begun", day_and_time(of.began) if of.began else ""
    yield "steps", f"{run.history.step:,}" + (f" of {known.steps:,}" if known.steps else "")
    yield "rows a step", f"{known.batch:,}" if known.batch else ""
    yield "learning rate", number(known.learning_rate) if known.learning_rate else ""
    yield "health", of.health
    scores = held_out(run.facts)
    intervals = {} if scores is None else {"rewards/accuracies": scores.accuracy, "rewards/margins": scores.margin}
    for metric, (name, form) in tables.SCORES.items():
        interval = intervals.get(metric)
        value = interval.mean if interval is not None else of.heldout(metric)
        spread = tables.between(interval, form)
        yield (
            f"held-out {name}",
            "" if value is None else tables.score(value, form) + (f" ({spread})" if spread else ""),
        )
    yield "training loss", _number(of.training("loss"))
    yield "time", duration(of.seconds) if of.seconds else ""
    yield f"{known.loss.unit}s a second", _number(of.median("pairs_per_second"))
    yield "tokens a second", _number(of.median("tokens_per_second"))
    memory = run.facts.get("memory")
    yield "memory at the highest", f"{memory / 1e9:.2f} GB" if memory else ""
    yield "device", str((run.facts.get("environment") or {}).get("device") or "")


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def _differences(runs: Sequence[Run]) -> Table:
    """Return the keys of the configs whose values differ; a run without a config has none."""
    flat = [dict(_flat(_config(run))) for run in runs]
    known = [values for values in flat if values]
    rows = []
    for key in dict.fromkeys(key for values in known for key in values):
        if key not in _OWN and len({values.get(key) for values in known}) > 1:
            rows.append((key, [values.get(key, "") for values in flat]))
    return Table("differences", "Differences of the configs", ("", *(run.name for run in runs)), rows, numeric=False)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted names of all keys with their values as text."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _answers(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return each held-out prompt with its answers: before training, and after it by each run that was asked."""
    befores: dict[str, dict[str, str]] = {}  # prompt → answer before training → its title
    afters: dict[str, list[tuple[str, str]]] = {}
    for run in runs:
        for sample in samples(run):
            asked, before = str(sample["asked"]), str(sample["before"])
            title = "before" if not befores.get(asked) else f"before, {run.name}"
            befores.setdefault(asked, {}).setdefault(before, title)
            after = "not yet" if sample["after"] is None else str(sample["after"])
            afters.setdefault(asked, []).append((run.name, after))
    return [(asked, [(title, text) for text, title in befores[asked].items()] + afters[asked]) for asked in afters]
