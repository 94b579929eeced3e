"""Recipes: one YAML file per run, validated so that every mistake is listed at once with its path.

A recipe trains a sparse autoencoder (`sae:`) or, rarely, a small language model (`language_model:`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from saekit.errors import InvalidInput, near
from saekit.files import existing
from saekit.training.config import Count, Positive, Share, TrainingConfig
from saekit.training.tracking import WandbConfig

MAX_RECIPE_BYTES = 1 << 20
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


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


class StandardSection(Section):
    architecture: Literal["standard"]
    d_sae: Count


class TopKSection(Section):
    architecture: Literal["topk"]
    d_sae: Count
    k: Count

    @model_validator(mode="after")
    def _k_within_d_sae(self) -> TopKSection:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is more than d_sae = {self.d_sae}")
        return self


SAES: dict[str, type[BaseModel]] = {"standard": StandardSection, "topk": TopKSection}
SAESection = Annotated[StandardSection | TopKSection, Field(discriminator="architecture")]


class Recipe(Section):
    """A run that trains a sparse autoencoder."""

    name: Name
    model: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the language model; None: measured
    device: str | None = None
    data: DataSection
    site: str
    sae: SAESection
    training: TrainingConfig = TrainingConfig()
    wandb: WandbConfig = WandbConfig()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


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
        None  # of matrix products; None: measured. Weights: float32
    )
    device: str | None = None
    data: LanguageModelData
    training: LanguageModelTraining
    wandb: WandbConfig = WandbConfig()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_size * self.data.context_size

    @property
    def steps(self) -> int:
        return max(1, self.training.tokens // self.tokens_per_step)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | LanguageModelRecipe:
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


def parse_recipe(raw: dict[str, Any], where: str = "recipe") -> Recipe | LanguageModelRecipe:
    """A recipe from plain values; every mistake in one `InvalidInput`."""
    kind = LanguageModelRecipe if "language_model" in raw else Recipe
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [_mistake(kind, item) for item in error.errors()]
        count = f"{len(lines)} mistakes" if len(lines) > 1 else "1 mistake"
        raise InvalidInput(
            "\n".join([f"recipe {where}: {count}", *(f"  {line}" for line in lines)])
        ) from None


def write_recipe(path: Path, recipe: Recipe | LanguageModelRecipe) -> None:
    """The recipe with every default spelled out."""
    path.write_text(
        yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True), "utf-8"
    )


def differences(old: BaseModel, new: BaseModel, free: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """(key path, old value, new value) wherever two recipes differ, but for the keys and sections in `free`."""
    one, two = (_flat(recipe.model_dump(mode="json")) for recipe in (old, new))
    return [
        (key, one.get(key), two.get(key))
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key) and not any(key == f or key.startswith(f"{f}.") for f in free)
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{path}.{key}" if path else key)
    return flat


def _mistake(kind: type[BaseModel], item: Any) -> str:
    # pydantic puts the chosen architecture after `sae` in the path; the file has no such key
    loc = [
        part
        for i, part in enumerate(item["loc"])
        if not (i == 1 and item["loc"][0] == "sae" and part in SAES)
    ]
    path = ".".join(str(part) for part in loc)
    if item["type"] == "extra_forbidden":
        hint = near(str(loc[-1]), _fields_at(kind, item["loc"][:-1]))
        return f"{path}: unknown key. {hint}".rstrip()
    if item["type"] == "missing":
        return f"{path}: missing"
    text = item["msg"].removeprefix("Value error, ")
    return f"{path}: {text} (got {item['input']!r:.80})" if path else text


def _fields_at(kind: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    for part in loc:
        if part in SAES:
            kind = SAES[part]
        elif isinstance(inner := getattr(kind.model_fields.get(str(part)), "annotation", None), type):
            kind = inner if issubclass(inner, BaseModel) else kind
    return list(kind.model_fields)


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InvalidInput(f"override {text!r}: expected key=value, e.g. sae.d_sae=2048")
    *parents, last = key.split(".")
    place = raw
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise InvalidInput(f"override {text!r}: {parent!r} holds a value, not a section")
    try:
        place[last] = yaml.load(value, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise InvalidInput(f"override {text!r}: {value!r} is not a YAML value") from error


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
