"""`fastpref init`: write a config for a loss, with comments from the schema."""

import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import typer
from pydantic.fields import FieldInfo

from fastpref.atomic import write_file
from fastpref.config.losses import LOSSES
from fastpref.config.paths import matches
from fastpref.config.text import Line, Table, is_array, keys_of, mistake, render, sections
from fastpref.errors import UserError

_COMMON = {
    "lora.rank": 16,
    "lora.alpha": 32.0,
    "eval.fraction": 0.05,
    "tokens.max_length": 2048,
    "train.learning_rate": 1e-4,
    "train.epochs": 1.0,
    "train.batch": 16,
}
_OF_LOSS: dict[str, dict[str, Any]] = {
    "kto": {"loss.desirable_weight": 1.0, "loss.undesirable_weight": 1.0},
    # LoRA usually takes ten times the learning rate of whole models.
    "simpo": {"loss.gamma_beta_ratio": 0.5, "train.learning_rate": 1e-5},
    "cpo": {"loss.sft_weight": 1.0},
}
_USUAL = {"train.learning_rate": "whole models usually take 5e-7 to 1e-6"}
_REMARKS: dict[str, dict[str, str]] = {
    "dpo": _USUAL,
    "ipo": _USUAL,
    "kto": _USUAL | {"loss.desirable_weight": "with unequal counts, keep weight times count of both kinds alike"},
    "pl": _USUAL,
    "lipo": _USUAL,
    "orpo": {"train.learning_rate": "the supervised term takes higher rates than DPO: whole models about 8e-6"},
    "simpo": {
        "train.learning_rate": "whole models 3e-7 to 1e-6, as its authors search; too high a rate ruins the text",
        "loss.beta": "2 to 10; larger than DPO's, because it scales an average per token",
    },
    "sft": {"train.learning_rate": "up to 2e-4 with adapters; whole models usually take about 1e-5"},
}
_ALWAYS = {"data.chat": "these rows are plain text, and the model has a chat template; with false they stay text"}
_EXAMPLES: dict[str, Any] = {  # examples for keys that have no default
    "model.revision": "main",
    "data.name": "default",
    "data.revision": "main",
    "data.rows": 1000,
    "loss.weights": [1.0],
    "loss.gamma": 1.0,
    "tokens.max_prompt_length": 1024,
    "tokens.chat_template": "chatml",
    "tokens.chat_template_kwargs": {"enable_thinking": False},
    "train.steps": 100,
    "train.min_lr": 1e-6,
    "train.warmup": 0.1,
    "train.betas": [0.9, 0.95],
    "train.epsilon": 1e-6,
    "train.stop": {"after": 3, "metric": "eval/rewards/accuracies", "by": 0.001},
    "train.tokens_per_microbatch": 4096,
    "output.dir": "runs/mine",
    "output.keep": 2,
    "output.push_to": "user/name",
}


def init(
    loss: str | None,
    model: str | None,
    data: str | None,
    sources: Mapping[str, Path | None],
    output: str | None,
    *,
    force: bool,
) -> None:
    """Write a config, or print it if `output` is "-". Say what to do next, and what another trainer's config has more.

    `sources` has the configs of other trainers by the option that names one, of which at most one is given. Raises
    UserError for options that do not go together, and for a file that exists unless `force` is set.
    """
    given = [(option, path) for option, path in sources.items() if path is not None]
    if len(given) > 1:
        raise UserError(f"{given[0][0]} and {given[1][0]} both name a config to translate; leave one out")
    name = check_loss(loss or "dpo")
    path = None if output == "-" else Path(output or f"{given[0][1].stem if given else name}.toml")
    folder = path.parent if path else Path()
    left_out: list[str] = []
    if not given:
        if model is None or data is None:
            raise UserError(f"init needs --model and --data (and takes --loss), or {_either(sources)} with a .yml file")
        text = template(name, kept(model, folder), kept(data, folder), chats=_should_be_chats(name, model, data))
    else:
        option, source = given[0]
        if model or data or (loss and option not in TAKE_LOSS):
            own = "the model and the data" if option in TAKE_LOSS else "the loss, the model and the data"
            raise UserError(f"{option} takes {own} from its file; leave the others out")
        from fastpref.translate import DIALECTS, translate

        translation = translate(DIALECTS[option], source, folder, loss and name)
        text, left_out = translation.text, translation.left_out
    if path is None:
        typer.echo(text, nl=False)
    else:
        _write(text, path, force=force)
        typer.echo(f"{path} is written. Next:")
        for command in ("check", "preview", "train"):
            typer.echo(f"  fastpref {command} {path}")
    if left_out:
        typer.echo("\n  ".join(["Not taken over:", *left_out]), err=path is None)


TAKE_LOSS = ("--from-trl",)
"""The options with which --loss says what the translated config trains."""


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def check_loss(loss: str) -> str:
    """Return the loss as the schema spells it. Raises UserError for an unknown one."""
    if loss.lower() not in LOSSES:
        raise UserError(f"--loss {loss}: there is no such loss; take one of {', '.join(LOSSES)}")
    return loss.lower()


def _write(text: str, path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; --output takes the name of a file")
    if path.exists() and not (force and path.is_file()):
        remedy = "or replace it with --force" if path.is_file() else "which must be an ordinary file"
        raise UserError(f"{path}: is there already; name another --output, {remedy}")
    write_file(path, text)


def _should_be_chats(loss: str, model: str, data: str) -> bool:
    """Return whether the rows are plain text and the model has a chat template, as far as both are on this machine."""
    from fastpref.checks.rows import leaves_out_template
    from fastpref.config import make_config

    try:
        config = make_config({"model": {"name": model}, "data": [{"path": data}], "loss": {"type": loss}})
    except UserError:
        return False
    return leaves_out_template(config)


def template(loss: str, model: str, data: str, *, chats: bool = False) -> str:
    """Return a config of `loss` as text: common keys set, the others commented out with their defaults.

    With `chats`, its rows of plain text become chats.
    """
    values: dict[str, Any] = {"model.name": model, "data.path": data, "loss.type": loss}
    values |= {"data.chat": True} if chats else {}
    values |= {} if LOSSES[loss].supervised else {"loss.beta": LOSSES[loss]().beta}
    values |= _COMMON | _OF_LOSS.get(loss, {})
    raw: dict[str, Any] = {}
    for name, value in values.items():
        _set(raw, name, value)
    skipped = () if LOSSES[loss].uses_reference else ("reference",)
    tables = [_table(name, info, loss, values, raw) for name, info in sections().items() if name not in skipped]
    what = "Supervised" if LOSSES[loss].supervised else "Preference"
    intro = [f"{what} training by {LOSSES[loss].__name__}. Remove the # before a key to set it."]
    return render(intro, tables)


def _table(section: str, info: FieldInfo, loss: str, values: Mapping[str, Any], raw: dict[str, Any]) -> Table:
    lines: list[Line] = []
    notes: list[str] = [info.description or ""]
    if section == "loss":
        notes += ["You have: take", *(f"   {options.suits}: {name}" for name, options in LOSSES.items())]
    for key, field in keys_of(section, loss).items():
        name, words = f"{section}.{key}", field.description or ""
        if name in values:
            lines.append(Line(key, values[name], (words,), (_REMARKS.get(loss, {}) | _ALWAYS).get(name, "")))
            continue
        default = field.get_default(call_default_factory=True)
        shown = _EXAMPLES.get(name) if default is None else default
        if name == "eval.data":
            notes.append(words)  # one line cannot show tables
        elif shown is not None and (default is not None or not mistake(_set(deepcopy(raw), name, shown))):
            lines.append(Line(key, shown, (words,), active=False))
    return Table(f"[[{section}]]" if is_array(section) else f"[{section}]", tuple(lines), tuple(notes))


def _set(raw: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Set a key, such as data.path, in tables as TOML has them, and return the tables."""
    section, _, key = name.partition(".")
    table = raw.setdefault(section, [{}] if is_array(section) else {})
    (table[0] if is_array(section) else table)[key] = value
    return raw


def kept(name: str, folder: Path, others: tuple[Path, ...] = ()) -> str:
    """Rewrite a path, relative to this folder or else one of `others`, so that a config in `folder` can use it.

    A config's relative paths are looked for in its own folder first. A name that is not a path is unchanged.
    """
    try:
        path = Path(name).expanduser()
        target = next((root / path for root in (Path(), *others) if matches(name, root)), None)
    except (OSError, RuntimeError):  # too long for a path, or ~name of a user who does not exist
        return name
    if target is None or path.is_absolute():
        return name
    try:
        return Path(os.path.relpath(target.resolve(), folder.resolve())).as_posix()
    except ValueError:  # on another drive
        return str(target.resolve())
