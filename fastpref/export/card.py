"""What travels with the weights: the licence, and a model card that says what the file is and how to run it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from fastpref import __version__
from fastpref.export.place import MARK
from fastpref.merge.checkpoint import model_folder
from fastpref.run.trained import Trained

CARD = "README.md"
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Provenance:
    """What is known of a trained model."""

    name: str
    base: str | None  # the name on the hub, or the folder's name, of the model that training began with
    base_url: str | None
    datasets: tuple[str, ...]
    licence: str | None  # an identifier such as apache-2.0
    card: str | None  # the text of the model card
    files: dict[str, bytes]  # licences and notices by their names


def provenance(trained: Trained) -> Provenance:
    """Collect what the folder of the trained model, its run and its base say."""
    folder = Path(trained.weights).expanduser()
    base = trained.began_with
    places = [folder, model_folder(trained.config.model)] if base is not None else [folder]
    cards = [_card(place) for place in places]
    data: dict[str, Any] = {}
    for card in reversed(cards):
        data |= {} if card is None else card.data.to_dict()
    files: dict[str, bytes] = {}
    for place in reversed(places):
        for pattern in _LICENCES:
            files |= {path.name: path.read_bytes() for path in sorted(place.glob(pattern)) if path.is_file()}
    on_hub = base is not None and "/" in base and not Path(base).expanduser().exists()
    named = data.get("base_model") if base is None else base if on_hub else Path(base).name
    named = next(iter(named), None) if isinstance(named, list) else named
    datasets = (
        [_last_part(source.path) for source in trained.config.data] if trained.of_run else data.get("datasets") or ()
    )
    return Provenance(
        _name(trained),
        named,
        f"https://huggingface.co/{named}" if named and (on_hub or base is None) and "/" in named else None,
        tuple(str(name) for name in ([datasets] if isinstance(datasets, str) else datasets)),
        data.get("license") if isinstance(data.get("license"), str) else None,
        None if cards[0] is None else cards[0].content,
        files,
    )


def general(known: Provenance) -> list[tuple[str, Any]]:
    """Return the settings `general.*` of the file."""
    settings: list[tuple[str, Any]] = [("name", known.name)]
    if known.licence is not None:
        settings.append(("license", known.licence))
    if known.base is not None:
        settings += [("base_model_count", 1), ("base_model_name", (0, known.base.rpartition("/")[2]))]
    if known.base_url is not None:
        settings.append(("base_model_repo_url", (0, known.base_url)))
    if known.datasets:
        settings.append(("dataset_count", len(known.datasets)))
        settings += [("dataset_name", (at, name)) for at, name in enumerate(known.datasets)]
    settings.append(("tags", ["text-generation", "fastpref"]))
    return settings


def card_text(known: Provenance, section: str) -> str:
    """Return the model card of an export: that of the training, if there is one, with a section on the file."""
    card = ModelCard(known.card or "---\n{}\n---\n", ignore_metadata_errors=True)
    data: Any = card.data
    data.library_name = "gguf"
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    data.license = data.license or known.licence
    if data.base_model is None and known.base_url is not None:
        data.base_model = known.base
    data.tags = list(dict.fromkeys([*(data.tags or ()), "gguf", "fastpref"]))
    body = card.text.strip() if known.card else f"# {known.name}"
    return (
        f"---\n{data.to_yaml()}\n---\n\n{body}\n\n## GGUF\n\n{section.strip()}\n\nWritten by `{MARK}` {__version__}.\n"
    )


def _card(folder: Path) -> ModelCard | None:
    try:
        return ModelCard((folder / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (OSError, ValueError):
        return None


def _name(trained: Trained) -> str:
    path = Path(trained.weights).expanduser()
    if not path.is_dir():
        return trained.weights.rpartition("/")[2]
    path = path.resolve()
    if path.name == "final" or path.name.startswith("step-"):
        path = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return path.name


def _last_part(path: str) -> str:
    place = Path(path).expanduser()
    return place.name if place.is_absolute() or place.exists() else path
