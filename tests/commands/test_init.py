"""`fastpref init`: its configs load, have the schema's descriptions, and replace no file without --force."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

from fastpref.commands.init import check_loss, kept, template
from fastpref.config import load_config
from fastpref.config.losses import LOSSES, LossOptions
from fastpref.config.text import Line, Table, keys_of, render, sections
from tests.support.command_line import CommandResult, run_command, succeed
from tests.support.paths import QUICKSTART_MODEL, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def load(folder: Path, text: str) -> Any:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


# --- The template ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_a_template_loads_as_what_was_asked_for(tmp_path: Path, loss: str):
    """The template has the given loss, model and data, whatever characters the names have, and trains adapters."""
    config = load(tmp_path, template(loss, 'org/mo"del', "pairs é.jsonl"))
    assert (config.loss.type, config.model.name, config.data[0].path) == (loss, 'org/mo"del', "pairs é.jsonl")
    beta = {"simpo": 2.0, "sft": 0.0}.get(loss, 0.1)
    assert (config.train.learning_rate, config.loss.beta) == (1e-5 if loss == "simpo" else 1e-4, beta)
    assert (config.lora.rank, config.lora.alpha, config.eval.fraction) == (16, 32.0, 0.05)


ROWS = {"text": {"prompt": "q"}, "a chat": {"prompt": [{"role": "user", "content": "q"}]}}


@pytest.mark.parametrize(("rows", "model", "line"), [
    ("text", "model", "chat = true"), ("text", "nowhere/x", '#chat = "auto"'), ("a chat", "model", '#chat = "auto"'),
])  # fmt: skip
def test_text_for_a_model_with_a_template_becomes_chats(elsewhere: Path, rows: str, model: str, line: str):
    """A new config makes chats of plain text if the model has a chat template, as far as both can be read here."""
    shutil.copytree(QUICKSTART_MODEL, elsewhere / "model")
    (elsewhere / "d.jsonl").write_text(json.dumps(ROWS[rows] | {"chosen": "y", "rejected": "n"}))
    text = succeed("init", "--model", model, "--data", "d.jsonl", "--output", "-").out
    assert next(found for found in text.splitlines() if re.match("#?chat = ", found)).startswith(line)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_key_has_the_schemas_own_words(loss: str):
    """Above each key is its whole docstring, and the template has every key of the schema that has a value to show."""
    lines = template(loss, "m", "d").splitlines()
    for section in sections():
        for key, field in keys_of(section, loss).items():
            words = " ".join((field.description or "").split())
            for at, line in enumerate(lines):
                if re.match(rf"#?{key} = ", line):
                    above = at
                    while above and lines[above - 1].startswith("# "):
                        above -= 1
                    comment = " ".join(text.removeprefix("# ") for text in lines[above:at])
                    if words in comment:
                        break
            else:
                assert field.default is None or f"{section}.{key}" == "eval.data" or section == "reference"


@pytest.mark.parametrize("loss", LOSSES)
def test_each_key_behind_a_hash_can_be_set(tmp_path: Path, loss: str):
    """Any commented line can be uncommented, and one that shows a default changes nothing."""
    text = template(loss, "m", "d")
    lines = text.splitlines()
    before = load(tmp_path, text)
    hidden = [at for at, line in enumerate(lines) if re.match(r"#\w+ = ", line)]
    assert len(hidden) > 20
    changed = 0
    for at in hidden:
        config = load(tmp_path, "\n".join([*lines[:at], lines[at].removeprefix("#"), *lines[at + 1 :]]))
        changed += config != before
    assert 0 < changed < 25  # keys without a default show an example


def test_every_loss_of_the_schema_has_a_template():
    """`--loss` takes exactly the losses of the schema."""
    assert {options.type for options in get_args(LossOptions)} == set(LOSSES)
    assert all(check_loss(loss.upper()) == loss for loss in LOSSES)


def test_the_chooser_is_the_readmes():
    """The README and the template have the same table of which loss suits which data."""
    rows = dict(re.findall(r"^\| ([^|]+) \| `(\w+)`(?:, the default)? \|$", README, re.MULTILINE))
    chooser = {name: options.suits for name, options in LOSSES.items()}
    assert {loss: words for words, loss in rows.items() if loss in LOSSES} == chooser
    for words in chooser.values():
        assert words in template("dpo", "m", "d")


def test_comments_cannot_end_early(tmp_path: Path):
    """Line ends and control characters in a comment do not become TOML."""
    text = render(["a\nb = 1"], [Table("[model]", (Line("name", "m", ("x\r\ny",), "p\x00q\nz = 2"),))], ["\x7f\nw = 3"])
    assert load(tmp_path, text + '[[data]]\npath = "d"\n').model.name == "m"


# --- The command -----------------------------------------------------------------------------------------------------

GIVEN = ("--model", "m", "--data", "d.jsonl")
PAIR = json.dumps({"prompt": "q", "chosen": "yes", "rejected": "no"})


def test_the_default_is_dpo_in_a_file_of_its_name(elsewhere: Path):
    """Without --loss and --output, dpo.toml is written here, check accepts it, and the next commands are printed."""
    result = run_command("init", *GIVEN)
    assert (result.status, result.err) == (0, "")
    assert [path.name for path in elsewhere.iterdir()] == ["dpo.toml"]
    lines = result.out.splitlines()
    assert lines[0] == "dpo.toml is written. Next:"
    assert {"  fastpref check dpo.toml", "  fastpref train dpo.toml"} <= set(lines[1:])
    (elsewhere / "d.jsonl").write_text(PAIR)
    succeed("check", "dpo.toml")


@pytest.mark.parametrize("loss", LOSSES)
def test_check_accepts_every_loss(elsewhere: Path, loss: str):
    """`check` accepts the config that `init` writes for any loss, also in another folder."""
    (elsewhere / "d.jsonl").write_text(PAIR)
    (elsewhere / "configs").mkdir()
    succeed("init", "--loss", loss, *GIVEN, "--output", "configs/c.toml")
    succeed("check", "configs/c.toml")
    assert load_config(elsewhere / "configs" / "c.toml").data[0].path == str(elsewhere / "d.jsonl")


def test_a_dash_prints_the_config_alone(elsewhere: Path):
    """`--output -` writes no file, and prints only the config."""
    result = run_command("init", "--loss", "KTO", *GIVEN, "--output", "-")
    assert result == CommandResult(0, template("kto", "m", "d.jsonl"), "")
    assert list(elsewhere.iterdir()) == []


def test_a_file_is_replaced_only_by_force(elsewhere: Path):
    """Without --force an existing file is not changed."""
    (elsewhere / "dpo.toml").write_text("mine")
    result = run_command("init", *GIVEN)
    assert (result.status, result.out) == (2, "")
    assert result.err == "fastpref: dpo.toml: is there already; name another --output, or replace it with --force\n"
    assert (elsewhere / "dpo.toml").read_text() == "mine"
    succeed("init", *GIVEN, "--force")
    assert (elsewhere / "dpo.toml").read_text() == template("dpo", "m", "d.jsonl")


MISTAKES = {
    "no model": (["--data", "d"], "init needs --model and --data"),
    "no data": (["--model", "m"], "init needs --model and --data"),
    "no source": (
        ["--model", "m"],
        "init needs --model and --data (and takes --loss), or --from-axolotl, --from-trl or",
    ),
    "no such loss": ([*GIVEN, "--loss", "ppo"], "--loss ppo: there is no such loss; take one of dpo, ipo, kto"),
    "both ways": (["--from-axolotl", "a.yml", *GIVEN], "--from-axolotl takes the loss, the model and the data from"),
    "no such folder": ([*GIVEN, "--output", "none/c.toml"], "none/c.toml: cannot be written: No such file"),
    "a folder": ([*GIVEN, "--output", ".", "--force"], ".: is a folder; --output takes the name of a file"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message_and_no_file(elsewhere: Path, arguments: list[str], message: str):
    """A mistake gives status 2 and one line on stderr, and nothing is written."""
    result = run_command("init", *arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(f"fastpref: {message}")
    assert result.err.count("\n") == 1
    assert list(elsewhere.iterdir()) == []


def test_paths_keep_their_meaning(elsewhere: Path):
    """Existing paths are written relative to the config's folder; other names and absolute paths do not change."""
    (elsewhere / "out").mkdir()
    (elsewhere / "d.jsonl").write_text("x")
    (elsewhere / "out" / "d.jsonl").write_text("another")
    assert kept("d.jsonl", Path("out")) == "../d.jsonl"
    assert kept("./d.jsonl", Path()) == "d.jsonl"
    for name in ("org/name", str(elsewhere / "d.jsonl"), "~no-such-person/x", "{{ jinja }}" * 100):
        assert kept(name, Path("out")) == name
