from __future__ import annotations

import pytest
import torch

from saekit.errors import InvalidInput, UnknownFeature
from saekit.sae import SAE, SAEConfig
from saekit.sae.architectures import ARCHITECTURES

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)) * 3


def new(architecture, **options):
    k = {"k": 4} if ARCHITECTURES[architecture].takes_k else {}
    return SAE.new(architecture, d_in=8, d_sae=32, **(k | options))


def both(**options):
    return [new("standard", **options), new("topk", **options)]


def every(**options):
    """One of each architecture, no vector at its first value."""
    saes = [new(name, **options) for name in ARCHITECTURES]
    draw = torch.Generator().manual_seed(1)
    for sae in saes:
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter += 0.1 * torch.rand(parameter.shape, generator=draw)
            if sae.kind.running_threshold:
                sae.threshold.fill_(0.4)
    return saes


@pytest.mark.parametrize("sae", every(), ids=ARCHITECTURES)
def test_shapes_and_leading_dimensions(sae) -> None:
    f = sae.encode(X)
    assert f.shape == (4, 5, 32)
    assert sae(X).shape == X.shape
    torch.testing.assert_close(sae.encode(X[0, 0]), f[0, 0])
    assert sae.W_enc.shape == (8, 32)
    assert sae.W_dec.shape == (32, 8)
    assert (f >= 0).all()
    assert 0 < (f > 0).float().mean() < 1
    torch.testing.assert_close(sae(X), sae.decode(f))
    torch.testing.assert_close(sae(X), sae.reconstruct(f, X))


def test_jumprelu_fires_above_its_threshold_and_not_at_it() -> None:
    sae = new("jumprelu")
    with torch.no_grad():
        p = sae.preactivations(X[0, 0])
        sae.threshold.copy_(p.abs())
        assert not sae.encode(X[0, 0]).any()
        sae.threshold.mul_(0.999)
        torch.testing.assert_close(sae.encode(X[0, 0]), p.relu())


def test_gated_magnitudes_have_their_own_scale_and_bias() -> None:
    sae = every()[-1]
    x = X - sae.b_dec
    gate, magnitude = x @ sae.W_enc + sae.b_gate, x @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag
    torch.testing.assert_close(sae.encode(X), (gate > 0) * magnitude.relu())


def test_topk_keeps_k() -> None:
    sae = SAE.new("topk", d_in=8, d_sae=32, k=4)
    with torch.no_grad():
        sae.b_enc += 100  # so that the relu takes nothing away
    assert ((sae.encode(X) > 0).sum(-1) == 4).all()


@pytest.mark.parametrize("sae", every(), ids=ARCHITECTURES)
def test_sparse_and_partial_encodes_equal_the_dense_one(sae) -> None:
    x = X.flatten(0, 1)
    f = sae.encode(x)
    active = sae.encode_active(x)
    again = torch.zeros_like(f)
    again[active.tokens, active.latents] = active.values
    torch.testing.assert_close(again, f)
    assert (active.values > 0).all()
    assert (active.tokens.diff() >= 0).all()
    torch.testing.assert_close(sae.encode_some(X, [3, 17]), sae.encode(X)[..., [3, 17]])


def test_latents_below_zero_need_no_competition() -> None:
    """A topk SAE's encoder is run only where one of the latents asked for may win."""
    sae = next(sae for sae in every() if sae.architecture == "topk")
    with torch.no_grad():
        sae.b_enc[3] = -50.0
    ran: list[int] = []
    whole = sae.preactivations
    sae.preactivations = lambda x: (ran.append(1), whole(x))[1]
    assert not sae.encode_some(X, [3]).any()
    assert not ran
    some = sae.encode_some(X, [3, 17, 20])
    assert ran
    assert torch.equal(some, sae.encode(X)[..., [3, 17, 20]])
    assert not torch.equal(some, (X @ sae.W_enc + sae.b_enc)[..., [3, 17, 20]].relu())  # some lose


def test_a_transcoder_reads_one_site_and_writes_another() -> None:
    for sae in every(d_out=5, skip=True, site="a", target_site="b"):
        assert (sae.site, sae.sites, sae.target_sites, sae.d_out, sae.widths) == (
            "a",
            ("a",),
            ("b",),
            5,
            (5,),
        )
        assert (sae.W_dec.shape, sae.b_dec.shape, sae.W_skip.shape) == ((32, 5), (5,), (5, 8))
        torch.testing.assert_close(
            sae(X), sae.encode(X) @ sae.W_dec + sae.b_dec + X @ sae.W_skip.t(), msg=sae.architecture
        )
        torch.testing.assert_close(sae.preactivations(X), X @ sae.W_enc + sae.encoder_bias)
    assert not torch.equal(new("topk", d_out=8).W_enc.t(), new("topk", d_out=8).W_dec)


def test_a_crosscoder_is_an_sae_over_sites_side_by_side() -> None:
    sae = new("standard", site=["a", "b"], widths=[6, 2])
    plain = new("standard")
    assert torch.equal(sae(X), plain(X))
    assert (sae.sites, sae.target_sites, sae.widths) == (("a", "b"), ("a", "b"), (6, 2))
    assert [part.shape[-1] for part in sae.split(sae(X))] == [6, 2]
    torch.testing.assert_close(
        sae.decoder_norms(), sae.W_dec[:, :6].norm(dim=1) + sae.W_dec[:, 6:].norm(dim=1)
    )
    assert new("standard", site=["a", "b"]).widths == (4, 4)
    with pytest.raises(InvalidInput, match="a crosscoder reads several sites, a, b"):
        _ = sae.site


def test_rescaling_by_decoder_norms_changes_the_choice_and_not_the_meaning() -> None:
    plain = SAE.new("topk", d_in=8, d_sae=32, k=4)
    with torch.no_grad():
        plain.W_dec *= torch.linspace(0.1, 5, 32)[:, None]
    rescaled = SAE(SAEConfig("topk", 8, 32, 4, rescale_acts_by_decoder_norm=True))
    rescaled.load_state_dict(plain.state_dict())
    norms = plain.W_dec.norm(dim=1)
    p = ((X - plain.b_dec) @ plain.W_enc + plain.b_enc) * norms
    kept = p.topk(4)
    expected = torch.zeros_like(p).scatter(-1, kept.indices, kept.values.relu())
    torch.testing.assert_close(rescaled.encode(X), expected)
    torch.testing.assert_close(rescaled(X), expected / norms @ plain.W_dec + plain.b_dec)
    torch.testing.assert_close(rescaled.direction(3), plain.W_dec[3] / norms[3])
    torch.testing.assert_close(rescaled.directions()[3], rescaled.direction(3))


def test_centred_inputs() -> None:
    plain = SAE.new("standard", d_in=8, d_sae=32)
    centred = SAE(SAEConfig("standard", 8, 32, center_input=True))
    centred.load_state_dict(plain.state_dict())
    mean = X.mean(-1, keepdim=True)
    torch.testing.assert_close(centred.encode(X), plain.encode(X - mean))
    torch.testing.assert_close(centred(X), plain(X - mean) + mean)
    torch.testing.assert_close(centred.encode(X + 7), centred.encode(X), atol=1e-4, rtol=1e-4)


def test_initialisation_follows_the_papers() -> None:
    for name, norm in zip(ARCHITECTURES, (0.1, 1.0, 1.0, 1.0, 0.1, 0.1), strict=True):
        sae = new(name, seed=5)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((32,), norm))
        assert torch.equal(sae.W_enc, sae.W_dec.t())
        assert not sae.encoder_bias.any()
        assert sae.W_enc.stride() == (1, 8)  # rows of D per latent in memory
    assert new("matryoshka").prefixes == (4, 8, 16, 32)
    assert torch.equal(both(seed=5)[0].W_dec, both(seed=5)[0].W_dec)
    assert not torch.equal(both(seed=5)[0].W_dec, both(seed=6)[0].W_dec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"architecture": "relu", "d_in": 8, "d_sae": 8},
            "'relu' is not one of standard, topk, batchtopk, matryoshka, jumprelu, gated",
        ),
        ({"architecture": "topk", "d_in": 8, "d_sae": 8}, "k: expected a whole number"),
        ({"architecture": "topk", "d_in": 8, "d_sae": 8, "k": 9}, "k: 9 is more than d_sae"),
        ({"architecture": "standard", "d_in": 8, "d_sae": 8, "k": 2}, "k: only for topk"),
        ({"architecture": "batchtopk", "d_in": 8, "d_sae": 8}, "k: expected a whole number"),
        (
            {"architecture": "jumprelu", "d_in": 8, "d_sae": 8, "k": 2},
            "k: only for topk, batchtopk and matryoshka",
        ),
        (
            {"architecture": "topk", "d_in": 8, "d_sae": 8, "k": 2, "prefixes": [8]},
            "prefixes: only for matryoshka",
        ),
        (
            {"architecture": "matryoshka", "d_in": 8, "d_sae": 8, "k": 2, "prefixes": [4, 2, 8]},
            "prefixes: expected incr",
        ),
        (
            {"architecture": "matryoshka", "d_in": 8, "d_sae": 8, "k": 2, "prefixes": [4]},
            "end with d_sae = 8",
        ),
        ({"architecture": "standard", "d_in": 8, "d_sae": 8, "skip": True}, "skip: only for transcoders"),
        ({"architecture": "standard", "d_in": 8, "d_sae": 8, "d_out": 0}, "d_out: expected"),
        (
            {"architecture": "standard", "d_in": 8, "d_sae": 8, "d_out": 4, "site": ["a", "b"]},
            "not both at once",
        ),
        (
            {"architecture": "standard", "d_in": 8, "d_sae": 8, "site": ["a", "b"], "widths": [8]},
            "expected 2 widths",
        ),
        (
            {"architecture": "standard", "d_in": 8, "d_sae": 8, "site": ["a", "b"], "widths": [8, 1]},
            "make 9, but d_in is 8",
        ),
        ({"architecture": "standard", "d_in": -1, "d_sae": 8}, "d_in: expected"),
        ({"architecture": "standard", "d_in": 8, "d_sae": 10**12}, "d_sae: expected"),
        ({"architecture": "standard", "d_in": True, "d_sae": 8}, "d_in: expected"),
        ({"architecture": "standard", "d_in": 8, "d_sae": 8, "dtype": "int8"}, "dtype"),
    ],
)
def test_what_cannot_be(options, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        SAE.new(options.pop("architecture"), **options)


def test_wrong_use_is_told() -> None:
    sae = both()[0]
    with pytest.raises(InvalidInput, match=r"expected activations \[\.\., 8\], got \(2, 9\)"):
        sae.encode(torch.zeros(2, 9))
    with pytest.raises(InvalidInput, match=r"expected latents"):
        sae.decode(torch.zeros(2, 9))
    for latent in (-1, 32, 1.0, True):
        with pytest.raises(UnknownFeature, match="0 to 31"):
            sae.direction(latent)
    with pytest.raises(InvalidInput, match="does not say its hook_name: SAE.new"):
        _ = sae.site


def test_fitting_a_model(model, llama) -> None:
    site = "blocks.2.hook_resid_pre"
    SAE.new("standard", d_in=256, d_sae=8, site=site).check_fits(model)
    with pytest.raises(InvalidInput, match="has width 8 at .* has 256"):
        SAE.new("standard", d_in=8, d_sae=8, site=site).check_fits(model)
    target = "blocks.2.hook_mlp_out"
    SAE.new("standard", d_in=256, d_sae=8, d_out=256, site=site, target_site=target).check_fits(model)
    with pytest.raises(InvalidInput, match="has width 9 at blocks.2.hook_mlp_out"):
        SAE.new("standard", d_in=256, d_sae=8, d_out=9, site=site, target_site=target).check_fits(model)
    SAE.new("standard", d_in=512, d_sae=8, site=[site, target]).check_fits(model)
    centred = SAE(SAEConfig("standard", 64, 8, center_input=True, metadata={"hook_name": site}))
    with pytest.raises(InvalidInput, match="only LayerNorm models"):
        centred.check_fits(llama)
