"""Folders of dictionary_learning and sparsify: the same latents and x̂, the same site, and nothing of theirs is run.

Neither library is installed here. Their arithmetic is written out in `THEIRS`, a line or two for each class, and was
compared with their own code when this was written.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from saekit.errors import InvalidInput, SaekitError
from saekit.sae import SAE
from saekit.sae.foreign.pickled import read_pt

D, S, K = 8, 32, 4
X = torch.randn(50, D, generator=torch.Generator().manual_seed(0)) * 2
GROUPS = [4, 8, 20]


def drawn(**shapes) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name.replace("__", "."): torch.randn(shape, generator=draw) / 2 for name, shape in shapes.items()}


def top(p, k):
    values, latents = p.relu().topk(k, dim=-1)
    return torch.zeros_like(p).scatter(-1, latents, values)


LINEAR = {"encoder__weight": (S, D), "encoder__bias": (S,), "decoder__weight": (D, S)}
PLAIN = {"W_enc": (D, S), "b_enc": (S,), "W_dec": (S, D), "b_dec": (D,)}
WITH_K = {"k": torch.tensor(K, dtype=torch.int)}
THRESHOLD = {"threshold": torch.tensor(0.9)}


def linear(t, x, bias=None):
    return (x if bias is None else x - t[bias]) @ t["encoder.weight"].T + t["encoder.bias"]


def unit(t):
    """AutoEncoder.normalize_decoder, which its from_pretrained calls."""
    norms = t["decoder.weight"].norm(dim=0)
    return t | {
        "decoder.weight": t["decoder.weight"] / norms,
        "encoder.weight": t["encoder.weight"] * norms[:, None],
        "encoder.bias": t["encoder.bias"] * norms,
    }


def gated(t, x):
    e = (x - t["decoder_bias"]) @ t["encoder.weight"].T
    return (e + t["gate_bias"] > 0) * (t["r_mag"].exp() * e + t["mag_bias"]).relu()


def jump(t, p):
    return p.relu() * (p.relu() > t["threshold"])


# class → our architecture, its tensors, its encode, the weight and bias of its decode
THEIRS = {
    "AutoEncoder": (
        "standard", drawn(**LINEAR, bias=(D,)),
        lambda t, x: linear(unit(t), x, "bias").relu(), lambda t: (unit(t)["decoder.weight"].T, t["bias"]),
    ),
    "AutoEncoderNew": (
        "standard", drawn(**LINEAR, decoder__bias=(D,)),
        lambda t, x: linear(t, x).relu(), lambda t: (t["decoder.weight"].T, t["decoder.bias"]),
    ),
    "GatedAutoEncoder": (
        "gated", drawn(encoder__weight=(S, D), decoder__weight=(D, S), decoder_bias=(D,), gate_bias=(S,), mag_bias=(S,), r_mag=(S,)),
        gated, lambda t: (t["decoder.weight"].T, t["decoder_bias"]),
    ),
    "JumpReluAutoEncoder": (
        "jumprelu", drawn(**PLAIN, threshold=(S,)),
        lambda t, x: jump(t, x @ t["W_enc"] + t["b_enc"]), lambda t: (t["W_dec"], t["b_dec"]),
    ),
    "AutoEncoderTopK": (
        "topk", drawn(**LINEAR, b_dec=(D,)) | WITH_K | THRESHOLD,
        lambda t, x: top(linear(t, x, "b_dec"), K), lambda t: (t["decoder.weight"].T, t["b_dec"]),
    ),
    "BatchTopKSAE": (
        "batchtopk", drawn(**LINEAR, b_dec=(D,)) | WITH_K | THRESHOLD,
        lambda t, x: jump(t, linear(t, x, "b_dec")), lambda t: (t["decoder.weight"].T, t["b_dec"]),
    ),
    "MatryoshkaBatchTopKSAE": (
        "matryoshka", drawn(**PLAIN) | WITH_K | THRESHOLD | {"group_sizes": torch.tensor(GROUPS)},
        lambda t, x: jump(t, (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]), lambda t: (t["W_dec"], t["b_dec"]),
    ),
}  # fmt: skip


def write(folder, name="AutoEncoderTopK", tensors=None, buffer=None, **trainer):
    """A folder as dictionary_learning writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = {
        "dict_class": name, "activation_dim": D, "dict_size": S, "k": K, "lr": 3e-4, "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3",
    } | trainer  # fmt: skip
    buffer = {"d_submodule": D, "io": "out", "ctx_len": 128} if buffer is None else buffer
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}))
    torch.save(THEIRS[name][1] if tensors is None else tensors, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("name", THEIRS)
def test_dictionary_learning_latents_and_reconstructions(tmp_path, name) -> None:
    architecture, tensors, encode, decoder = THEIRS[name]
    sae = SAE.load(write(tmp_path / "a", name))
    W_dec, b_dec = decoder(tensors)
    f = encode(tensors, X)
    assert 0 < (f > 0).float().mean() < 0.7
    torch.testing.assert_close(sae.encode(X), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(f), f @ W_dec + b_dec, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(X), f @ W_dec + b_dec, atol=1e-5, rtol=1e-5)
    assert (sae.architecture, sae.site) == (architecture, "blocks.3.hook_resid_post")
    assert (sae.model_name, sae.config.metadata["context_size"]) == ("EleutherAI/pythia-70m-deduped", 128)
    assert sae.k == (K if "TopK" in name else None)
    assert sae.prefixes == ((4, 12, 32) if architecture == "matryoshka" else None)
    again = SAE.load(sae.save(tmp_path / "b"))
    assert torch.equal(again(X), sae(X))


def test_an_autoencoders_norms_move_but_its_function_stays(tmp_path) -> None:
    tensors = THEIRS["AutoEncoder"][1]
    sae = SAE.load(write(tmp_path / "a", "AutoEncoder"))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(S))
    f = linear(tensors, X, "bias").relu()
    torch.testing.assert_close(
        sae(X), f @ tensors["decoder.weight"].T + tensors["bias"], atol=1e-5, rtol=1e-5
    )
    silent = tensors | {"decoder.weight": tensors["decoder.weight"] * (torch.arange(S) > 0)}
    assert bool(SAE.load(write(tmp_path / "b", "AutoEncoder", silent))(X).isfinite().all())


def test_other_ways_of_saving_the_same(tmp_path) -> None:
    tensors = THEIRS["AutoEncoderTopK"][1]
    whole = SAE.load(write(tmp_path / "a"))
    with_versions = OrderedDict(tensors)
    with_versions._metadata = OrderedDict({"": {"version": 1}})  # as Module.state_dict has it
    parameters = {n: torch.nn.Parameter(t) if t.is_floating_point() else t for n, t in tensors.items()}
    shared = torch.stack([tensors["encoder.bias"], tensors["encoder.bias"]])
    views = tensors | {
        "encoder.bias": shared[1],
        "decoder.weight": tensors["decoder.weight"].T.contiguous().T,
    }
    halves = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    for i, saved in enumerate([with_versions, parameters, views, halves]):
        sae = SAE.load(write(tmp_path / str(i), tensors=saved))
        exact = saved is not halves
        torch.testing.assert_close(
            sae.W_dec, whole.W_dec, atol=0 if exact else 0.01, rtol=0 if exact else 0.01
        )
    for protocol in (3, 4, 5):
        torch.save(tensors, tmp_path / "a" / "ae.pt", pickle_protocol=protocol)
        assert torch.equal(SAE.load(tmp_path / "a").W_enc, whole.W_enc)
    old = {n: t for n, t in tensors.items() if n not in ("k", "threshold")}  # before they were kept
    assert torch.equal(SAE.load(write(tmp_path / "old", tensors=old)).W_enc, whole.W_enc)


@pytest.mark.parametrize(
    ("trainer", "buffer"),
    [
        ({"submodule_name": "mlp"}, None),
        ({"submodule_name": None}, None),
        ({"layer": 4}, None),
        ({}, {"io": "in"}),
        ({}, {"io": "in_and_out"}),
    ],
)
def test_a_site_that_is_not_certain_stays_open(tmp_path, trainer, buffer) -> None:
    sae = SAE.load(write(tmp_path / "a", buffer=buffer, **trainer))
    with pytest.raises(InvalidInput, match="does not say its hook_name"):
        _ = sae.site


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"dict_class": "IdentityDict"}, r"config\.json: dict_class: 'IdentityDict' is not one of AutoEncoder"),
        ({"dict_class": ["x"]}, "dict_class"),
        ({"activation_dim": -1}, "activation_dim: expected a whole number"),
        ({"dict_size": True}, "dict_size: expected a whole number"),
        ({"dict_size": 33}, r"encoder\.weight is \[32, 8\], expected \[33, 8\]; decoder\.weight is .*; encoder\.bias is \[32\]"),
        ({"k": 5}, r"k: 5, but ae\.pt says 4"),
        ({"k": None}, "k: expected a whole number"),
    ],
)  # fmt: skip
def test_wrong_configs_are_named(tmp_path, trainer, message) -> None:
    folder = write(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    config["trainer"] |= trainer
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match=message):
        SAE.load(folder)


def test_tensors_against_the_class(tmp_path) -> None:
    tensors = dict(THEIRS["AutoEncoderTopK"][1])
    tensors["extra"] = tensors.pop("decoder.weight")
    with pytest.raises(InvalidInput, match=r"missing decoder\.weight \[8, 32\]; unexpected extra \[8, 32\]"):
        SAE.load(write(tmp_path / "a", tensors=tensors))
    matryoshka = THEIRS["MatryoshkaBatchTopKSAE"][1]
    wrong = matryoshka | {"group_sizes": torch.tensor([4, 8])}
    with pytest.raises(
        InvalidInput, match=r"prefixes: expected increasing widths that end with d_sae = 32, got"
    ):
        SAE.load(write(tmp_path / "a", "MatryoshkaBatchTopKSAE", wrong))
    with pytest.raises(InvalidInput, match=r"missing group_sizes"):
        SAE.load(write(tmp_path / "a", "MatryoshkaBatchTopKSAE", {n: t for n, t in matryoshka.items() if n != "group_sizes"}))  # fmt: skip
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(InvalidInput, match="no section trainer"):
        SAE.load(tmp_path / "a")


# Hostile .pt files


def repacked(path, change) -> None:
    """Write the zip again, each entry as `change(name, bytes)` gives it: (bytes, compression), or None to drop it."""
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            if changed := change(name, data):
                archive.writestr(name, changed[0], changed[1])


def with_pickle(path, value) -> None:
    """A `.pt` whose pickle is that of `value`."""
    torch.save({"a": torch.zeros(4)}, path)
    data = value if isinstance(value, bytes) else pickle.dumps(value, protocol=2)
    repacked(path, lambda name, old: (data if name.endswith("/data.pkl") else old, zipfile.ZIP_STORED))


class Payload:
    """Makes its file when unpickled by anything that runs pickles."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_payload_is_never_run(tmp_path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "ae.pt"
    with_pickle(path, {"a": Payload(trap)})
    with pytest.raises(InvalidInput, match=r"not a plain dictionary of tensors \(it calls (_io|io)\.open\)"):
        read_pt(path)
    path.write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(InvalidInput, match="before PyTorch 1.6"):
        read_pt(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Payload(trap))).close()
    assert trap.exists(), "the trap works"


class Calls:
    def __init__(self, function, *arguments) -> None:
        self.called = function, arguments

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize(
    ("call", "name"),
    [((torch.Tensor, 10**12), "torch._C._TensorBase|torch.Tensor"), ((bytearray, 10**12), "bytearray")],
)
def test_what_even_weights_only_would_allow(tmp_path, call, name) -> None:
    with_pickle(tmp_path / "ae.pt", {"a": Calls(*call)})
    with pytest.raises(InvalidInput, match=f"it calls .*({name})"):
        read_pt(tmp_path / "ae.pt")


class Tensors(pickle.Pickler):
    """Pickles what persistent_id is told about storages, as torch.save does, but with any numbers."""

    def persistent_id(self, thing):
        return (
            ("storage", torch.FloatStorage, *thing[1:])
            if isinstance(thing, tuple) and thing[:1] == ("S",)
            else None
        )


def strided(key="0", length=4, offset=0, shape=(4,), stride=(1,)) -> bytes:
    data = io.BytesIO()
    made = Calls(
        torch._utils._rebuild_tensor_v2,
        ("S", key, "cpu", length),
        offset,
        shape,
        stride,
        False,
        OrderedDict(),
    )
    Tensors(data, protocol=2).dump({"a": made})
    return data.getvalue()


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"length": 10**12}, "bytes of tensor 'a' are missing, or not as many as it says"),
        ({"key": "1"}, "bytes of tensor 'a' are missing"),
        ({"key": "../data/0"}, "bytes of tensor 'a' are missing"),
        ({"shape": (10**6, 10**6), "stride": (0, 0)}, "reaches beyond its storage"),
        ({"shape": (5,)}, "reaches beyond its storage"),
        ({"offset": 1}, "reaches beyond its storage"),
        ({"shape": (2,), "stride": (4,)}, "reaches beyond its storage"),
        ({"shape": (-1,)}, "has shape"),
        ({"stride": (-1,)}, "has shape"),
        ({"shape": (4, 1)}, "has shape"),
        ({"shape": ("4",)}, "has shape"),
        ({"length": -4}, "not a plain dictionary"),
        ({"length": "4"}, "not a plain dictionary"),
    ],
)
def test_tensors_that_do_not_fit_their_bytes(tmp_path, described, message) -> None:
    with_pickle(tmp_path / "ae.pt", strided())
    assert torch.equal(read_pt(tmp_path / "ae.pt")["a"], torch.zeros(4))
    with_pickle(tmp_path / "ae.pt", strided(**described))
    with pytest.raises(InvalidInput, match=message):
        read_pt(tmp_path / "ae.pt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "instruction EMPTY_LIST"),
        (3, "expected a dictionary of tensors, found int"),
        ({"a": 1}, "a are not tensors"),
        ({1: 2}, "expected a dictionary of tensors"),
        ({"a": {"b": 1}}, "a are not tensors"),
        (b".", "not a plain dictionary"),
        (b"S'\\o'\n.", "instruction STRING"),  # an escape that Python warns of
        (b"", "not a plain dictionary"),
        (b"\x80\x02}r\xff\xff\xff\xff.", None),  # a memo at 2^32 − 1, which must cost nothing
        (b"\x80\x02" + b"(" * 100_000 + b".", "not a plain dictionary"),
        (b"\x80\x02}" + b"\x85" * 100_000 + b".", "expected a dictionary"),
        (b"\x80\x02}" + b" " * 2**21 + b".", "bytes of pickle; at most"),
    ],
)
def test_pickles_of_other_things(tmp_path, value, message) -> None:
    with_pickle(tmp_path / "ae.pt", value)
    if message is None:
        assert read_pt(tmp_path / "ae.pt") == {}
        return
    with pytest.raises(InvalidInput, match=message):
        read_pt(tmp_path / "ae.pt")


def test_zips_that_torch_never_writes(tmp_path) -> None:
    path = tmp_path / "ae.pt"

    def refused(message):
        with pytest.raises(InvalidInput, match=message):
            read_pt(path)
        torch.save({"a": torch.zeros(1000)}, path)

    torch.save({"a": torch.zeros(1000)}, path)
    repacked(path, lambda _, data: (data, zipfile.ZIP_DEFLATED))
    refused("is compressed, which torch.save never does")
    repacked(path, lambda name, data: None if name.endswith("/0") else (data, zipfile.ZIP_STORED))
    refused("bytes of tensor 'a' are missing")
    repacked(path, lambda name, data: None if name.endswith(".pkl") else (data, zipfile.ZIP_STORED))
    refused("not a dictionary of tensors saved with torch.save")
    repacked(path, lambda name, data: (b"big" if name.endswith("byteorder") else data, zipfile.ZIP_STORED))
    refused("not little-endian")
    for odd, message in (
        ("ae/../x", "not one that torch.save writes"),
        ("ae/code/x.py", "not a dictionary"),
        ("x", "not one"),
    ):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(odd, b"")
        refused(message)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("ae/data/1")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, b"/etc/passwd")
    refused("is a link")
    content = bytearray(path.read_bytes())
    content[content.index(bytes(4000)) + 100] = 1
    path.write_bytes(content)
    refused("not a readable PyTorch file .*CRC")
    path.write_bytes(path.read_bytes()[:-30])
    refused("not a readable PyTorch file")
    path.write_bytes(b"")
    refused("not a readable PyTorch file")
    torch.save({"a": torch.full((3,), float("nan"))}, path)
    refused("'a' holds NaN")
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    refused("before PyTorch 1.6")


# sparsify


def write_sparsify(folder, tensors=None, **cfg):
    """A folder as sparsify writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": S, "k": K, "multi_topk": False,
        "skip_connection": False, "transcode": False, "d_in": D,
    } | cfg  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(cfg))
    shapes = {"encoder__weight": (S, D), "encoder__bias": (S,), "W_dec": (S, D), "b_dec": (D,)}
    if cfg["skip_connection"]:
        shapes["W_skip"] = (D, D)
    save_file(drawn(**shapes) if tensors is None else tensors, folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_latents_and_reconstructions(tmp_path, transcode, skip) -> None:
    sae = SAE.load(write_sparsify(tmp_path / "layers.5.mlp", transcode=transcode, skip_connection=skip))
    t = drawn(encoder__weight=(S, D), encoder__bias=(S,), W_dec=(S, D), b_dec=(D,), W_skip=(D, D))
    f = top(linear(t, X, None if transcode else "b_dec"), K)
    x_hat = f @ t["W_dec"] + t["b_dec"] + (X @ t["W_skip"].T if skip else 0)
    torch.testing.assert_close(sae.encode(X), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(X), x_hat, atol=1e-5, rtol=1e-5)
    assert sae.is_transcoder == (transcode or skip)
    assert sae.site == ("blocks.5.mlp.hook_in" if transcode else "blocks.5.mlp.hook_out")
    assert sae.target_sites == ("blocks.5.mlp.hook_out",)
    assert torch.equal(SAE.load(sae.save(tmp_path / "b"))(X), sae(X))


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("layers.10", "blocks.10.hook_resid_post"),
        ("h.3", "blocks.3.hook_resid_post"),
        ("layers.0.self_attn", "blocks.0.attn.hook_out"),
        ("h.11.mlp", "blocks.11.mlp.hook_out"),
        ("layers.2/seed1", "blocks.2.hook_resid_post"),
        ("embed_tokens", None),
        ("layers.5.mlp.down_proj", None),
        ("mine", None),
    ],
)
def test_hook_points_become_sites_where_that_is_certain(tmp_path, name, site) -> None:
    write_sparsify(tmp_path / name)
    (tmp_path / "config.json").write_text(
        json.dumps({"sae": {}, "model": "EleutherAI/pythia-70m", "ctx_len": 2048})
    )
    sae = SAE.load(tmp_path, name)
    assert sae.config.metadata.get("hook_name") == site
    assert (sae.model_name, sae.config.metadata["context_size"]) == ("EleutherAI/pythia-70m", 2048)


def test_hook_points_are_the_modules_of_the_model(model) -> None:
    """What sparsify's hooks see, the outputs of modules and a transcoder's inputs, is what the sites give."""
    from transformers import AutoModelForCausalLM

    from saekit import embedded
    from saekit.sae.foreign.sparsify import _sites
    from saekit.sites import capture

    plain = AutoModelForCausalLM.from_pretrained(embedded.folder("model"), dtype=torch.float32).eval()
    ids, seen = torch.arange(2, 20)[None], {}

    def hook(module, inputs, output, *, name):
        seen[name] = (inputs[0], output[0] if isinstance(output, tuple) else output)

    names = ["h.1", "h.1.mlp", "h.1.attn"]
    for name in names:
        plain.base_model.get_submodule(name).register_forward_hook(
            lambda *arguments, name=name: hook(*arguments, name=name)
        )
    with torch.no_grad():
        plain(ids)
    for name in names:
        sites = _sites(name, transcode=True)
        here = capture(model, sites, ids)
        for site, there in zip(sites, seen[name], strict=True):
            torch.testing.assert_close(here[site], there, atol=1e-3, rtol=1e-4)
        assert _sites(name, transcode=False)[0] == sites[1]


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"activation": "groupmax"}, r"activation: 'groupmax' is not supported"),
        ({"signed": True}, "latents below zero"),
        ({"transcode": "yes"}, "transcode: expected true or false"),
        ({"d_in": "8"}, "d_in: expected a whole number"),
        ({"num_latents": 33}, r"encoder\.weight is \[32, 8\], expected \[33, 8\]"),
        ({"num_latents": -3}, "num_latents: expected a whole number"),
        ({"num_latents": 0, "expansion_factor": 3}, r"expected \[24, 8\]"),
        ({"k": 33}, "k: 33 is more than d_sae"),
        ({"skip_connection": True}, r"missing W_skip \[8, 8\]"),
    ],
)
def test_what_sparsify_writes_and_we_lack(tmp_path, cfg, message) -> None:
    tensors = drawn(encoder__weight=(S, D), encoder__bias=(S,), W_dec=(S, D), b_dec=(D,))
    with pytest.raises(InvalidInput, match=message):
        SAE.load(write_sparsify(tmp_path / "a", tensors, **cfg))


def test_sparsify_defaults_and_a_broken_neighbour(tmp_path) -> None:
    folder = write_sparsify(tmp_path / "layers.1", num_latents=0, expansion_factor=4, multi_topk=True)
    (tmp_path / "config.json").write_text("{")
    sae = SAE.load(folder)
    assert (sae.d_sae, sae.model_name) == (S, None)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mutated_bytes_give_an_sae_or_one_error(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    if data.draw(st.booleans()):
        path = write(folder / "a") / data.draw(st.sampled_from(["config.json", "ae.pt"]))
    else:
        path = write_sparsify(folder / "a") / data.draw(st.sampled_from(["cfg.json", "sae.safetensors"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        sae = SAE.load(folder / "a")
    except SaekitError:
        return
    assert sae.W_dec.shape == (S, D)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_pickles_give_tensors_or_one_error(tmp_path_factory, data) -> None:
    """The zip's checksums would catch these; here they are right."""
    path = tmp_path_factory.mktemp("mutated") / "ae.pt"
    program = bytearray(strided())
    for _ in range(data.draw(st.integers(1, 6))):
        program[data.draw(st.integers(0, len(program) - 1))] = data.draw(st.integers(0, 255))
    with_pickle(path, bytes(program))
    try:
        tensors = read_pt(path)
    except InvalidInput:
        return
    assert all(tensor.numel() <= 4 for tensor in tensors.values())
