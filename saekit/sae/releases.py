"""The published SAEs that `SAE.load(release, id)` can fetch, searched without a network.

`sae_lens` ships the registry as one YAML file. It is read where it lies: importing `sae_lens` for it costs
4–5 s, the file alone under one. Nothing here imports `sae_lens` or torch.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from saekit.errors import FileMissing, InvalidInput

REGISTRY = "pretrained_saes.yaml"
UNSUPPORTED = ("temporal",)  # conversions of sae_lens to architectures that saekit lacks

SITE = re.compile(r"blocks\.\d+\.(?:[a-z0-9]+\.)?hook_[a-z]+(?:_[a-z]+)*|hook_embed")
# What a converter of sae_lens makes of "<repository>/<path>", for those that need not download a file to know.
SITES_BY_CONVERSION = {
    "connor_rob_hook_z": ((r"_L(\d+)_Hcat_z", "blocks.{}.attn.hook_z"),),
    "gemma_2": (
        (r"-res/embedding", "hook_embed"),
        (r"-res/layer_(\d+)", "blocks.{}.hook_resid_post"),
        (r"-mlp/layer_(\d+)", "blocks.{}.hook_mlp_out"),
        (r"-att/layer_(\d+)", "blocks.{}.attn.hook_z"),
    ),
    "gemma_2_transcoder": ((r"layer_(\d+)", "blocks.{}.ln2.hook_normalized"),),
    "gemma_3": (
        (r"/resid_post.*layer_(\d+)", "blocks.{}.hook_resid_post"),
        (r"/attn_out.*layer_(\d+)", "blocks.{}.attn.hook_z"),
        (r"/mlp_out.*layer_(\d+)", "blocks.{}.hook_mlp_out"),
        (r"/(?:transcoder|clt).*layer_(\d+)", "blocks.{}.hook_mlp_in"),
    ),
    "dictionary_learning_1": ((r"resid_post_layer_(\d+)", "blocks.{}.hook_resid_post"),),
    "mwhanna_transcoder": ((r"/layer_(\d+)\.safetensors", "blocks.{}.mlp.hook_in"),),
    "qwen_scope": ((r"/layer(\d+)\.sae\.pt", "blocks.{}.hook_resid_post"),),
    "goodfire": ((r"-SAE-l(\d+)/", "blocks.{}.hook_resid_post"),),
}


@dataclass(frozen=True)
class PublishedSAE:
    """One SAE of a release."""

    id: str  # the second argument of `SAE.load`
    site: str | None  # the site it reads, where the registry tells
    neuronpedia: str | None  # its page there, as `model/sae`
    l0: float | None  # as its authors expect it
    explained_variance: float | None  # as its authors expect it


@dataclass(frozen=True)
class Release:
    """SAEs published together, under one name."""

    name: str  # the first argument of `SAE.load`
    model: str
    repo_id: str  # on the Hugging Face Hub
    conversion: str | None  # the converter of sae_lens; None where the files are in its own layout
    saes: tuple[PublishedSAE, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites its SAEs read, where the registry tells, each once."""
        return tuple(dict.fromkeys(sae.site for sae in self.saes if sae.site))

    @property
    def supported(self) -> bool:
        """Whether saekit has the architecture, as far as the registry tells."""
        return self.conversion not in UNSUPPORTED


def releases(query: str = "") -> list[Release]:
    """Releases in which every word of the query occurs, in any case, best first; all of them for an empty query.

    A word may occur in the release's name, its model or its repository; those that do not must all occur in one
    SAE's id. Releases that have every word in their own name come first. An exact name gives that release alone.
    """
    known = registry()
    if query in known:
        return [known[query]]
    words = query.casefold().split()
    found = [(release, _rank(release, words)) for release in known.values()]
    return [release for release, rank in sorted(found, key=lambda pair: pair[1]) if rank < _NOT_THERE]


_NOT_THERE = 3


def _rank(release: Release, words: list[str]) -> int:
    """0 where the words are in the name, 1 with model and repository, 2 with an SAE's id."""
    name = release.name.casefold()
    if all(word in name for word in words):
        return 0
    about = f"{name} {release.model} {release.repo_id}".casefold()
    rest = [word for word in words if word not in about]
    if not rest:
        return 1
    return 2 if any(all(word in sae.id.casefold() for word in rest) for sae in release.saes) else _NOT_THERE


@cache
def registry() -> dict[str, Release]:
    """Every release by its name. Raises `FileMissing` without sae_lens, `InvalidInput` for a registry of another shape."""
    import yaml

    package = importlib.util.find_spec("sae_lens")  # finds it, does not import it
    places = package.submodule_search_locations if package else None
    path = Path(next(iter(places), "")) / REGISTRY if places else None
    if path is None or not path.is_file():
        raise FileMissing(
            f"the registry of published SAEs ({REGISTRY}) is part of sae_lens: pip install sae-lens"
        )
    try:
        content = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return {name: _release(name, entry) for name, entry in content.items()}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"{path}: not a registry saekit understands ({type(error).__name__}: {error})"
        ) from error


def _release(name: str, entry: dict[str, Any]) -> Release:
    conversion, repo = entry.get("conversion_func"), str(entry["repo_id"])
    saes = tuple(
        PublishedSAE(
            id=str(sae["id"]),
            site=_site(conversion, f"{repo}/{sae['path']}", str(sae["id"])),
            neuronpedia=sae.get("neuronpedia"),
            l0=sae.get("l0"),
            explained_variance=sae.get("variance_explained"),
        )
        for sae in entry["saes"]
    )
    return Release(name, str(entry["model"]), repo, conversion, saes)


def _site(conversion: str | None, place: str, sae_id: str) -> str | None:
    for pattern, site in SITES_BY_CONVERSION.get(conversion or "", ()):
        if found := re.search(pattern, place):
            return site.format(*found.groups())
    named = SITE.match(sae_id)
    return named.group() if named else None
