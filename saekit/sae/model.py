"""The sparse autoencoder: x [.., D] → latents f [.., S] → x̂ [.., E].

    p = (x − b_dec) W_enc + b_enc          pre-activations
    f = its architecture's activation of p                           (`sae.architectures`, a file each)
    x̂ = f W_dec + b_dec

One class serves training and use, and it always takes raw activations: whatever scale training works in is in the
optimizer's units, never in the weights (see `training.trainer`). Two kinds reach beyond one site, with any architecture:

    transcoder    reads one site and writes another: p = x W_enc + b_enc; with a skip, x̂ += x W_skipᵀ
                  (Dunefsky 2024, arXiv 2406.11944; Paulo 2025, arXiv 2501.18823)
    crosscoder    reads and writes several sites, side by side in x; decoder row i is (d_i¹, …, d_iᴸ)
                  (Lindsey 2024, Anthropic's circuits update, October 2024)

D = d_in, E = d_out (D but for transcoders), S = d_sae, K = k; leading dimensions are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saekit.errors import InvalidInput, UnknownFeature
from saekit.sae import kernels, memory
from saekit.sae.architectures import ARCHITECTURES, Architecture

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

MAX_WIDTH = 2**31
ROUNDING = 1e-3  # products of two shapes differ by far less
FLOATS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is, apart from its weights. `metadata` says where it came from, as SAELens names things."""

    architecture: str
    d_in: int  # the width read; of a crosscoder, its sites' widths together
    d_sae: int
    k: int | None = None  # topk, batchtopk, matryoshka: latents kept per token
    prefixes: tuple[int, ...] | None = None  # matryoshka: nested widths, the last one is d_sae
    d_out: int | None = None  # transcoder: the width written; None writes what is read
    skip: bool = False  # transcoder: x̂ += x W_skipᵀ
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False  # topk: latents count ‖d_i‖ times as much
    center_input: bool = False  # the SAE was trained on x − mean(x) (TransformerLens's centred weights)
    dtype: str = "float32"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or self.architecture not in ARCHITECTURES:
            raise InvalidInput(
                f"architecture: {self.architecture!r} is not one of {', '.join(ARCHITECTURES)}"
            )
        for name in ("d_in", "d_sae"):
            _check_width(name, getattr(self, name))
        if ARCHITECTURES[self.architecture].takes_k:
            _check_width("k", self.k)
            assert self.k is not None
            if self.k > self.d_sae:
                raise InvalidInput(f"k: {self.k} is more than d_sae = {self.d_sae}")
        elif self.k is not None:
            raise InvalidInput(f"k: only for topk, batchtopk and matryoshka, not for {self.architecture}")
        self._check_prefixes()
        self._check_sites()
        if self.dtype not in FLOATS:
            raise InvalidInput(f"dtype: {self.dtype!r} is not one of {', '.join(FLOATS)}")

    def _check_prefixes(self) -> None:
        if self.architecture != "matryoshka":
            if self.prefixes is not None:
                raise InvalidInput(f"prefixes: only for matryoshka, not for {self.architecture}")
            return
        prefixes = self.prefixes or ()
        for prefix in prefixes:
            _check_width("prefixes", prefix)
        if list(prefixes) != sorted(set(prefixes)) or prefixes[-1:] != (self.d_sae,):
            raise InvalidInput(
                f"prefixes: expected increasing widths that end with d_sae = {self.d_sae}, got {list(prefixes)}"
            )

    def _check_sites(self) -> None:
        if self.d_out is not None:
            _check_width("d_out", self.d_out)
            if self.apply_b_dec_to_input or self.center_input or self.rescale_acts_by_decoder_norm:
                raise InvalidInput("d_out: a transcoder's b_dec belongs to its output, not to its input")
        elif self.skip:
            raise InvalidInput("skip: only for transcoders, which have a d_out")
        names, widths = self.metadata.get("hook_names"), self.metadata.get("hook_widths")
        if names is None and widths is None:
            return
        if self.d_out is not None:
            raise InvalidInput("a transcoder reads one site, a crosscoder several: not both at once")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InvalidInput(f"hook_names: expected a list of site names, got {names!r:.80}")
        if not isinstance(widths, list) or len(widths) != len(names):
            raise InvalidInput(f"hook_widths: expected {len(names)} widths, got {widths!r:.80}")
        for width in widths:
            _check_width("hook_widths", width)
        if sum(widths) != self.d_in:
            raise InvalidInput(f"hook_widths: {widths} make {sum(widths)}, but d_in is {self.d_in}")


def _check_width(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < MAX_WIDTH:
        raise InvalidInput(f"{name}: expected a whole number from 1 to {MAX_WIDTH - 1:,}, got {value!r:.80}")


def default_prefixes(d_sae: int) -> tuple[int, ...]:
    """An eighth, a quarter, a half, all."""
    return tuple(sorted({max(1, d_sae // share) for share in (8, 4, 2, 1)}))


class Active(NamedTuple):
    """The non-zero latents of a batch of n tokens, as n_active triples sorted by token."""

    tokens: Tensor  # [n_active] int64, index into the batch
    latents: Tensor  # [n_active] int64
    values: Tensor  # [n_active]


class SAE(nn.Module):
    """A sparse autoencoder. Make one with `SAE.new` or `SAE.load`.

    Parameters: W_enc [D, S] (in memory as rows of D per latent), W_dec [S, E], b_dec [E]; b_enc [S], or a gated SAE's
    b_gate, b_mag, r_mag [S]; jumprelu: threshold [S]; W_skip [E, D] with a skip. batchtopk and matryoshka have a buffer,
    threshold [], which training keeps.
    """

    threshold: Tensor
    b_enc: Tensor
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        self.kind: Architecture = ARCHITECTURES[config.architecture]
        D, S, E, dtype = config.d_in, config.d_sae, config.d_out or config.d_in, FLOATS[config.dtype]
        self.W_enc = nn.Parameter(torch.zeros(S, D, dtype=dtype).t())
        self.W_dec = nn.Parameter(torch.zeros(S, E, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(E, dtype=dtype))
        for name, value in self.kind.vectors.items():
            setattr(self, name, nn.Parameter(torch.full((S,), value, dtype=dtype)))
        if self.kind.running_threshold:
            self.register_buffer("threshold", torch.zeros((), dtype=dtype))
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(E, D, dtype=dtype))

    @classmethod
    def new(
        cls,
        architecture: str,
        *,
        d_in: int,
        d_sae: int,
        site: str | Sequence[str] | None = None,
        target_site: str | None = None,
        model: str | None = None,
        k: int | None = None,
        prefixes: Sequence[int] | None = None,
        d_out: int | None = None,
        skip: bool = False,
        widths: Sequence[int] | None = None,
        seed: int = 0,
        dtype: str = "float32",
    ) -> SAE:
        """A fresh SAE: decoder rows in random directions, W_enc = W_decᵀ (transcoders: directions of its own), biases 0.

        architecture: standard, topk, batchtopk, matryoshka, jumprelu or gated. k: topk, batchtopk, matryoshka.
        prefixes: matryoshka's nested widths; an eighth, a quarter, a half and all of d_sae by default.
        site: the site it reads; several names make a crosscoder, whose d_in is their widths together (`widths`, equal
        by default). d_out and target_site: a transcoder, which writes width d_out there, with `skip` affinely too.

        Rows have norm 0.1 (Anthropic, April 2024), for the TopK family 1 (Gao 2024, appendix A).
        Raises `InvalidInput` for a width, k or architecture that cannot be.
        """
        metadata: dict[str, Any] = {"model_name": model, "hook_name_out": target_site}
        if site is None or isinstance(site, str):
            metadata["hook_name"] = site
        else:
            metadata["hook_names"] = list(site)
            metadata["hook_widths"] = list(widths or [d_in // max(1, len(site))] * len(site))
        if architecture == "matryoshka" and prefixes is None and isinstance(d_sae, int):
            prefixes = default_prefixes(d_sae)
        config = SAEConfig(
            architecture,
            d_in,
            d_sae,
            k,
            prefixes=None if prefixes is None else tuple(prefixes),
            d_out=d_out,
            skip=skip,
            apply_b_dec_to_input=d_out is None,
            dtype=dtype,
            metadata={k: v for k, v in metadata.items() if v is not None},
        )
        sae = cls(config)
        draw = torch.Generator().manual_seed(seed)
        norm = sae.kind.row_norm
        with torch.no_grad():
            sae.W_dec.copy_(_random_rows(d_sae, sae.d_out, norm, draw))
            sae.W_enc.copy_((sae.W_dec if d_out is None else _random_rows(d_sae, d_in, norm, draw)).t())
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
    def architecture(self) -> str:
        return self.config.architecture

    @property
    def d_in(self) -> int:
        return self.config.d_in

    @property
    def d_out(self) -> int:
        return self.config.d_out or self.config.d_in

    @property
    def d_sae(self) -> int:
        return self.config.d_sae

    @property
    def k(self) -> int | None:
        return self.config.k

    @property
    def prefixes(self) -> tuple[int, ...] | None:
        return self.config.prefixes

    # Where it reads and writes

    @property
    def is_transcoder(self) -> bool:
        return self.config.d_out is not None

    @property
    def is_crosscoder(self) -> bool:
        return "hook_names" in self.config.metadata

    @property
    def site(self) -> str:
        """The TransformerLens name of the site it reads, e.g. `blocks.2.hook_resid_pre`."""
        if self.is_crosscoder:
            raise InvalidInput(f"a crosscoder reads several sites, {', '.join(self.sites)}: use sae.sites")
        return self.sites[0]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites it reads, one but for a crosscoder."""
        if self.is_crosscoder:
            return tuple(self.config.metadata["hook_names"])
        return (self._site("hook_name", "site='blocks.2.hook_resid_pre'"),)

    @property
    def target_sites(self) -> tuple[str, ...]:
        """The sites that x̂ is for: those it reads, or a transcoder's other one."""
        if self.is_transcoder:
            return (self._site("hook_name_out", "target_site='blocks.2.hook_mlp_out'"),)
        return self.sites

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each target site."""
        return tuple(self.config.metadata.get("hook_widths", (self.d_out,)))

    def split(self, x_hat: Tensor) -> tuple[Tensor, ...]:
        """x̂ [.., E], or any row of W_dec, as one part for each target site."""
        return x_hat.split(list(self.widths), dim=-1)

    def _site(self, key: str, keyword: str) -> str:
        site = self.config.metadata.get(key)
        if not isinstance(site, str):
            raise InvalidInput(f"this SAE does not say its {key}: SAE.new(…, {keyword})")
        return site

    @property
    def model_name(self) -> str | None:
        return self.config.metadata.get("model_name")

    # x → p → f → x̂

    @property
    def encoder_bias(self) -> Tensor:
        """[S]: b_enc, or a gated SAE's b_gate."""
        bias: Tensor = getattr(self, self.kind.bias)
        return bias

    @property
    def shift(self) -> Tensor | None:
        """[D] what is taken off the input before it is encoded: b_dec, or nothing."""
        return self.b_dec if self.config.apply_b_dec_to_input else None

    def preactivations(self, x: Tensor) -> Tensor:
        """p [.., S], scaled by the decoder norms where the SAE selects by them."""
        x, rows = self._shifted(x), self.W_enc.t()
        if kernels.few(x, rows, self.encoder_bias):  # a token that is being generated, say
            p = kernels.linear(x, rows, self.encoder_bias)
        else:
            p = x @ self.W_enc + self.encoder_bias
        return p * self.W_dec.norm(dim=1) if self.config.rescale_acts_by_decoder_norm else p

    def _shifted(self, x: Tensor) -> Tensor:
        x = self._input(x)
        return x if self.shift is None else x - self.shift

    def encode(self, x: Tensor) -> Tensor:
        """Latents f [.., S] of activations x [.., D] of any float dtype. Raises `InvalidInput` on a wrong width."""
        return self.kind.activate(self, self.preactivations(x))

    def encode_active(self, x: Tensor) -> Active:
        """The non-zero latents of x [n, D], without a dense [n, S] result where the architecture allows it."""
        return Active(*self.kind.active(self, self.preactivations(x)))

    def encode_some(self, x: Tensor, latents: Sequence[int]) -> Tensor:
        """f [.., n] at n latents: one encoder column each, but for topk, where all latents compete."""
        at = [self.check_latent(latent) for latent in latents]
        some: slice | list[int] = at
        if len(at) == 1:
            some = slice(at[0], at[0] + 1)  # a view: nothing is gathered at each token that is steered
        p = self._shifted(x) @ self.W_enc[:, some] + self.encoder_bias[some]
        if self.architecture != "topk":
            return self.kind.activate(self, p, some)
        if x.device.type == "cpu" and bool((p <= -ROUNDING).all()):
            return torch.zeros_like(p)  # what is below zero fires in no competition, which need not be held
        assert self.k is not None
        every = self.preactivations(x)
        winners = every.topk(self.k, sorted=False).indices
        wins = (winners[..., None, :] == torch.tensor(at, device=x.device)[:, None]).any(-1)
        return torch.where(wins, every[..., some].relu(), 0.0)

    def decode(self, f: Tensor) -> Tensor:
        """f W_dec + b_dec [.., E] of latents f [.., S]; a skip, which needs x, is added by `reconstruct`."""
        if f.shape[-1] != self.d_sae:
            raise InvalidInput(f"decode: expected latents [.., {self.d_sae}], got {tuple(f.shape)}")
        if self.config.rescale_acts_by_decoder_norm:
            f = f / self.W_dec.norm(dim=1)
        return f @ self.W_dec + self.b_dec

    def affine(self, x: Tensor) -> Tensor:
        """The part of x̂ that no latent carries: b_dec [E], with a skip + x W_skipᵀ [.., E]."""
        return self.b_dec + x.to(self.W_skip) @ self.W_skip.t() if self.config.skip else self.b_dec

    def reconstruct(self, f: Tensor, x: Tensor) -> Tensor:
        """x̂ [.., E] of latents f and the x [.., D] they came from, in the units of x as the SAE sees it."""
        x_hat = self.decode(f)
        return x_hat + x.to(self.W_skip) @ self.W_skip.t() if self.config.skip else x_hat

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction x̂ [.., E]; a mean that was taken off the input is put back."""
        reconstruction = self.reconstruct(self.encode(x), x)
        if self.config.center_input:
            reconstruction = reconstruction + x.to(reconstruction.dtype).mean(-1, keepdim=True)
        return reconstruction

    def decoder_norms(self) -> Tensor:
        """[S]: ‖d_i‖, of a crosscoder Σ_l ‖d_iˡ‖ (Lindsey 2024)."""
        return _RowNorms.apply(self.W_dec, self.widths)

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
        """Raises `InvalidInput` unless the model has this SAE's sites at this SAE's widths."""
        from saekit.sites import site_width

        read = self.widths if not self.is_transcoder else (self.d_in,)
        wanted = dict(zip(self.sites, read, strict=True)) | dict(
            zip(self.target_sites, self.widths, strict=True)
        )
        for site, width in wanted.items():
            if (actual := site_width(model, site)) != width:
                raise InvalidInput(
                    f"this SAE has width {width} at {site}, but {model.cfg.model_name} has {actual} there; "
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
        out = f", d_out={self.d_out}" if self.is_transcoder else ""
        site = self.config.metadata.get("hook_names") or self.config.metadata.get("hook_name")
        return f"{self.architecture}, d_in={self.d_in}{out}, d_sae={self.d_sae}{k}, site={site!r}"


class _RowNorms(Function):
    """Σ_l ‖w_iˡ‖ [S] of rows [S, E] of parts with the given widths; autograd's own takes three passes more over the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, widths: tuple[int, ...]) -> Tensor:
        norms = torch.stack([part.norm(dim=1) for part in rows.split(list(widths), dim=1)], dim=1)
        ctx.save_for_backward(rows, norms)
        ctx.widths = widths
        return norms.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        rows, norms = ctx.saved_tensors
        slopes = g[:, None] / norms.clamp_min(torch.finfo(norms.dtype).tiny)  # 0 for a row of zeros
        found = memory.take(tuple(rows.shape), rows.dtype, rows.device)
        parts = (tensor.split(list(ctx.widths), dim=1) for tensor in (rows, found))
        for part, out, slope in zip(*parts, slopes.unbind(1), strict=True):
            torch.mul(part, slope[:, None], out=out)
        return found, None


def _random_rows(n: int, width: int, norm: float, draw: torch.Generator) -> Tensor:
    """[n, width] rows of the given norm in random directions."""
    rows = torch.randn(n, width, generator=draw)
    return rows * (norm / rows.norm(dim=1, keepdim=True))
