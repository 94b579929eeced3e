"""SAEs as folders: the SAELens layout, both ways, and the way to what others publish.

`cfg.json` and `sae_weights.safetensors` in one folder per site. What is written here, `sae_lens` reads, and the other
way round, with one mapping where the two families differ:

    standard, topk, jumprelu, gated       as they are
    batchtopk, matryoshka                 as `jumprelu`, with their threshold in every place (as SAELens saves its own)
    transcoders of these                  `transcoder`, `jumprelu_transcoder`; with a skip `skip_transcoder`,
                                          `jumprelu_skip_transcoder`
    transcoders, topk and gated           SAELens has no class for them: the same layout under `topk_transcoder`,
                                          `gated_skip_transcoder` …, which `sae_lens` refuses with a KeyError
    crosscoders                           as an SAE over the sites side by side, which they are; which sites, and how
                                          wide, is in the metadata (`hook_names`, `hook_widths`)

Three additions live in `metadata`, which `sae_lens` keeps and ignores: `saekit_version`; `sha256`, the sum of each
tensor's bytes; and `saekit_architecture`, from which a batchtopk or matryoshka SAE comes back as one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit import embedded
from saekit.errors import FileMissing, InvalidInput, UnknownName, first_line, near
from saekit.files import (
    existing,
    read_json,
    read_tensors,
    sha256_of_tensor,
    staged,
    write_json,
    write_tensors,
)
from saekit.sae.architectures import ARCHITECTURES
from saekit.sae.foreign import reader
from saekit.sae.foreign.parts import check_shapes
from saekit.sae.model import SAE, SAEConfig
from saekit.sae.releases import Release, registry

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUT = "6.54.0"  # the sae_lens version whose layout this is; below 6.0.0 its reader rebuilds the metadata
CENTRED = "center_writing_weights"
OURS = "saekit_architecture"
TRAINING_NAMES = {"batchtopk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}  # ours → SAELens's
IDENTITIES = ("none", "expected_average_only_in")  # the latter is identity once a run is over
TRANSCODERS = {
    f"{'' if name == 'standard' else f'{name}_'}{'skip_' if skip else ''}transcoder": (name, skip)
    for name, skip in product(("standard", "topk", "jumprelu", "gated"), (False, True))
}


def save(sae: SAE, folder: str | Path) -> Path:
    """Write the SAE's folder, replacing an older one only when the new one is whole."""
    folder = Path(folder)
    with staged(folder) as building:
        tensors = to_tensors(sae)
        write_tensors(building / WEIGHTS, tensors)
        write_json(building / CFG, to_cfg(sae, tensors))
    return folder


def to_tensors(sae: SAE) -> dict[str, Tensor]:
    """The tensors of `sae_weights.safetensors`."""
    tensors = {name: tensor.contiguous() for name, tensor in sae.state_dict().items()}
    if sae.kind.running_threshold:
        tensors["threshold"] = sae.threshold.detach().expand(sae.d_sae).contiguous()
    return tensors


def to_cfg(sae: SAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The content of `cfg.json` beside tensors that `to_tensors` gave."""
    config = sae.config
    metadata = copy.deepcopy(config.metadata)
    metadata.setdefault("sae_lens_version", LAYOUT)
    metadata.setdefault("sae_lens_training_version", None)
    metadata["saekit_version"] = version("saekit")
    metadata["sha256"] = {name: sha256_of_tensor(tensor) for name, tensor in sorted(tensors.items())}
    if config.center_input:
        metadata["model_from_pretrained_kwargs"] = {CENTRED: True}
    architecture = config.architecture
    if sae.kind.running_threshold:
        prefixes = None if config.prefixes is None else list(config.prefixes)
        metadata[OURS] = {"architecture": architecture, "k": config.k, "prefixes": prefixes}
        metadata["training_architecture"] = TRAINING_NAMES[architecture]
        architecture = "jumprelu"
    if config.d_out is not None:
        architecture = next(name for name, kind in TRANSCODERS.items() if kind == (architecture, config.skip))
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": config.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if str(metadata.get("hook_name", "")).endswith("hook_z") else "none",
        "metadata": metadata,
    }
    if config.d_out is not None:
        cfg["d_out"] = config.d_out
    if config.architecture == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": config.rescale_acts_by_decoder_norm}
    return cfg


def load(source: str | Path, site: str | None = None) -> SAE:
    """An SAE from a folder of this layout or of another library's, the embedded one, or a published release.

    A release's SAE may also be written in one, `gpt2-small-res-jb/blocks.2.hook_resid_pre`.
    """
    folder = Path(source)
    if not _is_there(folder):
        if str(source) == embedded.NAME and site is None:
            return load_folder(embedded.folder("sae"))
        release, _, sae_id = (str(source), "", site) if site else str(source).partition("/")
        if site or release in registry():
            return load_published(release, sae_id)
        existing(folder, "SAE")  # says what is missing
    for place in (folder,) if site is None else (folder, folder / site):
        if read := reader(place):
            config, tensors, path = read(place)
            return assemble(config, tensors, str(path))
        if (place / CFG).is_file():
            return load_folder(place)
    raise FileMissing(
        f"SAE {folder}: no {CFG} in it; expected the SAELens layout, one folder per site, or a folder of "
        "dictionary_learning (config.json, ae.pt) or sparsify (cfg.json, sae.safetensors)"
    )


def names_sae(source: str) -> bool:
    """Whether `load` takes it for a folder with an SAE in it, or for a published `release/id`. Reads neither."""
    folder = Path(source)
    if _is_there(folder):
        return reader(folder) is not None or (folder / CFG).is_file()
    return source.partition("/")[0] in registry()


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have; a release may, or `existing` says what is wrong
        return False


def load_folder(folder: Path) -> SAE:
    """Read and check a folder in the SAELens layout; every mismatch is listed at once."""
    cfg = read_json(existing(folder / CFG, "SAE config"))
    config = from_cfg(cfg, str(folder / CFG))
    path = folder / WEIGHTS
    tensors = read_tensors(existing(path, "SAE weights"))
    sums = config.metadata.pop("sha256", None)
    if isinstance(sums, dict):
        changed = [
            name for name, tensor in tensors.items() if sums.get(name) not in (None, sha256_of_tensor(tensor))
        ]
        if changed:
            raise InvalidInput(
                f"{path}: {', '.join(changed)} differ from the SHA-256 in {CFG}: the file is damaged, or another "
                f"program changed the weights and kept the sums (then remove sha256 from the metadata in {CFG})"
            )
    return assemble(config, tensors, str(path))


def from_cfg(cfg: dict[str, Any], where: str) -> SAEConfig:
    """The configuration in a `cfg.json`. Raises `InvalidInput` for what is not understood."""
    metadata = cfg.get("metadata")
    if not isinstance(metadata, dict):
        raise InvalidInput(
            f"{where}: no metadata; it was written before SAELens 6, load and save it with sae_lens"
        )
    name = str(cfg.get("architecture"))
    transcoder = name in TRANSCODERS
    required = ("architecture", "d_in", "d_sae", *(["d_out"] if transcoder else []))
    if missing := [key for key in required if key not in cfg]:
        raise InvalidInput(f"{where}: missing {', '.join(missing)}")
    if (normalize := cfg.get("normalize_activations", "none")) not in IDENTITIES:
        raise InvalidInput(
            f"{where}: normalize_activations = {normalize!r} is not supported; fold it into the weights first"
        )
    if not isinstance(shifted := cfg.get("apply_b_dec_to_input", True), bool):
        raise InvalidInput(f"{where}: apply_b_dec_to_input: expected true or false, got {shifted!r:.80}")
    name, skip = TRANSCODERS[name] if transcoder else (name, False)
    kwargs = metadata.get("model_from_pretrained_kwargs") or {}
    try:
        if name in ("batchtopk", *TRAINING_NAMES.values()):
            raise InvalidInput(
                f"architecture: {name!r} is a training SAE of SAELens: save its inference model"
            )
        config = SAEConfig(
            architecture=name,
            d_in=cfg["d_in"],
            d_sae=cfg["d_sae"],
            k=cfg.get("k") if name == "topk" else None,
            d_out=cfg["d_out"] if transcoder else None,
            skip=skip,
            apply_b_dec_to_input=shifted,
            rescale_acts_by_decoder_norm=name == "topk"
            and bool(cfg.get("rescale_acts_by_decoder_norm", False)),
            center_input=bool(isinstance(kwargs, dict) and kwargs.get(CENTRED)),
            dtype=str(cfg.get("dtype", "float32")).removeprefix("torch."),
            metadata=metadata,
        )
        return _as_trained(config) if name == "jumprelu" and OURS in metadata else config
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None


def _as_trained(config: SAEConfig) -> SAEConfig:
    """The batchtopk or matryoshka SAE that was saved as a jumprelu."""
    metadata = dict(config.metadata)
    ours = metadata.pop(OURS)
    metadata.pop("training_architecture", None)
    if not isinstance(ours, dict) or ours.get("architecture") not in [*TRAINING_NAMES]:
        raise InvalidInput(f"metadata.{OURS}: expected what saekit wrote, got {ours!r:.80}")
    prefixes = ours.get("prefixes")
    return replace(
        config,
        architecture=ours["architecture"],
        k=ours.get("k"),
        prefixes=tuple(prefixes) if isinstance(prefixes, list) else None,
        metadata=metadata,
    )


def assemble(config: SAEConfig, tensors: Mapping[str, Tensor], where: str) -> SAE:
    """The SAE of a configuration and the tensors of this layout. Raises one `InvalidInput` for all that do not fit."""
    kind = ARCHITECTURES[config.architecture]
    D, S, E = config.d_in, config.d_sae, config.d_out or config.d_in
    expected: dict[str, tuple[int, ...]] = {"W_enc": (D, S), "W_dec": (S, E)}
    expected |= dict.fromkeys(kind.vectors, (S,))
    if kind.running_threshold:
        expected["threshold"] = (S,)
    expected["b_dec"] = (E,)
    if config.skip:
        expected["W_skip"] = (E, D)
    check_shapes(tensors, expected, where)
    if kind.running_threshold and bool((tensors["threshold"] != tensors["threshold"][0]).any()):
        kind = ARCHITECTURES["jumprelu"]  # somebody gave each latent its own, so this is what it is now
        config = replace(config, architecture=kind.name, k=None, prefixes=None)
    with torch.device("meta"):
        sae = SAE(config)
    dtype = sae.W_dec.dtype
    for name in expected:
        tensor = tensors[name].detach().to(dtype)
        if name == "W_enc":
            sae.W_enc = torch.nn.Parameter(tensor.t().contiguous().t())
        elif name == "threshold" and kind.running_threshold:
            sae.threshold = tensor[0].clone()
        else:
            setattr(sae, name, torch.nn.Parameter(tensor.contiguous()))
    return sae


def load_published(release: str, site: str) -> SAE:
    """A published SAE through `sae_lens`, which knows the releases and converts their files."""
    known = registry()
    if release in known:
        _check_published(known[release], site)
    elif "/" not in release:
        raise UnknownName(
            f"{release!r} is neither a folder with {CFG} nor a published release. {near(release, known)}".rstrip()
        )
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice concerns its own classes
            import sae_lens

            published = sae_lens.SAE.from_pretrained(release, site, device="cpu")
    except Exception as error:  # hub, network and conversion errors of a dozen kinds
        raise FileMissing(
            f"release {release!r}, SAE {site!r} could not be fetched: {first_line(error)}"
        ) from error
    where = f"{release}/{site}"
    cfg = published.cfg.to_dict()
    cfg["metadata"] = {key: value for key, value in cfg["metadata"].items() if value is not None}
    config = from_cfg(cfg, where)
    return assemble(config, published.state_dict(), where)


def _check_published(release: Release, site: str) -> None:
    known = [sae.id for sae in release.saes]
    if not site:
        raise UnknownName(f"release {release.name!r} has {len(known)} SAEs; name one: {known[:5]} …")
    if site not in known:
        raise UnknownName(
            f"release {release.name!r} has no SAE {site!r}. {near(site, known) or f'It has {known[:5]} …'}"
        )
    if not release.supported:
        raise InvalidInput(
            f"release {release.name!r}: its architecture, {release.conversion}, is not one of "
            f"{', '.join(ARCHITECTURES)}, nor a transcoder of these"
        )
