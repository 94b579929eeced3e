"""The kernels of training on a GPU, in Triton: weighted sums of table rows, dot products of row pairs, an exact top-k.

Names and results are those of `saekit.sae.kernels`, which calls these for tensors on a GPU. Nothing here
waits for the device, what is launched depends on shapes alone, and no sum uses atomics: the same input gives the same
bits, and a CUDA graph may capture it all. Table rows may be float32 or bfloat16; every sum is float32.

B tokens, S = d_sae, W = width of a row, n pairs, m segments.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (what a kernel's parameters are is settled when it is launched)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a table that a program holds at a time: 32 for each of 128 threads
WIDEST = 4096  # columns of a row that a program holds all at once
CHUNK = 128  # pairs after which a long segment is cut
WHOLE_ROW = 2048  # row length up to which groups are not worth a launch
SELECT_MAX = 16_384  # numbers among which one program selects; two 16-bit counts share an integer there


# Weighted sums of rows


@triton.jit
def _sum_of_rows(
    index, weights, table, first, count, cut, gap, columns, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Σ weights[i] · table[index[i], columns] over count pairs from first on, leaving out the gap pairs from cut on."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        offset = start + tl.arange(0, ROWS)
        here = offset < count
        i = first + offset
        i += tl.where(i >= cut, gap, 0)
        row = tl.load(index + i, mask=here, other=0).to(tl.int64)
        weight = tl.load(weights + i, mask=here, other=0.0)
        at = table + row[:, None] * W + columns[None, :]
        rows = tl.load(at, mask=here[:, None] & (columns < W)[None, :], other=0.0)
        total += weight[:, None] * rows.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def _sum_chunks(
    index,
    weights,
    starts,
    table,
    partial,
    m,
    W,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial[c] = the sum over pairs c·CHUNK … (c + 1)·CHUNK − 1, where all of them belong to one segment."""
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = chunk * CHUNK
    low = tl.zeros((), tl.int32)  # the last segment that starts at or before the chunk, by bisection
    high = low + m - 1
    for _ in range(STEPS):
        middle = (low + high + 1) // 2
        before = tl.load(starts + middle) <= first
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    if tl.load(starts + low + 1) >= first + CHUNK:
        total = _sum_of_rows(index, weights, table, first, CHUNK, 0, 0, columns, W, ROWS, COLUMNS)
        tl.store(partial + chunk.to(tl.int64) * W + columns, total, mask=columns < W)


@triton.jit
def _sum_segments(
    index,
    weights,
    starts,
    table,
    partial,
    out,
    W,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[j] = the sum of segment j's loose pairs, before and behind its whole chunks, plus the sums of those."""
    segment = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(starts + segment).to(tl.int32)
    last = tl.load(starts + segment + 1).to(tl.int32)
    chunk, end = (first + CHUNK - 1) // CHUNK, last // CHUNK
    chunks = tl.maximum(end - chunk, 0)
    loose = last - first - chunks * CHUNK
    cut, gap = chunk * CHUNK, chunks * CHUNK
    total = _sum_of_rows(index, weights, table, first, loose, cut, gap, columns, W, ROWS, COLUMNS)
    if chunks > 0:
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(chunk, end, ROWS):
            c = start + tl.arange(0, ROWS)
            at = partial + c.to(tl.int64)[:, None] * W + columns[None, :]
            sums += tl.load(at, mask=(c < end)[:, None] & (columns < W)[None, :], other=0.0)
        total += tl.sum(sums, 0)
    tl.store(out + segment.to(tl.int64) * W + columns, total, mask=columns < W)


def segment_sum(index: Tensor, weights: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """out[j] = Σ weights[i] · table[index[i]] over starts[j] ≤ i < starts[j + 1]: a sum of rows per segment. → [m, W] float32

    index: [n] int32 or int64. weights: [n] float32. starts: [m + 1] int32 or int64, ascending from 0 to n; segments may be
    empty. table: [R, W] float32 or bfloat16. All contiguous; n < 2³¹.

    A program sums one segment, but fewer than 2 · CHUNK of its pairs: where a segment covers whole chunks of the pair
    list, other programs have summed those before. So nothing waits for a latent that fires on every token, and which
    pair is added when depends on `starts` alone.
    """
    assert all(t.is_contiguous() for t in (index, weights, starts, table))
    n, m, W = len(index), len(starts) - 1, table.shape[1]
    out = table.new_empty(m, W, dtype=torch.float32)
    if out.numel() == 0:
        return out
    columns = min(triton.next_power_of_2(W), 1024)
    rows = min(TILE // columns, 32)
    blocks = triton.cdiv(W, columns)
    partial = out.new_empty(n // CHUNK, W)
    with torch.cuda.device_of(table):
        if len(partial):
            _sum_chunks[(len(partial), blocks)](
                index, weights, starts, table, partial, m, W, m.bit_length(), CHUNK, rows, columns
            )
        _sum_segments[(m, blocks)](index, weights, starts, table, partial, out, W, CHUNK, rows, columns)
    return out


# Dot products


@triton.jit
def _dots(tokens, latents, a, b, out, n, W, PAIRS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    token = tl.load(tokens + i, mask=i < n, other=0).to(tl.int64)
    latent = tl.load(latents + i, mask=i < n, other=0).to(tl.int64)
    total = tl.zeros((PAIRS, COLUMNS), tl.float32)
    for start in range(0, W, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = (i < n)[:, None] & (columns < W)[None, :]
        left = tl.load(a + token[:, None] * W + columns[None, :], mask=mask, other=0.0)
        right = tl.load(b + latent[:, None] * W + columns[None, :], mask=mask, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    tl.store(out + i, tl.sum(total, 1), mask=i < n)


def pair_dots(tokens: Tensor, latents: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a[tokens[i]] · b[latents[i]] for each pair. → [n] float32

    tokens, latents: [n] int32 or int64; sorted by token is fastest. a: [B, W], b: [S, W], float32 or bfloat16. All
    contiguous.
    """
    assert all(t.is_contiguous() for t in (tokens, latents, a, b))
    n, W = len(tokens), a.shape[1]
    out = a.new_empty(n, dtype=torch.float32)
    columns = min(triton.next_power_of_2(W), 512)
    pairs = min(TILE // 2 // columns, 32)
    if n:
        with torch.cuda.device_of(a):
            _dots[(triton.cdiv(n, pairs),)](tokens, latents, a, b, out, n, W, pairs, columns)
    return out


# What the chosen latents leave of a row, and the dot products with it


@triton.jit
def _decode_error(
    latents,
    starts,
    values,
    rows,
    rest,
    error,
    squares,
    dots,
    W,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    first = tl.load(starts + token).to(tl.int32)
    last = tl.load(starts + token + 1).to(tl.int32)
    total = _sum_of_rows(latents, values, rows, first, last - first, 0, 0, columns, W, ROWS, COLUMNS)
    left = tl.load(rest + token * W + columns, mask=columns < W, other=0.0) - total
    tl.store(error + token * W + columns, left, mask=columns < W)
    tl.store(squares + token, tl.sum(left * left, 0))
    for start in range(first, last, ROWS):  # the rows once more, which lie in cache now
        i = start + tl.arange(0, ROWS)
        latent = tl.load(latents + i, mask=i < last, other=0).to(tl.int64)
        at = rows + latent[:, None] * W + columns[None, :]
        row = tl.load(at, mask=(i < last)[:, None] & (columns < W)[None, :], other=0.0)
        tl.store(dots + i, tl.sum(row.to(tl.float32) * left[None, :], 1), mask=i < last)


def decode_error(
    tokens: Tensor, latents: Tensor, starts: Tensor, values: Tensor, rows: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """error = rest − Σ value · row [B, W], its squared norm [B], and error[token] · row[latent] of each pair [n]; float32.

    tokens, latents: [n] int32 or int64. starts: [B + 1], each token's first pair. values: [n] float32. rows: [S, W]
    float32 or bfloat16. rest: [B, W] float32. All contiguous.

    One program a token. Rows wider than a program holds go through `segment_sum` and `pair_dots`.
    """
    B, W = rest.shape
    if W > WIDEST:
        error = rest - segment_sum(latents, values, starts, rows)
        return error, error.square().sum(1), pair_dots(tokens, latents, error, rows)
    assert all(t.is_contiguous() for t in (latents, starts, values, rows, rest))
    error, squares, dots = torch.empty_like(rest), rest.new_empty(B), torch.empty_like(values)
    columns = triton.next_power_of_2(W)
    if B:
        with torch.cuda.device_of(rest):
            _decode_error[(B,)](
                latents,
                starts,
                values,
                rows,
                rest,
                error,
                squares,
                dots,
                W,
                min(TILE // columns, 32),
                columns,
            )
    return error, squares, dots


# Top-k


@triton.jit
def _ordered(value):
    """int32 that order as the float32 numbers do: −0 as 0, NaN above all."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _positions(key, k):
    """Where the k greatest keys go, in their order; −1 for the others. Among equals the first ones are taken."""
    # The k-th greatest key, bit by bit from the sign down: the greatest t with at least k keys ≥ t.
    t = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= k, 0, -(1 << 31))
    for step in range(31):
        higher = t | (1 << (30 - step))
        t = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= k, higher, t)
    # How many greater and how many equal ones lie at or before each, two counts in one scan.
    counts = tl.cumsum((key > t).to(tl.int32) + ((key == t).to(tl.int32) << 16), 0)
    greater, equal = counts & 0xFFFF, counts >> 16
    room = k - tl.sum((key > t).to(tl.int32), 0)
    chosen = (key > t) | ((key == t) & (equal <= room))
    return tl.where(chosen, greater + tl.minimum(equal, room) - 1, -1)


@triton.jit
def _group_maxima(p, bias, maxima, S, n_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """maxima[b, j] = the greatest key in p[b] + bias over latents j·GROUP … (j + 1)·GROUP − 1."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(p + row * S + at, mask=at < S, other=float("-inf")).to(tl.float32)
    value += tl.load(bias + at, mask=at < S, other=0.0)
    tl.store(maxima + row * n_groups + group, tl.max(_ordered(value), 1), mask=group < n_groups)


@triton.jit
def _select_groups(maxima, groups, n_groups, k, SIZE: tl.constexpr):
    """groups[b] = the k groups with the greatest maxima, ascending."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    key = tl.load(maxima + row * n_groups + i, mask=i < n_groups, other=-(1 << 31))
    position = _positions(key, k)
    tl.store(groups + row * k + position, i, mask=position >= 0)


@triton.jit
def _select(p, bias, groups, values, latents, S, k, n, GROUP: tl.constexpr, SIZE: tl.constexpr):
    """The k greatest of row b among the n numbers of its groups, or of the whole row where GROUP is 0."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    at = i
    if GROUP > 0:
        at = tl.load(groups + row * k + i // GROUP, mask=i < n, other=0) * GROUP + i % GROUP
    inside = (i < n) & (at < S)
    value = tl.load(p + row * S + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + at, mask=inside, other=0.0)
    # What is not there lies below −∞ and is never chosen.
    position = _positions(tl.where(inside, _ordered(value), -(1 << 31)), k)
    tl.store(latents + row * k + position, at.to(tl.int64), mask=position >= 0)
    tl.store(values + row * k + position, value, mask=position >= 0)


def group_size(S: int, k: int) -> int | None:
    """How many latents make a group in `top_k`; 0: a row is no more than one program holds; None: it cannot be done.

    About √(S / k), so that there are as many groups as candidates.
    """
    if S <= WHOLE_ROW or 4 * k >= S:
        return 0 if S <= SELECT_MAX else None
    size = 1 << max(1, (S // k).bit_length() // 2)
    return size if max(triton.cdiv(S, size), k * size) <= SELECT_MAX else None


def top_k(p: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest of p + bias in each row, by ascending latent: values [B, k] float32 and latents [B, k] int64.

    p: [B, S] float32 or bfloat16, bias: [S] float32, both contiguous; 1 ≤ k ≤ S, and `group_size` of them is not None
    (k · S up to some 10⁸). Exact; of equal values those of the lowest latents; NaN is greater than all numbers, as in
    torch.topk.

    p is read once, where a radix select reads it again for every few bits. Every row is cut into groups of neighbours:
    the k groups with the greatest maxima hold the k greatest numbers, for each of those maxima is itself a number that
    whatever lies in another group does not exceed. What is left, a few thousand numbers a row, stays in registers.
    """
    B, S = p.shape
    group = group_size(S, k)
    assert group is not None
    assert all(t.is_contiguous() for t in (p, bias))
    values = p.new_empty(B, k, dtype=torch.float32)
    latents = p.new_empty(B, k, dtype=torch.int64)
    if B == 0:
        return values, latents
    groups, n = latents, S  # without groups, `groups` is not read
    with torch.cuda.device_of(p):
        if group:
            n_groups, n = triton.cdiv(S, group), k * group
            maxima = p.new_empty(B, n_groups, dtype=torch.int32)
            groups = p.new_empty(B, k, dtype=torch.int32)
            side = max(TILE // group, 1)
            _group_maxima[(B, triton.cdiv(n_groups, side))](p, bias, maxima, S, n_groups, group, side)
            size = triton.next_power_of_2(n_groups)
            _select_groups[(B,)](maxima, groups, n_groups, k, size, num_warps=_warps(size))
        size = triton.next_power_of_2(n)
        _select[(B,)](p, bias, groups, values, latents, S, k, n, group, size, num_warps=_warps(size))
    return values, latents


def _warps(size: int) -> int:
    """16 numbers per thread."""
    return max(size // (16 * 32), 1)
