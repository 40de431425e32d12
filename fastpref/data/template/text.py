"""Read and write text.json, the record of how a run wrote text, and a generation_config.json with every end token.

text.json is in the folders of a run, of its checkpoints, of its result and of a merged model."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from fastpref.config import Config
from fastpref.config.keywords import RESERVED
from fastpref.data.template.keywords import variables
from fastpref.data.template.named import load_chat_template
from fastpref.errors import UserError, one_line

TEXT = "text.json"
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class TextRecord:
    """The way in which the rows of a run became text, and the tokens that ended its completions."""

    chat_template: str | dict[str, str] | None
    """The tokenizer's, tokens.chat_template, or that of all sources: Jinja, or several by their names."""
    chat_template_kwargs: Mapping[str, Any]
    """The keywords for the chat template: tokens.chat_template_kwargs."""
    day: date
    """The date that chat templates wrote."""
    ends: Mapping[str, int]
    """The tokens that ended training completions, with their ids."""

    def to_json(self) -> str:
        return json.dumps(vars(self) | {"day": self.day.isoformat()}, indent=1, ensure_ascii=False) + "\n"

    def save(self, folder: Path) -> None:
        (folder / TEXT).write_text(self.to_json(), encoding="utf-8")

    def changes(self, now: "TextRecord") -> list[str]:
        """Return the differences from `now` in words: the chat template, its keywords."""
        words = {"chat_template": "the chat template", "chat_template_kwargs": "its keywords"}
        return [word for name, word in words.items() if getattr(self, name) != getattr(now, name)]


def text_of(config: Config, tokenizer: PreTrainedTokenizerBase, day: date, ends: Iterable[int]) -> TextRecord:
    """Return the record of a run. The tokenizer must have the rows' chat template; `ends` are token ids."""
    tokens: Any = tokenizer.convert_ids_to_tokens(sorted(ends))
    template: Any = tokenizer.chat_template
    return TextRecord(template, config.tokens.chat_template_kwargs or {}, day, dict(zip(tokens, sorted(ends))))


def read_text(*folders: Path) -> TextRecord | None:
    """Read the record of the first folder that has one. Raises UserError if it is damaged."""
    path = next((folder / TEXT for folder in folders if (folder / TEXT).is_file()), None)
    return None if path is None else _read(path)


def read_text_on_hub(name: str, revision: str | None = None) -> TextRecord | None:
    """Read the record of a model or an adapter on the hub or in its cache. Raises UserError if it is damaged."""
    try:
        path = cached_file(name, TEXT, revision=revision, _raise_exceptions_for_missing_entries=False)
    except Exception:  # no such repository or no network, which loading the model reports
        return None
    return None if path is None else _read(Path(path))


def check_template_keywords(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for a key of tokens.chat_template_kwargs that no chat template of the config reads."""
    keywords = config.tokens.chat_template_kwargs
    if not keywords:
        return
    templates = _templates(config, tokenizer)
    if not templates:
        raise UserError("tokens.chat_template_kwargs: the tokenizer has no chat template; set tokens.chat_template")
    known: frozenset[str] = frozenset()
    for template in templates:
        try:
            known |= variables(template)
        except TemplateError as error:
            raise UserError(f"the chat template is not valid Jinja: {error}") from None
    unknown = next((name for name in keywords if name not in known), None)
    if unknown is not None:
        alike = get_close_matches(unknown, known - RESERVED, n=1)
        hint = f"did you mean {alike[0]}?" if alike else "its keywords are the names that the template's text reads"
        raise UserError(
            f"tokens.chat_template_kwargs.{unknown}: the chat template does not read {unknown}, so it would do "
            f"nothing; {hint}"
        )


# --- Where an answer ends --------------------------------------------------------------------------------------------


def stop_at(model: PreTrainedModel, ends: Collection[int]) -> list[int]:
    """Let a model's `generate`, and the generation_config.json saved with it, also stop at these tokens.

    Returns the tokens that are new to the model.
    """
    generation: Any = model.generation_config
    own = _ids(generation.eos_token_id)
    new = [token for token in ends if token not in own]
    if new:
        generation.eos_token_id = _all_ends(own, ends)
        generation._from_model_config = False  # its end tokens differ from those of the model's config
    return new


def save_generation_config(folder: Path, generation: GenerationConfig | None) -> None:
    """Write the generation config unless it exists already, as it does in the folder of a whole model."""
    if generation is not None and not (folder / _GENERATION).exists():
        _write_generation(folder, generation)


def add_text(folder: Path, text: TextRecord | None, architecture: PretrainedConfig) -> None:
    """Add the record and the end tokens to the folder of a whole model, which may have its base's config."""
    if text is None:
        return
    text.save(folder)
    path = folder / _GENERATION
    generation: Any = (
        GenerationConfig.from_pretrained(str(folder)) if path.is_file()
        else GenerationConfig.from_model_config(architecture)
    )  # fmt: skip
    generation.eos_token_id = _all_ends(_ids(generation.eos_token_id), text.ends.values())
    _write_generation(folder, generation)


def _write_generation(folder: Path, generation: GenerationConfig) -> None:
    """Write a generation config unchecked: `save_pretrained` refuses combinations that models on the hub have."""
    content = json.loads(generation.to_json_string())
    content.pop("_from_model_config", None)  # the model's config may have other end tokens
    (folder / _GENERATION).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _all_ends(own: list[int], trained: Collection[int]) -> int | list[int] | None:
    """Return the model's own ends if complete, or else all. Trained ones come first, as some programs read only one."""
    if not set(trained) <= set(own):
        own = [*trained, *(token for token in own if token not in trained)]
    return own if len(own) > 1 else next(iter(own), None)


def _ids(eos: int | list[int] | None) -> list[int]:
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


# ---------------------------------------------------------------------------------------------------------------------


def _templates(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the chat templates of the tokenizer and of the data sources."""
    own: Any = tokenizer.chat_template
    templates = list(own.values()) if isinstance(own, Mapping) else [own]
    for data in (*config.data, *config.eval.data):
        if isinstance(data.format, Mapping):
            templates.append(load_chat_template(data.format.get("chat_template"), "format.chat_template"))
    return [template for template in templates if template]


def _read(path: Path) -> TextRecord:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return TextRecord(
            content["chat_template"],
            dict(content["chat_template_kwargs"]),
            date.fromisoformat(content["day"]),
            {str(token): int(number) for token, number in content["ends"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error, named=True)})") from None
