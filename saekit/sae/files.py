"""The SAELens file layout, both ways: `cfg.json` and `sae_weights.safetensors` in one folder per site.

What is written here, `sae_lens` reads, and the other way round. Two additions live in `metadata`, which
`sae_lens` keeps and ignores: `saekit_version` and `sha256`, the sum of each tensor's bytes.
"""

from __future__ import annotations

import copy
from importlib.metadata import version
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
from saekit.sae.model import ARCHITECTURES, SAE, SAEConfig

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUT = "6.54.0"  # the sae_lens version whose layout this is; below 6.0.0 its reader rebuilds the metadata
CENTRED = "center_writing_weights"


def save(sae: SAE, folder: str | Path) -> Path:
    """Write the SAE's folder, replacing an older one only when the new one is whole."""
    folder = Path(folder)
    with staged(folder) as building:
        tensors = {name: tensor.contiguous() for name, tensor in sae.state_dict().items()}
        write_tensors(building / WEIGHTS, tensors)
        write_json(building / CFG, to_cfg(sae, tensors))
    return folder


def to_cfg(sae: SAE, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The content of `cfg.json`."""
    config = sae.config
    metadata = copy.deepcopy(config.metadata)
    metadata.setdefault("sae_lens_version", LAYOUT)
    metadata.setdefault("sae_lens_training_version", None)
    metadata["saekit_version"] = version("saekit")
    metadata["sha256"] = {name: sha256_of_tensor(tensor) for name, tensor in sorted(tensors.items())}
    if config.center_input:
        metadata["model_from_pretrained_kwargs"] = {CENTRED: True}
    cfg: dict[str, Any] = {
        "architecture": config.architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": config.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if str(metadata.get("hook_name", "")).endswith("hook_z") else "none",
        "metadata": metadata,
    }
    if config.architecture == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": config.rescale_acts_by_decoder_norm}
    return cfg


def load(source: str | Path, site: str | None = None) -> SAE:
    """An SAE from a folder, the embedded one, or a published release."""
    if str(source) == embedded.NAME and site is None and not Path(source).is_dir():
        return load_folder(embedded.folder("sae"))
    folder = Path(source)
    if (folder / CFG).is_file():
        return load_folder(folder)
    if site is not None and (folder / site / CFG).is_file():
        return load_folder(folder / site)
    if site is not None and not folder.exists():
        return load_published(str(source), site)
    existing(folder, "SAE")
    raise FileMissing(f"SAE {folder}: no {CFG} in it; expected the SAELens layout, one folder per site")


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
                f"{path}: {', '.join(changed)} differ from the SHA-256 in {CFG}; the file is damaged"
            )
    return assemble(config, tensors, str(path))


def from_cfg(cfg: dict[str, Any], where: str) -> SAEConfig:
    """The configuration in a `cfg.json`. Raises `InvalidInput` for what is not understood."""
    metadata = cfg.get("metadata")
    if not isinstance(metadata, dict):
        raise InvalidInput(
            f"{where}: no metadata; it was written before SAELens 6, load and save it with sae_lens"
        )
    if missing := [key for key in ("architecture", "d_in", "d_sae") if key not in cfg]:
        raise InvalidInput(f"{where}: missing {', '.join(missing)}")
    normalize = cfg.get("normalize_activations", "none")
    if normalize not in ("none", "expected_average_only_in"):  # the latter is identity once a run is over
        raise InvalidInput(
            f"{where}: normalize_activations = {normalize!r} is not supported; fold it into the weights first"
        )
    kwargs = metadata.get("model_from_pretrained_kwargs") or {}
    try:
        return SAEConfig(
            architecture=cfg["architecture"],
            d_in=cfg["d_in"],
            d_sae=cfg["d_sae"],
            k=cfg.get("k") if cfg["architecture"] == "topk" else None,
            apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)),
            rescale_acts_by_decoder_norm=bool(cfg.get("rescale_acts_by_decoder_norm", False)),
            center_input=bool(isinstance(kwargs, dict) and kwargs.get(CENTRED)),
            dtype=str(cfg.get("dtype", "float32")).removeprefix("torch."),
            metadata=metadata,
        )
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None


def assemble(config: SAEConfig, tensors: dict[str, Tensor], where: str) -> SAE:
    D, S = config.d_in, config.d_sae
    expected = {"W_enc": (D, S), "W_dec": (S, D), "b_enc": (S,), "b_dec": (D,)}
    wrong = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    wrong += [f"unexpected {name} {list(t.shape)}" for name, t in tensors.items() if name not in expected]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise InvalidInput(f"{where}: " + "; ".join(wrong))
    with torch.device("meta"):
        sae = SAE(config)
    dtype = sae.W_dec.dtype
    sae.W_enc = torch.nn.Parameter(tensors["W_enc"].to(dtype).t().contiguous().t())
    for name in ("W_dec", "b_enc", "b_dec"):
        setattr(sae, name, torch.nn.Parameter(tensors[name].to(dtype)))
    return sae


def load_published(release: str, site: str) -> SAE:
    """A published SAE through `sae_lens`, which knows the releases and converts their files."""
    import sae_lens
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release in directory:
        if site not in directory[release].saes_map:
            known = list(directory[release].saes_map)
            raise UnknownName(
                f"release {release!r} has no SAE {site!r}. {near(site, known) or f'It has {known[:5]} …'}"
            )
    elif "/" not in release:
        raise UnknownName(
            f"{release!r} is neither a folder with {CFG} nor a published release. {near(release, directory)}".rstrip()
        )
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice concerns its own classes
            published = sae_lens.SAE.from_pretrained(release, site, device="cpu")
    except Exception as error:  # hub, network and conversion errors of a dozen kinds
        raise FileMissing(
            f"release {release!r}, SAE {site!r} could not be fetched: {first_line(error)}"
        ) from error
    where = f"{release}/{site}"
    cfg = published.cfg.to_dict()
    if cfg["architecture"] not in ARCHITECTURES:
        raise InvalidInput(
            f"{where}: architecture {cfg['architecture']!r} is not one of {', '.join(ARCHITECTURES)}"
        )
    cfg["metadata"] = {key: value for key, value in cfg["metadata"].items() if value is not None}
    return assemble(from_cfg(cfg, where), dict(published.state_dict()), where)
