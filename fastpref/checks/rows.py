"""The first rows of a config's data: whether the files are there, and whether their columns are of a known format."""

from collections.abc import Iterator
from dataclasses import replace

from fastpref.checks.model import has_chat_template
from fastpref.config import Config, DataConfig
from fastpref.data.found import find, path_of
from fastpref.data.records import Joined, Records
from fastpref.data.rows.auto import AutoFormat
from fastpref.data.rows.content import RowError
from fastpref.errors import UserError
from fastpref.places import means_a_path

_READ = 20  # rows of each file
_FILES = 16  # of each source


def data_mistakes(config: Config) -> Iterator[str]:
    """Yield the first mistake of each source. Sources on the hub are not looked at."""
    for data in (*config.data, *config.eval.data):
        try:
            chats = _look(data, config)
        except UserError as error:
            yield str(error)
            continue
        if chats and has_chat_template(config) is False:
            yield (
                f"{data.path}: its rows are chats, and the tokenizer of {config.model.name} has no chat template; set "
                "tokens.chat_template, to chatml for example"
            )


def leaves_out_template(config: Config) -> bool:
    """Return whether the first source has rows of plain text although the model has a chat template, as far as both can
    be read on this machine.
    """
    try:
        return has_chat_template(config) is True and _look(config.data[0], config) is False
    except UserError:
        return False


def _look(data: DataConfig, config: Config) -> bool | None:
    """Read the first rows of a source's files. Returns whether `auto` finds chats there, which a template writes; None
    if other formats read them, or if they are not read. Raises UserError.
    """
    from fastpref.data.source import find_source, remedy, row_error

    parts = list(_parts(data))
    if not parts:
        return None
    records = Joined(parts)
    if not len(records):
        raise UserError(f"{data.path}: there are no rows")
    source, read = find_source(data, records, config.loss), 0
    for part in parts[: 1 if data.rows else None]:
        of = replace(source, records=part)
        for at in range(min(_READ, data.rows or len(part), len(part))):
            try:
                of.read(at)
                read += 1
            except RowError as error:
                if data.on_error == "error":
                    raise UserError(row_error(of, at, error) + remedy(error, after=read)) from None
    return source.form.chat if isinstance(source.form, AutoFormat) else None


def _parts(data: DataConfig) -> Iterator[Records]:
    """Yield the first rows of each file of a source, up to one that cannot be read at once. Raises UserError if a file
    is not there.
    """
    from fastpref.checks.first_rows import files_in, first_rows

    path = path_of(data)
    if path.is_dir():
        files = files_in(data, path)
    elif found := find(data):
        files = found.files
    elif means_a_path(data.path):
        raise UserError(f"{data.path}: there is no such file or folder")
    else:
        return
    for file in files[:_FILES]:
        part = first_rows(data, file)
        if part is None:
            return
        yield part
