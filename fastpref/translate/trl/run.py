"""Rules for tokens and micro-batches."""

from pathlib import Path

from fastpref.translate.fields import Fields, Left, Made, Setting, dotted
from fastpref.translate.trainer_arguments import batch as shared_batch
from fastpref.translate.trl.method import DEFAULT

LENGTH, UNLIMITED = 1024, 2048
"""TRL's default, and that of fastpref for rows without a limit."""


def length(config: Fields) -> Made:
    given = config.given("max_length")
    cut = config.text("truncation_mode", "keep_start")
    words = "" if given else DEFAULT
    if config.get("max_length") == "none":
        yield Left("max_length", "rows have a limit here; set tokens.max_length to the length of the longest")
    else:
        yield Setting(dotted("tokens.max_length"), limit(config), given, words)
    if cut != "keep_start":
        yield Left("truncation_mode", "a row that is too long loses its oldest turns first, then ends of answers")


def limit(config: Fields) -> int:
    return UNLIMITED if config.get("max_length") == "none" else config.whole("max_length", LENGTH)


def score(config: Fields) -> Made:
    yield Setting(dotted("tokens.score"), "all", (), "as TRL, which scores every turn of a completion")


def template(config: Fields) -> Made:
    path = config.text("chat_template_path", "")
    if path and (path.endswith((".jinja", ".jinja2", ".j2", ".txt")) or Path(path).is_file()):
        yield Setting(dotted("tokens.chat_template"), path, ("chat_template_path",))
    elif path:
        yield Left("chat_template_path", "it is a tokenizer; name a file with its chat template")


def batch(config: Fields) -> Made:
    yield from shared_batch(config, limit(config), 1 if config.method == "sft" else 2)
