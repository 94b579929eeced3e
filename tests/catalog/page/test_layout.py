"""Where the page's map puts features: neighbours near each other, the same each time, nothing undefined."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import saekit
from saekit.catalog import Catalog
from saekit.catalog.page import layout as module
from saekit.catalog.page.layout import GRID, layout, layout_of
from saekit.catalog.tables import write_table

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

K = 8


def grouped(groups: int = 24, each: int = 20, D: int = 48) -> Tensor:
    """[groups · each, D] directions around as many centres; a point's group is its index // each."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(groups, D, generator=generator).repeat_interleave(each, dim=0)
    return centres + 0.7 * torch.randn(len(centres), D, generator=generator)


def nearest(rows: Tensor, k: int = K) -> Tensor:
    """[P, k] the nearest other rows by cosine."""
    cosine = normalize(rows, dim=1) @ normalize(rows, dim=1).T
    return cosine.fill_diagonal_(-2).topk(k).indices


def edges(rows: Tensor) -> Tensor:
    near = nearest(rows)
    return torch.stack([torch.arange(len(rows))[:, None].expand_as(near), near], dim=-1).flatten(0, 1)


def kept(rows: Tensor, places: Tensor) -> float:
    """The share of each point's nearest directions among its nearest places."""
    apart = torch.cdist(places, places).fill_diagonal_(torch.inf)
    near = (-apart).topk(K).indices
    return float((near[:, :, None] == nearest(rows)[:, None, :]).any(dim=2).float().mean())


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps, where it does not matter how good the picture is."""
    monkeypatch.setattr(module, "STEPS", 12)
    monkeypatch.setattr(module, "EARLY", 4)


def test_neighbours_lie_near_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 200)
    rows = grouped()
    places = layout(rows, edges(rows))
    assert kept(rows, places) > 0.5
    components = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    assert kept(rows, places) > 3 * kept(rows, components[0][:, :2] * components[1][:2])
    apart = torch.cdist(places, places).fill_diagonal_(torch.inf)
    assert (apart.argmin(dim=1) // 20 == torch.arange(len(rows)) // 20).float().mean() > 0.98
    assert float(places.min()) == 0.0
    assert float(places.max()) == 1.0


@pytest.mark.parametrize(("cells", "error"), [(50, 0.05), (200, 0.005)])
def test_a_convolution_over_the_mesh_is_the_sum_over_all_pairs(
    cells: int, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FINEST", cells)
    y_2P = 12 * torch.rand(2, 300, generator=torch.Generator().manual_seed(1)) - 3
    apart = y_2P[:, :, None] - y_2P[:, None, :]
    q = 1 / (1 + apart.square().sum(dim=0))
    wanted = (q.square() * apart).sum(dim=2) / (q.sum() - 300)
    found = module._Mesh.around(y_2P).repulsion(y_2P)
    assert (found - wanted).norm() < error * wanted.norm()


def test_attraction_is_the_sum_over_edges() -> None:
    generator = torch.Generator().manual_seed(2)
    y_2P = torch.randn(2, 40, generator=generator)
    head, tail = module._both_ways(torch.randint(40, (90, 2), generator=generator))
    wanted = torch.zeros(2, 40)
    for i, j in zip(head.tolist(), tail.tolist(), strict=True):
        apart = y_2P[:, j] - y_2P[:, i]
        wanted[:, i] += apart / (1 + apart.square().sum())
    torch.testing.assert_close(module._attraction(y_2P, head, tail), wanted)
    assert {*zip(head.tolist(), tail.tolist(), strict=True)} == {
        *zip(tail.tolist(), head.tolist(), strict=True)
    }


@pytest.mark.usefixtures("brief")
def test_the_same_directions_give_the_same_bits_and_touch_no_other_randomness() -> None:
    rows = grouped(6)
    first = layout(rows, edges(rows))
    torch.rand(3)
    state = torch.random.get_rng_state()
    assert torch.equal(layout(rows, edges(rows)), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(layout(rows, edges(rows), seed=1), first)


def test_a_point_without_edges_joins_its_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 200)
    rows = grouped(8)
    found = edges(rows)
    places = layout(rows, found[(found != 5).all(dim=1)])
    apart = (places - places[5]).norm(dim=1)
    apart[5] = torch.inf
    assert (apart.topk(5, largest=False).indices // 20 == 0).all()


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(0, 4),
        torch.ones(1, 4),
        torch.eye(4)[:2],
        torch.eye(4)[:3],
        torch.ones(2, 4),
        torch.ones(50, 4),
        torch.zeros(50, 4),
        torch.cat([torch.eye(30), -torch.eye(30)]),
        torch.linspace(-1, 1, 40)[:, None],
    ],
    ids=["none", "one", "two", "three", "same two", "same", "zero", "opposite", "one wide"],
)
def test_degenerate_directions_have_places(rows: Tensor) -> None:
    places = layout(rows, torch.zeros(0, 2, dtype=torch.long))
    assert places.shape == (len(rows), 2)
    assert bool(((places >= 0) & (places <= 1)).all())  # false for NaN
    assert len(places) < 2 or len(torch.unique(places, dim=0)) > 1


@pytest.fixture(scope="module")
def catalog(model: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    sae = saekit.SAE.new("topk", d_in=256, d_sae=96, k=8, site="blocks.3.hook_resid_pre", model="tiny")
    lines = [f"The small boat number {i} sailed past the harbour with a red lamp." for i in range(8)]
    folder = tmp_path_factory.mktemp("layout") / "catalog"
    return Catalog.build(model, sae, saekit.tokenize(lines, model, 32), folder)


def firing(catalog: Catalog, folder: Path, alive: list[int]) -> Catalog:
    """The catalog, with these features alone having fired."""
    shutil.copytree(catalog.path, folder)
    features = catalog.table("features").to_pydict()
    features["density"] = [0.1 if i in alive else 0.0 for i in range(len(catalog))]
    write_table(folder, "features", features)
    return Catalog.open(folder)


@pytest.mark.usefixtures("brief")
def test_a_catalog_has_a_place_for_each_feature_that_fired(catalog: Catalog, tmp_path: Path) -> None:
    alive = [*range(0, 60, 2), 95]
    threads = torch.get_num_threads()
    x, y = layout_of(firing(catalog, tmp_path / "some", alive))
    assert torch.get_num_threads() == threads
    assert [i for i in range(96) if x[i] is not None] == [i for i in range(96) if y[i] is not None] == alive
    places = np.array([[x[i], y[i]] for i in alive])
    assert places.dtype.kind == "i"
    assert all(type(x[i]) is int for i in alive)
    assert places.min() == 0
    assert places.max() == GRID


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("alive", [[], [7], [3, 90]])
def test_a_catalog_of_hardly_any_feature_has_a_map(
    catalog: Catalog, tmp_path: Path, alive: list[int]
) -> None:
    x, y = layout_of(firing(catalog, tmp_path / "few", alive))
    assert [i for i in range(96) if x[i] is not None] == [i for i in range(96) if y[i] is not None] == alive
    assert all(place is not None and 0 <= place <= GRID for i in alive for place in (x[i], y[i]))
