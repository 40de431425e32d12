"""The base of the tables of a config, and types that several of them use. Nothing here imports torch."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True,
        protected_namespaces=(), serialize_by_alias=True,
    )  # fmt: skip


Count = Annotated[int, Field(ge=1)]


def _steps_or_share(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not (whole or (isinstance(value, float) and 0 < value < 1)):
        raise ValueError(f"must be a whole number of steps, or a share of all steps below 1, got {value!r}")
    return value


Every = Annotated[Count | Annotated[float, Field(gt=0, lt=1)], BeforeValidator(_steps_or_share)]
"""A number of steps, or a share of all steps of a run."""
Names = Annotated[tuple[str, ...], Strict(False)]
