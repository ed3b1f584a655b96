"""Types and the base class that all sections of the configuration share."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _as_meant(value: Any) -> Any:
    """Expands `~` in a path, which no shell does after `key=`; refuses an empty path and `None`."""
    if not isinstance(value, str):
        return value
    if not value.strip() or value in ("None", "none"):
        raise ValueError(f"{value!r} is not a path: write null for none")
    return os.path.expanduser(value)


# In the type of a key: its value may be `auto` in a file or after --set, which `config/draft.py` takes out.
AUTO = "auto"
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LocalPath = Annotated[Path, BeforeValidator(_as_meant)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A section of the configuration: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
