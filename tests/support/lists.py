"""A loss of lists, for tests of the data that such losses take."""

from dataclasses import dataclass
from typing import Any, ClassVar

from fastpref.config import Config
from fastpref.config.losses import Loss


@dataclass(frozen=True)
class Lists(Loss):
    type: str = "lists"
    suits: ClassVar[str] = "lists of completions with scores"
    listwise: ClassVar[bool] = True


def of_lists(config: Config) -> Config:
    """Return the config with a loss of lists."""
    loss: Any = Lists()
    return config.model_copy(update={"loss": loss})
