"""dictionary_learning (https://github.com/saprmarks/dictionary_learning): `ae.pt` and `config.json`.

    AutoEncoder, AutoEncoderNew   standard     the first subtracts its bias from the input, the second does not
    GatedAutoEncoder              gated
    JumpReluAutoEncoder           jumprelu     does not subtract b_dec
    AutoEncoderTopK               topk         its threshold serves no default encode, and is left behind
    BatchTopKSAE                  batchtopk    with its threshold, as its default encode
    MatryoshkaBatchTopKSAE        matryoshka   group sizes become prefixes

Latents are those that its own `from_pretrained` gives: an AutoEncoder's decoder columns are brought to norm 1, their
norms going into the encoder, and no other class's are. x̂ is the same either way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.files import read_json
from saekit.sae.foreign.parts import Parts, Shape, check_shapes, known, width
from saekit.sae.foreign.pickled import read_pt
from saekit.sae.model import SAEConfig

CONFIG, WEIGHTS = "config.json", "ae.pt"


@dataclass(frozen=True)
class _Class:
    """How one of its classes maps to ours."""

    architecture: str
    names: Mapping[str, str]  # ours → theirs
    shifted: bool = True  # whether b_dec is taken off the input
    linear: bool = True  # nn.Linear holds its weights the other way round
    extra: tuple[str, ...] = ()  # tensors that are no weights


_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}
_PLAIN = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
_GATED = {"b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}

CLASSES = {
    "AutoEncoder": _Class("standard", _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderNew": _Class("standard", _LINEAR | {"b_dec": "decoder.bias"}, shifted=False),
    "GatedAutoEncoder": _Class("gated", {"W_enc": "encoder.weight", "W_dec": "decoder.weight"} | _GATED),
    "JumpReluAutoEncoder": _Class("jumprelu", _PLAIN, shifted=False, linear=False),
    "AutoEncoderTopK": _Class("topk", _LINEAR | {"b_dec": "b_dec"}, extra=("k", "threshold")),
    "BatchTopKSAE": _Class("batchtopk", _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}, extra=("k",)),
    "MatryoshkaBatchTopKSAE": _Class("matryoshka", _PLAIN, linear=False, extra=("k", "group_sizes")),
}


def read(folder: Path) -> Parts:
    """The SAE in the folder. Raises `InvalidInput` for classes and files that are not understood."""
    where = folder / CONFIG
    config = read_json(where)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise InvalidInput(f"{where}: no section trainer; it is not a config.json of dictionary_learning")
    name = trainer.get("dict_class")
    if not isinstance(name, str) or name not in CLASSES:
        raise InvalidInput(f"{where}: dict_class: {name!r:.80} is not one of {', '.join(CLASSES)}")
    kind = CLASSES[name]
    D, S = width(trainer, "activation_dim", where), width(trainer, "dict_size", where)
    path = folder / WEIGHTS
    tensors = read_pt(path)
    _check(kind, tensors, D, S, path)
    weights = {ours: tensors[theirs].to(torch.float32) for ours, theirs in kind.names.items()}
    if kind.linear:
        weights |= {ours: weights[ours].t() for ours in ("W_enc", "W_dec")}
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].expand(S)
    if name == "AutoEncoder":
        weights = _with_unit_rows(weights)
    try:
        sae = SAEConfig(
            kind.architecture,
            D,
            S,
            k=_k(trainer, tensors, where) if "k" in kind.extra else None,
            prefixes=tuple(accumulate(tensors["group_sizes"].tolist()))
            if "group_sizes" in kind.extra
            else None,
            apply_b_dec_to_input=kind.shifted,
            metadata=_metadata(trainer, config.get("buffer")),
        )
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None
    return Parts(sae, weights, path)


def _check(kind: _Class, tensors: dict[str, Tensor], D: int, S: int, path: Path) -> None:
    shapes: dict[str, Shape] = {"W_enc": (D, S), "W_dec": (S, D), "b_dec": (D,)}
    if "k" in kind.extra:
        shapes["threshold"] = ()  # one for all latents
    expected = {theirs: shapes.get(ours, (S,)) for ours, theirs in kind.names.items()}
    if kind.linear:
        expected = {name: shape[::-1] for name, shape in expected.items()}
    expected |= dict.fromkeys(kind.extra, ())
    if "group_sizes" in kind.extra:
        expected["group_sizes"] = (tensors["group_sizes"].numel() if "group_sizes" in tensors else 1,)
    check_shapes(tensors, expected, path, optional={"k", "threshold"} & set(kind.extra))


def _k(trainer: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path) -> int:
    k = width(trainer, "k", where)
    if "k" in tensors and int(tensors["k"]) != k:
        raise InvalidInput(f"{where}: k: {k}, but {WEIGHTS} says {int(tensors['k'])}")
    return k


def _with_unit_rows(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As AutoEncoder.normalize_decoder: f_i takes ‖d_i‖ from d_i, unless all are 1 already. x̂ stays."""
    norms = weights["W_dec"].norm(dim=1)
    if torch.allclose(norms, torch.ones_like(norms)):
        return weights
    norms = torch.where(norms > 0, norms, 1.0)
    return weights | {
        "W_enc": weights["W_enc"] * norms,
        "b_enc": weights["b_enc"] * norms,
        "W_dec": weights["W_dec"] / norms[:, None],
    }


def _metadata(trainer: Mapping[str, Any], buffer: Any) -> dict[str, Any]:
    buffer = buffer if isinstance(buffer, dict) else {}
    model, context = trainer.get("lm_name"), buffer.get("ctx_len")
    return known(
        {
            "model_name": model if isinstance(model, str) else None,
            "hook_name": _site(trainer, buffer),
            "context_size": context if isinstance(context, int) else None,
        }
    )


def _site(trainer: Mapping[str, Any], buffer: Mapping[str, Any]) -> str | None:
    """The site, where it is certain: the name of the submodule is the user's own, and this is the one all write."""
    found = re.fullmatch(r"resid_post_layer_(\d+)", str(trainer.get("submodule_name")))
    if found is None or buffer.get("io", "out") != "out" or trainer.get("layer") != int(found[1]):
        return None
    return f"blocks.{found[1]}.hook_resid_post"
