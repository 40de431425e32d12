"""The base of the tables of a config, and types that several of them use. Nothing here imports torch."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True,
        protected_namespaces=(), serialize_by_alias=True,
    )  # fmt: skip


Count = Annotated[int, Field(ge=1)]


Share = Annotated[float, Field(gt=0, lt=1)]


def steps_or_share(*words: str) -> BeforeValidator:
    """Return the check of a key that takes a number of steps, a share of all steps of a run, or one of some words."""

    def check(value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (whole or (isinstance(value, float) and 0 < value < 1) or (isinstance(value, str) and value in words)):
            listed = " or ".join(f'"{word}"' for word in words)
            raise ValueError(f"must be a number of steps, a share of all steps below 1, {listed}, got {value!r}")
        return value

    return BeforeValidator(check)


Names = Annotated[tuple[str, ...], Strict(False)]
