"""The SAELens layout, both ways, and everything that can be wrong with a folder."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from saekit.errors import FileMissing, InvalidInput, SaekitError, UnknownName
from saekit.sae import SAE, SAEConfig
from saekit.sae.files import CFG, WEIGHTS

X = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 2


def make(architecture="topk", **options):
    k = {"k": 4} if architecture == "topk" else {}
    sae = SAE(
        SAEConfig(
            architecture,
            8,
            32,
            metadata={"hook_name": "blocks.1.hook_resid_pre", "model_name": "m"},
            **k,
            **options,
        )
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return sae


VARIANTS = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
]


@pytest.mark.parametrize(("architecture", "options"), VARIANTS)
def test_sae_lens_reads_ours_and_ours_reads_theirs(tmp_path, architecture, options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of sae_lens's own imports
        import sae_lens

        ours = make(architecture, **options)
        ours.save(tmp_path / "ours")
        theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
        assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_pre"
        assert theirs.cfg.architecture() == architecture
        theirs.save_model(tmp_path / "theirs")
    back = SAE.load(tmp_path / "theirs")
    for sae in (theirs, back):
        torch.testing.assert_close(sae.encode(X), ours.encode(X), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae(X), ours(X), atol=1e-5, rtol=1e-5)
    assert back.site == ours.site
    assert back.config.rescale_acts_by_decoder_norm == ours.config.rescale_acts_by_decoder_norm


def test_round_trip_is_exact_and_keeps_foreign_metadata(tmp_path) -> None:
    sae = make()
    sae.config.metadata["neuronpedia_id"] = "x/1"
    again = SAE.load(sae.save(tmp_path / "a"))
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, getattr(again, name))
    assert again.config.metadata["neuronpedia_id"] == "x/1"
    assert again.W_enc.stride() == (1, 8)
    assert (tmp_path / "a" / WEIGHTS).stat().st_mode & 0o044


def test_centring_survives(tmp_path) -> None:
    again = SAE.load(make("standard", center_input=True).save(tmp_path / "a"))
    assert again.config.center_input


def edit_cfg(folder, **changes):
    cfg = json.loads((folder / CFG).read_text())
    for key, value in changes.items():
        if value is None:
            cfg.pop(key)
        else:
            cfg[key] = value
    (folder / CFG).write_text(json.dumps(cfg))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "relu2"}, r"cfg\.json: architecture: 'relu2'"),
        ({"d_sae": 33}, r"W_enc is \[8, 32\], expected \[8, 33\]; W_dec is \[32, 8\]"),
        ({"d_sae": 10**12}, r"cfg\.json: d_sae: expected"),
        ({"d_in": "8"}, r"cfg\.json: d_in: expected"),
        ({"k": -1}, r"cfg\.json: k"),
        ({"k": None}, r"cfg\.json: k"),
        ({"d_sae": None, "d_in": None}, r"missing d_in, d_sae"),
        ({"metadata": None}, r"before SAELens 6"),
        ({"normalize_activations": "layer_norm"}, r"normalize_activations = 'layer_norm'"),
        ({"dtype": "int4"}, r"dtype"),
    ],
)
def test_wrong_configs_are_named(tmp_path, changes, message) -> None:
    make().save(tmp_path / "a")
    edit_cfg(tmp_path / "a", **changes)
    with pytest.raises(InvalidInput, match=message):
        SAE.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"d_in": NaN}', "NaN"),
        ('{"d_in": 1, "d_in": 2}', r"duplicate keys \['d_in'\]"),
        ("[1]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_hostile_json(tmp_path, content, message) -> None:
    make().save(tmp_path / "a")
    (tmp_path / "a" / CFG).write_text(content)
    with pytest.raises(InvalidInput, match=message):
        SAE.load(tmp_path / "a")


def test_tensors_against_the_config(tmp_path) -> None:
    folder = make().save(tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    edit_cfg(folder, metadata={"hook_name": "s"})  # without sums, so that the shapes are what is wrong
    save_file(
        {"W_enc": tensors["W_enc"], "b_enc": tensors["b_enc"], "extra": tensors["b_dec"]}, folder / WEIGHTS
    )
    with pytest.raises(
        InvalidInput, match=r"missing W_dec \[32, 8\]; missing b_dec \[8\]; unexpected extra \[8\]"
    ):
        SAE.load(folder)
    save_file(tensors | {"b_dec": torch.full((8,), float("nan"))}, folder / WEIGHTS)
    with pytest.raises(InvalidInput, match="'b_dec' holds NaN"):
        SAE.load(folder)


def test_damage_is_seen_by_the_sums(tmp_path) -> None:
    folder = make().save(tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"b_dec": tensors["b_dec"] + 1}, folder / WEIGHTS)
    with pytest.raises(InvalidInput, match="b_dec differ from the SHA-256"):
        SAE.load(folder)


def test_what_is_not_there(tmp_path) -> None:
    with pytest.raises(FileMissing, match="does not exist"):
        SAE.load(tmp_path / "none")
    with pytest.raises(FileMissing, match=r"no cfg\.json"):
        SAE.load(tmp_path)
    folder = make().save(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileMissing, match="SAE weights"):
        SAE.load(folder)


def test_a_pickle_is_never_run(tmp_path) -> None:
    folder = make().save(tmp_path / "a")
    torch.save({"W_enc": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(InvalidInput, match="not a readable safetensors file"):
        SAE.load(folder)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_mutated_bytes_give_the_same_sae_or_one_error(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    sae = make()
    sae.save(folder / "a")
    path = folder / "a" / data.draw(st.sampled_from([CFG, WEIGHTS]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        again = SAE.load(folder / "a")
    except SaekitError:
        return
    assert again.W_dec.shape[1] == 8


def test_saving_over_a_folder_is_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    import saekit.sae.files as files

    folder = make().save(tmp_path / "a")
    before = (folder / WEIGHTS).read_bytes()
    monkeypatch.setattr(
        files, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        make("standard").save(folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_unknown_releases_list_near_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnknownName, match=r"neither a folder .* Did you mean .*gpt2-small-res-jb"):
            SAE.load("gpt2-small-res-jbb", "blocks.2.hook_resid_pre")
        with pytest.raises(UnknownName, match=r"has no SAE 'blocks\.22\.hook_resid_pre'"):
            SAE.load("gpt2-small-res-jb", "blocks.22.hook_resid_pre")


def test_the_published_gpt2_release_loads_through_sae_lens(tmp_path, monkeypatch) -> None:
    """The release's own files are on the hub. A SAELens folder of the true shapes stands in for the download."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens.loading.pretrained_sae_loaders as loaders
    D, S = 768, 24_576
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(D, S, generator=draw) / 28, "W_dec": torch.randn(S, D, generator=draw) / 28,
        "b_enc": torch.zeros(S), "b_dec": torch.randn(D, generator=draw),
    }  # fmt: skip
    old_cfg = {  # as it is published: before SAELens 6
        "model_name": "gpt2-small", "hook_point": "blocks.2.hook_resid_pre", "hook_point_layer": 2, "d_in": D, "d_sae": S,
        "dataset_path": "Skylion007/openwebtext", "context_size": 128, "dtype": "torch.float32", "device": "cpu",
        "expansion_factor": 32, "l1_coefficient": 8e-05, "lr": 0.0004,
    }  # fmt: skip
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename))
        path = tmp_path / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        if filename.endswith(CFG):
            path.write_text(json.dumps(old_cfg))
        elif filename.endswith(WEIGHTS):
            save_file(tensors, path)
        else:
            save_file({"sparsity": torch.zeros(S)}, path)
        return str(path)

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    sae = SAE.load("gpt2-small-res-jb", "blocks.2.hook_resid_pre")
    assert asked[0] == ("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.2.hook_resid_pre/cfg.json")
    assert (sae.architecture, sae.d_in, sae.d_sae, sae.site) == ("standard", D, S, "blocks.2.hook_resid_pre")
    assert sae.config.center_input, "the release was trained on centred activations"
    x = torch.randn(3, D, generator=draw) + 5
    centred = x - x.mean(-1, keepdim=True)
    expected = torch.relu((centred - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"])
    torch.testing.assert_close(sae.encode(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae.direction(7650), tensors["W_dec"][7650])
    again = SAE.load(sae.save(tmp_path / "saved"))
    assert again.config.center_input
    shutil.rmtree(tmp_path)
