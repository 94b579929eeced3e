"""Edits as files: what comes back acts bit for bit alike, and what does not fit is refused, saying why."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open, save_file

from saekit.errors import FileMissing, InvalidInput, UnknownFeature
from saekit.sae import SAE
from saekit.sites import capture
from saekit.steering import files
from saekit.steering.directions import Direction
from saekit.steering.edits import Edit, swap
from saekit.steering.files import SAEPart, load, part_of, save
from saekit.steering.steer import steer

AT = "blocks.2.hook_resid_pre"
PROMPT = "The old king walked to the"
D = 256


def direction(seed=0, site=AT) -> Direction:
    return Direction(torch.randn(D, generator=torch.Generator().manual_seed(seed)), site, f"direction {seed}")


def trained(architecture, **options) -> SAE:
    """An SAE with biases and thresholds that are not all alike."""
    sae = SAE.new(architecture, d_in=D, d_sae=64, site=AT, model="tiny", seed=3, **options)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.b_dec += 0.1 * torch.randn(D, generator=draw)
        for name in sae.kind.vectors:
            getattr(sae, name).add_(0.1 * torch.rand(64, generator=draw))
        if sae.kind.running_threshold:
            sae.threshold.fill_(0.02)
    return sae.requires_grad_(False)


def every_edit(model, sae) -> list[Edit]:
    x = capture(model, [AT], model.to_tokens(PROMPT))[AT]
    f = sae.encode(x)[0, 1:]
    first, second = f.mean(0).topk(2).indices.tolist()
    often = float(f[:, first].sort().values[-2:].mean())
    d, feature, other = direction(), Direction.from_sae(sae, first), Direction.from_sae(sae, second)
    return [
        d.add(0.1),
        d.add(0.25, unit="norm").at("last_prompt"),
        feature.clamp(1.7),
        other.min_clamp(30.0).when(feature, above=often),
        feature.scale(2.5),
        other.ablate(),
        d.project_out().at([1, 3]),
        d.rescale(0.7).when(direction(2), above=float(-x.norm(dim=-1).max())),
        d.cap(-0.2, unit="norm"),
        d.swap(model, "A small ship"),
        swap(model, "A small ship", d, direction(1), position=-1).at("prompt"),
        swap(model, "A small ship", site="blocks.3.hook_resid_pre", position=-1).at([2]),
        Edit("add", AT, torch.ones(D).bfloat16(), 0.1, "max", "ones", max_activation=3.5),
        Edit("add", "blocks.4.attn.hook_z", torch.ones(D), 0.1, "norm", "heads", norm=2.5),
    ]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "batchtopk", "matryoshka", "topk"])
def test_every_edit_comes_back_bit_for_bit(model, tmp_path, architecture) -> None:
    takes_k = architecture in ("topk", "batchtopk", "matryoshka")
    sae = trained(architecture, k=8 if takes_k else None)
    edits, path, ids = every_edit(model, sae), tmp_path / "edits.safetensors", model.to_tokens(PROMPT)
    assert save(edits, path, model=model) == path
    again = load(path, model=model, sae=sae if architecture == "topk" else ())
    assert [str(edit) for edit in again] == [str(edit) for edit in edits]
    plain = model(ids)
    for one, back in [*zip(edits, again, strict=True), (edits, again)]:
        with steer(model, one):
            expected = model(ids)
        with steer(model, back):
            assert torch.equal(model(ids), expected), str(one)
        assert not torch.equal(expected, plain), str(one)
    save(again, tmp_path / "again.safetensors", model=model)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    if architecture != "topk":
        assert path.stat().st_size < 60_000  # columns of two features, not the SAE


def test_a_part_of_an_sae_gives_the_bits_of_the_whole() -> None:
    x = torch.randn(3, 7, D, generator=torch.Generator().manual_seed(4))
    for architecture in ("standard", "gated", "jumprelu", "batchtopk"):
        sae = trained(architecture, k=4 if architecture == "batchtopk" else None)
        part = part_of(sae, [9, 40])
        for latents in ([40], [40, 9], [9]):
            f = part.encode_some(x, latents)
            assert torch.equal(f, sae.encode_some(x, latents))
            assert (f > 0).any()
        assert torch.equal(part.direction(40), sae.direction(40))
        with pytest.raises(UnknownFeature, match="feature 8: this part of an SAE has 9, 40"):
            part.encode_some(x, [8])


def test_a_transcoder_and_a_crosscoder_come_back(model, tmp_path) -> None:
    sites = ["blocks.1.hook_resid_pre", "blocks.3.hook_resid_pre"]
    crosscoder = SAE.new("standard", d_in=2 * D, d_sae=32, site=sites)
    transcoder = SAE.new(
        "standard", d_in=D, d_out=D, d_sae=32, skip=True, site=AT, target_site="blocks.2.hook_mlp_out"
    )
    edits = [
        Direction.from_sae(crosscoder, 3, sites[1]).scale(3.0),
        Direction.from_sae(transcoder, 4).clamp(2.0),
    ]
    path, ids = tmp_path / "e.safetensors", model.to_tokens(PROMPT)
    save(edits, path, model=model)
    again = load(path, model=model)
    with torch.no_grad():
        with steer(model, edits):
            expected = model(ids)
        with steer(model, again):
            assert torch.equal(model(ids), expected)
    assert isinstance(again[0].sae, SAEPart)
    assert again[0].sae.sites == tuple(sites)


def test_the_same_model_in_another_dtype_takes_it(tmp_path, model) -> None:
    import saekit

    save(direction().add(1.0), tmp_path / "e.safetensors", model=model)
    half = saekit.load_model("tiny", dtype="bfloat16", device="cpu")
    assert str(load(tmp_path / "e.safetensors", model=half)[0]) == f"add 1 direction 0 at {AT}"


def test_another_model_is_refused_and_named(tmp_path, model, llama) -> None:
    path = tmp_path / "e.safetensors"
    save(direction().add(1.0), path, model=model)
    with pytest.raises(
        InvalidInput, match=r"e\.safetensors is for another model: made on 'tiny' with weights .*, this is"
    ):
        load(path, model=llama)


def rewritten(path, change) -> None:
    """The file with its JSON changed."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    content = json.loads(metadata["edits"])
    change(content, tensors)
    save_file(tensors, path, metadata | {"edits": json.dumps(content)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c["edits"][0].update(site="blocks.2.resid_pre"), "Did you mean"),
        (lambda c, t: t.update({"tensor 0": torch.ones(8)}), f"width 8 at {AT}, which has 256"),
        (lambda c, t: t.update({"tensor 0": torch.ones(2, D)}), r"expected a direction \[D\]"),
        (lambda c, t: t.update({"tensor 0": torch.full((D,), torch.nan)}), "NaN or infinite"),
        (lambda c, t: t.pop("tensor 0"), "no tensor of floats 'tensor 0'"),
        (lambda c, t: c["edits"][0].update(kind="push"), "edits.0.kind: "),
        (lambda c, t: c["edits"][0].update(strength="8"), "edits.0.strength: "),
        (lambda c, t: c["edits"][0].update(more=1), "edits.0.more: Extra"),
        (lambda c, t: c["edits"][0].pop("norm"), "edits.0.norm: Field required"),
        (lambda c, t: c["edits"][0].update(positions=[-1]), "positions: "),
        (lambda c, t: c["edits"][0].update(unit="sd"), "edits.0.unit: "),
        (lambda c, t: c["edits"][1].update(sae=7), "SAE 7, which is not in the file"),
        (lambda c, t: c["edits"][1].update(latent=6), "feature 6: this part of an SAE has 5"),
        (lambda c, t: c["edits"][1].update(sae=None), "clamp needs a feature"),
        (lambda c, t: c["saes"][0].update(latents=[5, 6]), "the part of SAE 0 has tensors"),
        (lambda c, t: c["saes"][0]["config"].update(d_in=10**9), "the part of SAE 0 has tensors"),
        (lambda c, t: c["saes"][0]["config"].update(secret=1), "config with 'secret'"),
        (lambda c, t: c["saes"][0]["config"].update(skip="yes"), "flags or metadata"),
        (lambda c, t: c["saes"][0]["config"].pop("d_in"), "lacks something"),
        (lambda c, t: c["saes"][0]["config"].update(architecture="mystery"), "architecture: 'mystery'"),
        (lambda c, t: t.pop("sae 0 b_enc"), "has not the tensors of a standard one"),
        (lambda c, t: t.update({"sae 0 b_enc": torch.ones(2)}), "has not the tensors of a standard one"),
        (lambda c, t: t.update({"sae 0 extra": torch.ones(2)}), "has not the tensors of a standard one"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(model, tmp_path, change, message) -> None:
    path = tmp_path / "e.safetensors"
    save([direction().add(1.0), Direction.from_sae(trained("standard"), 5).clamp(1.0)], path, model=model)
    rewritten(path, lambda c, t: None)
    assert len(load(path, model=model)) == 2
    rewritten(path, change)
    with pytest.raises(InvalidInput, match=message) as caught:
        load(path, model=model)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_topk_sae_has_to_be_brought(model, tmp_path) -> None:
    sae, path = trained("topk", k=8), tmp_path / "e.safetensors"
    save(Direction.from_sae(sae, 5).clamp(1.0), path, model=model)
    with pytest.raises(InvalidInput, match=f"the topk SAE with d_sae 64 at {AT}, sha256 .*: load"):
        load(path, model=model)
    other = trained("topk", k=8)
    other.b_dec[0] += 1
    with pytest.raises(InvalidInput, match="; given was"):
        load(path, model=model, sae=other)
    assert load(path, model=model, sae=[other, sae])[0].sae is sae


def test_files_that_are_no_edits(model, tmp_path) -> None:
    with pytest.raises(FileMissing, match="edits: .* does not exist"):
        load(tmp_path / "none.safetensors", model=model)
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidInput, match="no file of edits"):
        load(tmp_path / "other.safetensors", model=model)
    with pytest.raises(InvalidInput, match="does not end with .safetensors"):
        save(direction().add(1.0), tmp_path / "e.json", model=model)
    with pytest.raises(InvalidInput, match="expected edits such as"):
        save([8.0], tmp_path / "e.safetensors", model=model)
    with pytest.raises(InvalidInput, match="do not fit tiny: width 3 at"):
        save(Direction(torch.ones(3), AT).add(1.0), tmp_path / "e.safetensors", model=model)


def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch) -> None:
    path = tmp_path / "e.safetensors"
    save(direction().add(1.0), path, model=model)
    before = path.read_bytes()

    def full(place, *_):
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        save(direction().add(2.0), path, model=model)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "e.safetensors"
    save([direction().add(1.0), Direction.from_sae(trained("standard"), 5).clamp(1.0)], path, model=model)
    return path, path.read_bytes()


@given(data=st.data())
def test_hostile_files_are_refused_or_read(model, saved, data) -> None:
    """Any file ends in edits or in one line, never in another error."""
    path, good = saved
    n = len(good)
    flips = data.draw(st.lists(st.tuples(st.integers(0, min(n, 4000) - 1), st.integers(0, 255)), max_size=6))
    content = bytearray(good[: data.draw(st.integers(0, n))] if data.draw(st.booleans()) else good)
    for at, value in flips:
        if at < len(content):
            content[at] = value
    path.write_bytes(bytes(content))
    try:
        assert all(isinstance(edit, Edit) for edit in load(path, model=model))
    except InvalidInput as error:
        assert "\n" not in str(error)
