"""The SAELens layout, both ways, and everything that can be wrong with a folder."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from saekit.errors import FileMissing, InvalidInput, SaekitError, UnknownName
from saekit.sae import SAE, SAEConfig
from saekit.sae.files import CFG, WEIGHTS, names_sae
from saekit.sae.releases import registry

X = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 2


ARCHITECTURES = ("standard", "topk", "batchtopk", "matryoshka", "jumprelu", "gated")


def make(architecture="topk", **options):
    """An SAE with random weights, thresholds above 0, in float32."""
    if architecture in ("topk", "batchtopk", "matryoshka"):
        options = {"k": 4} | options
    if architecture == "matryoshka":
        options = {"prefixes": (8, 16, 32)} | options
    metadata = {"hook_name": "blocks.1.hook_resid_pre", "model_name": "m"}
    if options.get("d_out"):
        options = {"apply_b_dec_to_input": False} | options
        metadata["hook_name_out"] = "blocks.1.hook_mlp_out"
    sae = SAE(SAEConfig(architecture, 8, 32, metadata=options.pop("metadata", metadata), **options))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            random = torch.randn(tensor.shape, generator=draw)
            tensor.copy_(random.abs() if name == "threshold" else random / 2)
    return sae


TRANSCODER, SKIP = {"d_out": 5}, {"d_out": 5, "skip": True}
# architecture, options, and what sae_lens calls it
VARIANTS = [
    ("standard", {}, "standard"),
    ("standard", {"apply_b_dec_to_input": False}, "standard"),
    ("topk", {}, "topk"),
    ("topk", {"rescale_acts_by_decoder_norm": True}, "topk"),
    ("jumprelu", {}, "jumprelu"),
    ("jumprelu", {"apply_b_dec_to_input": False}, "jumprelu"),
    ("gated", {}, "gated"),
    ("gated", {"apply_b_dec_to_input": False}, "gated"),
    ("batchtopk", {}, "jumprelu"),
    ("matryoshka", {}, "jumprelu"),
    *(
        (name, options, f"{'' if name == 'standard' else 'jumprelu_'}{kind}")
        for name in ("standard", "jumprelu", "batchtopk", "matryoshka")
        for options, kind in ((TRANSCODER, "transcoder"), (SKIP, "skip_transcoder"))
    ),
]


@pytest.fixture(scope="module")
def sae_lens():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its own imports
        import sae_lens
    return sae_lens


@pytest.mark.parametrize(("architecture", "options", "name"), VARIANTS)
def test_sae_lens_reads_ours_and_ours_reads_theirs(tmp_path, sae_lens, architecture, options, name) -> None:
    ours = make(architecture, **options)
    ours.save(tmp_path / "ours")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_pre"
    assert theirs.cfg.architecture() == name
    assert theirs.cfg.metadata.hook_name_out == ours.config.metadata.get("hook_name_out")
    theirs.save_model(tmp_path / "theirs")
    back = SAE.load(tmp_path / "theirs")
    f = ours.encode(X)
    assert 0 < (f > 0).float().mean() < 0.8
    for sae in (theirs, back):
        torch.testing.assert_close(sae.encode(X), f, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.decode(f), ours.decode(f), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae(X), ours(X), atol=1e-5, rtol=1e-5)
    assert back.sites == ours.sites
    assert back.target_sites == ours.target_sites
    assert back.config.rescale_acts_by_decoder_norm == ours.config.rescale_acts_by_decoder_norm


@pytest.mark.parametrize("architecture", ["topk", "gated"])
@pytest.mark.parametrize(("options", "kind"), [(TRANSCODER, "transcoder"), (SKIP, "skip_transcoder")])
def test_transcoders_that_sae_lens_has_no_class_for(tmp_path, sae_lens, architecture, options, kind) -> None:
    ours = make(architecture, **options)
    ours.save(tmp_path / "a")
    with pytest.raises(KeyError, match=f"{architecture}_{kind}"):
        sae_lens.SAE.load_from_disk(tmp_path / "a")
    again = SAE.load(tmp_path / "a")
    assert again.architecture == architecture
    assert torch.equal(again(X), ours(X))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_crosscoder_is_an_sae_over_its_sites_side_by_side(tmp_path, sae_lens, architecture) -> None:
    metadata = {"hook_names": ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"], "hook_widths": [5, 3]}
    ours = make(architecture, metadata=metadata)
    ours.save(tmp_path / "a")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "a")
    torch.testing.assert_close(theirs.encode(X), ours.encode(X), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(X), ours(X), atol=1e-5, rtol=1e-5)
    theirs.save_model(tmp_path / "theirs")
    for folder in ("a", "theirs"):
        again = SAE.load(tmp_path / folder)
        assert again.is_crosscoder
        assert (again.sites, again.widths) == (tuple(metadata["hook_names"]), (5, 3))
        assert [part.shape[1] for part in again.split(again(X))] == [5, 3]


TRAINING = {
    "StandardTrainingSAE": {},
    "TopKTrainingSAE": {"k": 4},
    "JumpReLUTrainingSAE": {},
    "GatedTrainingSAE": {},
    "BatchTopKTrainingSAE": {"k": 4.0},
    "MatryoshkaBatchTopKTrainingSAE": {"k": 4.0, "matryoshka_widths": [8, 16, 32]},
}


@pytest.mark.parametrize("name", TRAINING)
def test_ours_reads_the_inference_model_of_each_of_their_training_saes(tmp_path, sae_lens, name) -> None:
    config = getattr(sae_lens, f"{name}Config")(d_in=8, d_sae=32, **TRAINING[name])
    training = getattr(sae_lens, name)(config)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter, tensor in training.named_parameters():
            random = torch.randn(tensor.shape, generator=draw)
            tensor.copy_(random.abs() if parameter == "threshold" else random / 2)
        if "BatchTopK" in name:
            training.topk_threshold.fill_(0.7)
    training.save_inference_model(tmp_path / "a")
    theirs, ours = sae_lens.SAE.load_from_disk(tmp_path / "a"), SAE.load(tmp_path / "a")
    assert ours.architecture == theirs.cfg.architecture()
    f = theirs.encode(X)
    assert 0 < (f > 0).float().mean() < 0.8
    torch.testing.assert_close(ours.encode(X), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(f), theirs.decode(f), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(X), theirs(X), atol=1e-5, rtol=1e-5)
    details = ours.config.metadata["training_architecture_details"]
    again = SAE.load(ours.save(tmp_path / "b"))
    assert again.architecture == ours.architecture
    assert again.config.metadata["training_architecture_details"] == details
    if "BatchTopK" in name:
        training.save_model(tmp_path / "training")
        with pytest.raises(InvalidInput, match="is a training SAE of SAELens: save its inference model"):
            SAE.load(tmp_path / "training")


EXACT = [(name, options) for name in ARCHITECTURES for options in ({}, TRANSCODER, SKIP)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("architecture", "options"), EXACT)
def test_round_trips_are_exact(tmp_path, architecture, options, dtype) -> None:
    sae = make(architecture, dtype=dtype, **options)
    sae.config.metadata["neuronpedia_id"] = "x/1"
    again = SAE.load(sae.save(tmp_path / "a"))
    assert [*again.state_dict()] == [*sae.state_dict()]
    for name, tensor in sae.state_dict().items():
        there = again.state_dict()[name]
        assert (there.dtype, there.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(there, tensor)
    added = {"sae_lens_version", "sae_lens_training_version", "saekit_version"}
    metadata = {key: value for key, value in again.config.metadata.items() if key not in added}
    assert replace(again.config, metadata=metadata) == sae.config
    assert again.W_enc.stride() == (1, 8)
    assert (tmp_path / "a" / WEIGHTS).stat().st_mode & 0o044
    twice = again.save(tmp_path / "b")
    assert (twice / CFG).read_bytes() == (tmp_path / "a" / CFG).read_bytes()
    assert (twice / WEIGHTS).read_bytes() == (tmp_path / "a" / WEIGHTS).read_bytes()


def test_thresholds_that_another_program_made_differ(tmp_path, sae_lens) -> None:
    """Folding decoder norms gives every latent its own threshold: what was batchtopk is jumprelu then."""
    ours = make("batchtopk")
    ours.save(tmp_path / "a")
    folded = sae_lens.SAE.load_from_disk(tmp_path / "a", fold_W_dec_norm=True)
    folded.save_model(tmp_path / "b")
    with pytest.raises(InvalidInput, match=r"remove sha256 from the metadata"):
        SAE.load(tmp_path / "b")
    edit_metadata(tmp_path / "b", sha256=None)
    again = SAE.load(tmp_path / "b")
    assert (again.architecture, again.k) == ("jumprelu", None)
    torch.testing.assert_close(again(X), ours(X), atol=1e-4, rtol=1e-4)


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


def edit_metadata(folder, **changes):
    metadata = json.loads((folder / CFG).read_text())["metadata"] | changes
    edit_cfg(folder, metadata={key: value for key, value in metadata.items() if value is not None})


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
        ({"architecture": "temporal"}, r"architecture: 'temporal' is not one of standard"),
        ({"architecture": ["topk"]}, r"architecture"),
        ({"architecture": "gated"}, r"missing b_gate \[32\]; missing b_mag \[32\]; missing r_mag \[32\]; unexpected b_enc"),
        ({"architecture": "jumprelu"}, r"missing threshold \[32\]"),
        ({"architecture": "skip_transcoder"}, r"missing d_out"),
        ({"architecture": "transcoder", "d_out": 5}, r"d_out: a transcoder's b_dec belongs to its output"),
        ({"architecture": "topk_transcoder", "d_out": 5, "apply_b_dec_to_input": False}, r"W_dec is \[32, 8\], expected \[32, 5\]; b_dec"),
        ({"architecture": "transcoder", "d_out": -5, "apply_b_dec_to_input": False}, r"d_out: expected"),
        ({"apply_b_dec_to_input": "no"}, r"apply_b_dec_to_input: expected true or false, got 'no'"),
        ({"normalize_activations": ["none"]}, r"normalize_activations"),
    ],
)  # fmt: skip
def test_wrong_configs_are_named(tmp_path, changes, message) -> None:
    make().save(tmp_path / "a")
    edit_cfg(tmp_path / "a", **changes)
    with pytest.raises(InvalidInput, match=message):
        SAE.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        ("batchtopk", "saekit_architecture: expected what saekit wrote"),
        ({"architecture": "gated"}, "saekit_architecture: expected what saekit wrote"),
        ({"architecture": ["batchtopk"]}, "saekit_architecture: expected what saekit wrote"),
        ({"architecture": "batchtopk"}, "k: expected a whole number"),
        ({"architecture": "matryoshka", "k": 4, "prefixes": [4, 8]}, "prefixes: expected increasing widths"),
        ({"architecture": "matryoshka", "k": 4, "prefixes": [[4], 32]}, "prefixes"),
    ],
)
def test_a_wrong_note_about_the_training_is_named(tmp_path, ours, message) -> None:
    make("batchtopk").save(tmp_path / "a")
    edit_metadata(tmp_path / "a", saekit_architecture=ours)
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
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(FileMissing, match="SAE"):
            SAE.load(name)
        with pytest.raises(UnknownName, match="neither a folder"):
            SAE.load(name, "s")


def test_a_pickle_is_never_run(tmp_path) -> None:
    folder = make().save(tmp_path / "a")
    torch.save({"W_enc": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(InvalidInput, match="not a readable safetensors file"):
        SAE.load(folder)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_bytes_give_the_same_sae_or_one_error(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    sae = make(data.draw(st.sampled_from(ARCHITECTURES)), **data.draw(st.sampled_from([{}, SKIP])))
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
    assert again.W_dec.shape == sae.W_dec.shape


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


def test_what_is_taken_for_an_sae(tmp_path) -> None:
    folder = make().save(tmp_path / "a")
    assert names_sae(str(folder))
    assert names_sae("gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical")
    for other in (str(tmp_path), "tiny", "user/catalog", "x" * 300):
        assert not names_sae(other)


def test_unknown_releases_list_near_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnknownName, match=r"neither a folder .* Did you mean .*gpt2-small-res-jb"):
            SAE.load("gpt2-small-res-jbb", "blocks.2.hook_resid_pre")
        for source in (
            ("gpt2-small-res-jb", "blocks.22.hook_resid_pre"),
            ("gpt2-small-res-jb/blocks.22.hook_resid_pre",),
        ):
            with pytest.raises(UnknownName, match=r"has no SAE 'blocks\.22\.hook_resid_pre'\. Did you mean"):
                SAE.load(*source)
        with pytest.raises(UnknownName, match=r"has 13 SAEs; name one: \['blocks\.0\.hook_resid_pre'"):
            SAE.load("gpt2-small-res-jb")


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


PUBLISHED = [  # release, its converter, an SAE of it, what the converter gives, the tensors beside the usual
    (
        "gemma-scope-2b-pt-res-canonical", "gemma_2", "layer_20/width_16k/canonical",
        {"architecture": "jumprelu", "hook_name": "blocks.20.hook_resid_post", "normalize_activations": None},
        {"threshold": (32,)},
    ),
    (
        "gemma-scope-2-4b-pt-transcoders-all", "gemma_3", "layer_10_width_16k_l0_big_affine",
        {
            "architecture": "jumprelu_skip_transcoder", "hook_name": "blocks.10.hook_mlp_in",
            "hook_name_out": "blocks.10.hook_mlp_out", "d_out": 8,
        },
        {"threshold": (32,), "W_skip": (8, 8)},
    ),
    (
        "gemma-scope-2b-pt-transcoders", "gemma_2_transcoder", "layer_0/width_16k/average_l0_76",
        {
            "architecture": "jumprelu_transcoder", "hook_name": "blocks.0.ln2.hook_normalized",
            "hook_name_out": "blocks.0.hook_mlp_out", "d_out": 8,
        },
        {"threshold": (32,)},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("release", "converter", "sae_id", "cfg", "shapes"), PUBLISHED)
def test_published_releases_of_other_architectures(
    tmp_path, monkeypatch, sae_lens, release, converter, sae_id, cfg, shapes
) -> None:
    """sae_lens's own converters need the hub; one that gives small tensors of the same kind stands in for each."""
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS

    draw = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (8, 32), "W_dec": (32, 8), "b_enc": (32,), "b_dec": (8,)} | shapes
    tensors = {name: torch.randn(shape, generator=draw) / 2 for name, shape in shapes.items()}
    tensors["threshold"] = tensors["threshold"].abs()
    given = {
        "d_in": 8,
        "d_sae": 32,
        "apply_b_dec_to_input": False,
        "model_name": "m",
        "activation_fn": "relu",
    } | cfg
    asked = []

    def convert(repo_id, folder_name, device, force_download, cfg_overrides):
        asked.append(repo_id)
        return given | cfg_overrides, dict(tensors), None

    monkeypatch.setitem(NAMED_PRETRAINED_SAE_LOADERS, converter, convert)
    sae = SAE.load(f"{release}/{sae_id}")
    assert asked == [registry()[release].repo_id]
    assert sae.sites == (cfg["hook_name"],)
    assert sae.target_sites == (cfg.get("hook_name_out", cfg["hook_name"]),)
    assert next(s.site for s in registry()[release].saes if s.id == sae_id) == sae.site
    p = X @ tensors["W_enc"] + tensors["b_enc"]
    f = p.relu() * (p > tensors["threshold"])
    expected = (
        f @ tensors["W_dec"] + tensors["b_dec"] + (X @ tensors["W_skip"].T if "W_skip" in tensors else 0)
    )
    torch.testing.assert_close(sae.encode(X), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(X), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(SAE.load(sae.save(tmp_path / "a"))(X), sae(X))


def test_releases_we_lack_the_architecture_for_are_refused_before_a_download(monkeypatch, sae_lens) -> None:
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *_, **__: pytest.fail("it was asked for"))
    with pytest.raises(InvalidInput, match="its architecture, temporal, is not one of standard, topk"):
        SAE.load("temporal-sae-gemma-2-2b", registry()["temporal-sae-gemma-2-2b"].saes[0].id)


def test_a_repository_of_an_architecture_we_lack_is_refused(monkeypatch, sae_lens) -> None:
    config = sae_lens.MatchingPursuitSAEConfig(d_in=8, d_sae=32)
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *_, **__: sae_lens.MatchingPursuitSAE(config))
    with pytest.raises(
        InvalidInput, match="someone/repository/sae: architecture: 'matching_pursuit' is not one of"
    ):
        SAE.load("someone/repository", "sae")
