"""What the page may ask for, with a bound on everything that costs time or memory."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saekit.catalog import Catalog
from saekit.errors import InvalidInput
from saekit.steering.edits import Edit
from saekit.steering.kinds import Unit

MAX_TEXT = 20_000  # characters
MAX_EDITS = 16
MAX_NEW_TOKENS = 256
MAX_STRENGTH = 1e6
MAX_STRENGTHS = 12  # of a sweep
MAX_SAMPLES = 8  # of a sweep, at each strength
MAX_POSITIONS = 4096
MAX_POSITION = 2**20

LIMITS = {  # as the page is told them
    "text": MAX_TEXT,
    "edits": MAX_EDITS,
    "new_tokens": MAX_NEW_TOKENS,
    "strengths": MAX_STRENGTHS,
    "samples": MAX_SAMPLES,
}

Position = Annotated[int, Field(ge=0, le=MAX_POSITION)]
Strength = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]


# Every kind but swap, which needs another text.
Turn = Literal["add", "clamp", "min_clamp", "ablate", "scale", "project_out", "rescale", "cap"]


class _Question(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class EditQuestion(_Question):
    """One feature of the catalog, and what is done with it."""

    feature: int
    kind: Turn = "add"
    strength: Strength = 0.0
    unit: Unit = "raw"

    def edit(self, catalog: Catalog) -> Edit:
        """Raises `UnknownFeature`, or `InvalidInput` for a unit that the kind does not take."""
        feature = catalog[self.feature]
        return feature.edit(self.kind, self.strength, self.unit)


class SteerQuestion(_Question):
    """A prompt to continue, plainly and under edits."""

    prompt: str = Field(min_length=1, max_length=MAX_TEXT)
    edits: list[EditQuestion] = Field(max_length=MAX_EDITS)
    max_new_tokens: int = Field(default=20, ge=1, le=MAX_NEW_TOKENS)
    seed: int = Field(default=0, ge=0, lt=2**63)
    temperature: float = Field(default=1.0, ge=0, le=100)
    positions: (
        Literal["all", "prompt", "generated", "last_prompt"]
        | Annotated[list[Position], Field(max_length=MAX_POSITIONS)]
    ) = "all"


class StreamQuestion(SteerQuestion):
    """The same, told while it comes; control: beside it the edits along random directions of the same norms."""

    control: bool = False


class SweepQuestion(SteerQuestion):
    """The first edit at several strengths; the others stay as they are."""

    edits: list[EditQuestion] = Field(min_length=1, max_length=MAX_EDITS)
    strengths: list[Strength] = Field(min_length=1, max_length=MAX_STRENGTHS)
    samples: int = Field(default=2, ge=1, le=MAX_SAMPLES)


class ActivationsQuestion(_Question):
    """A text whose firing features are asked for."""

    text: str = Field(min_length=1, max_length=MAX_TEXT)


Question = TypeVar("Question", bound=_Question)


def parsed(kind: type[Question], body: bytes) -> Question:
    """The question in a JSON body. Raises `InvalidInput` that lists every mistake with its place."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()]
        raise InvalidInput("; ".join(mistakes[:10])) from error
