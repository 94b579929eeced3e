"""Edits as a file: what they are, what they are for, and all that they need to act again bit for bit.

One safetensors file. Its tensors are directions, states of swaps, and parts of SAEs; `edits` in its metadata is JSON:

    {"format", "model": {"name", "hash"}, "edits": [{"kind", "site", "direction": "tensor 0", "strength", …}], "saes": [{…}]}

An edit that depends on a feature needs its SAE's encoder. Of most SAEs the columns of the features used are enough, and
they are kept in the file (`SAEPart`). Of a TopK SAE, where all latents compete, they are not: the file names the SAE by
the SHA-256 of its tensors, and whoever loads it brings it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from saekit.errors import InvalidInput, UnknownFeature, UnknownName
from saekit.files import (
    MAX_JSON_BYTES,
    existing,
    read_metadata,
    read_tensors,
    replacing,
    sha256_of_tensor,
    write_tensors,
)
from saekit.lm import model_hash
from saekit.sae.model import SAE, SAEConfig
from saekit.sites import site_width
from saekit.steering.edits import Condition, Edit, Source
from saekit.steering.kinds import Kind, Unit
from saekit.steering.positions import check_positions

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

FORMAT: Literal["saekit edits 1"] = "saekit edits 1"
SITES = ("hook_name", "hook_names", "hook_widths", "hook_name_out", "model_name")  # kept of an SAE's metadata


class SAEPart(SAE):
    """Some latents of an SAE, under the numbers they have in it: enough for `encode_some` and `direction`."""

    def __init__(self, config: SAEConfig, latents: Sequence[int], whole: str) -> None:
        super().__init__(config)
        self.latents = tuple(latents)
        self.whole = whole  # `sae_hash` of the SAE it is a part of
        self.requires_grad_(False)

    def check_latent(self, latent: int) -> int:
        """The latent's row here. Raises `UnknownFeature` for one that is not in the part."""
        if latent not in self.latents:
            raise UnknownFeature(
                f"feature {latent!r}: this part of an SAE has {', '.join(map(str, self.latents))}"
            )
        return self.latents.index(latent)


# What the metadata says


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Latent = Annotated[int, Field(ge=0, lt=2**31)]
Index = Annotated[int, Field(ge=0)]


class _Model(_Strict):
    name: str
    hash: str


class _SAE(_Strict):
    sha256: str  # of all tensors of the whole SAE
    config: dict[str, Any]  # of the whole SAE, or of the part that is here
    latents: list[Latent] | None  # those that are here; None: the SAE has to be brought


class _Feature(_Strict):
    sae: Index
    latent: Latent


class _Condition(_Strict):
    site: str
    direction: str
    above: float
    label: str
    feature: _Feature | None


class _Source(_Strict):
    values: str
    basis: str | None


class _Edit(_Strict):
    kind: Kind
    site: str
    direction: str
    strength: float
    unit: Unit
    label: str
    latent: Latent | None
    sae: Index | None
    max_activation: float | None
    norm: float | None
    source: _Source | None
    condition: _Condition | None
    positions: Literal["all", "prompt", "generated", "last_prompt"] | list[int] | None


class _Content(_Strict):
    format: Literal["saekit edits 1"]
    model: _Model
    edits: list[_Edit]
    saes: list[_SAE]


# Saving


def save(edits: Edit | Sequence[Edit], path: str | Path, *, model: TransformerBridge) -> Path:
    """Write edits made for `model` to a `.safetensors` file; the old file or the new one, whatever happens.

    Raises `InvalidInput` for edits that are none, and what `steer` raises for edits that do not fit the model.
    """
    path, listed = Path(path), flat(edits)
    if path.suffix != ".safetensors":
        raise InvalidInput(f"edits: {path} does not end with .safetensors")
    if wrong := _misfits(listed, model):
        raise InvalidInput(f"edits that do not fit {model.cfg.model_name}: {'; '.join(wrong)}")
    packing = _Packing(listed)
    content = _Content(
        format=FORMAT,
        model=_Model(name=str(model.cfg.model_name), hash=model_hash(model)),
        edits=[packing.edit(edit) for edit in listed],
        saes=packing.saes(),
    )
    with replacing(path) as building:
        write_tensors(building, packing.tensors, {"edits": content.model_dump_json()})
    return path


def flat(edits: Edit | Sequence[Edit]) -> list[Edit]:
    """The edits as a list, or `InvalidInput`."""
    listed = [edits] if isinstance(edits, Edit) else list(edits)
    for edit in listed:
        if not isinstance(edit, Edit):
            raise InvalidInput(f"expected edits such as feature.add(8.0), got {type(edit).__name__}")
    return listed


class _Packing:
    """Gathers the tensors of a file, each once."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}
        self._saes: dict[int, SAE] = {}
        self._latents: dict[int, set[int]] = {}
        for edit in edits:
            needed = (edit if edit.sae is not None and edit.needs_activation else None, edit.condition)
            for part in needed:
                if part is not None and part.sae is not None and part.latent is not None:
                    self._saes.setdefault(id(part.sae), part.sae)
                    self._latents.setdefault(id(part.sae), set()).add(part.latent)

    def tensor(self, tensor: Tensor) -> str:
        tensor = tensor.detach().cpu().contiguous()
        key = f"{tensor.dtype} {tuple(tensor.shape)} {sha256_of_tensor(tensor)}"
        if key not in self._names:
            self._names[key] = f"tensor {len(self._names)}"
            self.tensors[self._names[key]] = tensor.clone()
        return self._names[key]

    def edit(self, edit: Edit) -> _Edit:
        condition, source = edit.condition, edit.source
        return _Edit(
            kind=edit.kind,
            site=edit.site,
            direction=self.tensor(edit.direction),
            strength=float(edit.strength),
            unit=edit.unit,
            label=edit.label,
            latent=edit.latent,
            sae=self._index(edit.sae) if edit.needs_activation else None,
            max_activation=edit.max_activation,
            norm=edit.norm,
            source=None
            if source is None
            else _Source(
                values=self.tensor(source.values),
                basis=None if source.basis is None else self.tensor(source.basis),
            ),
            condition=None if condition is None else self._condition(condition),
            positions=edit.positions
            if edit.positions is None or isinstance(edit.positions, str)
            else list(edit.positions),
        )

    def _condition(self, condition: Condition) -> _Condition:
        feature = None
        if condition.sae is not None and condition.latent is not None:
            feature = _Feature(sae=self._index(condition.sae), latent=condition.latent)
        return _Condition(
            site=condition.site,
            direction=self.tensor(condition.direction),
            above=float(condition.above),
            label=condition.label,
            feature=feature,
        )

    def _index(self, sae: SAE | None) -> int:
        return list(self._saes).index(id(sae))

    def saes(self) -> list[_SAE]:
        found = []
        for number, (key, sae) in enumerate(self._saes.items()):
            latents = sorted(self._latents[key])
            if sae.architecture == "topk":
                found.append(_SAE(sha256=sae_hash(sae), config=_config(sae), latents=None))
                continue
            part = part_of(sae, latents)
            for name, tensor in part.state_dict().items():
                self.tensors[f"sae {number} {name}"] = tensor.contiguous()
            found.append(_SAE(sha256=sae_hash(sae), config=_config(part), latents=latents))
        return found


def part_of(sae: SAE, latents: Sequence[int]) -> SAEPart:
    """The part of an SAE that gives f of some latents, with the bits that the whole one gives."""
    rows = [sae.check_latent(latent) for latent in latents]
    config = sae.config
    part = SAEPart(
        replace(
            config,
            d_sae=len(rows),
            k=None if config.k is None else min(config.k, len(rows)),
            prefixes=None if config.prefixes is None else (len(rows),),
            skip=False,  # the part encodes; it does not reconstruct
            metadata={key: config.metadata[key] for key in SITES if key in config.metadata},
        ),
        latents,
        sae_hash(sae),
    )
    own = sae.state_dict()
    with torch.no_grad():
        part.W_enc.copy_(own["W_enc"][:, rows])
        part.W_dec.copy_(own["W_dec"][rows])
        part.b_dec.copy_(own["b_dec"])
        for name in sae.kind.vectors:
            getattr(part, name).copy_(own[name][rows])
        if sae.kind.running_threshold:
            part.threshold.copy_(own["threshold"])
    return part


def sae_hash(sae: SAE) -> str:
    """SHA-256 over the SAE's tensors, of a part that of the whole SAE."""
    if isinstance(sae, SAEPart):
        return sae.whole
    sums = [f"{name} {sha256_of_tensor(tensor)}" for name, tensor in sorted(sae.state_dict().items())]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def _config(sae: SAE) -> dict[str, Any]:
    config = asdict(sae.config)
    config["metadata"] = {key: config["metadata"][key] for key in SITES if key in config["metadata"]}
    return config


# Loading


def load(path: str | Path, *, model: TransformerBridge, sae: SAE | Sequence[SAE] = ()) -> list[Edit]:
    """The edits of a file, to be put on the model they were made for.

    sae: the TopK SAEs that the file names but does not hold.

    Raises `FileMissing`; `InvalidInput` for a broken file, for any other model, site or width (saying what differs), and
    for an SAE that is missing or another one.
    """
    path = existing(path, "edits")
    content, tensors = _read(path)
    if wrong := made_on(model, content.model.name, content.model.hash):
        raise InvalidInput(f"{path} is for another model: {'; '.join(wrong)}")
    brought = [sae] if isinstance(sae, SAE) else list(sae)
    try:
        saes = [_sae(number, said, tensors, brought) for number, said in enumerate(content.saes)]
        edits = [_unpacked(edit, tensors, saes, content.model.hash) for edit in content.edits]
    except _Broken as error:
        raise InvalidInput(f"{path}: {error}") from error
    except (InvalidInput, UnknownName) as error:  # an edit or a config that cannot be
        raise InvalidInput(f"{path}: {error}") from error
    if wrong := _misfits(edits, model):
        raise InvalidInput(f"{path} does not fit {model.cfg.model_name}: {'; '.join(wrong)}")
    return edits


class _Broken(Exception):
    """What is wrong with a file."""


def made_on(model: TransformerBridge, name: str | None, hashed: str | None) -> list[str]:
    """What tells this model from the one that a file was made on; nothing, if it is the same or nobody knows."""
    if hashed is None or hashed == (own := model_hash(model)):
        return []
    return [
        f"made on {name or 'a model'!r:.80} with weights {hashed[:12]!r}, this is {model.cfg.model_name!r} with {own[:12]!r}"
    ]


def _misfits(edits: Sequence[Edit], model: TransformerBridge) -> list[str]:
    """What keeps edits off a model: sites it lacks, widths it has not."""
    wrong = []
    for site, width in dict.fromkeys((edit.site, len(edit.direction)) for edit in edits):
        try:
            if (actual := site_width(model, site)) != width:
                wrong.append(f"width {width} at {site}, which has {actual}")
        except UnknownName as error:
            wrong.append(str(error))
    return wrong


def _read(path: Path) -> tuple[_Content, Mapping[str, Tensor]]:
    if (text := read_metadata(path).get("edits")) is None:
        raise InvalidInput(f"{path}: no file of edits; expected one that saekit.steering.files.save wrote")
    if len(text) > MAX_JSON_BYTES:
        raise InvalidInput(f"{path}: {len(text):,} characters of JSON; at most {MAX_JSON_BYTES:,} are read")
    try:
        content = _Content.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidInput(f"{path}: {where or 'its JSON'}: {first['msg']}") from error
    return content, read_tensors(path)


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors or not tensors[name].is_floating_point():
        raise _Broken(f"no tensor of floats {name!r:.80}")
    return tensors[name]


def _sae(number: int, said: _SAE, tensors: Mapping[str, Tensor], brought: Sequence[SAE]) -> SAE:
    """The SAE that was brought, or the part that is in the file."""
    config = _sae_config(said.config)
    if said.latents is None:
        for sae in brought:
            if sae_hash(sae) == said.sha256:
                return sae
        where = ", ".join(config.metadata.get("hook_names", [config.metadata.get("hook_name", "?")]))
        what = (
            f"the {config.architecture} SAE with d_sae {config.d_sae} at {where}, sha256 {said.sha256[:12]}"
        )
        other = f"; given was {', '.join(sae_hash(sae)[:12] for sae in brought)}" if brought else ""
        raise _Broken(f"its edits need {what}: load(path, model=…, sae=…){other}")
    own = {
        name.removeprefix(f"sae {number} "): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"sae {number} ")
    }
    shapes = {name: tuple(own[name].shape) if name in own else None for name in ("W_enc", "W_dec")}
    n = len(said.latents)
    expected = {"W_enc": (config.d_in, n), "W_dec": (n, config.d_out or config.d_in)}
    if config.d_sae != n or len(set(said.latents)) != n or config.skip or shapes != expected:
        raise _Broken(f"the part of SAE {number} has tensors {shapes}; expected {expected}")
    part = SAEPart(config, said.latents, said.sha256)
    wrong = [
        name
        for name, tensor in part.state_dict().items()
        if name not in own or (own[name].shape, own[name].dtype) != (tensor.shape, tensor.dtype)
    ]
    if wrong or set(own) - set(part.state_dict()):
        raise _Broken(f"the part of SAE {number} has not the tensors of a {config.architecture} one")
    part.load_state_dict(own)
    return part


def _sae_config(said: Mapping[str, Any]) -> SAEConfig:
    known = {item.name for item in fields(SAEConfig)}
    if unknown := sorted(set(said) - known):
        raise _Broken(f"an SAE's config with {', '.join(unknown)[:80]!r}")
    values = dict(said)
    if isinstance(values.get("prefixes"), list):
        values["prefixes"] = tuple(values["prefixes"])
    flags = ("skip", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "center_input")
    if not isinstance(values.get("metadata", {}), dict) or not all(
        type(values.get(flag, False)) is bool for flag in flags
    ):
        raise _Broken("an SAE's config whose flags or metadata are none")
    try:
        return SAEConfig(**values)
    except TypeError as error:
        raise _Broken(f"an SAE's config that lacks something ({error})") from error


def _unpacked(said: _Edit, tensors: Mapping[str, Tensor], saes: Sequence[SAE], made_for: str) -> Edit:
    def feature(sae: int | None, latent: int | None) -> SAE | None:
        if sae is None:
            return None
        if sae >= len(saes) or latent is None:
            raise _Broken(f"an edit with a feature of SAE {sae}, which is not in the file")
        saes[sae].check_latent(latent)
        return saes[sae]

    condition, source = said.condition, said.source
    return Edit(
        kind=said.kind,
        site=said.site,
        direction=_tensor(tensors, said.direction),
        strength=said.strength,
        unit=said.unit,
        label=said.label,
        latent=said.latent,
        sae=feature(said.sae, said.latent),
        max_activation=said.max_activation,
        norm=said.norm,
        source=None
        if source is None
        else Source(
            _tensor(tensors, source.values),
            None if source.basis is None else _tensor(tensors, source.basis),
        ),
        condition=None
        if condition is None
        else Condition(
            condition.site,
            _tensor(tensors, condition.direction),
            condition.above,
            condition.label,
            None if condition.feature is None else condition.feature.latent,
            None if condition.feature is None else feature(condition.feature.sae, condition.feature.latent),
        ),
        positions=None if said.positions is None else check_positions(said.positions),
        model_hash=made_for,
    )
