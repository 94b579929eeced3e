"""A vector [D] at a site of a model, that knows where it came from. Directions add, subtract and scale.

from_contrast    h⁺ − h⁻ at the last token of two prompts (Turner 2023; at every position: `Prefix`)
from_means       mean⁺ − mean⁻ over labelled texts (CAA, Rimsky 2023)
from_pca         the axis that pairs of texts differ along (RepE, Zou 2023)
from_probe       what a linear probe reads (logistic, or the difference of means with its threshold)
task_vector      the state after demonstrations (Hendel 2023)
from_sae         a latent's decoder row
from_file        safetensors, a GGUF control vector, or a JSON list of numbers
random           a norm-matched control
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit.errors import InvalidInput, UnknownName
from saekit.files import finite_number
from saekit.lm import model_hash
from saekit.sites import check_site, site_width
from saekit.steering.directions.files import read_direction, write_direction
from saekit.steering.directions.parts import Parts, decompose
from saekit.steering.directions.sources import Sides, principal_axis
from saekit.steering.directions.states import Token, check_texts, states
from saekit.steering.edits import Edit, Source, Steerable
from saekit.steering.kinds import Kind, Unit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.sae import SAE
    from saekit.steering.probes import ProbeKind


@dataclass(frozen=True, eq=False)
class Direction(Steerable):
    """A vector [D] at a site, with a label that says what it is and a source that says where it came from."""

    vector: Tensor = field(repr=False)  # [D] float32, on the CPU
    site: str
    label: str = "direction"
    sae: SAE | None = field(default=None, repr=False)
    latent: int | None = None
    source: str = ""
    model: str | None = None  # the name it was taken from
    model_hash: str | None = field(default=None, repr=False)
    sides: Sides | None = field(default=None, repr=False)  # the states it was taken from, where there are two

    def __post_init__(self) -> None:
        vector = torch.as_tensor(self.vector).detach()
        if vector.ndim != 1 or not len(vector) or not vector.is_floating_point():
            raise InvalidInput(f"direction: expected a vector [D], got {vector.dtype} {list(vector.shape)}")
        if not bool(torch.isfinite(vector).all()):
            raise InvalidInput(f"direction {self.label}: the vector holds NaN or infinite values")
        object.__setattr__(self, "vector", vector.float().cpu())

    # Where they come from

    @classmethod
    def from_contrast(cls, model: TransformerBridge, positive: str, negative: str, *, site: str) -> Direction:
        """h⁺ − h⁻ at the site, read at the last token of each prompt (ActAdd, Turner 2023, arXiv 2308.10248).

        Raises `UnknownName` for a site the model lacks, `InvalidInput` for an empty prompt.
        """
        sides = Sides(*(states(model, [text], site) for text in (positive, negative)))
        label = f"{positive!r} − {negative!r}"
        return cls._of(model, site, sides.difference, label, "contrast of two prompts, last token", sides)

    @classmethod
    def from_means(
        cls,
        model: TransformerBridge,
        positive: Sequence[str],
        negative: Sequence[str],
        *,
        site: str,
        token: Token = "last",
        label: str = "mean difference",
    ) -> Direction:
        """mean⁺ − mean⁻ over two lists of texts (CAA, Rimsky 2023, arXiv 2312.06681).

        token: where a text is read, at its `"last"` token or as the `"mean"` over its ordinary ones.
        Raises `UnknownName` for a site the model lacks, `InvalidInput` for an empty list or text.
        """
        sides = _sides(model, positive, negative, site, token)
        source = f"mean difference of {len(positive)} and {len(negative)} texts, {token} token"
        return cls._of(model, site, sides.difference, label, source, sides)

    @classmethod
    def from_pca(
        cls,
        model: TransformerBridge,
        positive: Sequence[str],
        negative: Sequence[str],
        *,
        site: str,
        token: Token = "last",
        label: str = "principal axis",
    ) -> Direction:
        """The axis, of length 1, that pairs of texts differ along most (RepE reading, Zou 2023, arXiv 2310.01405).

        positive, negative: as many of one as of the other, a pair at each place. Uncentred; the labels give the sign.
        Raises `UnknownName` for a site the model lacks, `InvalidInput` for lists that do not pair up.
        """
        sides = _sides(model, positive, negative, site, token)
        axis = principal_axis(sides)
        source = (
            f"principal axis of {len(positive)} pairs, {token} token: {axis.share:.0%} of their squared differences, "
            f"{axis.agreement:.0%} of the pairs agree"
        )
        return cls._of(model, site, axis.vector, label, source, sides)

    @classmethod
    def from_probe(
        cls,
        model: TransformerBridge,
        positive: Sequence[str],
        negative: Sequence[str],
        *,
        site: str,
        kind: ProbeKind = "logistic",
        token: Token = "last",
        label: str | None = None,
    ) -> Direction:
        """What a linear probe for positive against negative reads (`saekit.steering.probes.fit_probe`).

        kind `"logistic"`: its weights, of length 1. `"difference"`: mean⁺ − mean⁻ of the texts it was fitted on.
        """
        from saekit.steering.probes import fit_probe

        return fit_probe(model, positive, negative, site=site, kind=kind, token=token, label=label).direction

    @classmethod
    def task_vector(
        cls,
        model: TransformerBridge,
        demonstrations: str | Sequence[str],
        *,
        site: str,
        label: str = "task vector",
    ) -> Direction:
        """The state at the last token of a prompt that demonstrates a task, e.g. `"a → A\\nb → B\\nc →"`.

        Several prompts: their mean. It is meant to *replace* the state at the last token of a prompt without
        demonstrations, so it is no difference (Hendel 2023, arXiv 2310.15916).
        Raises `UnknownName` for a site the model lacks, `InvalidInput` for an empty prompt.
        """
        texts = (
            [demonstrations]
            if isinstance(demonstrations, str)
            else check_texts(demonstrations, "demonstrations")
        )
        vector = states(model, texts, site).mean(0)
        return cls._of(
            model, site, vector, label, f"last-token state of {len(texts)} prompt(s) with demonstrations"
        )

    @classmethod
    def random(cls, like: Tensor, site: str, seed: int = 0) -> Direction:
        """A random direction of the same norm: the control that every steering claim needs beside it."""
        vector = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
        return cls(vector * (float(like.norm()) / vector.norm()), site, f"random direction {seed}")

    @classmethod
    def from_sae(cls, sae: SAE, latent: int, site: str | None = None) -> Direction:
        """A latent's decoder row, without a catalog. site: which of a crosscoder's; of a transcoder it is its target.

        Raises `UnknownFeature` for a latent the SAE lacks, `UnknownName` for a site it does not write.
        """
        sites = sae.target_sites
        if site is None and len(sites) > 1:
            raise InvalidInput(f"feature {latent}: this SAE writes {', '.join(sites)}; name one, site=…")
        site = site or sites[0]
        if site not in sites:
            raise UnknownName(f"site {site!r}: this SAE writes {', '.join(sites)}")
        row = sae.split(sae.direction(latent))[sites.index(site)]
        return cls(row, site, f"feature {latent}", sae, latent, "decoder row", sae.model_name)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        site: str | None = None,
        model: TransformerBridge | None = None,
    ) -> Direction:
        """A direction that `save` wrote, a safetensors file with one vector, a GGUF control vector, or a JSON list.

        site: needed where the file does not say it; of a GGUF control vector, which of its layers.
        model: the model it is for; a direction of another one is refused.

        Raises `FileMissing`, `InvalidInput` for a file that is broken or says another site, model or width.
        """
        direction = cls(**read_direction(Path(path), site))
        if model is not None:
            direction.check_fits(model)
        return direction

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file that `from_file` reads: the vector, with site, label, source and model as metadata."""
        about = {
            "site": self.site,
            "label": self.label,
            "source": self.source,
            "model": self.model,
            "model_hash": self.model_hash,
        }
        return write_direction(Path(path), self.vector, about)

    # Arithmetic

    def __add__(self, other: Direction) -> Direction:
        return self._combined(other, 1.0)

    def __sub__(self, other: Direction) -> Direction:
        return self._combined(other, -1.0)

    def __mul__(self, factor: float) -> Direction:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return self._like(self.vector * finite_number(factor, "factor"), f"{factor:g} × {_atom(self.label)}")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        if not isinstance(divisor, (int, float)):
            return NotImplemented
        if divisor == 0:
            raise InvalidInput(f"{self.label}: divided by 0")
        return self * (1 / divisor)

    def __neg__(self) -> Direction:
        return self._like(-self.vector, f"−{_atom(self.label)}")

    def unit(self) -> Direction:
        """The same direction of length 1. Raises `InvalidInput` for a vector of zeros."""
        return self._like(self._axis(), f"unit {_atom(self.label)}")

    def without(self, other: Direction) -> Direction:
        """What is left after the part along another direction is taken off: v − (v · ô)ô."""
        self._check_like(other)
        axis = other._axis()
        return self._like(
            self.vector - (self.vector @ axis) * axis, f"{_atom(self.label)} without {_atom(other.label)}"
        )

    def cosine(self, other: Direction) -> float:
        """The cosine between two directions of one place."""
        self._check_like(other)
        return float(self._axis() @ other._axis())

    @property
    def norm(self) -> float:
        return float(self.vector.norm())

    # What they are made of, and what is done with them

    def in_features(self, sae: SAE, n: int = 10) -> Parts:
        """The direction in the features of an SAE at its site: by cosine, by a sparse fit, and by what fires (`Parts`).

        n: features for each view. Raises `InvalidInput` for an SAE of another site or width.
        """
        return decompose(self.vector, self.site, self.label, sae, n, self.sides)

    def edit(self, kind: Kind, strength: float = 0.0, unit: Unit = "raw") -> Edit:
        return Edit(
            kind, self.site, self.vector, strength, unit, self.label, latent=self.latent, sae=self.sae,
            model_hash=self.model_hash,
        )  # fmt: skip

    def replace(self) -> Edit:
        """Put the vector itself in place of the activations, as a task vector wants it: at the positions where it acts,
        nothing of x is left. Give `steer` the last position of the prompt, `positions=[n − 1]`."""
        return Edit(
            "swap", self.site, self.vector, 0.0, label=self.label, source=Source(self.vector),
            model_hash=self.model_hash,
        )  # fmt: skip

    def check_fits(self, model: TransformerBridge) -> None:
        """Raises `UnknownName` or `InvalidInput` unless it is a direction of this model: site, width and weights."""
        if (width := site_width(model, self.site)) != len(self.vector):
            raise InvalidInput(
                f"{self.label} has width {len(self.vector)}, but {model.cfg.model_name} has {width} at {self.site}"
            )
        if self.model_hash is not None and self.model_hash != model_hash(model):
            raise InvalidInput(
                f"{self.label} was taken from {self.model}, and {model.cfg.model_name} has other weights; "
                "take it anew from this model"
            )

    def __str__(self) -> str:
        source = f"\n  {self.source}" if self.source else ""
        model = f" of {self.model}" if self.model else ""
        return f"{self.label} at {self.site}{model}, width {len(self.vector)}, norm {self.norm:.3g}{source}"

    @classmethod
    def _of(
        cls,
        model: TransformerBridge,
        site: str,
        vector: Tensor,
        label: str,
        source: str,
        sides: Sides | None = None,
    ) -> Direction:
        name = str(model.cfg.model_name)
        return cls(vector, site, label, source=source, model=name, model_hash=model_hash(model), sides=sides)

    @property
    def _of_model(self) -> str:
        return f"{self.model} ({self.model_hash[:8]})" if self.model_hash else str(self.model)

    def _axis(self) -> Tensor:
        if not self.norm > 0:
            raise InvalidInput(f"{self.label}: a vector of zeros has no direction")
        return self.vector / self.norm

    def _combined(self, other: Any, sign: float) -> Direction:
        if not isinstance(other, Direction):
            return NotImplemented
        self._check_like(other)
        known = self if self.model_hash else other
        return Direction(
            self.vector + sign * other.vector,
            self.site,
            f"{self.label} {'+' if sign > 0 else '−'} {_atom(other.label)}",
            source="; ".join(dict.fromkeys(d.source for d in (self, other) if d.source)),
            model=known.model or self.model,
            model_hash=known.model_hash,
        )

    def _like(self, vector: Tensor, label: str) -> Direction:
        """Another vector at the same place; no longer a latent's row, nor what its sides differ by."""
        return Direction(
            vector, self.site, label, source=self.source, model=self.model, model_hash=self.model_hash
        )

    def _check_like(self, other: Direction) -> None:
        a, b = self, other
        if a.site != b.site:
            raise InvalidInput(
                f"{a.label} is at {a.site}, {b.label} at {b.site}: no arithmetic between sites"
            )
        if a.model_hash and b.model_hash:
            same = a.model_hash == b.model_hash
        else:  # one name may stand for many copies, and one copy have many names: only bare names are compared
            same = bool(a.model_hash or b.model_hash) or None in (a.model, b.model) or a.model == b.model
        if not same:
            raise InvalidInput(
                f"{a.label} is of {a._of_model}, {b.label} of {b._of_model}: no arithmetic between models"
            )
        if len(a.vector) != len(b.vector):
            raise InvalidInput(
                f"{a.label} has width {len(a.vector)}, {b.label} {len(b.vector)}: no arithmetic between widths"
            )


def _sides(
    model: TransformerBridge, positive: Sequence[str], negative: Sequence[str], site: str, token: Token
) -> Sides:
    """Both lists in one call, so that they share forwards."""
    positive, negative = check_texts(positive, "positive"), check_texts(negative, "negative")
    both = states(model, [*positive, *negative], check_site(model, site), token)
    return Sides(both[: len(positive)], both[len(positive) :])


def _atom(label: str) -> str:
    """A label that can stand as one side of an operation."""
    return f"({label})" if any(sign in label for sign in (" + ", " − ", " × ", " without ")) else label
