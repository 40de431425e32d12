"""Translate the data sets of a LLaMA-Factory config, which dataset_info.json describes, into [[data]]."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpref.data.rows.messages import STANDARD
from fastpref.errors import UserError
from fastpref.translate.fields import Fields, Left, Made, Setting, shown
from fastpref.translate.sources import SUFFIXES

INFO = "dataset_info.json"
KEYS = {  # key of an entry of dataset_info.json → its translation, in words for the documentation
    "file_name": "`path`, in `dataset_dir`; of a folder a [[data]] each file",
    "hf_hub_url": "`path`",
    "subset": "`name`",
    "split": "`split`",
    "revision": "`revision`",
    "num_samples": "`rows`, the first ones",
    "formatting": "`format`, with `columns` and `tags`: nothing where `auto` reads the rows alike, else "
    "chat_template.default with their names",
    "ranking": "nothing: the columns show it",
    "columns": "see `formatting`",
    "tags": "see `formatting`",
}
LEFT_OUT = {
    "folder": "a folder of a data set of the hub cannot be named; all of it is read",
    "ms_hub_url": "data sets of ModelScope are not loaded",
    "om_hub_url": "data sets of Modelers are not loaded",
    "script_url": "data sets with code of their own are not loaded",
    "cloud_file_name": "cloud storage is not read; copy the data to this machine",
    "file_sha1": "files are read as they are",
}
_ROLES = {  # tag of a role → the template's role, and LLaMA-Factory's default
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("tool", "observation"),
    "function_tag": ("assistant", "function_call"),
    "system_tag": ("system", "system"),
}


def train(config: Fields) -> Made:
    yield from _listed(config, "dataset", ("data",))


def held_out(config: Fields) -> Made:
    yield from _listed(config, "eval_dataset", ("eval", "data"))
    share = config.number("val_size", 0)
    if share and "eval_dataset" in config:
        raise config.refused("val_size", "eval_dataset is held out already; remove one of them")
    if share >= 1:
        yield Left("val_size", "a number of rows cannot be held out; set eval.fraction to a share below 1")
    elif share:
        yield Setting(("eval", "fraction"), share, ("val_size",), "by a hash of the prompt")


def _listed(config: Fields, field: str, section: tuple[str, ...]) -> Made:
    folder = config.text("dataset_dir", "data")
    described = None if folder == "ONLINE" else _described(config, folder)
    at = 0
    for name in config.names(field):
        if described is None:
            if folder != "ONLINE":
                place = f"{folder}/{INFO}"
                yield Left(field, f"{place} is not here, so {name} is taken for the path of a data set; set its path")
            entry, paths = {}, [name]
        else:
            where, entries = described
            entry = entries.get(name)
            if not isinstance(entry, dict):
                known = ", ".join(list(entries)[:8]) + (", ..." if len(entries) > 8 else "")
                raise config.refused(field, f"{name} is not in {where}, which has {known or 'nothing'}")
            paths = _paths(config, field, name, entry, folder)
        for path in paths:
            yield from _source(config, (*section, at), path, entry, f"{field}: {name}")
            at += 1
        yield from _lost(entry, f"{field}: {name}")


def _described(config: Fields, folder: str) -> tuple[str, Mapping[str, Any]] | None:
    """Return the place and the entries of dataset_info.json, or None if there is none. Raises UserError."""
    for root in (Path(), config.file.parent):
        path = root / folder / INFO
        try:
            entries = json.loads(path.read_text(encoding="utf-8-sig"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        if not isinstance(entries, dict):
            raise UserError(f"{path}: must be a table of data sets, got {shown(entries)}")
        return str(path), entries
    return None


def _paths(config: Fields, field: str, name: str, entry: Mapping[str, Any], folder: str) -> list[str]:
    if "hf_hub_url" in entry:
        return [str(entry["hf_hub_url"])]
    if "file_name" not in entry:
        what = next((key for key in LEFT_OUT if key in entry), None)
        why = LEFT_OUT[what] if what else "it has neither file_name nor hf_hub_url"
        raise config.refused(field, f"{name}: {why}")
    path = f"{folder.rstrip('/')}/{entry['file_name']}"
    for root in (Path(), config.file.parent):
        if (root / path).is_dir():
            files = sorted(file.name for file in (root / path).iterdir() if file.name.endswith(SUFFIXES))
            return [f"{path}/{file}" for file in files] or [path]
    return [path]


def _source(config: Fields, key: tuple[str | int, ...], path: str, entry: Mapping[str, Any], place: str) -> Made:
    yield Setting((*key, "path"), path, (place,))
    for name, ours in (("subset", "name"), ("split", "split"), ("revision", "revision")):
        if name in entry and "hf_hub_url" in entry and (name, entry[name]) != ("split", "train"):
            yield Setting((*key, ours), entry[name], (f"{place}: {name}",))
    limits = {"max_samples": config.whole("max_samples", 0), "num_samples": entry.get("num_samples")}
    counts = [count for count in limits.values() if isinstance(count, int) and count > 0]
    if counts:
        yield Setting((*key, "rows"), min(counts), tuple(name for name, count in limits.items() if count))
    form, reason = format_of(entry, config.method)
    if reason:
        yield Left(f"{place}: columns", reason)
    elif form is not None:
        yield Setting((*key, "format"), form, (f"{place}: columns, tags",))


def format_of(entry: Mapping[str, Any], method: str) -> tuple[Any, str]:
    """Return the format that reads rows as LLaMA-Factory does, None for "auto"; and a reason if there is none."""
    given = entry.get("columns")
    columns = given if isinstance(given, dict) else {}
    if entry.get("formatting", "alpaca") == "alpaca":
        return _alpaca(columns, bool(columns), method)
    tags = entry.get("tags")
    return _sharegpt(columns, tags if isinstance(tags, dict) else {}, method)


_SYSTEM = "the system prompt is in the column {name}, and only a column called system is read; rename it"


def _alpaca(columns: Mapping[str, Any], named: bool, method: str) -> tuple[Any, str]:
    prompt = columns.get("prompt", "instruction")
    query = columns.get("query", None if named else "input")
    history = columns.get("history")
    if columns.get("system") not in (None, "system"):
        return None, _SYSTEM.format(name=columns["system"])
    answers = _answers(columns, method, "output")
    is_usual = (
        prompt == "instruction"
        and query in (None, "input")
        and history in (None, "history")
        and all(name == key.removeprefix("field_") for key, name in answers.items() if key in _PAIR)
        and (method not in ("kto", "sft") or answers["field_completion"] in ("output", "completion"))
        and answers.get("field_label", "kto_tag") in ("kto_tag", "label")
    )
    if is_usual:
        return None, ""
    if query or history:
        which = " and ".join(name for name in (query, history) if name)
        why = f"the columns {prompt} and {which} are one prompt, which a function of your own can read"
        return None, f'{why}: format = "module:function"'
    asked = {"field_messages": prompt} if method not in ("kto", "sft") else {"field_prompt": prompt}
    return {"type": "chat_template.default", **asked, **answers}, ""


_PAIR = ("field_chosen", "field_rejected")


def _answers(columns: Mapping[str, Any], method: str, response: str) -> dict[str, str]:
    """Return the columns of the completions and of the label, by the options of a chat format."""
    if method == "sft":
        return {"field_completion": columns.get("response", response)}
    if method == "kto":
        tag = columns.get("kto_tag", "kto_tag")
        return {"field_completion": columns.get("response", response), "field_label": tag}
    return {f"field_{name}": columns.get(name, name) for name in ("chosen", "rejected")}


def _sharegpt(columns: Mapping[str, Any], tags: Mapping[str, Any], method: str) -> tuple[Any, str]:
    if columns.get("system") not in (None, "system"):
        return None, _SYSTEM.format(name=columns["system"])
    messages = columns.get("messages", "conversations")
    answers = {key: name for key, name in _answers(columns, method, "").items() if key != "field_completion"}
    options: dict[str, Any] = {}
    keys = (tags.get("role_tag", "from"), tags.get("content_tag", "value"))
    if keys not in (("from", "value"), ("role", "content")):
        options["message_property_mappings"] = dict(zip(("role", "content"), keys, strict=True))
    roles: dict[str, list[str]] = {}
    for tag, (role, default) in _ROLES.items():
        name = tags.get(tag, default)
        if isinstance(name, str) and STANDARD.known_roles.get(name) != role:
            roles.setdefault(role, []).append(name)
    if roles:
        options["roles"] = roles
    if columns.get("tools") not in (None, "tools"):
        options["tools"] = columns["tools"]
    usual = messages in ("conversations", "messages") and all(
        name == key.removeprefix("field_") or (key == "field_label" and name in ("kto_tag", "label"))
        for key, name in answers.items()
    )
    if usual and not options:
        return None, ""
    return {"type": "chat_template.default", "field_messages": messages, **answers, **options}, ""


def _lost(entry: Mapping[str, Any], place: str) -> Made:
    columns = entry.get("columns")
    for name in ("images", "videos", "audios"):
        if isinstance(columns, dict) and columns.get(name):
            yield Left(f"{place}: {name}", "images, videos and sounds are not trained on; rows with them are refused")
    for name, value in entry.items():
        if name in LEFT_OUT and value:
            yield Left(f"{place}: {name}", LEFT_OUT[name])
        elif name not in KEYS and name not in LEFT_OUT:
            yield Left(f"{place}: {name}", "unknown key")
