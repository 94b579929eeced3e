"""Directions: where they come from, arithmetic, files, and what they are made of."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from conftest import SHARED, SITE

import saekit
from saekit.errors import FileMissing, InvalidInput, SaekitError, UnknownName
from saekit.evaluation.logistic import logistic
from saekit.files import write_tensors
from saekit.lm import model_hash
from saekit.sae import SAE
from saekit.sites import capture
from saekit.steering import gguf
from saekit.steering.directions import Direction, Prefix
from saekit.steering.directions import states as states_file
from saekit.steering.directions.sources import Sides, principal_axis
from saekit.steering.directions.states import states
from saekit.steering.probes import fit_probe
from saekit.steering.steer import steer

SITE_2 = "blocks.2.hook_resid_pre"
TEXTS = [
    "The king",
    "A dog sees the old river and the garden",
    "ship",
    "Someone finds a letter near the window.",
    "The horse follows",
    "no",
]
HAPPY = [
    "What a lovely day",
    "I love this garden",
    "The dog is so happy",
    "She smiled at him",
    "They laughed and sang",
]
SAD = [
    "What a terrible day",
    "I hate this garden",
    "The dog is so sad",
    "She cried alone at night",
    "They wept and mourned",
]


def exact(lm) -> bool:
    return lm.cfg.dtype == torch.float32


def close(lm, got, expected) -> None:
    """Equal up to the rounding of the model's dtype."""
    bound = (1e-4 if exact(lm) else 0.05) * float(expected.abs().max())
    torch.testing.assert_close(got, expected, atol=bound, rtol=0)


def alone(lm, text, site=SITE_2):
    return capture(lm, [site], lm.to_tokens(text))[site][0].float()


# States


@pytest.mark.parametrize("token", ["last", "mean"])
def test_a_batch_gives_what_its_texts_give_alone(lm, token, monkeypatch) -> None:
    expected = torch.stack(
        [alone(lm, text)[-1] if token == "last" else alone(lm, text)[1:].mean(0) for text in TEXTS]
    )
    close(lm, states(lm, TEXTS, SITE_2, token), expected)
    monkeypatch.setattr(states_file, "TOKENS_AT_ONCE", 20)
    close(lm, states(lm, TEXTS, SITE_2, token), expected)


def test_no_forward_is_larger_than_its_bound(model, monkeypatch) -> None:
    seen = []

    def watch(lm, sites, ids):
        seen.append(ids.shape)
        return capture(lm, sites, ids)

    monkeypatch.setattr(states_file, "capture", watch)
    monkeypatch.setattr(states_file, "TOKENS_AT_ONCE", 64)
    states(model, ["word " * n for n in range(1, 41)], SITE_2)
    assert sum(n for n, _ in seen) == 40
    assert max(n * t for n, t in seen) <= 64
    assert len(seen) < 40


@pytest.mark.parametrize(
    ("texts", "token", "message"),
    [
        ([], "last", "expected a list of texts"),
        ("one text", "last", "expected a list of texts"),
        (["a", ""], "last", "a prompt is empty"),
        (["a", None], "last", "a prompt is None"),
        (["a"], "first", "expected 'last' or 'mean'"),
        (["word " * 400], "last", "403 tokens, but tiny reads 256"),
    ],
)
def test_texts_that_have_no_state(model, texts, token, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        states(model, texts, SITE_2, token)


# Where they come from


def test_contrast_is_a_difference_of_activations(lm) -> None:
    direction = Direction.from_contrast(lm, "a king", "a dog", site=SITE_2)
    close(lm, direction.vector, alone(lm, "a king")[-1] - alone(lm, "a dog")[-1])
    assert (direction.label, direction.model) == ("'a king' − 'a dog'", lm.cfg.model_name)
    assert direction.model_hash == model_hash(lm)
    with pytest.raises(InvalidInput, match="a prompt is empty"):
        Direction.from_contrast(lm, "", "x", site=SITE_2)
    with pytest.raises(UnknownName, match="Did you mean"):
        Direction.from_contrast(lm, "a", "x", site="blocks.2.resid_pre")


@pytest.mark.parametrize("token", ["last", "mean"])
def test_mean_difference_is_the_mean_of_contrasts(lm, token) -> None:
    direction = Direction.from_means(lm, HAPPY, SAD[:3], site=SITE_2, token=token)
    pick = (lambda x: x[-1]) if token == "last" else (lambda x: x[1:].mean(0))
    plus, minus = (torch.stack([pick(alone(lm, t)) for t in side]).mean(0) for side in (HAPPY, SAD[:3]))
    close(lm, direction.vector, plus - minus)
    assert "5 and 3 texts" in direction.source


def test_the_principal_axis_keeps_the_mean_that_centring_would_take_off() -> None:
    draw = torch.Generator().manual_seed(0)
    wanted = torch.randn(32, generator=draw)
    minus = torch.randn(40, 32, generator=draw)
    noise = torch.randn(40, 32, generator=draw) * 0.3
    plus = minus + wanted + noise
    axis = principal_axis(Sides(plus, minus))
    assert torch.cosine_similarity(axis.vector, wanted, dim=0) > 0.99
    assert axis.agreement == 1
    differences = (plus - minus).double()
    values, vectors = torch.linalg.eigh(differences.t() @ differences)
    assert abs(float(vectors[:, -1].float() @ axis.vector)) == pytest.approx(1, abs=1e-5)
    assert axis.share == pytest.approx(float(values[-1] / values.sum()))
    centred = torch.linalg.svd(differences - differences.mean(0))[2][0].float()
    assert abs(float(torch.cosine_similarity(centred, wanted, dim=0))) < 0.7  # what others have got wrong
    torch.testing.assert_close(principal_axis(Sides(minus, plus)).vector, -axis.vector)
    with pytest.raises(InvalidInput, match="40 positive and 39 negative"):
        principal_axis(Sides(plus, minus[1:]))
    with pytest.raises(InvalidInput, match="no pair differs"):
        principal_axis(Sides(plus, plus))


def test_pca_of_texts(lm) -> None:
    direction = Direction.from_pca(lm, HAPPY, SAD, site=SITE_2)
    sides = Sides(*(torch.stack([alone(lm, t)[-1] for t in side]) for side in (HAPPY, SAD)))
    assert abs(float(principal_axis(sides).vector @ direction.vector)) == pytest.approx(1, abs=1e-3)
    assert direction.norm == pytest.approx(1, abs=1e-5)
    assert float(sides.difference @ direction.vector) > 0
    assert "5 pairs" in direction.source


def test_a_probe_is_fitted_on_three_quarters_and_judged_on_the_rest(lm) -> None:
    probe = fit_probe(lm, HAPPY, SAD, site=SITE_2)
    fitted = [0, 1, 2, 4]
    x = states(lm, [*HAPPY, *SAD], SITE_2)
    keep = torch.tensor(fitted + [5 + i for i in fitted])
    weights, bias = logistic(x[keep], keep < 5)
    torch.testing.assert_close(probe.weights, weights, rtol=1e-4, atol=1e-6)
    assert (probe.fitted, probe.kept_back) == (8, 2)
    scores = probe.scores(lm, [HAPPY[3], SAD[3]])
    torch.testing.assert_close(scores, x[[3, 8]].double() @ weights + bias, rtol=1e-2, atol=1e-2)
    expected = (float(scores[0] > 0) + float(scores[1] <= 0)) / 2
    assert probe.accuracy == expected
    assert probe.direction.norm == pytest.approx(1, abs=1e-5)
    direction = Direction.from_probe(lm, HAPPY, SAD, site=SITE_2)
    assert torch.equal(direction.vector, probe.direction.vector)
    assert f"accuracy {probe.accuracy:.0%} on 2 others" in direction.source


def test_the_difference_probe_turns_halfway_between_the_means(model) -> None:
    probe = fit_probe(model, HAPPY, SAD, site=SITE_2, kind="difference")
    plus, minus = (states(model, [side[i] for i in (0, 1, 2, 4)], SITE_2).mean(0) for side in (HAPPY, SAD))
    torch.testing.assert_close(probe.direction.vector, plus - minus, rtol=1e-4, atol=1e-5)
    above, below = (float(x.double() @ probe.weights + probe.bias) for x in (plus, minus))
    assert above > 0
    assert above == pytest.approx(-below, rel=1e-4)
    assert "difference probe at blocks.2.hook_resid_pre" in str(probe)


@pytest.mark.parametrize(
    ("positive", "negative", "kind", "message"),
    [
        (HAPPY, SAD, "forest", "a probe is 'logistic' or 'difference'"),
        (HAPPY[:3], SAD, "logistic", "3 positive and 5 negative texts; expected 4 or more"),
        (HAPPY, HAPPY, "difference", "do not differ"),
    ],
)
def test_probes_that_cannot_be(model, positive, negative, kind, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        fit_probe(model, positive, negative, site=SITE_2, kind=kind)


def test_a_probe_refuses_another_model(model, gemma_folder) -> None:
    probe = fit_probe(model, HAPPY, SAD, site=SITE_2)
    gemma = saekit.load_model(gemma_folder, dtype="float32")
    with pytest.raises(InvalidInput, match="width 256, but .* has 32"):
        probe.scores(gemma, HAPPY)


@torch.no_grad()
def test_a_task_vector_in_the_last_stream_makes_the_demonstrations_logits(lm) -> None:
    site = f"blocks.{lm.cfg.n_layers - 1}.hook_resid_post"
    shown = "hot: cold, big: small, up:"
    task = Direction.task_vector(lm, shown, site=site)
    ids = lm.to_tokens("up:")
    there = []
    with (
        steer(lm, task.replace(), positions=[ids.shape[1] - 1]),
        lm.hooks(fwd_hooks=[(site, lambda x, hook: there.append(x[0, -1].float()))]),
    ):
        replaced = lm(ids)[0]
    torch.testing.assert_close(there[0], task.vector, rtol=1e-5, atol=1e-5)
    plain = lm(ids)[0]
    close(lm, replaced[-1].float(), lm(lm.to_tokens(shown))[0, -1].float())
    assert torch.equal(replaced[:-1], plain[:-1])
    assert not torch.equal(replaced[-1], plain[-1])
    two = Direction.task_vector(lm, [shown, "up:"], site=site)
    close(lm, two.vector, (alone(lm, shown, site)[-1] + alone(lm, "up:", site)[-1]) / 2)


# ActAdd's full form


@torch.no_grad()
def test_a_prefix_turns_the_negative_prompt_into_the_positive_one(lm) -> None:
    prefix = Prefix.from_contrast(lm, "The happy king walked", "A dog", site=SITE_2)
    plus, minus = lm.to_tokens("The happy king walked"), lm.to_tokens("A dog")
    space = lm.tokenizer(" ", add_special_tokens=False)["input_ids"][-1]
    filled = torch.full_like(plus, space)
    filled[:, : minus.shape[1]] = minus
    assert len(prefix.vectors) == plus.shape[1]
    assert not prefix.vectors[0].any()  # BOS cancels
    assert len(prefix.add(1.0)) == plus.shape[1] - 1
    with steer(lm, prefix.add(1.0)):
        steered = lm(filled)[0].float()
    close(lm, steered, lm(plus)[0].float())
    last = prefix.at(plus.shape[1] - 1)
    close(
        lm,
        last.vector,
        alone(lm, "The happy king walked")[-1] - capture(lm, [SITE_2], filled)[SITE_2][0, -1].float(),
    )


@torch.no_grad()
def test_a_prefix_acts_on_the_first_positions_in_proportion(model) -> None:
    prefix = Prefix.from_contrast(model, " Love", " Hate", site=SITE_2)
    ids = model.to_tokens("The old king walked to the river")
    x = capture(model, [SITE_2], ids)[SITE_2]
    seen = []
    with (
        steer(model, prefix.add(5.0)),
        model.hooks(fwd_hooks=[(SITE_2, lambda x, hook: seen.append(x))]),
    ):
        model(ids)
    n = len(prefix.vectors)
    torch.testing.assert_close(seen[0][0, :n], x[0, :n] + 5 * prefix.vectors, rtol=1e-4, atol=1e-4)
    assert torch.equal(seen[0][0, n:], x[0, n:])
    assert str(prefix).startswith("' Love' − ' Hate' at blocks.2.hook_resid_pre")
    with pytest.raises(InvalidInput, match=f"covers positions 0 to {n - 1}"):
        prefix.at(n)
    with pytest.raises(InvalidInput, match="a prompt is empty"):
        Prefix.from_contrast(model, "", "x", site=SITE_2)


# Arithmetic


def vector(seed, width=256):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def test_arithmetic() -> None:
    a, b = (Direction(vector(seed), SITE_2, label) for seed, label in ((0, "a"), (1, "b")))
    torch.testing.assert_close(((a + b) - b).vector, a.vector)
    assert torch.equal((2 * a).vector, (a + a).vector)
    torch.testing.assert_close((a * 3 / 3).vector, a.vector)
    assert torch.equal((-a).vector, -a.vector)
    assert a.unit().norm == pytest.approx(1)
    assert a.cosine(3 * a) == pytest.approx(1)
    left = a.without(b)
    assert float(left.vector @ b.vector) == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close((left + float(a.vector @ b.unit().vector) * b.unit()).vector, a.vector)
    assert (a - 2 * (a + b)).label == "a − (2 × (a + b))"
    assert left.label == "a without b"


@torch.no_grad()
def test_a_sum_steers_as_its_parts_do(lm) -> None:
    a = Direction.from_contrast(lm, "a king", "a dog", site=SITE_2)
    b = Direction.from_contrast(lm, "a river", "a lamp", site=SITE_2)
    ids = lm.to_tokens("The old king walked to the")
    with steer(lm, a.add(2.0), b.add(-1.0)):
        apart = lm(ids).float()
    with steer(lm, (2 * a - b).add(1.0)):
        together = lm(ids).float()
    close(lm, together, apart)
    assert not torch.equal(apart, lm(ids).float())


def test_arithmetic_keeps_the_model_and_forgets_the_latent(model, sae) -> None:
    row = Direction.from_sae(sae, 7)
    contrast = Direction.from_contrast(model, " a", " b", site=SITE)
    for made in (row * 2, row + contrast, contrast - row, -row, row.unit(), row.without(contrast)):
        assert made.sae is None
        assert made.latent is None
        assert made.model == "tiny"
        with pytest.raises(InvalidInput, match="needs a feature of an SAE"):
            made.clamp(1.0)
    assert (row + contrast).model_hash == contrast.model_hash == model_hash(model)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            Direction(vector(1), "blocks.3.hook_resid_pre", "b"),
            "a is at blocks.2.* no arithmetic between sites",
        ),
        (Direction(vector(1, 128), SITE_2, "b"), "width 256, b 128"),
        (Direction(vector(1), SITE_2, "b", model="other"), "a is of tiny, b of other"),
        (Direction(vector(1), SITE_2, "b", model="tiny", model_hash="2"), None),
    ],
)
def test_arithmetic_between_places_is_refused(other, message) -> None:
    a = Direction(vector(0), SITE_2, "a", model="tiny")
    combine = [lambda: a + other, lambda: a - other, lambda: a.without(other), lambda: a.cosine(other)]
    for one in combine:
        if message is None:  # one name, and a hash on one side only
            one()
        else:
            with pytest.raises(InvalidInput, match=message):
                one()
    hashed = Direction(vector(0), SITE_2, "a", model="tiny", model_hash="1")
    if message is None:
        with pytest.raises(InvalidInput, match="no arithmetic between models"):
            hashed + other


def test_arithmetic_with_no_directions() -> None:
    a = Direction(vector(0), SITE_2, "a")
    for wrong in (lambda: a + 1, lambda: a * a, lambda: a / "2"):
        with pytest.raises(TypeError):
            wrong()
    for wrong in (lambda: a / 0, lambda: a * float("nan"), (a - a).unit, lambda: a.without(a - a)):
        with pytest.raises(InvalidInput):
            wrong()
    for tensor in (torch.ones(2, 2), torch.tensor([1, 2]), torch.ones(0), torch.tensor([1.0, float("inf")])):
        with pytest.raises(InvalidInput, match="direction"):
            Direction(tensor, SITE_2)


def test_the_random_control_has_the_norm_and_another_direction() -> None:
    like = vector(0) * 3
    control = Direction.random(like, SITE_2, seed=1)
    torch.testing.assert_close(control.vector.norm(), like.norm())
    assert abs(torch.cosine_similarity(control.vector, like, dim=0)) < 0.3
    assert torch.equal(control.vector, Direction.random(like, SITE_2, seed=1).vector)


# Files


def test_a_saved_direction_comes_back_bit_for_bit(model, tmp_path) -> None:
    direction = Direction.from_means(model, HAPPY, SAD, site=SITE_2, label="joy")
    path = direction.save(tmp_path / "new" / "joy.safetensors")
    back = Direction.from_file(path, model=model)
    assert torch.equal(back.vector, direction.vector)
    for name in ("site", "label", "source", "model", "model_hash"):
        assert getattr(back, name) == getattr(direction, name)
    assert [p.name for p in path.parent.iterdir()] == ["joy.safetensors"]
    assert Direction.from_file(path, site=SITE_2).site == SITE_2
    with pytest.raises(InvalidInput, match="a direction at blocks.2.hook_resid_pre, not at blocks.3"):
        Direction.from_file(path, site=SITE)
    replaced = Direction(direction.vector, SITE_2, "joy", model="tiny", model_hash="0" * 64)
    replaced.save(path)
    with pytest.raises(InvalidInput, match="joy was taken from tiny, and tiny has other weights"):
        Direction.from_file(path, model=model)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    from saekit.steering.directions import files

    path = Direction(vector(0), SITE_2, "old").save(tmp_path / "d.safetensors")

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        Direction(vector(1), SITE_2, "new").save(path)
    assert Direction.from_file(path).label == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]
    with pytest.raises(InvalidInput, match="does not end with .safetensors"):
        Direction(vector(1), SITE_2).save(tmp_path / "d.pt")


def test_other_peoples_files(tmp_path, model) -> None:
    write_tensors(tmp_path / "bare.safetensors", {"anything": vector(0)})
    with pytest.raises(InvalidInput, match="does not say its site"):
        Direction.from_file(tmp_path / "bare.safetensors")
    bare = Direction.from_file(tmp_path / "bare.safetensors", site=SITE_2, model=model)
    assert torch.equal(bare.vector, vector(0))
    assert bare.label == "bare"
    write_tensors(tmp_path / "two.safetensors", {"a": vector(0), "b": vector(1)})
    with pytest.raises(InvalidInput, match=r"expected one vector \[D\], found a \[256\], b \[256\]"):
        Direction.from_file(tmp_path / "two.safetensors", site=SITE_2)
    with pytest.raises(FileMissing):
        Direction.from_file(tmp_path / "none.safetensors")
    with pytest.raises(InvalidInput, match="is no .safetensors, .gguf or .json file"):
        (tmp_path / "d.pt").write_bytes(b"")
        Direction.from_file(tmp_path / "d.pt", site=SITE_2)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1, [2]]", '["1"]', "[true]", "[]", "[1e999]", "[NaN]", f"[1{'0' * 400}]", "[" * 100_000],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_json_that_is_no_vector(tmp_path, text) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(SaekitError):
        Direction.from_file(tmp_path / "d.json", site=SITE_2)


def test_a_published_vector_is_read_and_refused_where_it_does_not_fit(model) -> None:
    path = SHARED / "vectors" / "gpt2_small_res_jb_jedi_vector.json"
    if not path.is_file():
        pytest.skip("../shared/vectors is missing: published vectors are not part of the repository")
    direction = Direction.from_file(path, site="blocks.0.hook_resid_pre")
    assert direction.norm == pytest.approx(1.809, abs=1e-3)
    with pytest.raises(InvalidInput, match="width 768, but tiny has 256 at blocks.0.hook_resid_pre"):
        Direction.from_file(path, site="blocks.0.hook_resid_pre", model=model)


def test_a_control_vector_gives_a_direction_of_one_block(model, tmp_path) -> None:
    made = [Direction(vector(n), f"blocks.{n}.hook_resid_post", "v").add(3.0) for n in (1, 4)]
    path = gguf.save(made, tmp_path / "v.gguf", model=model)
    for site in ("blocks.4.hook_resid_post", "blocks.5.hook_resid_pre"):
        direction = Direction.from_file(path, site=site, model=model)
        torch.testing.assert_close(direction.vector, vector(4))
        assert (direction.site, direction.model_hash) == (site, model_hash(model))
    with pytest.raises(InvalidInput, match="for each of 2 blocks; name one"):
        Direction.from_file(path)
    with pytest.raises(InvalidInput, match="no direction at blocks.4.hook_resid_pre; it holds blocks.1"):
        Direction.from_file(path, site="blocks.4.hook_resid_pre")
    alone = gguf.save(made[:1], tmp_path / "one.gguf", model=model)
    assert Direction.from_file(alone).site == "blocks.1.hook_resid_post"


# What they are made of


@pytest.mark.parametrize("rescaled", [False, True])
def test_the_fit_finds_what_a_direction_was_made_of(rescaled) -> None:
    sae = SAE.new("topk", d_in=64, d_sae=256, k=4, site=SITE_2)
    if rescaled:  # latents that count in units of their row's norm
        from dataclasses import replace

        sae = SAE(replace(sae.config, rescale_acts_by_decoder_norm=True))
        with torch.no_grad():
            sae.W_dec.copy_(torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) * 3)
    wanted = {3: 2.0, 77: 5.0, 200: 1.0}
    made = sum(c * sae.direction(i) for i, c in wanted.items())
    parts = Direction(made, SITE_2, "made").in_features(sae, n=3)
    assert {p.feature: pytest.approx(p.coefficient, rel=1e-4) for p in parts.by_fit} == wanted
    assert parts.by_fit[0].feature == 77
    assert parts.explained == pytest.approx(1, abs=1e-6)
    assert parts.explained_random < 0.9
    assert parts.by_sides is None
    rows = sae.directions()
    cosines = torch.cosine_similarity(rows, made[None], dim=1)
    best = cosines.abs().argsort(descending=True)[:3]
    assert [p.feature for p in parts.by_cosine] == best.tolist()
    assert [p.cosine for p in parts.by_cosine] == pytest.approx(cosines[best].tolist(), abs=1e-5)


def test_the_fit_is_non_negative_and_least_squares() -> None:
    sae = SAE.new("standard", d_in=64, d_sae=256, site=SITE_2, seed=1)
    target = vector(3, 64)
    parts = Direction(target, SITE_2).in_features(sae, n=12)
    assert all(p.coefficient >= 0 for p in parts.by_fit)
    assert [p.explained for p in parts.by_fit] == sorted(p.explained for p in parts.by_fit)
    assert len({p.feature for p in parts.by_fit}) == len(parts.by_fit)
    rows = torch.stack([sae.direction(p.feature) for p in parts.by_fit])
    left = target - torch.tensor([p.coefficient for p in parts.by_fit]) @ rows
    assert float(left.square().sum() / target.square().sum()) == pytest.approx(1 - parts.explained, abs=1e-5)
    for part, slope in zip(parts.by_fit, (rows @ left).tolist(), strict=True):
        assert slope == pytest.approx(0, abs=1e-4) if part.coefficient > 0 else slope < 1e-4


def test_a_row_that_the_others_make_needless_gets_nothing_rather_than_a_negative_share() -> None:
    sae = SAE.new("standard", d_in=3, d_sae=3, site=SITE_2)
    rows = torch.nn.functional.normalize(
        torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, -0.2], [0.0, 1.0, -0.2]]), dim=1
    )
    sae.W_dec.data.copy_(rows)
    target = rows[1] + rows[2] - 0.3 * rows[0]  # least squares alone would find just that
    parts = Direction(target, SITE_2).in_features(sae, n=3)
    assert parts.by_fit[0].feature == 0  # which looks best at first
    assert parts.by_fit[0].coefficient == 0
    assert 0.9 < parts.explained < 0.9999


def test_sides_tell_what_fires_more(model, sae) -> None:
    direction = Direction.from_means(model, HAPPY, SAD, site=SITE)
    parts = direction.in_features(sae, n=6)
    plus, minus = (sae.encode(states(model, side, SITE)).mean(0) for side in (HAPPY, SAD))
    differences = (plus - minus).abs()
    assert parts.by_sides is not None
    found = [abs(p.plus - p.minus) for p in parts.by_sides]
    assert found == pytest.approx(differences.topk(6).values.tolist(), rel=1e-4)
    for part in parts.by_sides:
        assert part.plus == pytest.approx(float(plus[part.feature]), rel=1e-4)
        assert part.minus == pytest.approx(float(minus[part.feature]), rel=1e-4)
    assert "by sides" in str(parts)
    assert (2 * direction).in_features(sae).by_sides is None


def test_parts_of_a_crosscoder_are_those_at_the_site() -> None:
    crosscoder = SAE.new("standard", d_in=512, d_sae=64, site=[SITE_2, SITE])
    direction = Direction(crosscoder.direction(9)[256:], SITE)
    parts = direction.in_features(crosscoder, n=1)
    assert (parts.by_cosine[0].feature, parts.by_fit[0].feature) == (9, 9)
    assert parts.by_fit[0].coefficient == pytest.approx(1, rel=1e-4)


def test_parts_that_cannot_be(sae) -> None:
    for direction, n, message in [
        (Direction(vector(0), SITE_2), 3, "is at blocks.2.hook_resid_pre, but this SAE writes blocks.3"),
        (Direction(vector(0, 128), SITE), 3, "width 128, but this SAE has 256"),
        (Direction(torch.zeros(256), SITE), 3, "a vector of zeros"),
        (Direction(vector(0), SITE), 0, "n: expected"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            direction.in_features(sae, n)


# On real labelled texts


def test_emotions_are_read_by_every_source_alike(model) -> None:
    folder = SHARED / "texts" / "emotions"
    if not folder.is_dir():
        pytest.skip("../shared/texts is missing: the labelled texts are not part of the repository")
    happy, sad = (json.loads((folder / f"{name}.json").read_text())[:60] for name in ("happiness", "sadness"))
    probe = fit_probe(model, happy, sad, site=SITE, kind="difference", token="mean")
    assert probe.auc > 0.6
    means = Direction.from_means(model, happy, sad, site=SITE, token="mean")
    assert means.cosine(probe.direction) > 0.8
    assert means.cosine(Direction.from_pca(model, happy, sad, site=SITE, token="mean")) > 0
    assert means.cosine(Direction.from_probe(model, happy, sad, site=SITE, token="mean")) > 0.1


def test_facts_are_read_in_batches(model) -> None:
    path = SHARED / "texts" / "facts" / "facts_true_false.csv"
    if not path.is_file():
        pytest.skip("../shared/texts is missing: the labelled texts are not part of the repository")
    with path.open() as file:
        rows = list(csv.DictReader(file))[:80]
    true, false = ([row["statement"] for row in rows if row["label"] == label] for label in "10")
    direction = Direction.from_means(model, true, false, site=SITE)
    expected = sum(alone(model, t, SITE)[-1] for t in true) / len(true) - sum(
        alone(model, t, SITE)[-1] for t in false
    ) / len(false)
    torch.testing.assert_close(direction.vector, expected, rtol=1e-3, atol=1e-4)
