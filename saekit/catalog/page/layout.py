"""Features as points in the plane, so that those whose directions are near each other are near each other: the page's map.

t-SNE (van der Maaten and Hinton 2008) on a graph that the catalog has: each feature and its nearest others by decoder cosine.

    attraction of y_i   4 ρ Σ_j p_ij q_ij (y_j − y_i)         p_ij  1/E over the E directed edges, else 0
    repulsion of y_i    4 Σ_j q_ij² (y_i − y_j) / Σ q         q_ij  1 / (1 + |y_i − y_j|²)

Edges that weigh the same do as well as fitted ones (Böhm, Berens and Kobak 2022). ρ exaggerates attraction in the first
steps, so that clusters find each other. Sums over all pairs are convolutions: points are spread over a mesh, convolved
by FFT and read off again (as Linderman et al. 2019, here between the four corners of a cell), so that a step costs no
more than the mesh and the edges.

    P points, D the width of a direction, M the side of the mesh; y_2P places
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

if TYPE_CHECKING:
    from saekit.catalog.store import Catalog

GRID = 65535  # whole numbers 0 … GRID on the page: two bytes say where a point is, finer than any screen
STEPS, EARLY = 500, 100
EXAGGERATION = 4.0  # ρ in the first EARLY steps, 1 after them
RATE = 0.5  # × P: t-SNE's gradients shrink as 1/P (Belkina et al. 2019)
MOMENTUM, FARTHEST = 0.8, 5.0  # a step is kept below FARTHEST, in units of q's width
CELL = 0.5  # side of a mesh's cell in the same units, where FINEST and WIDEST allow it
FINEST, WIDEST = 50, 256  # cells across the points
JOINED = 10  # neighbours looked for where a catalog's are all dead


def layout_of(catalog: Catalog) -> tuple[list[int | None], list[int | None]]:
    """(x, y) of each feature as whole numbers 0 … 65535, y downward; None for those that never fired.

    The same catalog gives the same numbers on one machine.
    """
    alive = np.flatnonzero(catalog.density > 0)
    place = np.full(len(catalog), -1)
    place[alive] = np.arange(len(alive))
    table = catalog.table("neighbours")
    table = table.filter(np.asarray(table["by"]) == "decoder")
    edges = np.stack([place[table["feature"].to_numpy()], place[table["neighbour"].to_numpy()]], axis=1)
    rows = catalog.sae.directions().detach().float().cpu()[torch.from_numpy(alive)]
    with _one_thread():
        points = layout(rows, torch.from_numpy(edges[(edges >= 0).all(axis=1)]))
    found = np.full((len(catalog), 2), None)
    found[alive] = (points * GRID).round().int().numpy()
    return found[:, 0].tolist(), found[:, 1].tolist()


@contextmanager
def _one_thread() -> Iterator[None]:
    """The steps are short: threads would wait for each other, and sum in an order that depends on how many they are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def layout(directions: Tensor, edges: Tensor, seed: int = 0) -> Tensor:
    """Places [P, 2] in [0, 1] of points with directions [P, D] that edges [E, 2] join; one scale for both axes.

    Points without an edge are joined to the nearest others. Starts from the first two principal components.
    """
    P = len(directions)
    if P < 2:
        return torch.full((P, 2), 0.5)
    directions = normalize(directions, dim=1)
    head, tail = _both_ways(torch.cat([edges, _joined(directions, edges)]))
    generator = torch.Generator().manual_seed(seed)
    y_2P = _principal(directions, generator).T
    y_2P = 0.1 * y_2P / y_2P.std().clamp(min=1e-6) + 0.001 * torch.randn(y_2P.shape, generator=generator)
    speed, mesh = torch.zeros_like(y_2P), _Mesh.around(y_2P)
    for step in range(STEPS):
        mesh = mesh if mesh.holds(y_2P) else _Mesh.around(y_2P)
        pull = (EXAGGERATION if step < EARLY else 1.0) / len(head)
        force = 4 * (pull * _attraction(y_2P, head, tail) + mesh.repulsion(y_2P))
        speed = (MOMENTUM * speed + RATE * P * force).clamp(-FARTHEST, FARTHEST)
        y_2P = y_2P + speed
    low, high = y_2P.aminmax(dim=1)
    middle, side = (low + high) / 2, (high - low).max().clamp(min=1e-6)
    return ((y_2P.T - middle) / side + 0.5).clamp(0, 1)


def _attraction(y_2P: Tensor, head: Tensor, tail: Tensor) -> Tensor:
    """[2, P] Σ_j q_ij (y_j − y_i) over the edges of i. `bincount` sums in one order: the same bits each time."""
    apart = y_2P.index_select(1, tail) - y_2P.index_select(1, head)
    apart = apart / (1 + apart.square().sum(dim=0))
    return torch.stack([torch.bincount(head, along, y_2P.shape[1]).float() for along in apart])


class _Mesh(NamedTuple):
    """A periodic mesh, twice as wide as what it holds, so that nothing is pushed around its edge."""

    low: Tensor  # [2, 1] its corner
    cell: float
    side: int  # M
    q: Tensor  # [M, M/2 + 1] the transform of q
    push: Tensor  # [2, M, M/2 + 1] that of q² (y_i − y_j)

    @classmethod
    def around(cls, y_2P: Tensor) -> _Mesh:
        """One with room for the points to spread by a quarter."""
        low, high = y_2P.aminmax(dim=1, keepdim=True)
        room = 1.25 * float((high - low).max())
        cells = min(max(room / CELL, FINEST), WIDEST - 2)
        cell, side = room / cells, 1 << int(2 * cells + 3).bit_length()
        offsets = torch.fft.fftfreq(side, 1 / side) * cell
        dx, dy = torch.meshgrid(offsets, offsets, indexing="ij")
        q = 1 / (1 + dx.square() + dy.square())
        push = torch.stack([dx, dy]) * q.square()
        return cls((low + high - room) / 2, cell, side, torch.fft.rfft2(q), torch.fft.rfft2(push))

    def holds(self, y_2P: Tensor) -> bool:
        """Whether all points lie in it, and not all in its middle."""
        reach = (y_2P - self.low) / (self.cell * (self.side // 2 - 2))
        return bool(reach.min() >= 0 and reach.max() <= 1 and reach.max() - reach.min() > 0.3)

    def repulsion(self, y_2P: Tensor) -> Tensor:
        """[2, P] Σ_j q_ij² (y_i − y_j) / Σ q."""
        at = (y_2P - self.low) / self.cell
        cell = at.long()
        part, whole = at - cell, 1 - (at - cell)
        corners = torch.stack(
            [whole[0] * whole[1], whole[0] * part[1], part[0] * whole[1], part[0] * part[1]]
        )
        first = cell[0] * self.side + cell[1]
        index = torch.stack([first, first + 1, first + self.side, first + self.side + 1])
        shape = (self.side, self.side)
        mass = torch.bincount(index.flatten(), corners.flatten(), self.side**2).float().view(shape)
        spread = torch.fft.rfft2(mass)
        total = (mass * torch.fft.irfft2(spread * self.q, shape)).sum() - len(first)  # no point repels itself
        pushed = torch.fft.irfft2(spread * self.push, shape).flatten(1).index_select(1, index.flatten())
        return (pushed.view(2, 4, -1) * corners).sum(dim=1) / total.clamp(min=1e-6)


def _both_ways(edges: Tensor) -> tuple[Tensor, Tensor]:
    """(from, to) of each edge in both directions, each once."""
    head, tail = torch.unique(torch.cat([edges, edges.flip(1)]), dim=0).T.contiguous()
    return head, tail


def _joined(directions: Tensor, edges: Tensor) -> Tensor:
    """Edges [n, 2] from the points that have none to their nearest by cosine."""
    alone = torch.ones(len(directions), dtype=torch.bool)
    alone[edges.flatten()] = False
    found = [edges[:0]]
    for rows in alone.nonzero()[:, 0].split(1024):
        cosine = directions[rows] @ directions.T
        cosine[torch.arange(len(rows)), rows] = -2
        near = cosine.topk(min(JOINED, len(directions) - 1)).indices
        found.append(torch.stack([rows[:, None].expand_as(near), near], dim=-1).flatten(0, 1))
    return torch.cat(found)


def _principal(rows: Tensor, generator: torch.Generator) -> Tensor:
    """[P, 2] coordinates along the first two principal components, by subspace iteration."""
    mean = rows.mean(dim=0)
    basis = torch.randn(rows.shape[1], min(8, rows.shape[1]), generator=generator)
    for _ in range(6):
        along = rows @ torch.linalg.qr(basis)[0]
        along = along - along.mean(dim=0)
        basis = rows.T @ along - torch.outer(mean, along.sum(dim=0))
    found = along @ torch.linalg.svd(along, full_matrices=False)[2][:2].T
    return pad(found, (0, 2 - found.shape[1]))
