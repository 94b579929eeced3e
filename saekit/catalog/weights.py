"""What a catalog says of its features without having read a text: all that needs the model and the SAE at hand.

Part 1 of a build in parts stores it beside what it saw, so that `merge` needs neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saekit.catalog.effects import Effects, Floats, Ints, encoder_cosine, logit_effects, nearest, neurons
from saekit.catalog.tables import DIRECTIONS, read_table, write_table
from saekit.files import read_json, read_tensors, write_json, write_tensors
from saekit.lm import model_hash, special_ids, token_strings, tokenizer_hash
from saekit.sae import SAE
from saekit.sae.files import to_cfg, to_tensors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LOGITS_PER_LATENT = 10
NEIGHBOURS_PER_LATENT = 10
NEURONS_PER_LATENT = 5
ABOUT, ARRAYS = "about.json", "weights.safetensors"


@dataclass(frozen=True)
class Weights:
    """S d_sae."""

    about: dict[str, Any]  # the keys model, sae, site, target_site of catalog.json
    tensors: dict[str, Tensor]  # the SAE's, as its file holds them
    vocabulary: list[str]
    decoder_norm: Floats  # [S]
    encoder_cosine: Floats  # [S], NaN where encoder and decoder live at different widths
    neighbours: tuple[Ints, Floats]  # latents and cosines [S, k]
    effects: Effects | None  # None: the site does not write to the residual stream
    neurons: tuple[Ints, Floats] | None  # neurons and cosines [S, k]; None: not an MLP's site

    def save(self, folder: Path) -> None:
        write_tensors(folder / DIRECTIONS, self.tensors)
        arrays = {
            "decoder_norm": self.decoder_norm,
            "encoder_cosine": self.encoder_cosine,
            **_named("neighbours", self.neighbours),
            **_named("effects", self.effects or ()),
            **_named("neurons", self.neurons or ()),
        }
        write_tensors(folder / ARRAYS, {name: torch.from_numpy(array) for name, array in arrays.items()})
        write_vocabulary(folder, self.vocabulary)
        write_json(folder / ABOUT, self.about)

    @classmethod
    def load(cls, folder: Path) -> Weights:
        arrays = {name: t.numpy() for name, t in read_tensors(folder / ARRAYS, finite=False).items()}

        def of(group: str) -> tuple[Any, ...]:
            return tuple(arrays[name] for name in sorted(arrays) if name.startswith(f"{group}."))

        return cls(
            about=read_json(folder / ABOUT),
            tensors=read_tensors(folder / DIRECTIONS),
            vocabulary=read_table(folder, "vocabulary")["token"].to_pylist(),
            decoder_norm=arrays["decoder_norm"],
            encoder_cosine=arrays["encoder_cosine"],
            neighbours=of("neighbours"),
            effects=Effects(*found) if (found := of("effects")) else None,
            neurons=of("neurons") or None,
        )


def _named(group: str, arrays: tuple[Any, ...]) -> dict[str, Any]:
    return {f"{group}.{i}": array for i, array in enumerate(arrays)}


def write_vocabulary(folder: Path, strings: list[str]) -> None:
    write_table(folder, "vocabulary", {"token_id": np.arange(len(strings)), "token": strings})


def describe(model: TransformerBridge, sae: SAE) -> dict[str, Any]:
    """The keys of catalog.json that say which model and which SAE, fingerprints of their weights included."""
    return {
        "model": {
            "name": sae.model_name or str(model.cfg.model_name),
            "hash": model_hash(model),
            "tokenizer_hash": tokenizer_hash(model.tokenizer),
            "dtype": str(model.cfg.dtype).removeprefix("torch."),
        },
        "sae": to_cfg(sae, to_tensors(sae)),
        "site": sae.site,
        "target_site": sae.target_sites[0],
    }


def excluded_tokens(model: TransformerBridge, include_special: bool) -> dict[str, int]:
    """The excluded tokens, string → id."""
    ids = [] if include_special else list(special_ids(model))
    return dict(zip(token_strings(model.tokenizer, ids), ids, strict=True))


def look_at(model: TransformerBridge, sae: SAE, about: dict[str, Any]) -> Weights:
    """about: what `describe` said."""
    directions, target = sae.directions(), sae.target_sites[0]
    neighbours = nearest(
        directions, NEIGHBOURS_PER_LATENT
    )  # before the copies of the weights that a file needs
    effects = logit_effects(model, directions, target, LOGITS_PER_LATENT)
    return Weights(
        about=about,
        tensors={name: tensor.cpu() for name, tensor in to_tensors(sae).items()},
        vocabulary=token_strings(model.tokenizer, list(range(model.cfg.d_vocab))),
        decoder_norm=directions.float().norm(dim=1).cpu().numpy(),
        encoder_cosine=encoder_cosine(sae.W_enc, sae.W_dec),
        neighbours=neighbours,
        effects=effects,
        neurons=neurons(model, directions, target, NEURONS_PER_LATENT),
    )
