"""The one-pass build against brute force: everything it says of a text, computed again the slow way, to the last number."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from catalog.brute import Options, Seen, brute_tables
from conftest import SHARED, SITE, sentences

from saekit.catalog import build as building
from saekit.catalog.build import Progress, build, distinct_names
from saekit.catalog.encode import encode
from saekit.catalog.tables import CATALOG, SCHEMAS, read_table
from saekit.errors import InvalidInput
from saekit.files import sha256_of_file
from saekit.sae import SAE
from saekit.sites import capture
from saekit.tokens import token_batches, tokenize

SMALL = Options(contexts=4, window=12, bands=3, per_band=2, sample_rows=5)
OF_TEXT = ("contexts", "activations", "corpus", "sample", "tokens", "evidence")
EXACT = {
    "feature",
    "band",
    "rank",
    "document",
    "row",
    "start",
    "length",
    "peak",
    "offset",
    "position",
    "token_id",
    "count",
}


def options(chosen: Options) -> dict[str, int]:
    return {
        name: getattr(chosen, name) for name in ("contexts", "window", "bands", "per_band", "sample_rows")
    }


def look(model, sae: SAE, tokens: Any, special: tuple[int, ...]) -> Seen:
    """Everything that fires, densely, unit by unit."""
    parts = []
    for batch in token_batches(tokens, 8):
        x = capture(model, [sae.site], batch.ids)[sae.site]
        f = torch.zeros(*batch.ids.shape, sae.d_sae)
        wanted = ~torch.isin(batch.ids, torch.tensor(special, dtype=torch.long))
        active = encode(sae, x[wanted])
        dense = torch.zeros(int(wanted.sum()), sae.d_sae)
        dense[active.tokens, active.latents] = active.values
        with torch.no_grad():
            assert torch.allclose(dense, sae.encode(x[wanted]), rtol=1e-4, atol=1e-5)
        f[wanted] = dense
        parts.append((batch.ids.numpy(), batch.documents.numpy(), x.norm(dim=-1).numpy(), f.numpy()))
    return Seen(*(np.concatenate(part) for part in zip(*parts, strict=True)), special=special)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_table(folder, name).to_pylist()


def check_against_brute_force(folder: Path, seen: Seen, chosen: Options) -> None:
    expected, about = brute_tables(seen, chosen)
    expected["histograms"] = [row for row in expected["histograms"] if row["of"] == "activation"]
    found = {name: rows(folder, name) for name in (*OF_TEXT, "features", "histograms", "neighbours")}
    found["histograms"] = [row for row in found["histograms"] if row["of"] == "activation"]
    found["neighbours"] = [row for row in found["neighbours"] if row["by"] == "firing"]
    for name, table in found.items():
        assert len(table) == len(expected[name]), name
        for mine, theirs in zip(table, expected[name], strict=True):
            for column, value in theirs.items():
                if column in EXACT or isinstance(value, str):
                    assert mine[column] == value, (name, mine, theirs)
                else:
                    slack = 1e-4 if column == "std_activation" else 2e-6  # a difference of sums
                    close = mine[column] == pytest.approx(float(value), rel=2e-6, abs=slack)
                    assert close, (name, column, mine, theirs)
    info = json.loads((folder / CATALOG).read_text("utf-8"))
    assert info["corpus"]["tokens"] == about["tokens"]
    assert info["corpus"]["rows"] == len(seen.ids)
    assert info["corpus"]["context_size"] == seen.ids.shape[1]
    assert info["median_norm"] == pytest.approx(about["median_norm"], rel=1e-6)
    assert info["sinks"] == {"norm_above": 10, "tokens": about["sinks"]}
    assert info["sample"]["rows"] == about["sample"]


@pytest.fixture(scope="module", params=["model", "llama"])
def made(request, tmp_path_factory):
    model = request.getfixturevalue(request.param)
    sae = SAE.new(
        "topk",
        d_in=model.cfg.d_model,
        d_sae=48,
        k=6,
        site="blocks.2.hook_resid_pre",
        model=request.param,
        seed=3,
    )
    sae.W_dec.data[7] = sae.W_enc.data[:, 7] = 0  # it never fires
    tokens = tokenize(sentences(25), model, 32)
    folder = tmp_path_factory.mktemp("catalog") / "c"
    assert build(model, sae, tokens, folder, **options(SMALL)) == folder.resolve()
    return model, sae, tokens, folder


def test_everything_from_the_text_is_what_brute_force_finds(made) -> None:
    model, sae, tokens, folder = made
    seen = look(model, sae, tokens, tokens.special)
    assert (seen.f > 0).any((0, 1)).sum() > 20
    check_against_brute_force(folder, seen, SMALL)


def test_every_band_shows_what_is_active_and_in_it(made) -> None:
    *_, folder = made
    highest = {row["feature"]: row["max_activation"] for row in rows(folder, "features")}
    sampled = [row for row in rows(folder, "contexts") if row["band"] > 0]
    assert {row["band"] for row in sampled} == {1, 2, 3}
    for row in sampled:
        share = row["max_activation"] / highest[row["feature"]] * 3
        assert row["band"] - 1 < share + 1e-6
        assert share <= row["band"] + 1e-6
        assert row["max_activation"] > 0
    at_peak = {
        (row["feature"], row["band"], row["rank"], row["offset"]): row["activation"]
        for row in rows(folder, "activations")
    }
    for row in rows(folder, "contexts"):
        assert at_peak[row["feature"], row["band"], row["rank"], row["peak"]] == row["max_activation"]


def test_tables_are_whole_sorted_and_summed(made) -> None:
    *_, folder = made
    info = json.loads((folder / CATALOG).read_text("utf-8"))
    assert {path.name for path in folder.iterdir()} == {
        CATALOG, "directions.safetensors", *(f"{name}.parquet" for name in SCHEMAS)
    }  # fmt: skip
    assert info["files"] == {
        path.name: sha256_of_file(path)
        for path in sorted(folder.iterdir())
        if path.stem not in ("catalog", "explanations", "scores")
    }
    for name in {*SCHEMAS} - {"corpus", "vocabulary"}:
        features = read_table(folder, name)["feature"].to_numpy()
        assert (np.diff(features) >= 0).all(), name
    assert not rows(folder, "explanations")
    assert not rows(folder, "scores")
    assert info["contexts"] == {"per_feature": 4, "window": 12, "bands": 3, "per_band": 2}
    assert info["seeds"] == {"draws": 0}


def test_what_the_weights_say_is_written(made) -> None:
    model, sae, _, folder = made
    direction = sae.directions()[5]
    centred = direction - direction.mean() if model.cfg.normalization_type == "LN" else direction
    effect = (centred * model.ln_final.weight.detach()) @ model.W_U.detach()
    mine = [row for row in rows(folder, "logits") if row["feature"] == 5]
    for raised, best in ((True, effect.topk(10)), (False, effect.topk(10, largest=False))):
        found = [row for row in mine if row["raised"] is raised]
        assert [row["rank"] for row in found] == [*range(10)]
        assert [row["token_id"] for row in found] == best.indices.tolist()
        assert [row["effect"] for row in found] == pytest.approx(best.values.tolist(), rel=1e-4)
    spread = [row for row in rows(folder, "histograms") if row["feature"] == 5 and row["of"] == "effect"]
    assert sum(row["count"] for row in spread) == model.cfg.d_vocab
    assert spread[0]["low"] == pytest.approx(float(effect.min()), rel=1e-4)
    assert spread[-1]["high"] == pytest.approx(float(effect.max()), rel=1e-4)
    unit = torch.nn.functional.normalize(sae.directions(), dim=1)
    cosine = (unit @ unit.t()).fill_diagonal_(-2)[5].topk(10)
    near = [row for row in rows(folder, "neighbours") if row["feature"] == 5 and row["by"] == "decoder"]
    assert [row["neighbour"] for row in near] == cosine.indices.tolist()
    assert [row["similarity"] for row in near] == pytest.approx(cosine.values.tolist(), abs=1e-5)
    assert not rows(folder, "neurons")
    features = rows(folder, "features")
    assert [row["decoder_norm"] for row in features] == pytest.approx(sae.directions().norm(dim=1).tolist())
    assert features[7]["label"] == ""
    assert features[7]["count"] == 0
    words = [model.tokenizer.decode([i]).strip() for i in _first_tokens(folder, 5)]
    assert features[5]["label"] == ", ".join(words)
    vocabulary = rows(folder, "vocabulary")
    assert len(vocabulary) == model.cfg.d_vocab


def _first_tokens(folder: Path, feature: int) -> list[int]:
    mine = [row for row in rows(folder, "tokens") if row["feature"] == feature]
    return [row["token_id"] for row in sorted(mine, key=lambda row: -row["share"])][:3]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_build_gives_the_same_bytes(made, tmp_path) -> None:
    model, sae, tokens, folder = made
    again = build(model, sae, tokens, tmp_path / "c", **options(SMALL))
    assert contents(again) == contents(folder)


def test_several_saes_share_a_forward_and_each_is_as_if_alone(model, tmp_path, monkeypatch) -> None:
    site, other = "blocks.2.hook_resid_pre", "blocks.4.hook_resid_pre"
    saes = [
        SAE.new("topk", d_in=256, d_sae=24, k=3, site=site),
        SAE.new("topk", d_in=256, d_sae=16, k=3, site=other),
        SAE.new("topk", d_in=256, d_sae=24, k=3, site=site, seed=1),
    ]
    forwards: list[Any] = []

    def counted(model, sites, ids):
        forwards.append(sites)
        return capture(model, sites, ids)

    tokens = tokenize(sentences(8), model, 32)
    monkeypatch.setattr(building, "capture", counted)
    made = build(model, saes, tokens, tmp_path / "all", **options(SMALL))
    assert len(forwards) == -(-tokens.shape[0] // 8)
    names = [f"{site}-topk-24-1", other, f"{site}-topk-24-2"]
    assert made == [(tmp_path / "all" / name).resolve() for name in names]
    for sae, folder in zip(saes, made, strict=True):
        alone = build(model, sae, tokens, tmp_path / folder.name, **options(SMALL))
        assert contents(alone) == contents(folder)


def test_names_of_several_saes() -> None:
    def named(site: str, architecture: str, d_sae: int) -> SAE:
        k = {"k": 2} if architecture == "topk" else {}
        return SAE.new(architecture, d_in=4, d_sae=d_sae, site=site, **k)

    assert distinct_names([named("a", "topk", 8), named("b", "topk", 8)]) == ["a", "b"]
    assert distinct_names([named("a", "topk", 8), named("a", "topk", 16), named("b", "topk", 8)]) == [
        "a-topk-8", "a-topk-16", "b"
    ]  # fmt: skip
    assert distinct_names([named("a", "topk", 8)] * 2) == ["a-topk-8-1", "a-topk-8-2"]


def test_a_transcoder_reads_one_site_and_acts_on_another(model, tmp_path) -> None:
    sae = SAE.new(
        "topk", d_in=256, d_out=256, d_sae=24, k=3, site="blocks.1.hook_resid_mid",
        target_site="blocks.1.hook_mlp_out", seed=4,
    )  # fmt: skip
    tokens = tokenize(sentences(8), model, 32)
    folder = build(model, sae, tokens, tmp_path / "c", **options(SMALL))
    check_against_brute_force(folder, look(model, sae, tokens, tokens.special), SMALL)
    info = json.loads((folder / CATALOG).read_text("utf-8"))
    assert (info["site"], info["target_site"]) == ("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out")
    W_out = model.blocks[1].mlp.W_out.detach()
    cosine = torch.cosine_similarity(sae.W_dec.detach()[3][None], W_out, dim=1)
    mine = [row for row in rows(folder, "neurons") if row["feature"] == 3]
    assert [row["neuron"] for row in mine] == cosine.abs().topk(5).indices.tolist()
    assert len(rows(folder, "logits")) == 24 * 20


def test_a_transcoder_of_two_widths_has_no_encoder_cosine(model, tmp_path) -> None:
    sae = SAE.new(
        "topk", d_in=1024, d_out=256, d_sae=8, k=2, site="blocks.1.mlp.hook_post",
        target_site="blocks.1.hook_mlp_out",
    )  # fmt: skip
    folder = build(model, sae, tokenize(sentences(3), model, 32), tmp_path / "c")
    assert [row["encoder_cosine"] for row in rows(folder, "features")] == [None] * 8


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("topk", {"k": 20}),
        ("standard", {}),
        ("jumprelu", {}),
        ("gated", {}),
        ("batchtopk", {"k": 4}),
        ("matryoshka", {"k": 4}),
    ],
)
def test_every_architecture(model, tmp_path, architecture: str, arguments: dict[str, int]) -> None:
    sae = SAE.new(architecture, d_in=256, d_sae=24, site=SITE, seed=2, **arguments)
    with torch.no_grad():
        sae.encoder_bias.normal_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
        if architecture in ("batchtopk", "matryoshka"):
            sae.threshold.fill_(1.5)
    tokens = tokenize(sentences(4), model, 32)
    folder = build(model, sae, tokens, tmp_path / "c", **options(SMALL))
    check_against_brute_force(folder, look(model, sae, tokens, tokens.special), SMALL)


def test_rows_that_nothing_refers_to_are_left_out(model, tmp_path) -> None:
    sae = SAE.new("topk", d_in=256, d_sae=3, k=1, site=SITE, seed=2)
    tokens = tokenize(sentences(25), model, 32)
    few = Options(contexts=1, window=5, bands=1, per_band=1, sample_rows=1)
    folder = build(model, sae, tokens, tmp_path / "c", **options(few))
    assert len(rows(folder, "corpus")) < 32 * tokens.shape[0] / 2
    check_against_brute_force(folder, look(model, sae, tokens, tokens.special), few)


def test_an_sae_that_selects_by_decoder_norm(model, tmp_path) -> None:
    from dataclasses import replace

    plain = SAE.new("topk", d_in=256, d_sae=24, k=3, site=SITE, seed=2)
    sae = SAE(replace(plain.config, rescale_acts_by_decoder_norm=True))
    sae.load_state_dict(plain.state_dict())
    sae.W_dec.data *= torch.linspace(0.5, 2, 24)[:, None]
    tokens = tokenize(sentences(4), model, 32)
    folder = build(model, sae, tokens, tmp_path / "c", **options(SMALL))
    check_against_brute_force(folder, look(model, sae, tokens, tokens.special), SMALL)


def test_special_tokens_are_excluded_unless_told_otherwise(model, sae, tmp_path) -> None:
    tokens = tokenize(sentences(4), model, 32)
    plain = build(model, sae, tokens, tmp_path / "a")
    told = build(model, sae, tokens, tmp_path / "b", include_special=True)
    about = [json.loads((folder / CATALOG).read_text("utf-8")) for folder in (plain, told)]
    assert [one["excluded"] for one in about] == [{"<|endoftext|>": 0}, {}]
    n, t = tokens.shape
    assert about[1]["corpus"]["tokens"] == n * t > about[0]["corpus"]["tokens"]
    inside = {(row["row"], row["position"]): row["token_id"] for row in rows(plain, "corpus")}
    for row in rows(plain, "contexts"):
        assert 0 not in [inside[row["row"], row["start"] + i] for i in range(row["length"])]


def test_max_tokens_stops_behind_a_unit(model, tmp_path) -> None:
    sae = SAE.new("topk", d_in=256, d_sae=16, k=2, site=SITE)
    ids = torch.randint(1, 500, (40, 16), generator=torch.Generator().manual_seed(0))
    for limit, expected in ((1, 8), (8 * 16, 8), (8 * 16 + 1, 16), (10**9, 40)):
        folder = build(model, sae, ids, tmp_path / "c", max_tokens=limit)
        info = json.loads((folder / CATALOG).read_text("utf-8"))
        assert info["corpus"] == {
            "label": "token ids", "tokens": expected * 16, "rows": expected, "context_size": 16, "licence": None
        }  # fmt: skip


def test_progress_says_how_far_it_is(model, tmp_path) -> None:
    sae = SAE.new("topk", d_in=256, d_sae=16, k=2, site=SITE)
    ids = torch.randint(1, 500, (24, 16), generator=torch.Generator().manual_seed(0))
    seen: list[Progress] = []
    folder = build(model, sae, ids, tmp_path / "c", progress=seen.append)
    assert [one.tokens for one in seen] == [128, 256, 384]
    assert seen[-1].alive == sum(row["count"] > 0 for row in rows(folder, "features"))
    assert seen[-1].latents == 16
    assert seen[0].seconds_left is not None
    assert seen[0].seconds_left > 0 == seen[-1].seconds_left
    assert all(one.tokens_per_second > 0 for one in seen)
    seen.clear()
    build(model, sae, iter(ids), tmp_path / "c", progress=seen.append, licence="CC0-1.0")
    assert [one.seconds_left for one in seen] == [None] * 3, "nobody knows how long it is"
    assert json.loads((folder / CATALOG).read_text("utf-8"))["corpus"]["licence"] == "CC0-1.0"
    seen.clear()
    build(model, sae, iter(ids), tmp_path / "c", progress=seen.append, max_tokens=256)
    assert seen[0].seconds_left is not None
    assert seen[-1].seconds_left == 0


def test_wrong_builds(model, sae, tmp_path) -> None:
    tokens = tokenize(sentences(2), model, 32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")

    def refused(
        match: str, sae: Any = sae, tokens: Any = tokens, folder: str = "x", **arguments: Any
    ) -> None:
        with pytest.raises(InvalidInput, match=match):
            build(model, sae, tokens, tmp_path / folder, **arguments)
        assert {path.name for path in tmp_path.iterdir()} == {"mine"}

    refused("exists and is no catalog", folder="mine")
    refused("exists and is no part of a catalog", folder="mine", part=(1, 2))
    refused("exists and is no catalog", folder="mine/thesis.txt")
    refused("has width 8", sae=SAE.new("standard", d_in=8, d_sae=8, site=SITE))
    crosscoder = SAE.new("standard", d_in=512, d_sae=8, site=[SITE, "blocks.1.hook_resid_pre"])
    refused("a crosscoder, which reads", sae=crosscoder)
    refused("no token to look at", tokens=torch.zeros(2, 8, dtype=torch.long))
    refused("contexts is a whole number from 1", contexts=0)
    refused("window is a whole number", window=2.5)
    refused("bands is a whole number", bands=True)
    refused("max_tokens starts at 1", max_tokens=0)
    refused(r"part \(0, 2\); expected", part=(0, 2))
    refused(r"part \(3, 2\); expected", part=(3, 2))
    refused("part '1/2'; expected", part="1/2")
    refused("at least one SAE", sae=[])


def test_rows_of_different_lengths(model, tmp_path) -> None:
    sae = SAE.new("topk", d_in=256, d_sae=16, k=2, site=SITE)
    ids = [*torch.ones(8, 8, dtype=torch.long), *torch.ones(8, 9, dtype=torch.long)]
    with pytest.raises(InvalidInput, match="rows of 8 tokens as before are expected, got 9"):
        build(model, sae, ids, tmp_path / "c")
    build(model, sae, ids[:8], tmp_path / "c")  # goes on behind the first unit
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("when", ["pass", "weights", "tables"])
def test_an_interrupted_build_leaves_the_old_catalog_and_goes_on(
    model, tmp_path, monkeypatch, no_leaked_hooks, when: str
) -> None:
    sae = SAE.new("topk", d_in=256, d_sae=16, k=2, site=SITE)
    old = build(model, sae, tokenize(sentences(3), model, 32), tmp_path / "c")
    before = contents(old)
    tokens = tokenize(sentences(30), model, 32)
    untouched = build(model, sae, tokens, tmp_path / "untouched")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if when == "pass":
            encodes: list[int] = []

            def third(*arguments: Any) -> Any:
                encodes.append(1)
                return encode(*arguments) if len(encodes) < 3 else interrupted()

            patched.setattr(building, "encode", third)
        else:
            patched.setattr(building, "look_at" if when == "weights" else "write_catalog", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(model, sae, tokens, old)
    assert contents(old) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c.building", "untouched"]
    seen: list[Progress] = []
    build(model, sae, tokens, old, progress=seen.append)
    units = -(-tokens.shape[0] // 8)
    assert len(seen) == (units - 2 if when == "pass" else 0), "it did not begin anew"
    assert contents(old) == contents(untouched)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "untouched"]


def test_a_state_that_was_stopped_between_two_units_is_not_saved(model, tmp_path, monkeypatch) -> None:
    sae = SAE.new("topk", d_in=256, d_sae=16, k=2, site=SITE)
    ids = torch.randint(1, 500, (40, 16), generator=torch.Generator().manual_seed(0))
    taken: list[int] = []

    def interrupted(state: Any, unit: Any, add: Any = building.State.add) -> None:
        add(state, unit)
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(building.State, "add", interrupted)
        patched.setattr(building, "SAVE_EVERY", 0.0)
        patched.setattr(building, "SAVING_TAKES", 1e-9)  # only once
        with pytest.raises(KeyboardInterrupt):
            build(model, sae, ids, tmp_path / "c")
    seen: list[Progress] = []
    build(model, sae, ids, tmp_path / "c", progress=seen.append)
    assert len(seen) == 4, "it goes on behind the first unit"
    assert contents(tmp_path / "c") == contents(build(model, sae, ids, tmp_path / "d"))


def test_ctrl_c_in_the_middle_of_a_unit_waits_for_its_end(model, tmp_path, monkeypatch) -> None:
    sae = SAE.new("topk", d_in=256, d_sae=16, k=2, site=SITE)
    ids = torch.randint(1, 500, (40, 16), generator=torch.Generator().manual_seed(0))
    taken: list[int] = []

    def disturbed(state: Any, unit: Any, add: Any = building.State.add) -> None:
        taken.append(1)
        if len(taken) == 3:
            signal.raise_signal(signal.SIGINT)
        add(state, unit)

    with monkeypatch.context() as patched:
        patched.setattr(building.State, "add", disturbed)
        with pytest.raises(KeyboardInterrupt):
            build(model, sae, ids, tmp_path / "c")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen: list[Progress] = []
    build(model, sae, ids, tmp_path / "c", progress=seen.append)
    assert len(seen) == 2, "it goes on behind the third unit"
    assert contents(tmp_path / "c") == contents(build(model, sae, ids, tmp_path / "d"))


def test_a_full_disk_is_one_clear_error_and_loses_nothing(model, tmp_path, monkeypatch) -> None:
    sae = SAE.new("topk", d_in=256, d_sae=16, k=2, site=SITE)
    ids = torch.randint(1, 500, (40, 16), generator=torch.Generator().manual_seed(0))

    with monkeypatch.context() as patched:
        patched.setattr(building, "write_catalog", full)
        with pytest.raises(InvalidInput, match=r"c: could not be written \(.*No space left.*\)\. Make room"):
            build(model, sae, ids, tmp_path / "c")
    seen: list[Progress] = []
    build(model, sae, ids, tmp_path / "c", progress=seen.append)
    assert not seen
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_catalog_that_cannot_take_its_place_leaves_the_old_one(model, tmp_path, monkeypatch) -> None:
    sae = SAE.new("topk", d_in=256, d_sae=16, k=2, site=SITE)
    ids = torch.randint(1, 500, (40, 16), generator=torch.Generator().manual_seed(0))
    before = contents(build(model, sae, ids[:8], tmp_path / "c"))
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.name == "done":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refused)
        patched.setattr(building._Survey, "save", lambda survey: full())
        with pytest.raises(InvalidInput, match="could not be written"):
            build(model, sae, ids, tmp_path / "c")
    assert contents(tmp_path / "c") == before


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_damaged_state_is_named(model, tmp_path) -> None:
    sae = SAE.new("topk", d_in=256, d_sae=16, k=2, site=SITE)
    ids = torch.randint(1, 500, (40, 16), generator=torch.Generator().manual_seed(0))

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model, sae, ids, tmp_path / "c", progress=stop)
    damaged = next((tmp_path / "c.building").rglob("state.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    before = contents(tmp_path / "c.building")
    with pytest.raises(InvalidInput, match=r"state is damaged \(.*start anew with resume=False"):
        build(model, sae, ids, tmp_path / "c")
    assert contents(tmp_path / "c.building") == before
    build(model, sae, ids, tmp_path / "c", resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_was_begun_otherwise_is_not_gone_on_with(model, tmp_path) -> None:
    sae = SAE.new("topk", d_in=256, d_sae=16, k=2, site=SITE)
    ids = torch.randint(1, 500, (40, 16), generator=torch.Generator().manual_seed(0))

    def stop(progress: Progress) -> None:
        if progress.tokens == 2 * 128:
            raise KeyboardInterrupt

    def stopped() -> None:
        with pytest.raises(KeyboardInterrupt):
            build(model, sae, ids, tmp_path / "c", progress=stop, resume=False)

    stopped()
    with pytest.raises(InvalidInput, match=r"contexts was 20, is 7\. .*resume=False"):
        build(model, sae, ids, tmp_path / "c", contexts=7)
    with pytest.raises(InvalidInput, match=r"sha256\.W_dec was .{12}…, is .{12}…"):
        build(model, SAE.new("topk", d_in=256, d_sae=16, k=2, site=SITE, seed=1), ids, tmp_path / "c")
    changed = ids.clone()
    changed[3, 3] += 1
    for other in (changed, ids[:12]):
        with pytest.raises(InvalidInput, match="the corpus is not the one .* first 16 rows"):
            build(model, sae, other, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    longer = torch.cat([ids[:16], changed[:16]])
    build(model, sae, longer, tmp_path / "c")  # what was looked at is the same
    assert contents(tmp_path / "c") == contents(build(model, sae, longer, tmp_path / "d"))
    stopped()
    build(model, sae, ids, tmp_path / "c", contexts=7, resume=False)
    assert contents(tmp_path / "c") == contents(build(model, sae, ids, tmp_path / "d", contexts=7))


def test_one_process_builds_at_a_place(model, tmp_path) -> None:
    sae = SAE.new("topk", d_in=256, d_sae=16, k=2, site=SITE)
    ids = torch.randint(1, 500, (16, 16), generator=torch.Generator().manual_seed(0))

    def meanwhile(progress: Progress) -> None:
        with pytest.raises(InvalidInput, match="another process .* is writing this catalog"):
            build(model, sae, ids, tmp_path / "c")

    build(model, sae, ids, tmp_path / "c", progress=meanwhile)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def on_real_text(tmp_path: Path, model, sae: SAE, corpus: str, context_size: int, max_tokens: int) -> None:
    path = SHARED / "corpora" / corpus
    if not path.exists():
        pytest.skip("../shared/corpora is missing: the real texts are not part of the repository")
    tokens = tokenize(path, model, context_size)
    chosen = Options(contexts=5, window=24, per_band=2, sample_rows=6)
    folder = build(model, sae, tokens, tmp_path / "c", max_tokens=max_tokens, **options(chosen))
    read = json.loads((folder / CATALOG).read_text("utf-8"))["corpus"]["rows"]
    seen = look(model, sae, [row for row, _ in zip(tokens, range(read), strict=False)], tokens.special)
    documents = next(tokens.batches(read)).documents.numpy()
    check_against_brute_force(folder, Seen(seen.ids, documents, seen.norms, seen.f, seen.special), chosen)


def test_real_text_on_the_embedded_model(model, sae, tmp_path) -> None:
    """The first latents of the embedded SAE, which was trained on this text."""
    few = SAE.new("topk", d_in=256, d_sae=160, k=8, site=sae.site)
    with torch.no_grad():
        few.W_enc.copy_(sae.W_enc[:, :160])
        few.W_dec.copy_(sae.W_dec[:160])
        few.b_enc.copy_(sae.b_enc[:160])
        few.b_dec.copy_(sae.b_dec)
    on_real_text(tmp_path, model, few, "wookieepedia.jsonl.gz", 64, 4_000)


def test_real_text_on_a_llama(llama, tmp_path) -> None:
    sae = SAE.new("topk", d_in=64, d_sae=128, k=6, site="blocks.2.hook_resid_pre", seed=5)
    on_real_text(tmp_path, llama, sae, "wookieepedia.jsonl.gz", 64, 4_000)
