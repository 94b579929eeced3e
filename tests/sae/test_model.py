from __future__ import annotations

import pytest
import torch

from saekit.errors import InvalidInput, UnknownFeature
from saekit.sae import SAE, SAEConfig

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)) * 3


def both(**options):
    return [
        SAE.new("standard", d_in=8, d_sae=32, **options),
        SAE.new("topk", d_in=8, d_sae=32, k=4, **options),
    ]


@pytest.mark.parametrize("sae", both(), ids=["standard", "topk"])
def test_shapes_and_leading_dimensions(sae) -> None:
    f = sae.encode(X)
    assert f.shape == (4, 5, 32)
    assert sae(X).shape == X.shape
    assert torch.equal(sae.encode(X[0, 0]), f[0, 0]) or torch.allclose(
        sae.encode(X[0, 0]), f[0, 0], atol=1e-6
    )
    assert sae.W_enc.shape == (8, 32)
    assert sae.W_dec.shape == (32, 8)
    assert (f >= 0).all()
    torch.testing.assert_close(sae(X), sae.decode(f))


def test_topk_keeps_k() -> None:
    sae = SAE.new("topk", d_in=8, d_sae=32, k=4)
    with torch.no_grad():
        sae.b_enc += 100  # so that the relu takes nothing away
    assert ((sae.encode(X) > 0).sum(-1) == 4).all()


@pytest.mark.parametrize("sae", both(), ids=["standard", "topk"])
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
    for sae, norm in zip(both(seed=5), (0.1, 1.0), strict=True):
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((32,), norm))
        assert torch.equal(sae.W_enc, sae.W_dec.t())
        assert not sae.b_enc.any()
        assert sae.W_enc.stride() == (1, 8)  # rows of D per latent in memory
    assert torch.equal(both(seed=5)[0].W_dec, both(seed=5)[0].W_dec)
    assert not torch.equal(both(seed=5)[0].W_dec, both(seed=6)[0].W_dec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "relu", "d_in": 8, "d_sae": 8}, "'relu' is not one of standard, topk"),
        ({"architecture": "topk", "d_in": 8, "d_sae": 8}, "k: expected a whole number"),
        ({"architecture": "topk", "d_in": 8, "d_sae": 8, "k": 9}, "k: 9 is more than d_sae"),
        ({"architecture": "standard", "d_in": 8, "d_sae": 8, "k": 2}, "k: only for topk"),
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
    with pytest.raises(InvalidInput, match="does not say which site"):
        _ = sae.site


def test_fitting_a_model(model, llama) -> None:
    site = "blocks.2.hook_resid_pre"
    SAE.new("standard", d_in=256, d_sae=8, site=site).check_fits(model)
    with pytest.raises(InvalidInput, match="reads width 8 .* has 256"):
        SAE.new("standard", d_in=8, d_sae=8, site=site).check_fits(model)
    centred = SAE(SAEConfig("standard", 64, 8, center_input=True, metadata={"hook_name": site}))
    with pytest.raises(InvalidInput, match="only LayerNorm models"):
        centred.check_fits(llama)
