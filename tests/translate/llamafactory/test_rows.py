"""Translation of the data sets that a LLaMA-Factory config names and dataset_info.json describes."""

from pathlib import Path
from typing import Any

import pytest

from fastpref.errors import UserError
from fastpref.translate.llamafactory import rows
from fastpref.translate.llamafactory.rows import format_of
from tests.support.translations import TRAINERS, snippet, tables

FACTORY = TRAINERS["LLaMA-Factory"]

ENTRIES: dict[str, list[dict[str, Any]]] = {
    "dataset: pairs": [{"path": "data/pairs.json"}],
    "{dataset: 'pairs,hub', max_samples: 20}": [
        {"path": "data/pairs.json", "rows": 20},
        {"path": "org/pairs", "name": "s", "split": "test", "revision": "v1", "rows": 20},
    ],
    "{dataset: hub, max_samples: 80}": [
        {"path": "org/pairs", "name": "s", "split": "test", "revision": "v1", "rows": 50},
    ],
    "dataset: files": [{"path": "data/many/a.json"}, {"path": "data/many/b.json"}],
    "{dataset: org/online, dataset_dir: ONLINE}": [{"path": "org/online"}],
}  # fmt: skip


@pytest.mark.parametrize("added", ENTRIES)
def test_names_are_looked_up(described: Path, added: str):
    """A data set is the file, the files or the repository that dataset_info.json names."""
    translation = snippet(FACTORY, described, added)
    assert tables(translation)["data"] == ENTRIES[added]
    assert translation.left_out == []


UNUSABLE = {
    "dataset: pears": "dataset: pears is not in data/dataset_info.json, which has pairs, hub, files, script",
    "dataset: script": "dataset: script: data sets with code of their own are not loaded",
    "dataset: cloud": "dataset: cloud: cloud storage is not read",
    "dataset: ms": "dataset: ms: data sets of ModelScope are not loaded",
    "dataset: nothing": "dataset: nothing: it has neither file_name nor hf_hub_url",
}


@pytest.mark.parametrize("added", UNUSABLE)
def test_what_cannot_be_loaded_is_refused(described: Path, added: str):
    """A name that is not described, or describes what is not loaded here, is one message with the place."""
    with pytest.raises(UserError, match=UNUSABLE[added]):
        snippet(FACTORY, described, added)


def test_what_a_description_has_more_is_listed(described: Path):
    """A key of an entry without a counterpart is listed with the data set's name."""
    lines = snippet(FACTORY, described, "dataset: 'odd,images'").left_out
    assert f"dataset: odd: folder: {rows.LEFT_OUT['folder']}" in lines
    assert "dataset: odd: colums: unknown key" in lines
    assert any(line.startswith("dataset: images: images: images, videos and sounds are not") for line in lines)


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read"), ("[]", "must be a table of data sets")])
def test_a_broken_description_is_one_message(described: Path, content: str, message: str):
    """A dataset_info.json that is none is refused."""
    (described / "data" / "dataset_info.json").write_text(content)
    with pytest.raises(UserError, match=f"data/dataset_info.json: {message}"):
        snippet(FACTORY, described, "dataset: pairs")


PAIRS = {"chosen": "chosen", "rejected": "rejected"}
CHAT = {"type": "chat_template.default"}
FORMATS: list[tuple[str, dict[str, Any], Any]] = [  # loss, description, format
    ("dpo", {}, None),
    ("dpo", {"columns": {"prompt": "instruction", "query": "input", "history": "history", **PAIRS}}, None),
    ("dpo", {"columns": {"prompt": "prompt", **PAIRS}},
     {**CHAT, "field_messages": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}),
    ("dpo", {"columns": {"prompt": "q", "chosen": "good", "rejected": "bad", "system": "system"}},
     {**CHAT, "field_messages": "q", "field_chosen": "good", "field_rejected": "bad"}),
    ("kto", {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "kto_tag"}}, None),
    ("kto", {"columns": {"prompt": "q", "response": "a", "kto_tag": "good"}},
     {**CHAT, "field_prompt": "q", "field_completion": "a", "field_label": "good"}),
    ("dpo", {"formatting": "sharegpt", "columns": {"messages": "conversations", **PAIRS}}, None),
    ("dpo", {"formatting": "sharegpt", "columns": {"messages": "messages", **PAIRS},
             "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
     None),
    ("dpo", {"formatting": "sharegpt", "columns": {"messages": "talk", **PAIRS}},
     {**CHAT, "field_messages": "talk", "field_chosen": "chosen", "field_rejected": "rejected"}),
    ("dpo", {"formatting": "sharegpt", "columns": {"messages": "messages", **PAIRS},
             "tags": {"role_tag": "by", "content_tag": "text", "user_tag": "me", "assistant_tag": "you"}},
     {**CHAT, "field_messages": "messages", "field_chosen": "chosen", "field_rejected": "rejected",
      "message_property_mappings": {"role": "by", "content": "text"}, "roles": {"user": ["me"], "assistant": ["you"]}}),
    ("kto", {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}}, None),
    ("kto", {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "good"}},
     {**CHAT, "field_messages": "messages", "field_label": "good"}),
    ("sft", {}, None),
    ("sft", {"columns": {"prompt": "q", "response": "a"}}, {**CHAT, "field_prompt": "q", "field_completion": "a"}),
    ("sft", {"formatting": "sharegpt"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("method", "entry", "form"), FORMATS)
def test_columns_and_tags_become_a_format(method: str, entry: dict[str, Any], form: Any):
    """Columns and tags that `auto` knows need no format; others become the options of a chat format."""
    assert format_of(entry, method) == (form, "")


UNREAD = [
    ({"columns": {"prompt": "q", "query": "more", **PAIRS}}, "the columns q and more are one prompt"),
    ({"columns": {"prompt": "q", "system": "persona", **PAIRS}}, "the system prompt is in the column persona"),
    ({"formatting": "sharegpt", "columns": {"system": "persona"}}, "the system prompt is in the column persona"),
]


@pytest.mark.parametrize(("entry", "reason"), UNREAD)
def test_columns_that_no_format_reads_have_a_reason(entry: dict[str, Any], reason: str):
    """Columns that no format can read get no format, and a reason that says what to do."""
    form, why = format_of(entry, "dpo")
    assert form is None
    assert reason in why


def test_the_formats_read_rows_as_llama_factory_does():
    """A row of each description gives the messages that LLaMA-Factory makes of it."""
    from fastpref.data.rows.formats import find_format

    row = {"q": "Why?", "good": "So.", "bad": "No.", "system": "Be brief."}
    form, _ = format_of({"columns": {"prompt": "q", "chosen": "good", "rejected": "bad", "system": "system"}}, "dpo")
    found = find_format(form, unpaired=False)
    assert found is not None
    content: Any = found.read(row)
    assert content.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert content.chosen == [{"role": "assistant", "content": "So."}]
    talk = [{"by": "me", "text": "Hi."}]
    tags = {"role_tag": "by", "content_tag": "text", "user_tag": "me", "assistant_tag": "you"}
    entry = {"formatting": "sharegpt", "columns": {"messages": "messages", **PAIRS}, "tags": tags}
    found = find_format(format_of(entry, "dpo")[0], unpaired=False)
    assert found is not None
    content = found.read(
        {"messages": talk, "chosen": {"by": "you", "text": "A"}, "rejected": {"by": "you", "text": "B"}}
    )
    assert content.prompt == [{"role": "user", "content": "Hi."}]
    assert content.rejected == [{"role": "assistant", "content": "B"}]
