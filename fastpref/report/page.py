"""Prepare the values that the templates show, and render a run's page."""

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastpref.report import tables
from fastpref.report.figures import figures, margins
from fastpref.report.heldout import held_out
from fastpref.report.source import GOING_ON, Run
from fastpref.report.svg import number
from fastpref.run.times import day_and_time, duration, moment

RELOAD = 30  # seconds after which a browser reads the page of a run that goes on again


def render(run: Run) -> str:
    """Return the page. Everything that comes from data or models is escaped."""
    scores = held_out(run.facts)
    shown = (tables.metrics, tables.data, tables.tokens, tables.speed, tables.environment)
    return (
        templates()
        .get_template("run.html.j2")
        .render(
            title=f"{run.name}: {run.known.loss.title}",
            reload=RELOAD if run.going_on else None,
            written=tables.written(run),
            run=run,
            method=run.known.loss.title,
            status=status(run),
            health=run.health,
            figures=figures(run),
            heldout=tables.heldout(run, scores),
            margins=margins(scores) if scores and len(scores.margins) else None,
            samples=samples(run),
            unanswered="not yet" if run.going_on else "not yet: the run was stopped",
            tables=[table for table in (show(run) for show in shown) if table.rows],
        )
    )


def templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("fastpref.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"sentence": _sentence, "pieces": _pieces, "number": number}
    return environment


def status(run: Run) -> str:
    """Return how far the run is, how it ended, when, and after how long."""
    planned = f" of {run.known.steps:,}" if run.known.steps else ""
    parts = [f"{run.history.step:,}{planned} steps"]
    ended = run.facts.get("ended")
    if run.going_on:
        parts.append(f"going on; this page is written again as the run goes on, and reloads every {RELOAD} seconds")
    elif ended == GOING_ON:
        parts.append("no process holds it: it was killed, or runs on another machine")
    elif ended:
        parts.append(str(ended))
    began, seconds = moment(run.facts.get("began")), run.facts.get("seconds")
    if began is not None:
        parts.append(f"begun on {day_and_time(began)}")
    if seconds:
        parts.append(f"{duration(float(seconds))} {'so far' if run.going_on else 'in all'}")
    return "; ".join(parts)


def samples(run: Run) -> list[Mapping[str, Any]]:
    """Return the held-out prompts with the answers before and after the training."""
    found = run.facts.get("samples")
    named = [s for s in found if isinstance(s, dict)] if isinstance(found, list) else []
    return [s for s in named if set(s) >= {"asked", "before", "after"}]


def _sentence(text: str) -> Markup:
    """Return a sentence as HTML, with the parts in backticks as code."""
    parts = (text[:1].upper() + text[1:]).split("`")
    code = [Markup("<code>{}</code>").format(part) if at % 2 else Markup.escape(part) for at, part in enumerate(parts)]
    return Markup("").join(code)


def _pieces(name: str) -> Markup:
    """Return a name as HTML that a narrow screen breaks after a slash or an underscore, and nowhere else."""
    return Markup("<wbr>").join(re.findall(r"[^/_]*[/_]|[^/_]+", name))
