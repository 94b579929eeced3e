"""Recipes: one YAML file per run, validated so that every mistake is listed at once with its path.

A recipe trains sparse autoencoders (`sae:`, one or a list), rarely a small language model (`language_model:`), or describes an
experiment (`activation_additions:`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from saekit.errors import InvalidInput, near
from saekit.files import existing, replace_text
from saekit.members import MANY, ONE, SECTIONS, SHARED, Member, Name, Sections, Seed, Site, members
from saekit.training.config import Count, Positive, Share, TrainingConfig
from saekit.training.tracking import WandbConfig

MAX_RECIPE_BYTES = 1 << 20
NO_TRAINING = "describes an experiment: use `saekit additions`"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSection(Section):
    """Where the text comes from and how it is cut. Paths are relative to the current folder."""

    text: str | tuple[str, ...]
    field: str = "text"
    context_size: Annotated[int, Field(ge=2)] = 128
    shuffle: bool = True  # documents in a seeded random order
    held_out: Share = 0.02  # share of documents that is evaluated on and never trained on
    held_out_text: str | tuple[str, ...] | None = None  # or a text of its own
    cache: str | None = (
        None  # a folder that keeps activations, in bfloat16, so that other runs need no forward
    )


class ParallelSection(Section):
    """How torchrun's processes share a run: data × latents of them. It may change when a run is resumed."""

    data: Count | None = None  # share the tokens of each batch; None: as many as there are, over `latents`
    latents: Count = 1  # share the latents of each SAE


class Recipe(Section):
    """A run that trains a sparse autoencoder."""

    name: Name
    model: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = (
        None  # of the language model; None: bf16 where native
    )
    device: str | None = None
    data: DataSection
    site: Site | None = None  # read by every SAE that names none of its own; a list is a crosscoder's
    sae: Sections
    training: TrainingConfig = TrainingConfig()
    parallel: ParallelSection = ParallelSection()
    report: bool = True  # report.html and report.png at the end, of each SAE
    wandb: WandbConfig = WandbConfig()
    seed: Seed = 0

    @model_validator(mode="after")
    def _members_make_sense(self) -> Recipe:
        n = self.parallel.latents
        if uneven := [str(m.section.d_sae) for m in self.members if m.section.d_sae % n]:
            raise InvalidInput(
                f"parallel.latents: {n} processes cannot share d_sae = {', '.join(uneven)} evenly"
            )
        return self

    @property
    def is_sweep(self) -> bool:
        """Whether `sae` is a list, be it of one."""
        return isinstance(self.sae, tuple)

    @property
    def members(self) -> tuple[Member, ...]:
        """The SAEs it trains, with the recipe's values where they have none of their own."""
        return members(self.sae, self.site, self.seed, self.training)

    @property
    def sites(self) -> tuple[str, ...]:
        """All the sites that its SAEs read and write, each once."""
        return tuple(dict.fromkeys(site for member in self.members for site in member.all_sites))


class TokenizerSection(Section):
    """A byte-level BPE; `repeat` counts a file's documents several times when merges are learned."""

    vocab_size: Annotated[Count, Field(ge=257)] = 8192  # the 256 bytes and <|endoftext|> are always in it
    repeat: dict[str, Count] = {}  # by file name without suffix


class LanguageModelSection(Section):
    """A GPT-2-style model: learned positions, pre-LayerNorm, tied embeddings."""

    width: Count = 256
    blocks: Count = 6
    heads: Count = 4
    tokenizer: TokenizerSection = TokenizerSection()

    @model_validator(mode="after")
    def _heads_divide_width(self) -> LanguageModelSection:
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} is not a multiple of heads = {self.heads}")
        return self


class LanguageModelData(Section):
    text: tuple[str, ...]
    field: str = "text"
    context_size: Annotated[int, Field(ge=2)] = 256
    repeat: dict[str, Count] = {}  # times a file's documents come in an epoch, by file name without suffix
    held_out_text: str
    held_out_source: str = "source"  # its column that names each document's origin


class LanguageModelTraining(Section):
    tokens: Count
    batch_size: Count = 32  # contexts per step
    lr: Positive = 2e-3
    lr_warmup: Share = 0.033
    lr_decay: Share = 0.45
    lr_end: Share = 0.02  # of lr, at the end of the decay
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    adam_betas: tuple[Share, Share] = (0.9, 0.95)
    clip_grad_norm: Positive = 1.0
    log_every: Count = 25
    evaluate_every: Count | None = 500
    checkpoint_every: Count | None = 200
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2


class LanguageModelRecipe(Section):
    """A run that trains a small language model and its tokenizer."""

    name: Name
    language_model: LanguageModelSection
    dtype: Literal["float32", "bfloat16"] | None = (
        None  # of matrix products; None: bf16 where native. Weights: float32
    )
    device: str | None = None
    data: LanguageModelData
    training: LanguageModelTraining
    wandb: WandbConfig = WandbConfig()
    seed: Seed = 0

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_size * self.data.context_size

    @property
    def steps(self) -> int:
        return max(1, self.training.tokens // self.tokens_per_step)


class AdditionsSection(Section):
    """Two short prompts, whose difference is added, and two texts that it is tried on."""

    topic: str  # a text file on what `positive` is about
    other: str  # a text file on something else
    positive: str = " weddings"
    negative: str = " "
    sites: tuple[str, ...] | None = None  # None: the residual stream before each block
    coefficients: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)] = (0.25, 0.5, 1.0, 2.0, 4.0)


class AdditionsRecipe(Section):
    """The activation-additions experiment (`saekit.steering.additions`) on a model."""

    name: Name
    model: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: bf16 where it is fast
    device: str | None = None
    activation_additions: AdditionsSection


AnyRecipe = Recipe | LanguageModelRecipe | AdditionsRecipe


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """A recipe file with `key.path=value` overrides applied.

    Raises `FileMissing`, or one `InvalidInput` that lists every mistake with its path.
    """
    path = existing(path, "recipe")
    if path.is_dir() or path.stat().st_size > MAX_RECIPE_BYTES:
        raise InvalidInput(f"recipe {path}: expected a YAML file of at most {MAX_RECIPE_BYTES:,} bytes")
    try:
        raw = yaml.load(path.read_text("utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InvalidInput(f"recipe {path}: not valid YAML ({error})") from error
    if not isinstance(raw, dict):
        raise InvalidInput(f"recipe {path}: expected keys such as name, model, data, site, sae")
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], where: str = "recipe") -> AnyRecipe:
    """A recipe from plain values; every mistake in one `InvalidInput`."""
    kinds: dict[str, Any] = {"language_model": LanguageModelRecipe, "activation_additions": AdditionsRecipe}
    kind: Any = next((kinds[key] for key in kinds if key in raw), Recipe)
    try:
        made: AnyRecipe = kind.model_validate(raw)
        return made
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _mistake(kind, item).splitlines()]
        count = f"{len(lines)} mistakes" if len(lines) > 1 else "1 mistake"
        raise InvalidInput(
            "\n".join([f"recipe {where}: {count}", *(f"  {line}" for line in lines)])
        ) from None


def write_recipe(path: Path, recipe: AnyRecipe) -> None:
    """The recipe with every default spelled out."""
    replace_text(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def differences(old: BaseModel, new: BaseModel, free: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """(key path, old value, new value) wherever two recipes differ, but for the keys and sections in `free`."""
    one, two = (_flat(recipe.model_dump(mode="json")) for recipe in (old, new))
    return [
        (key, one.get(key), two.get(key))
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key) and not any(key == f or key.startswith(f"{f}.") for f in free)
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{path}.{key}" if path else key)
    return flat


def _mistake(kind: type[BaseModel], item: Any) -> str:
    loc, section = _place(item["loc"])
    path = ".".join(map(str, loc))
    if item["type"] == "extra_forbidden":
        hint = near(str(loc[-1]), _fields_at(section or kind, loc[:-1]))
        return f"{path}: unknown key. {hint}".rstrip()
    if item["type"] == "missing":
        return f"{path}: missing"
    text = item["msg"].removeprefix("Value error, ")
    if not path:  # of the whole recipe: the text says where
        return text
    return f"{path}: {text} (got {item['input']!r:.80})"


def _place(loc: Sequence[Any]) -> tuple[list[Any], type[BaseModel] | None]:
    """(a mistake's path as the file has it, the section of an SAE that it lies in).

    Pydantic puts into the path which branch of a union was taken: one or several, and the architecture.
    """
    path = [part for part in loc if part not in (ONE, MANY)]
    at = 2 if len(path) > 1 and isinstance(path[1], int) else 1
    if path[:1] == ["sae"] and len(path) > at and path[at] in SECTIONS:
        return path[:at] + path[at + 1 :], SECTIONS[path[at]]
    return path, None


def _fields_at(kind: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    if loc[:1] == ["sae"]:  # `kind` is the SAE's section already
        return (
            sorted(TrainingConfig.model_fields.keys() - SHARED)
            if loc[-1] == "training"
            else [*kind.model_fields]
        )
    for part in loc:
        if isinstance(inner := getattr(kind.model_fields.get(str(part)), "annotation", None), type):
            kind = inner if issubclass(inner, BaseModel) else kind
    return list(kind.model_fields)


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InvalidInput(f"override {text!r}: expected key=value, e.g. sae.d_sae=2048")
    *parents, last = key.split(".")
    place: Any = raw
    for parent in parents:
        if isinstance(place, list):
            place = place[_index(place, parent, text)]
        else:
            place = place.setdefault(parent, {})
        if not isinstance(place, (dict, list)):
            raise InvalidInput(f"override {text!r}: {parent!r} holds a value, not a section")
    try:
        place[_index(place, last, text) if isinstance(place, list) else last] = yaml.load(
            value, Loader=_StrictLoader
        )
    except yaml.YAMLError as error:
        raise InvalidInput(f"override {text!r}: {value!r} is not a YAML value") from error


def _index(place: list[Any], part: str, text: str) -> int:
    if not part.isdecimal() or int(part) >= len(place):
        raise InvalidInput(
            f"override {text!r}: a list of {len(place)} stands there; expected a number "
            f"0 … {len(place) - 1}, got {part!r}"
        )
    return int(part)


class _StrictLoader(yaml.SafeLoader):
    """Plain data only: no tags, no aliases (and so no alias bombs), no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"key {', '.join(sorted(twice))} is given twice")
        return super().construct_mapping(node, deep)
