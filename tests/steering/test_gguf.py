"""GGUF control vectors: what is written, what comes back, what `gguf` reads of it, and hostile files."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.errors import FileMissing, InvalidInput
from saekit.steering import gguf
from saekit.steering.directions import Direction
from saekit.steering.edits import Edit
from saekit.steering.gguf import ControlVector, load, read, save, write
from saekit.steering.steer import steer

PROMPT = "The old king walked to the"
D = 256


def direction(site="blocks.2.hook_resid_post", seed=0, width=D) -> Direction:
    return Direction(torch.randn(width, generator=torch.Generator().manual_seed(seed)), site)


@torch.no_grad()
def test_edits_come_back_with_their_strength(model, tmp_path) -> None:
    edits = [direction().add(0.3), direction("blocks.5.hook_resid_pre", 1).add(-0.7)]
    path = save(edits, tmp_path / "v.gguf", model=model)
    back = load(path, model=model)
    assert [(edit.site, edit.strength) for edit in back] == [
        ("blocks.2.hook_resid_post", 0.3),
        ("blocks.4.hook_resid_post", -0.7),
    ]
    for edit, own in zip(back, edits, strict=True):
        torch.testing.assert_close(edit.direction, own.direction, rtol=1e-6, atol=0)
    ids = model.to_tokens(PROMPT)
    with steer(model, edits):
        expected = model(ids)
    with steer(model, back):
        torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
    found = read(path)
    assert torch.equal(found.directions[2], 0.3 * edits[0].direction)  # what llama.cpp adds at scale 1
    assert (found.model_hint, found.model) == ("gpt2", "tiny")


def test_several_edits_at_a_block_are_summed(model, tmp_path) -> None:
    a, b = direction(), direction("blocks.3.hook_resid_pre", 1)  # the same place by two names
    known = Edit("add", a.site, a.vector, 2.0, "norm", norm=4.0)
    path = save([a.add(0.3), b.add(0.5), known], tmp_path / "v.gguf", model=model)
    (edit,) = load(path, model=model)
    per_norm = 2.0 * 4.0 / a.vector.norm()
    torch.testing.assert_close(edit.direction, 0.3 * a.vector + 0.5 * b.vector + per_norm * a.vector)
    assert edit.strength == 1.0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: direction().project_out(), "it only adds, everywhere; it cannot hold project_out"),
        (lambda: direction().add(1.0).at("generated"), "cannot hold add 1 direction at .*, positions generated"),
        (lambda: direction().add(1.0).when(direction(), above=0), "cannot hold"),
        (lambda: direction().add(1.0, unit="norm"), "is not known, use unit='raw'"),
        (lambda: direction().add(0.0), "adds nothing"),
        (lambda: direction("blocks.2.hook_mlp_out").add(1.0), "not at blocks.2.hook_mlp_out"),
        (lambda: direction("blocks.0.hook_resid_post").add(1.0), "no slot for .*; the format has the outputs of blocks 1 … 5"),
        (lambda: direction("blocks.1.hook_resid_pre").add(1.0), "no slot"),
        (lambda: direction("blocks.0.hook_resid_pre").add(1.0), "no slot"),
        (lambda: direction("blocks.6.hook_resid_post").add(1.0), "no slot"),
        (lambda: direction(width=8).add(1.0), "has width 8, tiny 256"),
        (lambda: 8.0, "expected edits such as"),
    ],
)  # fmt: skip
def test_edits_that_a_control_vector_cannot_hold(model, tmp_path, edit, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        save([edit()], tmp_path / "v.gguf", model=model)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidInput, match="one edit at least"):
        save([], tmp_path / "v.gguf", model=model)


def test_other_models_are_refused(model, llama, tmp_path) -> None:
    ours = save(direction().add(1.0), tmp_path / "ours.gguf", model=model)
    with pytest.raises(InvalidInput, match="for another model: made on 'tiny' .*; width 256, not"):
        load(ours, model=llama)
    foreign = write(ControlVector({1: torch.ones(8)}), tmp_path / "f.gguf")
    with pytest.raises(InvalidInput, match="for another model: width 8, not 256"):
        load(foreign, model=model)
    deep = write(ControlVector({3: torch.ones(D), 30: torch.ones(D)}), tmp_path / "d.gguf")
    with pytest.raises(InvalidInput, match=r"direction\.30, where tiny has blocks 0 … 5"):
        load(deep, model=model)
    with pytest.raises(FileMissing, match="control vector: .* does not exist"):
        load(tmp_path / "none.gguf", model=model)
    with pytest.raises(InvalidInput, match="not a file"):
        read(tmp_path)


@torch.no_grad()
def test_direction_n_is_added_to_the_output_of_block_n(model, tmp_path) -> None:
    """As llama.cpp and repeng do: after block N's last residual sum, counted from 0, on every token."""
    d = direction().vector
    path = write(ControlVector({3: d}), tmp_path / "v.gguf")
    ids = model.to_tokens(PROMPT)
    block = model.original_model.transformer.h[3]
    handle = block.register_forward_hook(
        lambda module, args, out: (out[0] + d, *out[1:]) if isinstance(out, tuple) else out + d
    )
    expected = model(ids)
    handle.remove()
    with steer(model, load(path, model=model), include_special=True):
        torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)


def test_the_gguf_package_reads_what_is_written_and_writes_what_is_read(tmp_path) -> None:
    peer = pytest.importorskip("gguf", reason="the gguf package is not installed")
    vectors = {n: torch.randn(33, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 7)}
    path = write(ControlVector(vectors, {2: 1.5}, "gpt2"), tmp_path / "ours.gguf")
    reader = peer.GGUFReader(path)
    assert {t.name: torch.from_numpy(t.data.copy()).tolist() for t in reader.tensors} == {
        f"direction.{n}": v.tolist() for n, v in vectors.items()
    }
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.layer_count").contents() == 3

    writer = peer.GGUFWriter(tmp_path / "theirs.gguf", "controlvector")  # as repeng writes it
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 3)
    writer.add_array("general.tags", ["a", "bc"])
    writer.add_array("numbers", [1, 2, 3])
    for n, v in vectors.items():
        writer.add_tensor(f"direction.{n}", v.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read(tmp_path / "theirs.gguf")
    assert {n: v.tolist() for n, v in found.directions.items()} == {n: v.tolist() for n, v in vectors.items()}
    assert (found.model_hint, found.strengths, found.model_hash) == ("mistral", {}, None)


# Broken files


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


ARCHITECTURE = string(b"general.architecture") + struct.pack("<I", 8) + string(b"controlvector")


def made(
    *, magic=b"GGUF", version=3, tensors=1, pairs=1, kv=ARCHITECTURE, info=None, data=bytes(32)
) -> bytes:
    info = tensor() if info is None else info
    header = magic + struct.pack("<IQQ", version, tensors, pairs) + kv + info
    return header + bytes(-len(header) % 32) + data


def tensor(name=b"direction.1", dims=(8,), kind=0, offset=0) -> bytes:
    return (
        string(name)
        + struct.pack("<I", len(dims))
        + b"".join(struct.pack("<Q", d) for d in dims)
        + struct.pack("<IQ", kind, offset)
    )


def array(kind, n, items=b"") -> bytes:
    return ARCHITECTURE + string(b"a") + struct.pack("<IIQ", 9, kind, n) + items


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends at byte 0"),
        (made(magic=b"GGML"), "does not start with GGUF"),
        (made(version=1), "version 1; expected 2 or 3"),
        (made(version=0x03000000), "little-endian"),
        (made(tensors=0, info=b""), "0 tensors"),
        (made(tensors=2**63), "9223372036854775808 tensors"),
        (made(pairs=2**63), "'' twice"),
        (made(pairs=0, kv=b""), "general.architecture is None"),
        (made(kv=string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")), "is 'llama'"),
        (made(kv=ARCHITECTURE * 2, pairs=2), "'general.architecture' twice"),
        (made(kv=ARCHITECTURE + string(b"a") + struct.pack("<IB", 77, 1), pairs=2), "of type 77"),
        (made(kv=array(9, 1), pairs=2), "of type 9"),
        (made(kv=array(4, 2**62), pairs=2), "in the midst"),
        (made(kv=array(8, 2**62), pairs=2), "in the midst"),
        (made(kv=string(b"\xff") + struct.pack("<IB", 0, 1)), "no UTF-8"),
        (made(kv=ARCHITECTURE + string(b"general.alignment") + struct.pack("<II", 4, 24), pairs=2), "alignment is 24"),
        (made(kv=ARCHITECTURE + string(b"general.alignment") + struct.pack("<II", 4, 0), pairs=2), "alignment is 0"),
        (made(kv=ARCHITECTURE + string(b"saekit.strength.1") + struct.pack("<Id", 12, 0.0), pairs=2), "strength.1 is 0.0"),
        (made(kv=ARCHITECTURE + string(b"saekit.strength.1") + struct.pack("<Id", 12, float("nan")), pairs=2), "is nan"),
        (made(kv=ARCHITECTURE + string(b"saekit.model") + struct.pack("<IB", 0, 1), pairs=2), "saekit.model is 1, no text"),
        (made(info=tensor(b"direction.0")), "'direction.0'; expected direction.N with N from 1"),
        (made(info=tensor(b"direction.01")), "'direction.01'"),
        (made(info=tensor(b"direction.99999999")), "'direction.99999999'"),
        (made(info=tensor(b"blk.0.weight")), "'blk.0.weight'"),
        (made(info=tensor(dims=(8, 1))), "has 2 dimensions"),
        (made(info=tensor(kind=1)), "of ggml type 1; expected 0, float32"),
        (made(info=tensor(dims=(0,))), "has width 0"),
        (made(info=tensor(dims=(2**62,))), "has width"),
        (made(info=tensor(offset=4)), "at offset 4"),
        (made(info=tensor(offset=64)), "ends at byte"),
        (made(info=tensor(dims=(9,))), "ends at byte"),
        (made(info=tensor() * 2, tensors=2), "direction.1 twice"),
        (made(info=tensor() + tensor(b"direction.2", (4,)), tensors=2), "of width 8 and of width 4"),
        (made(data=struct.pack("<8f", *[float("inf")] * 8)), "NaN or infinite"),
    ],
)  # fmt: skip
def test_broken_files_say_what_is_wrong(tmp_path, content, message) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(made())
    assert read(path).directions[1].tolist() == [0.0] * 8
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: not a GGUF control vector: ")


def test_files_beyond_the_bound_are_not_read(tmp_path, monkeypatch) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(made())
    monkeypatch.setattr(gguf, "MAX_BYTES", 100)
    with pytest.raises(InvalidInput, match="a control vector has at most 100"):
        read(path)


@given(data=st.data())
def test_hostile_files_are_refused_or_read(tmp_path_factory, data) -> None:
    """Any bytes end in a vector or in one line, in bounded time and memory."""
    good = made(kv=ARCHITECTURE + array(8, 1, string(b"x"))[len(ARCHITECTURE) :], pairs=2)
    content = bytearray(good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good)
    for at, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(good) - 1), st.binary(min_size=1, max_size=8)), max_size=4)
    ):
        content[at : at + len(value)] = value
    path = tmp_path_factory.getbasetemp() / "hostile.gguf"
    path.write_bytes(bytes(content))
    try:
        assert read(path).directions
    except InvalidInput as error:
        assert "\n" not in str(error)


@given(
    st.dictionaries(st.integers(1, 4096), st.just(0), min_size=1, max_size=5),
    st.integers(1, 40),
    st.one_of(st.none(), st.text(max_size=20)),
)
def test_what_is_written_is_read(tmp_path_factory, slots, width, hint) -> None:
    vectors = {n: torch.randn(width, generator=torch.Generator().manual_seed(n)) for n in slots}
    strengths = {n: n / 7 for n in list(slots)[::2]}
    path = write(ControlVector(vectors, strengths, hint), tmp_path_factory.getbasetemp() / "written.gguf")
    found = read(path)
    assert all(torch.equal(found.directions[n], v) for n, v in vectors.items())
    assert (found.strengths, found.model_hint, len(found.directions)) == (strengths, hint, len(vectors))
