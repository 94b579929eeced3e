"""The sparse autoencoder: x [.., D] → latents f [.., S] → x̂ [.., D].

    standard   f = ReLU(p)                         Bricken 2023; Anthropic, circuits update April 2024
    topk       f = ReLU(the k largest p, else 0)   Gao 2024, arXiv 2406.04093, section 2.3
    both       p = (x − b_dec) W_enc + b_enc,      x̂ = f W_dec + b_dec

One class serves training and use, and it always takes raw activations: whatever scale training works in is in the
optimizer's units, never in the weights (see `training.trainer`).

D = d_in, S = d_sae, K = k; leading dimensions are free.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from saekit.errors import InvalidInput, UnknownFeature

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformer_lens.model_bridge import TransformerBridge

Architecture = Literal["standard", "topk"]
ARCHITECTURES: tuple[Architecture, ...] = ("standard", "topk")
MAX_WIDTH = 2**31
FLOATS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is, apart from its weights. `metadata` says where it came from, as SAELens names things."""

    architecture: Architecture
    d_in: int
    d_sae: int
    k: int | None = None  # topk: latents kept per token
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False  # topk: latents count ‖d_i‖ times as much
    center_input: bool = False  # the SAE was trained on x − mean(x) (TransformerLens's centred weights)
    dtype: str = "float32"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise InvalidInput(
                f"architecture: {self.architecture!r} is not one of {', '.join(ARCHITECTURES)}"
            )
        for name in ("d_in", "d_sae"):
            _check_width(name, getattr(self, name))
        if self.architecture == "topk":
            _check_width("k", self.k)
            assert self.k is not None
            if self.k > self.d_sae:
                raise InvalidInput(f"k: {self.k} is more than d_sae = {self.d_sae}")
        elif self.k is not None:
            raise InvalidInput(f"k: only for topk, not for {self.architecture}")
        if self.dtype not in FLOATS:
            raise InvalidInput(f"dtype: {self.dtype!r} is not one of {', '.join(FLOATS)}")


def _check_width(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < MAX_WIDTH:
        raise InvalidInput(f"{name}: expected a whole number from 1 to {MAX_WIDTH - 1:,}, got {value!r:.80}")


class Active(NamedTuple):
    """The non-zero latents of a batch of n tokens, as n_active triples sorted by token."""

    tokens: Tensor  # [n_active] int64, index into the batch
    latents: Tensor  # [n_active] int64
    values: Tensor  # [n_active]


class SAE(nn.Module):
    """A sparse autoencoder. Make one with `SAE.new` or `SAE.load`.

    Parameters: W_enc [D, S] (in memory as rows of D per latent), W_dec [S, D], b_enc [S], b_dec [D].
    """

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        D, S, dtype = config.d_in, config.d_sae, FLOATS[config.dtype]
        self.W_enc = nn.Parameter(torch.zeros(S, D, dtype=dtype).t())
        self.W_dec = nn.Parameter(torch.zeros(S, D, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(S, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(D, dtype=dtype))

    @classmethod
    def new(
        cls,
        architecture: Architecture,
        *,
        d_in: int,
        d_sae: int,
        site: str | None = None,
        model: str | None = None,
        k: int | None = None,
        seed: int = 0,
        dtype: str = "float32",
    ) -> SAE:
        """A fresh SAE: decoder rows in random directions, W_enc = W_decᵀ, biases 0.

        Rows have norm 0.1 for `standard` (Anthropic, April 2024) and 1 for `topk` (Gao 2024, appendix A).
        Raises `InvalidInput` for a width, k or architecture that cannot be.
        """
        metadata = {"hook_name": site, "model_name": model}
        config = SAEConfig(
            architecture,
            d_in,
            d_sae,
            k,
            dtype=dtype,
            metadata={k: v for k, v in metadata.items() if v is not None},
        )
        sae = cls(config)
        rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        rows *= (1.0 if architecture == "topk" else 0.1) / rows.norm(dim=1, keepdim=True)
        with torch.no_grad():
            sae.W_dec.copy_(rows)
            sae.W_enc.copy_(rows.t())
        return sae

    @classmethod
    def load(cls, source: str | Path, site: str | None = None, *, device: str = "cpu") -> SAE:
        """Load from a folder in the SAELens layout, or a published release by way of `sae_lens`.

        source: a folder, `"tiny"` (embedded), a release name or a hub repository. site: the SAE in a release, or
        the sub-folder. The loaded SAE is frozen, for use; `Trainer` thaws what it trains.

        Raises `FileMissing`, `UnknownName` for a release or site nobody knows, `InvalidInput` for broken files.
        """
        from saekit.sae.files import load

        return load(source, site).to(device).requires_grad_(False)

    def save(self, folder: str | Path) -> Path:
        """Write `cfg.json` and `sae_weights.safetensors` (SAELens layout), whole or not at all."""
        from saekit.sae.files import save

        return save(self, folder)

    @property
    def architecture(self) -> Architecture:
        return self.config.architecture

    @property
    def d_in(self) -> int:
        return self.config.d_in

    @property
    def d_sae(self) -> int:
        return self.config.d_sae

    @property
    def k(self) -> int | None:
        return self.config.k

    @property
    def site(self) -> str:
        """The TransformerLens name of the site it reads, e.g. `blocks.2.hook_resid_pre`."""
        site = self.config.metadata.get("hook_name")
        if site is None:
            raise InvalidInput(
                "this SAE does not say which site it reads: SAE.new(…, site='blocks.2.hook_resid_pre')"
            )
        return site

    @property
    def model_name(self) -> str | None:
        return self.config.metadata.get("model_name")

    def preactivations(self, x: Tensor) -> Tensor:
        """p [.., S], scaled by the decoder norms where the SAE selects by them."""
        x = self._input(x)
        p = (x - self.b_dec if self.config.apply_b_dec_to_input else x) @ self.W_enc + self.b_enc
        return p * self.W_dec.norm(dim=1) if self.config.rescale_acts_by_decoder_norm else p

    def encode(self, x: Tensor) -> Tensor:
        """Latents f [.., S] of activations x [.., D] of any float dtype. Raises `InvalidInput` on a wrong width."""
        p = self.preactivations(x)
        if self.k is None:
            return p.relu()
        values, latents = p.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(p).scatter(-1, latents, values.relu())

    def encode_active(self, x: Tensor) -> Active:
        """The non-zero latents of x [n, D], without a dense [n, S] result where the architecture allows it."""
        p = self.preactivations(x)
        if self.k is None:
            tokens, latents = (p > 0).nonzero(as_tuple=True)
            return Active(tokens, latents, p[tokens, latents])
        values, latents = p.topk(self.k, dim=-1, sorted=False)
        tokens, slots = (values > 0).nonzero(as_tuple=True)
        return Active(tokens, latents[tokens, slots], values[tokens, slots])

    def encode_some(self, x: Tensor, latents: Sequence[int]) -> Tensor:
        """f [.., n] at n latents. One encoder column each for ReLU; topk needs the full encode."""
        for latent in latents:
            self.check_latent(latent)
        if self.k is not None:
            return self.encode(x)[..., list(latents)]
        x = self._input(x)
        x = x - self.b_dec if self.config.apply_b_dec_to_input else x
        return (x @ self.W_enc[:, list(latents)] + self.b_enc[list(latents)]).relu()

    def decode(self, f: Tensor) -> Tensor:
        """x̂ [.., D] of latents f [.., S]."""
        if f.shape[-1] != self.d_sae:
            raise InvalidInput(f"decode: expected latents [.., {self.d_sae}], got {tuple(f.shape)}")
        if self.config.rescale_acts_by_decoder_norm:
            f = f / self.W_dec.norm(dim=1)
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction x̂ [.., D]; a mean that was taken off the input is put back."""
        reconstruction = self.decode(self.encode(x))
        if self.config.center_input:
            reconstruction = reconstruction + x.to(reconstruction.dtype).mean(-1, keepdim=True)
        return reconstruction

    def direction(self, latent: int) -> Tensor:
        """Decoder row [D]: what one unit of the latent, as `encode` gives it, adds to x̂."""
        row = self.W_dec.detach()[self.check_latent(latent)]
        return row / row.norm() if self.config.rescale_acts_by_decoder_norm else row.clone()

    def directions(self) -> Tensor:
        """All decoder rows [S, D], as `direction` gives each."""
        rows = self.W_dec.detach()
        return rows / rows.norm(dim=1, keepdim=True) if self.config.rescale_acts_by_decoder_norm else rows

    def check_latent(self, latent: int) -> int:
        if isinstance(latent, bool) or not isinstance(latent, int) or not 0 <= latent < self.d_sae:
            raise UnknownFeature(f"feature {latent!r}: expected a whole number from 0 to {self.d_sae - 1}")
        return latent

    def check_fits(self, model: TransformerBridge) -> None:
        """Raises `InvalidInput` unless the model has this SAE's site at this SAE's width."""
        from saekit.sites import site_width

        width = site_width(model, self.site)
        if width != self.d_in:
            raise InvalidInput(
                f"this SAE reads width {self.d_in} at {self.site}, but {model.cfg.model_name} has {width} there; "
                f"it belongs to {self.model_name or 'another model'}"
            )
        if self.config.center_input and model.cfg.normalization_type not in ("LN", "LNPre"):
            raise InvalidInput(
                f"this SAE reads centred activations, which only LayerNorm models have; {model.cfg.model_name} "
                f"uses {model.cfg.normalization_type}"
            )

    def _input(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.d_in,):
            raise InvalidInput(f"expected activations [.., {self.d_in}], got {tuple(x.shape)}")
        x = x.to(self.W_enc.device, self.W_enc.dtype)
        return x - x.mean(-1, keepdim=True) if self.config.center_input else x

    def extra_repr(self) -> str:
        k = f", k={self.k}" if self.k else ""
        site = self.config.metadata.get("hook_name")
        return f"{self.architecture}, d_in={self.d_in}, d_sae={self.d_sae}{k}, site={site!r}"
