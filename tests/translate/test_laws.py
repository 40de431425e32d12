"""What holds for the translation of every trainer's configs."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpref.config import Config
from fastpref.config.losses import LOSSES
from fastpref.config.text import keys_of, sections
from fastpref.errors import UserError
from fastpref.translate import DIALECTS, translate
from tests.support.paths import DOCS
from tests.support.translations import TRAINERS, Trainer, methods_of, tables, translated

EVERY = pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
METHODS = [(trainer, method) for trainer in TRAINERS.values() for method in methods_of(trainer)]
RULED = [
    (trainer, field)
    for trainer in TRAINERS.values()
    for field in sorted(trainer.ruled)
    if field not in trainer.methods_by or "sft" in LOSSES
]


def named(cases: list[tuple[Trainer, str]]) -> list[str]:
    return [f"{trainer.dialect.trainer}-{name}" for trainer, name in cases]


def test_every_option_has_a_trainer():
    """The trainers that are tested are those of the command line."""
    assert {trainer.dialect.option for trainer in TRAINERS.values()} == set(DIALECTS)


@EVERY
def test_every_field_is_translated_or_has_a_reason(trainer: Trainer):
    """Every field of a trainer's schema has a rule or exactly one reason, and so has every key of a table of data."""
    names = trainer.names
    matches = {field: [n for n in names if fnmatchcase(field, n)] for field in trainer.left_fields}
    assert [field for field, found in matches.items() if len({names[name] for name in found}) != 1] == []
    assert trainer.ruled & set(names) == set()
    assert [name for name in names if not any(name in found for found in matches.values())] == []
    assert set(trainer.entry_keys) & set(trainer.entry_left_out) == set()


@pytest.mark.parametrize(("trainer", "method"), METHODS, ids=named(METHODS))
def test_the_smallest_config_of_every_method_loads(tmp_path: Path, trainer: Trainer, method: str):
    """The smallest config becomes a config of that loss without a refused key, whole or with adapters."""
    for more in ({}, trainer.adapters):
        translation = translated(trainer, tmp_path, {**trainer.methods[method], **more})
        config = Config.model_validate(tables(translation))
        assert config.loss.type == method
        assert [(setting.key, reason) for setting, reason in translation.refused] == []


@pytest.mark.parametrize(("trainer", "method"), METHODS, ids=named(METHODS))
def test_fields_without_a_counterpart_are_listed(tmp_path: Path, trainer: Trainer, method: str):
    """Each field with a value but without a counterpart is listed with its reason, and the config loads."""
    fields = [field for field in trainer.left_fields if field not in trainer.methods_by]
    translation = translated(trainer, tmp_path, {**dict.fromkeys(fields, 3), **trainer.methods[method]})
    lines = translation.left_out
    assert [field for field in fields if f"{field}: {trainer.dialect.reason_for(field)}" not in lines] == []
    Config.model_validate(tables(translation))


ODD = [3, 0.5, "x", True, [1], ["a", {"b": 1}], {"a": [1]}, "\x01\n", -1, ["q_proj"]]


@pytest.mark.parametrize(("trainer", "field"), RULED, ids=named(RULED))
def test_values_of_another_kind(tmp_path: Path, trainer: Trainer, field: str):
    """Whatever a field's value is, there is a message or a config that loads."""
    messages: list[str] = []
    for method in methods_of(trainer):
        for value in ODD:
            try:
                translation = translated(
                    trainer, tmp_path, {**trainer.methods[method], **trainer.adapters, field: value}
                )
            except UserError as error:
                messages.append(str(error))
            else:
                Config.model_validate(tables(translation))
    assert [message for message in messages if "\n" in message] == []


@pytest.mark.parametrize(("trainer", "field"), RULED, ids=named(RULED))
def test_a_field_leaves_a_trace(tmp_path: Path, trainer: Trainer, field: str):
    """A field with a rule is named beside a key or listed as left out, or some value of it is refused."""
    for method in methods_of(trainer):
        base = {**trainer.methods[method], **trainer.adapters, **trainer.needs.get(field, {})}
        plain = translated(trainer, tmp_path, base).text
        for value in (True, 3, "epoch", 0.5, ["q_proj"], "q_proj", {"a": 1}, 4, False, "nf4"):
            try:
                if translated(trainer, tmp_path, {**base, field: value}).text != plain:
                    break
            except UserError:
                break
        else:
            pytest.fail(f"{field} changes nothing in a config of {method}")


@EVERY
def test_an_unknown_field_is_listed(tmp_path: Path, trainer: Trainer):
    """A field that is not in the trainer's schema is listed as unknown."""
    assert "mystery: unknown field" in translated(trainer, tmp_path, {"mystery": 3}).left_out


# --- Mistakes --------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an? .* config"),
        (b"- a\n- b\n", "not an? .* config"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a: &a [*a]\n", "not valid YAML"),
        (b"a: 2024-99-99\n", "not valid YAML"),
        (b"a: !!python/object:os.system {}\n", "cfg.yml:1: not valid YAML"),
        (b"a: [\n", "cfg.yml:2: not valid YAML"),
        (b"a: 1\n", "there is no (rl|model_name_or_path|base_model): in it"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, trainer: Trainer, content: bytes, message: str):
    """A file that is no config is refused with one message, and no code in it runs."""
    (tmp_path / "cfg.yml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        translate(trainer.dialect, tmp_path / "cfg.yml", tmp_path)
    with pytest.raises(UserError, match="there is no such file"):
        translate(trainer.dialect, tmp_path / "none.yml", tmp_path)
    with pytest.raises(UserError, match=f"this is a folder; {trainer.dialect.option} takes"):
        translate(trainer.dialect, tmp_path, tmp_path)


@EVERY
def test_another_trainers_config_is_told_its_option(tmp_path: Path, trainer: Trainer):
    """The config of one trainer, given to the option of another, is refused with the option to use."""
    (tmp_path / "cfg.yml").write_text(yaml.safe_dump(dict(trainer.smallest)))
    for other in TRAINERS.values():
        if other is not trainer:
            with pytest.raises(UserError, match=f"a config of {trainer.dialect.trainer}.*{trainer.dialect.option} "):
                translate(other.dialect, tmp_path / "cfg.yml", tmp_path)


# --- The pages -------------------------------------------------------------------------------------------------------


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def page_tables(trainer: Trainer) -> list[str]:
    """Return the tables of a trainer's page."""
    rules = trainer.dialect.rules
    fields = [f"| {quoted(r.fields) or '(always)'} | {quoted(r.keys) or '(none)'} | {r.how} |" for r in rules]
    entries = [f"| `{field}` | {how} |" for field, how in trainer.entry_keys.items()]
    reasons: dict[str, list[str]] = {}
    lost = {f"{trainer.entry}{field}": reason for field, reason in trainer.entry_left_out.items()}
    for field, reason in (trainer.names | lost).items():
        reasons.setdefault(reason, []).append(field)
    left = [f"| {quoted(names)} | {reason} |" for reason, names in reasons.items()]
    return ["\n".join(table) for table in (fields, entries, left)]


@pytest.mark.parametrize("at", [0, 1, 2])
@EVERY
def test_the_page_holds_the_tables(trainer: Trainer, at: int):
    """The page of a trainer has these tables; if this fails, put the printed table into the page."""
    assert page_tables(trainer)[at] in (DOCS / trainer.page).read_text(encoding="utf-8")


PENDING = {
    "train.schedule_options", "train.min_lr", "train.epsilon", "train.betas", "train.neftune_alpha", "train.stop",
    "reference.sync", "reference.name", "reference.adapter", "lora.stack", "lora.from", "lora.init", "lora.plus_ratio",
    "lora.layers", "tokens.add",
}  # fmt: skip


@EVERY
def test_the_rules_name_keys_that_exist(trainer: Trainer):
    """Every key of a rule is in the schema."""
    known: set[Any] = {"data", "lora", *PENDING}
    known |= {f"{s}.{info.alias or key}" for s in sections() for m in LOSSES for key, info in keys_of(s, m).items()}
    assert {key for rule in trainer.dialect.rules for key in rule.keys} <= known
