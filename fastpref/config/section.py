"""The base of the tables of a config, and types that several of them use. Nothing here imports torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True,
        protected_namespaces=(), serialize_by_alias=True,
    )  # fmt: skip


Count = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], Strict(False)]
