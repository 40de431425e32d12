"""Translate `datasets` and `test_datasets` of Axolotl into [[data]] and [[eval.data]]."""

from collections.abc import Iterator, Mapping
from typing import Any

from fastpref.config.formats import NAMES
from fastpref.data.template.named import KNOWN, OWN
from fastpref.errors import UserError
from fastpref.translate.fields import Fields, Left, Setting, shown
from fastpref.translate.sources import BUILDERS, SUFFIXES, files_of

_CHAT = "chat_template."

KEYS = {  # key of an entry → its translation, in words for the documentation
    "path": "`path`; of a builder such as `json` or of a folder, the `data_files` are",
    "data_files": "a [[data]] a file, where `path` is a folder here or a builder",
    "split": "`split`",
    "name": "`name`",
    "revision": "`revision`",
    "type": "`format`: the same name; a table of `field_*` and `*_format` as it is; nothing, `auto`",
    "field_messages": "`format.field_messages`, with a type of `chat_template.*`, as all below",
    "field_chosen": "`format.field_chosen`",
    "field_rejected": "`format.field_rejected`",
    "field_tools": "`format.tools`",
    "message_property_mappings": "`format.message_property_mappings`",
    "message_field_role": "`format.message_property_mappings.role`",
    "message_field_content": "`format.message_property_mappings.content`",
    "roles": "`format.roles`",
    "chat_template": "`format.chat_template`, if it is " + ", ".join(f"`{name}`" for name in KNOWN),
    "chat_template_jinja": "`format.chat_template`",
}
_REASONS = {  # reason → keys of an entry
    "a file's kind goes by its suffix: " + ", ".join(SUFFIXES): "ds_type",
    "data sets with code of their own are not loaded": "trust_remote_code",
    "there is no such key; rows and weight take a part of the data": "shards shards_idx",
    "rows are read when they are needed": "preprocess_shards",
    "every key of a message reaches the chat template under its own name; rename one by message_property_mappings":
        "field_thinking template_thinking_key",
    "messages are written by the chat template as they are": "split_thinking",
    'there is no such key; a function of your own, format = "module:function", can drop turns': "drop_system_message",
    "it is for stepwise rewards": "step_separator max_completion_length train_on_last_step_only",
    "it is for supervised data; a preference's prompt is never trained on, its completions are wholly": """
        input_transform conversation input_format field field_human field_model logprobs_field temperature
        roles_to_train train_on_eos train_on_eot message_field_training message_field_training_detail""",
}  # fmt: skip
LEFT_OUT = {key: reason for reason, keys in _REASONS.items() for key in keys.split()}
_OPTIONS = ("field_messages", "field_chosen", "field_rejected", "message_property_mappings", "roles")
_OF_CHATS = (
    *_OPTIONS, "field_tools", "message_field_role", "message_field_content", "chat_template", "chat_template_jinja",
)  # fmt: skip


def entries(config: Fields, field: str, section: tuple[str, ...]) -> Iterator[Setting | Left]:
    """Translate the entries of `datasets` or `test_datasets`."""
    listed = config.get(field)
    if listed is None:
        return
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise UserError(f"{config.file}: {field}: must be a list of tables, each with a path, got {shown(listed)}")
    at = 0
    for number, entry in enumerate(listed):
        place = f"{field}[{number}]"
        given = {str(key): value for key, value in entry.items() if value is not None}
        if not isinstance(given.get("path"), str):
            raise UserError(f"{config.file}: {place}: there is no path in it, which says where the rows are")
        paths, lost = files_of(given["path"], given.get("data_files"), f"{place}.", (config.file.parent,))
        yield from lost
        for path in paths:
            yield from _source(given, path, place, (*section, at))
            at += 1
        yield from _lost(given, place)


def _source(entry: Mapping[str, Any], path: str, place: str, key: tuple[str | int, ...]) -> Iterator[Setting | Left]:
    yield Setting((*key, "path"), path, (f"{place}.path",))
    for name in ("split", "name", "revision"):
        if name in entry:
            yield Setting((*key, name), entry[name], (f"{place}.{name}",))
    form = _named(entry)
    if isinstance(form, str) and form.startswith(_CHAT):
        options, lost = _options(entry, place)
        yield from lost
        form = {"type": form, **options} if options else form
    if form is not None:
        yield Setting((*key, "format"), form, (f"{place}.type", *(f"{place}.{n}" for n in _OF_CHATS if n in entry)))


def _named(entry: Mapping[str, Any]) -> Any:
    """Return the format for the type of an entry; None means that the columns decide."""
    given = entry.get("type")
    if isinstance(given, dict):
        return {str(option): value for option, value in given.items() if value is not None} or None
    if not isinstance(given, str) or given in NAMES:
        return given
    # Axolotl adds .default to a name without a dot, and some of its modules have only one strategy
    for name in (f"{given}.default", given.removesuffix(".default")):
        if name in NAMES:
            return name
    return given


def _options(entry: Mapping[str, Any], place: str) -> tuple[dict[str, Any], list[Left]]:
    """Return the options of a chat_template.* format, and the fields lost if a template is unknown."""
    options = {name: entry[name] for name in _OPTIONS if name in entry}
    legacy = {"role": entry.get("message_field_role"), "content": entry.get("message_field_content")}
    renamed = {name: key for name, key in legacy.items() if key is not None}
    if renamed:
        options["message_property_mappings"] = renamed | dict(options.get("message_property_mappings") or {})
    if "field_tools" in entry:
        options["tools"] = entry["field_tools"]
    template, lost = chat_template(entry, f"{place}.")
    if template is not None:
        options["chat_template"] = template
    return options, lost


def chat_template(fields: Any, prefix: str = "") -> tuple[str | None, list[Left]]:
    """Return the template that the fields mean: a known name, Jinja or a file; None is the tokenizer's own."""
    name, jinja = fields.get("chat_template"), fields.get("chat_template_jinja")
    if jinja is not None and name in (None, "jinja"):
        return jinja, []
    lost = [Left(f"{prefix}chat_template_jinja", f"chat_template: {name} is used instead")] if jinja is not None else []
    if name is None or name == OWN:
        return None, lost
    fallback = str(name).removeprefix("tokenizer_default_fallback_")
    if fallback != name:
        why = f"the tokenizer's own template is used; if it has none, set chat_template to {fallback!r}"
        return None, [*lost, Left(f"{prefix}chat_template", why)]
    if name not in KNOWN:
        why = (
            f"{shown(name)} is not a template of fastpref (those are {', '.join(KNOWN)}), so the tokenizer's own is "
            "used; a file of Jinja can be named instead"
        )
        return None, [*lost, Left(f"{prefix}chat_template", why)]
    return name, lost


def _lost(entry: Mapping[str, Any], place: str) -> Iterator[Left]:
    chat = _named(entry)
    is_chat = isinstance(chat, str) and chat.startswith(_CHAT)
    for name, value in entry.items():
        if name in LEFT_OUT:
            ordinary = name == "ds_type" and (str(entry["path"]).endswith(SUFFIXES) or entry["path"] in BUILDERS)
            if value not in (False, "", [], {}) and not ordinary:
                yield Left(f"{place}.{name}", LEFT_OUT[name])
        elif name in _OF_CHATS and not is_chat:
            yield Left(f"{place}.{name}", "only formats chat_template.* have this option")
        elif name not in KEYS:
            yield Left(f"{place}.{name}", "unknown field")
