"""Combine keywords of a chat template (enable_thinking, ...) from the run and the row, and set its date."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, datetime, time
from typing import Any

from fastpref.config.keywords import check_keywords
from fastpref.data.rows.content import RowContent, Writing

_DAY = "strftime_now"  # the function by which templates write the date


def of_run(content: RowContent, keywords: Mapping[str, Any], day: date | None) -> RowContent:
    """Add the keywords and the date of the run to a row. The row's own keywords win; nulls among them are ignored."""
    if isinstance(content.prompt, str):
        return content
    merged = {**keywords, **_set(content.writing)}
    return replace(content, writing=replace(content.writing, template_kwargs=merged or None, day=day))


def keywords_of(writing: Writing) -> dict[str, Any]:
    """Return the keywords for the template. Raises ValueError as `check_keywords`."""
    keywords = _set(writing)
    check_keywords(keywords)
    return keywords


def key_of(writing: Writing) -> tuple[str | None, str]:
    """Return a key that is equal for writings that render chats in the same way, apart from their tools."""
    rest = [_set(writing), writing.day, writing.without_template]
    return writing.chat_template, json.dumps(rest, sort_keys=True, default=str)


def variables(template: str) -> frozenset[str]:
    """Return the names of the variables that a template reads. Raises jinja2's TemplateError for invalid Jinja."""
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(_compiled(template).environment.parse(template)))


def writes_the_date(template: str) -> bool:
    return _DAY in template


@contextmanager
def on_day(template: str, day: date | None) -> Iterator[None]:
    """Let transformers render this template as if it were midnight of a day; None is now.

    A keyword cannot do this, because `apply_chat_template` accepts plain values only and no functions.
    """
    if day is None or not writes_the_date(template):
        yield
        return
    names = _compiled(template).globals
    before, began = names[_DAY], datetime.combine(day, time())
    names[_DAY] = lambda form: began.strftime(form)
    try:
        yield
    finally:
        names[_DAY] = before


def _set(writing: Writing) -> dict[str, Any]:
    return {name: value for name, value in (writing.template_kwargs or {}).items() if value is not None}


def _compiled(template: str) -> Any:
    """Return the object that `apply_chat_template` renders: transformers compiles a template once and keeps it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)
