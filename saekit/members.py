"""The `sae` section of a recipe: one SAE, or a list of them trained over one forward.

    sae: {architecture: topk, d_sae: 4096, k: 32}                      one
    sae: [{architecture: topk, d_sae: 4096, k: 16}, {…, k: 32}]        a sweep; its members are named k16 and k32

Each says what it is, and may say where it reads and writes, how it starts, and which keys of `training` are its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from saekit.errors import InvalidInput
from saekit.sae.model import default_prefixes
from saekit.training.config import Count, TrainingConfig

ONE, MANY = "(one)", "(several)"  # which of a union's branches was meant; no key of a YAML file looks so
FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
TAKEN = re.compile(  # in a run's folder
    r"step-.*|final|wandb|metrics\.jsonl.*|recipe\.yaml.*|report\.(html|png)|pareto\.png", re.IGNORECASE
)

# What all SAEs of a run share: the stream of batches, and the moments at which something happens.
SHARED = frozenset(
    "tokens batch_size ring contexts log_every evaluate_every evaluate_tokens checkpoint_every keep_checkpoints".split()
)

Name = Annotated[str, StringConstraints(pattern=rf"^{FOLDER.pattern}$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _one_or_many(value: Any) -> str:
    return MANY if isinstance(value, (list, tuple)) else ONE


def _two_different(sites: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(sites)) < 2 or len(set(sites)) < len(sites):
        raise ValueError("a list of sites is a crosscoder's, which reads at least two different ones")
    return sites


Site = Annotated[
    Annotated[str, Tag(ONE)] | Annotated[tuple[str, ...], AfterValidator(_two_different), Tag(MANY)],
    Discriminator(_one_or_many),
]


def _own_training(values: dict[str, Any]) -> dict[str, Any]:
    """The values as `TrainingConfig` reads them, each wrong one told with its path."""
    shared = [
        InitErrorDetails(
            type=PydanticCustomError(
                "shared", "all SAEs of a run share one stream: set it in the recipe's `training`"
            ),
            loc=(key,),
            input=values[key],
        )
        for key in values
        if key in SHARED
    ]
    own = {key: value for key, value in values.items() if key not in SHARED}
    try:
        read = TrainingConfig.model_validate(own)
    except ValidationError as error:
        found = [_again(item) for item in error.errors()]
        raise ValidationError.from_exception_data("training", [*shared, *found]) from None
    if shared:
        raise ValidationError.from_exception_data("training", shared)
    return {key: read.model_dump(mode="json")[key] for key in own}


def _again(item: Any) -> InitErrorDetails:
    """A mistake as pydantic wants it back."""
    plain = item["type"] in ("missing", "extra_forbidden")
    kind = item["type"] if plain else PydanticCustomError("value_error", item["msg"].replace("{", "{{"))
    return InitErrorDetails(type=kind, loc=item["loc"], input=item["input"])


class SAESection(BaseModel):
    """What every architecture has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    d_sae: Count
    name: Name | None = None  # of its folder, in a sweep; None: made from what differs
    site: Site | None = None  # None: the recipe's; a list is a crosscoder's
    target_site: str | None = None  # a transcoder writes here
    skip: bool = False  # transcoder: with an affine skip
    seed: Seed | None = None  # of its initialisation; None: the recipe's
    training: Annotated[dict[str, Any], AfterValidator(_own_training)] = {}  # keys that are its own

    @model_validator(mode="after")
    def _sites_make_sense(self) -> SAESection:
        if self.skip and self.target_site is None:
            raise ValueError("skip: only a transcoder has one; name its target_site")
        if self.target_site is not None and isinstance(self.site, tuple):
            raise ValueError(
                "target_site: a transcoder reads one site, a crosscoder several and writes those: not both at once"
            )
        if self.target_site is not None and self.target_site == self.site:
            raise ValueError("target_site: it is the site that is read; leave it out for an autoencoder")
        return self


class StandardSection(SAESection):
    architecture: Literal["standard"]


class JumpReLUSection(SAESection):
    architecture: Literal["jumprelu"]


class GatedSection(SAESection):
    architecture: Literal["gated"]


class _KSection(SAESection):
    k: Count  # latents kept per token; of batchtopk and matryoshka, on average

    @model_validator(mode="after")
    def _k_within_d_sae(self) -> _KSection:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is more than d_sae = {self.d_sae}")
        return self


class TopKSection(_KSection):
    architecture: Literal["topk"]


class BatchTopKSection(_KSection):
    architecture: Literal["batchtopk"]


class MatryoshkaSection(_KSection):
    architecture: Literal["matryoshka"]
    prefixes: tuple[Count, ...] | None = (
        None  # nested widths; an eighth, a quarter, a half and all by default
    )

    @model_validator(mode="after")
    def _prefixes_nest(self) -> MatryoshkaSection:
        if self.prefixes is None:
            object.__setattr__(
                self, "prefixes", default_prefixes(self.d_sae)
            )  # spelled out; frozen from here
        prefixes = self.prefixes or ()
        if list(prefixes) != sorted(set(prefixes)) or prefixes[-1:] != (self.d_sae,):
            raise ValueError(
                f"prefixes: expected widths that increase strictly and end with d_sae = {self.d_sae}, got {list(prefixes)}"
            )
        return self


SECTIONS: dict[str, type[SAESection]] = {
    "standard": StandardSection,
    "topk": TopKSection,
    "batchtopk": BatchTopKSection,
    "matryoshka": MatryoshkaSection,
    "jumprelu": JumpReLUSection,
    "gated": GatedSection,
}
AnySection = Annotated[
    StandardSection | TopKSection | BatchTopKSection | MatryoshkaSection | JumpReLUSection | GatedSection,
    Field(discriminator="architecture"),
]


def _at_least_one(sections: tuple[SAESection, ...]) -> tuple[SAESection, ...]:
    if not sections:
        raise ValueError("expected one SAE at least")
    return sections


Sections = Annotated[
    Annotated[AnySection, Tag(ONE)]
    | Annotated[tuple[AnySection, ...], AfterValidator(_at_least_one), Tag(MANY)],
    Discriminator(_one_or_many),
]


class Member(NamedTuple):
    """One SAE of a run, with all that the recipe says about it."""

    name: str  # of its folder, in a sweep; empty for the one SAE of a run
    section: SAESection
    sites: tuple[str, ...]  # read
    target_site: str | None
    seed: int
    training: TrainingConfig

    @property
    def architecture(self) -> str:
        return self.section.architecture  # type: ignore[attr-defined]

    @property
    def is_crosscoder(self) -> bool:
        return len(self.sites) > 1

    @property
    def all_sites(self) -> tuple[str, ...]:
        """What the stream has to bring."""
        return self.sites if self.target_site is None else (*self.sites, self.target_site)


def members(
    sections: SAESection | Sequence[SAESection],
    site: str | tuple[str, ...] | None,
    seed: int,
    training: TrainingConfig,
) -> tuple[Member, ...]:
    """The SAEs of a recipe, each with the recipe's values where it has none of its own.

    Raises `InvalidInput` that names every member without a site, with a name that is another's or a file's, or with
    training keys that do not go together.
    """
    several = not isinstance(sections, SAESection)
    listed = [sections] if isinstance(sections, SAESection) else list(sections)
    named = names(listed) if several else [""]
    found, wrong = [], []
    for number, (section, name) in enumerate(zip(listed, named, strict=True)):
        path = f"sae.{number}" if several else "sae"
        where = section.site or site
        if where is None:
            wrong.append(f"{path}.site: missing (and no site for all at the top)")
        if section.target_site is not None and isinstance(where, tuple) and section.site is None:
            wrong.append(f"{path}.target_site: a transcoder reads one site, the recipe's are {len(where)}")
        if section.target_site is not None and section.target_site == where and section.site is None:
            wrong.append(f"{path}.target_site: it is the recipe's site, which is read")
        if several and (TAKEN.fullmatch(name) or not FOLDER.fullmatch(name)):
            wrong.append(f"{path}.name: {name!r} cannot be its folder's; give it another")
        if several and (same := _first_with(named, name)) != number:
            wrong.append(f"{path}.name: {name!r} is that of sae.{same} too; give them different ones")
        try:
            config = TrainingConfig.model_validate(training.model_dump() | section.training)
        except ValidationError as error:
            wrong += [f"{path}.training: {item['msg']}" for item in error.errors()]
            continue
        sites = (where,) if isinstance(where, str) else tuple(where or ())
        own_seed = seed if section.seed is None else section.seed
        found.append(Member(name, section, sites, section.target_site, own_seed, config))
    if wrong:
        raise InvalidInput("\n".join(wrong))
    return tuple(found)


def _first_with(names: Sequence[str], name: str) -> int:
    return [n.casefold() for n in names].index(name.casefold())  # some file systems do not tell cases apart


def names(sections: Sequence[SAESection]) -> list[str]:
    """A folder name for each: its own, or the architecture where there are several, and what differs within it."""
    values = [_told(section) for section in sections]
    several = len({value["architecture"] for value in values}) > 1
    made = []
    for section, mine in zip(sections, values, strict=True):
        kin = [other for other in values if other["architecture"] == mine["architecture"]]
        keys = dict.fromkeys(key for other in kin for key in other)
        differ = [key for key in keys if len({repr(other.get(key)) for other in kin}) > 1]
        parts = [_part(key, mine[key]) for key in differ if mine.get(key) not in (None, False)]
        start = [mine["architecture"]] if several or not parts else []
        made.append(section.name or "-".join([*start, *parts]))
    return made


def _told(section: SAESection) -> dict[str, Any]:
    """What a name may tell of: the section's keys and those of its training, prefixes only where they were chosen."""
    dump = section.model_dump(mode="json", exclude={"name", "training"}) | section.training
    if isinstance(section, MatryoshkaSection) and section.prefixes == default_prefixes(section.d_sae):
        del dump["prefixes"]
    return dump


def _part(key: str, value: Any) -> str:
    """`k16`, `lr0.0001`, `skip`, `blocks.3.hook_resid_pre`."""
    if value is True:
        return key
    text = "-".join(map(_short, value)) if isinstance(value, list) else _short(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text if "site" in key else f"{key}{text}")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
