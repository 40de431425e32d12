"""The command line: a user's mistake gives one message and status 2, help is fast, and no file is left behind."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import CommandResult, run_command, run_process
from tests.support.crafted import write_run
from tests.support.paths import QUICKSTART_MODEL

GOOD = f'[model]\nname = "{QUICKSTART_MODEL.as_posix()}"\n[[data]]\npath = "pairs.json"\n[lora]\nrank = 4\n'
HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command in an empty folder, which afterwards must have only the files that the test wrote."""
    files: dict[str, str] = {}

    def run(*arguments: str, **texts: str) -> CommandResult:
        files.update({f"{name}.toml" if "." not in name else name: text for name, text in texts.items()})
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        return run_command(*arguments)

    monkeypatch.chdir(tmp_path)
    yield run
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == set(files)


BAD = GOOD + "[train]\nbatch = 0\nsed = 1\n"
LINES = {
    "pairs.jsonl": '{"prompt": "q", "chosen": "yes", "rejected": "no"}\n',
    "lines.jsonl": '{"prompt": "q", "completion": "yes"}\n{oops\n',
    "broken.jsonl": "{oops\n3\n",
}
MISTAKES = {  # command: message
    "check none.toml": "none.toml: there is no such file",
    "check .": ".: this is a folder; a config is a .toml file",
    "check bad.toml": (
        "bad.toml:8: train.batch: must be greater than or equal to 1, got 0\n"
        "bad.toml:9: train.sed: unknown key (did you mean 'seed'?)"
    ),
    "check good.toml train.sed=1": "override 'train.sed=1': train.sed: unknown key (did you mean 'seed'?)",
    "check good.toml seed": "override 'seed': not of the form key=value, such as 'train.steps=100'",
    "train none.toml": "none.toml: there is no such file",
    "train bad.toml train.batch=1": "bad.toml:9: train.sed: unknown key (did you mean 'seed'?)",
    "train good.toml train.steps=0": "override 'train.steps=0': train.steps: must be greater than or equal to 1, got 0",
    "train good.toml": "pairs.json: there is no such file",
    "train good.toml data.0.path=broken.json": (
        "broken.json:1: not valid JSON at column 13: Expecting value; mend it, or write one row a line (.jsonl)"
    ),
    "train good.toml data.0.path=lines.jsonl": (
        "lines.jsonl:2: not valid JSON at column 2: Expecting property name enclosed in double quotes"
    ),
    "train good.toml data.0.path=broken.jsonl data.0.on_error=drop": "broken.jsonl: no row can be read; the first: ",
    "train good.toml data.0.path=pairs.jsonl data.0.format=chatml.intel": (
        "pairs.jsonl:1: there is no column question; the columns are prompt, chosen, rejected; these columns fit "
    ),
    "train good.toml data.0.path=lines.jsonl data.0.rows=1 loss.type=kto": (
        "lines.jsonl: the columns prompt, completion are of no format that auto knows"
    ),
    "train good.toml data.0.path=pairs.jsonl data.0.format=no_such_module:read": (
        "format 'no_such_module:read': no_such_module cannot be imported: ModuleNotFoundError"
    ),
    "check good.toml data.0.format=chatml.intl": (
        "override 'data.0.format=chatml.intl': data[0].format: there is no format 'chatml.intl' (did you mean 'chat"
    ),
    "train good.toml data.0.path=rows.json": "rows.json: the columns a are of no format that auto knows",
    "train good.toml --resume none/step-3 train.steps=3": "--resume none/step-3: there is no such folder",
    "train good.toml --resume train.steps=3": "--resume: there is no run in runs/good-dpo; name a checkpoint",
    "train good.toml a --resume b": "--resume takes one checkpoint, not 2: a, b",
    "train good.toml a/step-3": "override 'a/step-3': not of the form key=value, such as 'train.steps=100'",
    "preview none.toml": "none.toml: there is no such file",
    "preview bad.toml --rows 3 train.batch=1": "bad.toml:9: train.sed: unknown key (did you mean 'seed'?)",
    "preview good.toml": "pairs.json: there is no such file",
    "preview good.toml --no-cache data.0.path=lines.jsonl": (
        "lines.jsonl:2: not valid JSON at column 2: Expecting property name enclosed in double quotes"
    ),
    "preview good.toml model.name=./none": "model.name = './none': no tokenizer there",
    "report none": "none: there is no such folder",
    "report .": ".: not a run's folder: it has neither metrics.jsonl with config.toml",
    "train good.toml model.name=./none data.0.path=pairs.jsonl": "model.name = './none': there is no such folder",
    "check good.toml model.name=./none tokens.chat_template=chatmll": (
        "model.name = './none': there is no such folder\n"
        "tokens.chat_template: chatmll: cannot be read\n"
        "pairs.json: there is no such file"
    ),
    "chat ./none": "./none: there is no such folder",
    "merge a/b/c --output d": "a/b/c: there is no such folder",
    "export ./none --gguf": "./none: there is no such folder",
    "push ~/none/none": "~/none/none: there is no such folder",
}


@pytest.mark.parametrize(("command", "message"), MISTAKES.items(), ids=MISTAKES)
def test_a_users_mistake_is_one_message_and_status_2(run: Any, command: str, message: str):
    """Only the message is printed, on stderr without a traceback, and no file is written."""
    texts = {"good": GOOD, "bad": BAD, "broken.json": '[{"prompt": ', "rows.json": '[{"a": 1}]'} | LINES
    result = run(*command.split(), **texts)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("fastpref: ")
    for line, expected in zip(result.err.removeprefix("fastpref: ").splitlines(), message.splitlines(), strict=True):
        assert line.startswith(expected) or f"/{expected}" in line  # data in the config's folder are named in full


@pytest.mark.parametrize(
    "command", ["check", "train", "preview", "preview good.toml --rows 0", "tarin", "check --fast", "schema x y"]
)
def test_a_command_that_is_not_understood(run: Any, command: str):
    """Wrong commands and options give status 2 and the usage."""
    result = run(*command.split())
    assert result.status == 2
    assert "Usage:" in result.err
    assert "Traceback" not in result.err


def test_check_says_what_would_be_trained(run: Any):
    """A valid config gives one line on stdout and status 0, and overrides apply."""
    texts = {"good": GOOD, "pairs.json": f"[{LINES['pairs.jsonl']}]"}
    result = run("check", "good.toml", "model.name=m", **texts)
    assert result == CommandResult(0, "good.toml: no mistakes. DPO on m, training LoRA adapters of rank 4.\n", "")
    result = run("check", "whole.toml", "loss.type=kto", whole='[model]\nname = "m"\n[[data]]\npath = "d"\n')
    assert result == CommandResult(0, "whole.toml: no mistakes. KTO on m, training the whole model.\n", "")


def test_preview_needs_no_model(run: Any):
    """If the model's folder has only a tokenizer, preview still works."""
    result = run("preview", "good.toml", "data.0.path=pairs.jsonl", "--no-cache", good=GOOD, **LINES)
    assert (result.status, result.err) == (0, "")
    assert "row 0: pairs.jsonl:1" in result.out
    assert "a step of 1 pairs" in result.out


def described(schema: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Return every key of a JSON schema and of its definitions, with its description."""
    for key, inner in schema.get("properties", {}).items():
        yield f"{place}.{key}", inner.get("description", "")
    for name, inner in schema.get("$defs", {}).items():
        yield from described(inner, name)


def test_the_schema_describes_every_key(run: Any):
    """`fastpref schema` is JSON, and every key of every table and loss has a description."""
    result = run("schema")
    assert result.status == 0
    keys = dict(described(json.loads(result.out)))
    assert {".model", ".data", "TrainConfig.batch", "DataConfig.path", "KTO.desirable_weight"} <= set(keys)
    assert [key for key, words in keys.items() if not words] == []


PROBE = f"""
import sys
from fastpref.cli import main
try:
    main()
except SystemExit as ended:
    print("status", ended.code)
print("imported", *(name for name in {HEAVY} if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("command", "status"),
    {
        "--help": 0, "train --help": 0, "check good.toml": 0, "train bad.toml": 2, "preview bad.toml": 2, "schema": 0,
        "report none": 2, "report run": 0, "init --model m --data d --output -": 0,
        "init --from-axolotl cfg.yml --output -": 0, "init --from-trl trl.yml --output -": 0,
        "init --from-llamafactory factory.yml --output -": 0, "train trl.yml": 2,
    }.items(),
)  # fmt: skip
def test_quick_commands_import_nothing_heavy(tmp_path: Path, command: str, status: int):
    """Help, checks and refusals import neither torch nor libraries that need it."""
    (tmp_path / "good.toml").write_text(GOOD)
    (tmp_path / "pairs.json").write_text(f"[{LINES['pairs.jsonl']}]")
    (tmp_path / "bad.toml").write_text(BAD)
    write_run(tmp_path / "run")
    (tmp_path / "cfg.yml").write_text("{base_model: m, rl: dpo, datasets: [{path: d}]}")
    (tmp_path / "trl.yml").write_text("{model_name_or_path: m, dataset_name: d, use_peft: true}")
    (tmp_path / "factory.yml").write_text("{model_name_or_path: m, dataset: d, stage: dpo}")
    probe = [sys.executable, "-c", PROBE, *command.split()]
    result = subprocess.run(probe, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.splitlines()[-2:] == [f"status {status}", "imported"], result.stderr


def test_the_module_runs_as_the_command(tmp_path: Path):
    """`python -m fastpref` is the command, with the same status and message."""
    result = run_process("check", "none.toml", folder=tmp_path)
    assert result == CommandResult(2, "", "fastpref: none.toml: there is no such file\n")
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = {  # command and arguments, the function in which Ctrl-C arrives, what is said
    "train": ("train good.toml", "fastpref.checks.look", "interrupted before the first step; no run was begun"),
    "merge": ("merge runs/none --output m", "fastpref.cli.models.require_place", "interrupted; nothing was written"),
    "preview": ("preview good.toml", "fastpref.preview.preview.preview", "fastpref: interrupted"),
}


@pytest.mark.parametrize(("command", "place", "words"), INTERRUPTED.values(), ids=INTERRUPTED)
def test_an_interrupt_says_what_is_left(
    run: Any, monkeypatch: pytest.MonkeyPatch, command: str, place: str, words: str
):
    """Ctrl-C before a command has done anything ends with status 130 and one line that says so."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    result = run(*command.split(), good=GOOD, **LINES)
    assert result.status == 130
    assert words in result.err
    assert len(result.err.strip().splitlines()) == 1
