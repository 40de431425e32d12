"""`fastpref init`: what it writes loads, says what the schema says, and replaces nothing unasked."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from fastpref.cli import main
from fastpref.commands.init import check_loss, kept, template
from fastpref.config import load_config
from fastpref.config.losses import LOSSES, LossOptions
from fastpref.config.text import Line, Table, keys_of, render, sections
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command in an empty folder."""

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["fastpref", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Ran(ended.value.code if isinstance(ended.value.code, int) else 0, said.out, said.err)

    monkeypatch.chdir(tmp_path)
    return run


def load(folder: Path, text: str) -> Any:
    path = folder / "made.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


# --- The template ----------------------------------------------------------------------------------------------------

RATES = {"dpo": 1e-4, "ipo": 1e-4, "kto": 1e-4, "orpo": 1e-4, "simpo": 1e-5, "cpo": 1e-4}
BETAS = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0, "cpo": 0.1}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_template_loads_as_what_was_asked_for(tmp_path: Path, loss: str):
    """The loss, model and data are those given, whatever characters their names have; adapters are trained."""
    config = load(tmp_path, template(loss, 'org/mo"del', "pairs é.jsonl"))
    assert (config.loss.type, config.model.name, config.data[0].path) == (loss, 'org/mo"del', "pairs é.jsonl")
    assert (config.train.learning_rate, config.loss.beta) == (RATES[loss], BETAS[loss])
    assert (config.lora.rank, config.lora.alpha, config.eval.fraction) == (16, 32.0, 0.05)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_key_has_the_schemas_own_words(loss: str):
    """Above each key stands its docstring, whole; every key of the schema that has a value to show is there."""
    lines = template(loss, "m", "d").splitlines()
    for section in sections():
        for key, field in keys_of(section, loss).items():
            words = " ".join((field.description or "").split())
            for at, line in enumerate(lines):
                if re.match(rf"#?{key} = ", line):
                    above = at
                    while above and lines[above - 1].startswith("# "):
                        above -= 1
                    said = " ".join(text.removeprefix("# ") for text in lines[above:at])
                    if words in said:
                        break
            else:
                assert field.default is None or f"{section}.{key}" == "eval.data" or section == "reference"


@pytest.mark.parametrize("loss", LOSSES)
def test_each_key_behind_a_hash_can_be_set(tmp_path: Path, loss: str):
    """Without its #, any line alone leaves a config that loads; a default that is shown changes nothing."""
    text = template(loss, "m", "d")
    lines = text.splitlines()
    before = load(tmp_path, text)
    hidden = [at for at, line in enumerate(lines) if re.match(r"#\w+ = ", line)]
    assert len(hidden) > 20
    changed = 0
    for at in hidden:
        config = load(tmp_path, "\n".join([*lines[:at], lines[at].removeprefix("#"), *lines[at + 1 :]]))
        changed += config != before
    assert 0 < changed < 15  # the keys without a default show an example


def test_every_loss_of_the_schema_has_a_template():
    """The losses that `--loss` takes are those of the schema."""
    assert {options.type for options in get_args(LossOptions)} == set(LOSSES)
    assert all(check_loss(loss.upper()) == loss for loss in LOSSES)


def test_the_chooser_is_the_readmes():
    """The words that help to choose are one table in two places."""
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


def test_the_default_is_dpo_in_a_file_of_its_name(run: Any, tmp_path: Path):
    """Without --loss and --output dpo.toml is written here, accepted by check, and the next commands are named."""
    ran = run("init", *GIVEN)
    assert (ran.status, ran.err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["dpo.toml"]
    lines = ran.out.splitlines()
    assert lines[0] == "dpo.toml is written. Next:"
    assert {"  fastpref check dpo.toml", "  fastpref train dpo.toml"} <= set(lines[1:])
    assert run("check", "dpo.toml").status == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_check_accepts_every_loss(run: Any, tmp_path: Path, loss: str):
    """`init` then `check` ends with status 0, in another folder too."""
    (tmp_path / "d.jsonl").write_text("x")
    (tmp_path / "configs").mkdir()
    assert run("init", "--loss", loss, *GIVEN, "--output", "configs/c.toml").status == 0
    assert run("check", "configs/c.toml").status == 0
    assert load_config(tmp_path / "configs" / "c.toml").data[0].path == str(tmp_path / "d.jsonl")


def test_a_dash_prints_the_config_alone(run: Any, tmp_path: Path):
    """`--output -` writes no file, and stdout is the config and nothing else."""
    ran = run("init", "--loss", "KTO", *GIVEN, "--output", "-")
    assert ran == Ran(0, template("kto", "m", "d.jsonl"), "")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_by_force(run: Any, tmp_path: Path):
    """A file that is there stays as it is, without --force."""
    (tmp_path / "dpo.toml").write_text("mine")
    ran = run("init", *GIVEN)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == "fastpref: dpo.toml: is there already; name another --output, or replace it with --force\n"
    assert (tmp_path / "dpo.toml").read_text() == "mine"
    assert run("init", *GIVEN, "--force").status == 0
    assert (tmp_path / "dpo.toml").read_text() == template("dpo", "m", "d.jsonl")


MISTAKES = {
    "no model": (["--data", "d"], "init needs --model and --data"),
    "no data": (["--model", "m"], "init needs --model and --data"),
    "no such loss": ([*GIVEN, "--loss", "ppo"], "--loss ppo: there is no such loss; take one of dpo, ipo, kto"),
    "both ways": (["--from-axolotl", "a.yml", *GIVEN], "--from-axolotl takes the loss, the model and the data from"),
    "no such folder": ([*GIVEN, "--output", "none/c.toml"], "none/c.toml: cannot be written: No such file"),
    "a folder": ([*GIVEN, "--output", ".", "--force"], ".: is a folder; --output takes the name of a file"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message_and_no_file(run: Any, tmp_path: Path, arguments: list[str], said: str):
    """Status 2, one line on stderr, and nothing is written."""
    ran = run("init", *arguments)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith(f"fastpref: {said}")
    assert ran.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_paths_keep_their_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What exists here is named as seen from the config's folder; other names and absolute paths stay."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "d.jsonl").write_text("x")
    (tmp_path / "out" / "d.jsonl").write_text("another")
    assert kept("d.jsonl", Path("out")) == "../d.jsonl"
    assert kept("./d.jsonl", Path()) == "d.jsonl"
    for name in ("org/name", str(tmp_path / "d.jsonl"), "~no-such-person/x", "{{ jinja }}" * 100):
        assert kept(name, Path("out")) == name
