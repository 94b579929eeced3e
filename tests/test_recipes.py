"""The recipes that come with saekit: valid, explained, told by a dry run without a network, true to what they cite."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from saekit.errors import FileMissing
from saekit.recipe import Recipe, read_recipe
from saekit.sae import SAE
from saekit.training.dry_run import SUSTAINED, describe
from saekit.training.shapes import KNOWN, known_shape
from saekit.training.trainer import Trainer

FOLDER = Path(__file__).parent.parent / "recipes"
PATHS = sorted(FOLDER.glob("*.yaml"))
COST = re.compile(
    r"Cost: (?P<tokens>[\d,]+) tokens in (?P<steps>[\d,]+) steps of (?P<batch>[\d,]+)\. (?P<flops>[\d.e]+) FLOP "
    r"\(forward (?P<forward>[\d,]+) MFLOP a token, the \w+ (?P<saes>[\d,]+)[^)]*\), "
    r"(?P<hours>[\d.]+) h at a sustained 50 TFLOP/s.*? Memory: (?P<memory>[\d.]+) GB of weights, gradients? and Adam"
    r".*?, (?P<ring>[\d.]+) GB of rings?.* Disk: (?P<disk>[\d.]+) GB"
)


def head(path: Path) -> str:
    """The comment that a recipe opens with, as one line."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def is_of_saes(path: Path) -> bool:
    return isinstance(read_recipe(path), Recipe)


def on_hub(path: Path) -> bool:
    return is_of_saes(path) and read_recipe(path).model in KNOWN


HUB = [path for path in PATHS if on_hub(path)]
every = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
every_on_hub = pytest.mark.parametrize("path", HUB, ids=lambda path: path.stem)


@pytest.fixture
def no_network(monkeypatch) -> Iterator[None]:
    """Fails a test that opens a connection, with nothing but our own code to keep the hub's from trying."""
    tried = []

    def refuse(*address: object, **_: object) -> None:
        tried.append(address)
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert tried == []


def test_the_list_in_the_readme_is_whole() -> None:
    text = (FOLDER / "README.md").read_text("utf-8")
    assert set(re.findall(r"^\| `([\w.-]+\.yaml)` \|", text, re.MULTILINE)) == {path.name for path in PATHS}


@every
def test_a_recipe_says_what_it_shows_and_costs(path) -> None:
    assert re.search(r"\b[Ss]hows?\b", head(path))
    assert "Cost: " in head(path)
    assert "Quality: " in head(path)
    assert all(len(line) <= 140 for line in path.read_text("utf-8").splitlines())


@every
def test_a_recipe_has_its_file_as_its_name(path) -> None:
    name = {"tiny": "demo"}.get(path.stem, path.stem.replace("_", "-"))
    assert read_recipe(path).name == name


@every
@pytest.mark.usefixtures("no_network")
def test_a_dry_run_needs_no_network(path, monkeypatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    try:
        told = describe(read_recipe(path))
    except FileMissing as error:
        assert "../shared" in str(error), error
        pytest.skip("../shared is missing: its corpora are not part of the repository")
    assert told["steps"] > 1
    assert told["parameters"] > 0
    assert f"{told['steps']:,} steps" in told["text"]


@pytest.mark.parametrize("path", [path for path in PATHS if is_of_saes(path)], ids=lambda path: path.stem)
def test_every_key_goes_with_its_architecture(path) -> None:
    """The trainer refuses what a recipe cannot see, such as target_l0 for an SAE that k rules."""
    for member in read_recipe(path).members:
        k = {"k": 4} if hasattr(member.section, "k") else {}
        Trainer(SAE.new(member.architecture, d_in=8, d_sae=16, **k), **member.training.model_dump())


@every_on_hub
def test_what_a_recipe_says_of_its_cost_is_what_a_dry_run_says(path) -> None:
    recipe = read_recipe(path)
    told, said = describe(recipe), COST.search(head(path))
    assert said, f"no such line in {head(path)}"
    number = {key: float(value.replace(",", "")) for key, value in said.groupdict().items()}
    assert number["tokens"] == recipe.training.tokens
    assert (number["steps"], number["batch"]) == (told["steps"], recipe.training.batch_size)
    for key, value in {
        "flops": told["flops"],
        "forward": told["forward_flops_per_token"] / 1e6,
        "saes": told["flops_per_token"] / 1e6,
        "hours": told["flops"] / SUSTAINED / 3600,
        "memory": told["training_bytes"] / 1e9,
        "ring": told["ring_bytes"] / 1e9,
        "disk": told["disk_bytes"] / 1e9,
    }.items():
        assert number[key] == pytest.approx(value, rel=0.03), key


@every_on_hub
def test_a_published_quality_is_told_as_somebody_elses(path) -> None:
    quality = head(path).partition("Quality: ")[2]
    assert quality.startswith("not measured here. Published elsewhere")


@every_on_hub
def test_figures_of_a_model_that_is_not_here_are_not_called_checked(path) -> None:
    recipe = read_recipe(path)
    told = describe(recipe)
    assert told["checked"] == []
    assert any("behind all figures" in item and recipe.model in item for item in told["not_checked"])


def test_an_unknown_model_has_no_figures() -> None:
    told = describe(read_recipe(HUB[0], ["model=nobody/no-such-model"]))
    assert "parameters" not in told
    assert "parameters, memory and FLOP: they need the widths of the sites" in told["not_checked"]
    assert told["steps"] > 1


def test_a_site_that_the_shape_does_not_tell_has_no_figures() -> None:
    for site in ("blocks.99.hook_resid_pre", "blocks.1.attn.hook_pattern", "ln_final.hook_scale"):
        assert "parameters" not in describe(read_recipe(FOLDER / "gpt2-small-topk.yaml", [f"site={site}"]))


def scale_of(recipe: Recipe) -> float:
    """√d_in: how many times longer saekit's activations are than those at E‖x‖² = 1."""
    shape = known_shape(recipe.model)
    assert shape
    return shape.width**0.5


def steps_of(recipe: Recipe, share: float) -> float:
    return share * recipe.training.steps


def test_gemma_scope_in_saekits_units() -> None:
    """Lieberum 2024, section 3.2: bandwidth 0.001 and λ = 6e-4 at E‖x‖² = 1."""
    recipe = read_recipe(FOLDER / "gemma-2-2b-jumprelu.yaml")
    training, scale = recipe.training, scale_of(recipe)
    assert scale == 48
    assert training.bandwidth == pytest.approx(0.001 * scale)
    assert training.l0_coefficient == pytest.approx(6e-4 * scale**2, rel=0.01)
    assert steps_of(recipe, training.lr_warmup) == pytest.approx(1_000, rel=0.01)
    assert steps_of(recipe, training.sparsity_warmup) == pytest.approx(10_000, rel=0.01)


def test_saebench_in_saekits_units() -> None:
    recipe = read_recipe(FOLDER / "pythia-70m-sweep.yaml")
    assert len(recipe.members) == 24
    for member in recipe.members:
        assert steps_of(recipe, member.training.lr_warmup) == pytest.approx(1_000, rel=0.01)
        assert steps_of(recipe, member.training.sparsity_warmup) == pytest.approx(5_000, rel=0.01)
        assert member.training.bandwidth == pytest.approx(0.001 * scale_of(recipe), rel=0.01)
        assert member.section.d_sae in (2**12, 2**14)
        l0 = getattr(member.section, "k", member.training.target_l0)
        width = {2**12: "4k", 2**14: "16k"}[member.section.d_sae]
        assert member.name == f"{member.architecture}-{width}-{l0:.0f}"


def test_llama_scope_anneals_k_for_as_long_as_its_releases() -> None:
    recipe = read_recipe(FOLDER / "llama-3.1-8b-topk.yaml")
    assert recipe.training.k_start == known_shape(recipe.model).width
    assert int(steps_of(recipe, recipe.training.k_warmup)) == 39_062
    assert steps_of(recipe, recipe.training.lr_warmup) == pytest.approx(10_000, rel=0.01)


def test_sparsifys_learning_rate() -> None:
    recipe = read_recipe(FOLDER / "gpt2-small-transcoders.yaml")
    assert steps_of(recipe, recipe.training.lr_warmup) == pytest.approx(1_000, rel=0.01)
    for member in recipe.members:
        assert member.training.lr == pytest.approx(2e-4 / (member.section.d_sae / 2**14) ** 0.5, rel=0.01)


def test_the_small_sweep_has_every_architecture_at_one_sparsity() -> None:
    recipe = read_recipe(FOLDER / "sweep-tiny.yaml")
    at_32 = {m.architecture for m in recipe.members if getattr(m.section, "k", m.training.target_l0) == 32}
    assert at_32 == {"standard", "topk", "batchtopk", "matryoshka", "jumprelu", "gated"}
