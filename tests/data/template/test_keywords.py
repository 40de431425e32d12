"""Keywords of a chat template: a row's take precedence, and useless or harmful ones are refused; and the day."""

import inspect
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from fastpref.config import Config, TokensConfig, load_config
from fastpref.config.keywords import RESERVED
from fastpref.data.rows.content import Paired, Writing
from fastpref.data.sources import SourceRow
from fastpref.data.template.keywords import of_run, on_day, variables, writes_the_date
from fastpref.data.template.render import apply, write_all
from fastpref.data.template.text import check_template_keywords
from fastpref.errors import UserError
from tests.support.chats import tokenize
from tests.support.toy_tokenizers import CHATML, chatml, plain, toy_tokenizer

USER = {"role": "user", "content": "Why?"}
SHOWS = "{{ '[' + effort | default('none') + (' thinks' if thinks else '') + ']' }}" + CHATML
QWEN3 = "{% if enable_thinking is defined and enable_thinking is false %}{{ 'off' }}{% endif %}"
GPT_OSS = (
    "{% macro system() %}{% if not reasoning_effort is defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
    "{{ reasoning_effort + strftime_now('%Y-%m-%d') }}{% endmacro %}{{ system() }}"
)
LLAMA32 = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}{{ date_string }}"
)
LOOPS = (
    "{% for m in messages %}{% if m.skip %}{% continue %}{% endif %}"
    "{% generation %}{{ m }}{% endgeneration %}{% endfor %}"
)


def pair(**keywords: Any) -> Paired:
    chosen, rejected = ([{"role": "assistant", "content": word}] for word in ("so", "no"))
    return Paired([USER], chosen, rejected, Writing(template_kwargs=keywords or None))


# --- The run's and the row's -----------------------------------------------------------------------------------------

ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # of the run, of the row, result
    "none": ({}, {}, "none"),
    "the run's": ({"effort": "low"}, {}, "low"),
    "the row's": ({}, {"effort": "high"}, "high"),
    "the row's first": ({"effort": "low"}, {"effort": "high"}, "high"),
    "each its own": ({"effort": "low"}, {"thinks": True}, "low thinks"),
    "a null is none": ({"effort": "low", "thinks": True}, {"effort": None, "thinks": False}, "low"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_goes_before_its_run(case: str):
    """In the tokens of a prompt, a row's keyword takes precedence over the run's."""
    run, row, wanted = ROWS[case]
    tokenizer = toy_tokenizer(SHOWS, eos="<|im_end|>", special=["<|im_start|>"])
    examples, _ = tokenize([SourceRow(pair(**row), "row")], tokenizer, TokensConfig(chat_template_kwargs=run))
    assert str(tokenizer.decode(examples[0].prompt)).startswith(f"[{wanted}]<|im_start|>")
    assert tokenizer.decode(examples[0].completions[0]) == "so<|im_end|>"


def test_rows_written_together_are_those_written_alone():
    """Rows with any keywords, days and templates have the same text rendered together as rendered alone."""
    tokenizer = toy_tokenizer(SHOWS + "{{ strftime_now('%d') }}", eos="<|im_end|>")
    rows = [
        of_run(replace(pair(**row), writing=replace(pair(**row).writing, chat_template=template)), run, day)
        for run, row, _ in ROWS.values()
        for day in (date(2026, 1, 2), date(2026, 1, 3))
        for template in (None, CHATML + "{{ effort }}")
    ]
    together = write_all(rows, tokenizer)
    assert together == [write_all([row], tokenizer)[0] for row in rows]
    assert len({str(text) for text in together}) > len(ROWS)


def test_the_end_of_a_turn_is_that_of_the_keywords():
    """If a keyword changes which token ends a turn, each row has its own end."""
    template = CHATML.replace("'<|im_end|>\n'", "(mark | default('<|im_end|>')) + '\n'")
    tokenizer = toy_tokenizer(template, eos="</s>", special=["<|im_start|>", "<|im_end|>", "<|call|>"])
    rows = [SourceRow(row, "row") for row in (pair(), pair(mark="<|call|>"))]
    examples, _ = tokenize(rows, tokenizer, TokensConfig())
    assert [tokenizer.decode(example.completions[0]) for example in examples] == ["so<|im_end|>", "so<|call|>"]


# --- What is refused -------------------------------------------------------------------------------------------------


def config(folder: Path, table: str, data: str = "") -> Config:
    path = folder / "cfg.toml"
    path.write_text(
        f'[model]\nname = "m"\n[[data]]\npath = "d.jsonl"\n{data}\n[tokens]\nchat_template_kwargs = {table}\n'
    )
    return load_config(path)


def test_what_transformers_takes_itself_is_reserved():
    """Every parameter of `apply_chat_template` and every special token that it sets is a reserved name."""
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert {*parameters, *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES} <= RESERVED


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_reserved_name_is_refused(tmp_path: Path, name: str):
    """A reserved name is refused in a config, and in a row with its place."""
    with pytest.raises(UserError, match=rf"cfg.toml:7: tokens.chat_template_kwargs.{name}: {name} is no keyword"):
        config(tmp_path, f"{{ {name} = 1 }}")
    row = SourceRow(replace(pair(), writing=Writing(template_kwargs={name: "1"})), "d.jsonl:1")
    with pytest.raises(UserError, match=rf"d.jsonl:1: .*{name} is no keyword"):
        tokenize([row], chatml(), TokensConfig())


@pytest.mark.parametrize("value", ["2026-11-26", "12:30:00", "nan", "[1, inf]", "{ a = 2026-11-26 }"])
def test_a_value_that_json_has_not_is_refused(tmp_path: Path, value: str):
    """Dates, times, NaN and infinity are refused, because JSON, in which the keywords are recorded, has none."""
    with pytest.raises(UserError, match=r"chat_template_kwargs.*effort must be true, false, a number, text, a list"):
        config(tmp_path, f"{{ effort = {value} }}")


def test_an_empty_table_is_none(tmp_path: Path):
    assert config(tmp_path, "{}").tokens.chat_template_kwargs is None


UNKNOWN: dict[str, tuple[str | None, str, str | None]] = {  # the tokenizer's template, the table, the error
    "a slip": (SHOWS, "{ efort = 'low' }", r"tokens.chat_template_kwargs.efort: .* does not read efort.*mean effort\?"),
    "one of two": (SHOWS, "{ effort = 'low', enable_thinking = false }", "kwargs.enable_thinking: the chat template"),
    "no template": (None, "{ effort = 'low' }", "the tokenizer has no chat template"),
    "no Jinja": ("{% if %}", "{ effort = 'low' }", "not valid Jinja"),
    "known": (SHOWS, "{ effort = 'low', thinks = true }", None),
    "in a macro": (GPT_OSS, "{ reasoning_effort = 'low' }", None),
    "set where it is not given": (LLAMA32, "{ date_string = '26 Jul 2024' }", None),
    "asked whether it is there": (QWEN3, "{ enable_thinking = false }", None),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_keyword_that_no_template_reads_is_refused(tmp_path: Path, case: str):
    """A keyword that no template reads is refused, because it would silently have no effect."""
    template, table, wrong = UNKNOWN[case]
    given = config(tmp_path, table)
    if wrong is None:
        check_template_keywords(given, toy_tokenizer(template))
        return
    with pytest.raises(UserError, match=wrong):
        check_template_keywords(given, toy_tokenizer(template))


def test_a_sources_own_template_may_read_it(tmp_path: Path):
    """A keyword is accepted if a source's own template reads it, or one of several templates of a tokenizer."""
    form = 'format = { type = "chat_template.default", chat_template = "{{ effort }}" }'
    check_template_keywords(config(tmp_path, "{ effort = 'low' }", form), plain())
    several: Any = toy_tokenizer()
    several.chat_template = {"default": CHATML, "tool_use": SHOWS}
    check_template_keywords(config(tmp_path, "{ effort = 'low' }"), several)


def test_templates_of_every_kind_are_read():
    """Jinja with the statements that transformers adds to it can be read."""
    assert variables(LOOPS) == {"messages"}
    with pytest.raises(TemplateError):
        variables("{% if %}")


# --- The day ---------------------------------------------------------------------------------------------------------

DAYS = {"in the open": ("{{ strftime_now('%d %b %Y') }}", "26 Nov 2026"), "set": (LLAMA32, "26 Nov 2026"),
        "in a macro": (GPT_OSS, "medium2026-11-26"), "with the time": ("{{ strftime_now('%H:%M') }}", "00:00"),
        "no date": ("{{ 'never' }}", "never")}  # fmt: skip


@pytest.mark.parametrize("case", DAYS)
def test_a_template_writes_the_day_it_is_told(case: str):
    """A template renders the given day wherever it asks for the date; without one it renders today's."""
    template, wanted = DAYS[case]
    tokenizer = toy_tokenizer(template)
    assert apply(tokenizer, [USER], Writing(day=date(2026, 11, 26))) == wanted
    assert apply(tokenizer, [USER], Writing(chat_template=template, day=date(2026, 11, 26))) == wanted
    if case == "in the open":
        assert apply(tokenizer, [USER], Writing()) == datetime.now().strftime("%d %b %Y")


def test_the_day_ends_with_an_error():
    """If a template refuses a row, its day does not stay set."""
    template = "{{ strftime_now('%Y') }}{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}"
    assert writes_the_date(template)
    with pytest.raises(TemplateError), on_day(template, date(1999, 1, 1)):
        toy_tokenizer(template).apply_chat_template([USER, USER], tokenize=False)
    assert apply(toy_tokenizer(template), [USER], Writing()) == datetime.now().strftime("%Y")
