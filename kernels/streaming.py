"""Streaming kernels: hidden states and head in, loss and gradient out, no logit in memory.

Tiles of logits live in registers, and are computed again wherever they are needed:

    statistics    every part of the vocabulary: running softmax, most probable entry   x streams
    entries       the logits of more targets                             (with masses only)
    finish        the parts of a row as one
    measure       every part: sums of values and slopes                  (with a teacher only)
    finish_sums   the parts of a row as one
    gradient      a strip of the vocabulary: dz, in the head's dtype
    masses        dz of more targets in the strip                        (with masses only)
    accumulate    dh += dz @ head, strip after strip

A row's numbers meet in an order that only the vocabulary decides: not the rows beside it, not the
memory. Every output has one writer, and nothing waits for another program.

Legend: T tokens, D hidden width, V vocabulary, K more targets, z finished logit, q student,
p teacher. For the arguments that are tuples see ``arguments.py``.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .arguments import Label
from .formulas import (
    MINUS_INFINITY,
    chain,
    finish,
    finite_top,
    forward_kl,
    fp16_exponent,
    known,
    label_loss,
    load_masses,
    merge,
    nll_bound,
    nll_slope,
    power_of_two,
    reverse_kl,
    spread,
)

# Parts of the vocabulary with statistics of their own.
PARTS = tl.constexpr(32)

# Statistics of a row: the first index of [STATISTICS, T].
TOP = tl.constexpr(0)  # of the student's logits
LOG_SUM = tl.constexpr(1)  # log of the student's sum of e^(z - top)
TOP_P = tl.constexpr(2)
LOG_SUM_P = tl.constexpr(3)
D_PEAK = tl.constexpr(4)  # log q - log p of the student's most probable entry
NLL = tl.constexpr(5)
MISSING = tl.constexpr(6)  # 1 - q of the target
ELSEWHERE = tl.constexpr(7)  # what the target leaves to others
SLOPE_SUM = tl.constexpr(8)
FACTOR = tl.constexpr(9)  # of dz, a power of two
STATISTICS = 10


@triton.jit
def logits_tile(stream, transform, rows, columns, T, V, DEPTH: tl.constexpr):
    """z [ROWS, COLUMNS]; 0 for rows outside T, -inf for columns outside V."""
    D = stream.D
    depth = tl.arange(0, DEPTH)
    row_inside, column_inside = rows < T, columns < V
    hidden = stream.hidden + (rows.to(tl.int64)[:, None] * D + depth[None, :])
    weight = stream.weight + (columns.to(tl.int64)[None, :] * D + depth[:, None])
    raw = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in range(0, D, DEPTH):
        inside = start + depth < D
        h = tl.load(hidden + start, mask=row_inside[:, None] & inside[None, :], other=0.0)
        w = tl.load(weight + start, mask=inside[:, None] & column_inside[None, :], other=0.0)
        raw = tl.dot(h, w, raw, input_precision="ieee")
    bias = stream.bias
    if bias is not None:
        bias = tl.load(bias + columns, mask=column_inside, other=0.0)[None, :]
    return tl.where(column_inside[None, :], finish(raw, bias, transform), MINUS_INFINITY)


@triton.jit
def statistics_kernel(
    parts,
    targets,
    T,
    V,
    part_length,
    transform,
    stream,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One stream of logits -> its softmax in every part of the vocabulary."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    inside = rows < T
    target = tl.full([ROWS], -1, tl.int64)
    if targets is not None:
        target = tl.load(targets + rows, mask=inside, other=-1)
    top = tl.full([ROWS], MINUS_INFINITY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    other = tl.zeros([ROWS], tl.float32)
    sum_z = tl.zeros([ROWS], tl.float32)
    z_target = tl.zeros([ROWS], tl.float32)
    peak = tl.zeros([ROWS], tl.int32)
    begin = part * part_length
    end = tl.minimum(begin + part_length, V)
    for start in range(begin, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        z = logits_tile(stream, transform, rows, columns, T, end, DEPTH)
        largest = tl.max(z, 1)
        if parts.peaks is not None:
            at = tl.min(tl.where(z == largest[:, None], columns[None, :], V), 1)
            peak = tl.where(largest > top, at, peak)
        if parts.sums_z is not None:
            sum_z += tl.sum(tl.where(columns[None, :] < end, z, 0.0), 1)
        new_top = tl.maximum(top, largest)
        base = finite_top(new_top)
        factor = tl.exp(top - base)
        e = tl.exp(z - base[:, None])
        total = total * factor + tl.sum(e, 1)
        if targets is not None:
            is_target = columns[None, :] == target[:, None]
            z_target += tl.sum(tl.where(is_target, z, 0.0), 1)
            other = other * factor + tl.sum(tl.where(is_target, 0.0, e), 1)
        top = new_top
    at = part.to(tl.int64) * T + rows
    tl.store(parts.tops + at, top, mask=inside)
    tl.store(parts.totals + at, total, mask=inside)
    if parts.sums_z is not None:
        tl.store(parts.sums_z + at, sum_z, mask=inside)
    if parts.peaks is not None:
        tl.store(parts.peaks + at, peak, mask=inside)
    if targets is not None:
        in_part = (target >= begin) & (target < end)
        tl.store(parts.others + at, other, mask=inside)
        tl.store(parts.z_targets + rows, z_target, mask=inside & in_part)


@triton.jit
def logits_of(stream, transform, row, columns, V, DEPTH: tl.constexpr):
    """z of a few entries of one row, NaN outside the vocabulary.    columns [N] -> [N]"""
    D = stream.D
    depth = tl.arange(0, DEPTH)
    present = (columns >= 0) & (columns < V)
    hidden = stream.hidden + (row.to(tl.int64) * D + depth)
    weight = stream.weight + (columns.to(tl.int64)[:, None] * D + depth[None, :])
    raw = tl.zeros([columns.shape[0], DEPTH], tl.float32)
    for start in range(0, D, DEPTH):
        inside = start + depth < D
        h = tl.load(hidden + start, mask=inside, other=0.0)
        w = tl.load(weight + start, mask=present[:, None] & inside[None, :], other=0.0)
        raw += h.to(tl.float32)[None, :] * w.to(tl.float32)
    bias = stream.bias
    if bias is not None:
        bias = tl.load(bias + columns, mask=present, other=0.0)
    return tl.where(present, finish(tl.sum(raw, 1), bias, transform), float("nan"))


@triton.jit
def entries_kernel(
    z_more,
    target,
    stream,
    transform,
    V,
    K,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The logits of the more targets -> z_more [T, K]; NaN where nothing is looked at."""
    row = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entries < K
    mass = tl.load(target.masses + row * (1 + K) + 1 + entries, mask=inside, other=0.0)
    ids = tl.load(target.more + row * K + entries, mask=mass > 0, other=-1)
    z = logits_of(stream, transform, row, ids, V, DEPTH)
    tl.store(z_more + row * K + entries, z, mask=inside)


@triton.jit
def finish_kernel(
    statistics,
    parts,
    parts_p,
    target,
    z_more,
    teacher,
    transform,
    T,
    V,
    K,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The parts of every row -> statistics [STATISTICS, T]."""
    row = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    at = tl.arange(0, PARTS).to(tl.int64) * T + row
    tops = tl.load(parts.tops + at)
    totals = tl.load(parts.totals + at)
    without_label = totals
    if target.ids is not None:
        without_label = tl.load(parts.others + at)
    top, total, other = merge(tops, totals, without_label)
    log_sum = tl.log(total)
    if target.ids is not None:
        target_id = tl.load(target.ids + row)
        inside = (target_id >= 0) & (target_id < V)
        z_label = tl.load(parts.z_targets + row, mask=inside, other=float("nan"))
        if target.masses is not None:
            tail, mass, mass_sum = load_masses(target.masses, row, K, ENTRIES)
            entries = row * K + tl.arange(0, ENTRIES)
            z_more = tl.load(z_more + entries, mask=mass > 0, other=0.0)
            z_label = known(z_label, mass, z_more)
        sum_z = 0.0
        if target.smoothing is not None:
            sum_z = tl.sum(tl.load(parts.sums_z + at), 0)
        log_sum, nll, label = label_loss(top, total, other, sum_z, z_label, target, V)
        elsewhere = label.elsewhere
        if target.masses is not None:
            nll = spread(nll, z_label, tail, mass, z_more)
            elsewhere += mass_sum
        tl.store(statistics + NLL * T + row + one, nll)
        tl.store(statistics + MISSING * T + row + one, label.missing)
        tl.store(statistics + ELSEWHERE * T + row + one, elsewhere)
    tl.store(statistics + TOP * T + row + one, top)
    tl.store(statistics + LOG_SUM * T + row + one, log_sum)
    if teacher.hidden is not None:
        totals_p = tl.load(parts_p.totals + at)
        top_p, total_p, _ = merge(tl.load(parts_p.tops + at), totals_p, totals_p)
        log_sum_p = tl.log(total_p)
        tl.store(statistics + TOP_P * T + row + one, top_p)
        tl.store(statistics + LOG_SUM_P * T + row + one, log_sum_p)
        is_top = tops == tl.max(tops, 0)
        peak = tl.min(tl.where(is_top, tl.load(parts.peaks + at), V - 1), 0, keep_dims=True)
        z_peak_p = logits_of(teacher, transform, row, peak, V, DEPTH)
        d_peak = -log_sum - ((z_peak_p - top_p) - log_sum_p)
        tl.store(statistics + D_PEAK * T + row + one, d_peak)


@triton.jit
def statistic(statistics, rows, T, INDEX: tl.constexpr):
    """One statistic of the rows of a tile.    [ROWS, 1]"""
    return tl.load(statistics + INDEX * T + rows, mask=rows < T, other=0.0)[:, None]


@triton.jit
def label_of(statistics, rows, T):
    """The slope's numbers of the rows of a tile.    [ROWS, 1] each"""
    lse = statistic(statistics, rows, T, TOP) + statistic(statistics, rows, T, LOG_SUM)
    missing = statistic(statistics, rows, T, MISSING)
    return Label(lse, missing, statistic(statistics, rows, T, ELSEWHERE))


@triton.jit
def log_softmax(z, statistics, rows, T, TOP: tl.constexpr, LOG_SUM: tl.constexpr):
    """Of a tile whose rows' statistics are known."""
    top = statistic(statistics, rows, T, TOP)
    return (z - top) - statistic(statistics, rows, T, LOG_SUM)


@triton.jit
def measure_kernel(
    sums,
    statistics,
    student,
    teacher,
    mixture,
    transform,
    T,
    V,
    part_length,
    divergence: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Sums of value and slope, and the largest slope, in every part of the vocabulary."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    inside = rows < T
    d_peak = statistic(statistics, rows, T, D_PEAK)
    value_sum = tl.zeros([ROWS], tl.float32)
    slope_sum = tl.zeros([ROWS], tl.float32)
    largest = tl.zeros([ROWS], tl.float32)
    begin = part * part_length
    end = tl.minimum(begin + part_length, V)
    for start in range(begin, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        z = logits_tile(student, transform, rows, columns, T, end, DEPTH)
        log_q = log_softmax(z, statistics, rows, T, TOP, LOG_SUM)
        z_p = logits_tile(teacher, transform, rows, columns, T, end, DEPTH)
        log_p = log_softmax(z_p, statistics, rows, T, TOP_P, LOG_SUM_P)
        value, s = divergence(log_p, log_q, d_peak, mixture)
        present = columns[None, :] < end
        value_sum += tl.sum(tl.where(present, value, 0.0), 1)
        s = tl.where(present, s, 0.0)
        slope_sum += tl.sum(s, 1)
        largest = tl.maximum(largest, tl.max(tl.abs(s), 1))
    at = part.to(tl.int64) * T + rows
    tl.store(sums.value + at, value_sum, mask=inside)
    tl.store(sums.slope + at, slope_sum, mask=inside)
    tl.store(sums.largest + at, largest, mask=inside)


@triton.jit
def finish_sums_kernel(
    statistics,
    loss,
    sums,
    targets,
    keep,
    weights,
    slope,
    T,
    SCALED: tl.constexpr,
):
    """loss [T], and the statistics SLOPE_SUM and FACTOR. SCALED: dz has to fit fp16."""
    row = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    at = tl.arange(0, PARTS).to(tl.int64) * T + row
    value = tl.zeros([1], tl.float32)
    bound = tl.zeros([1], tl.float32)
    if targets is not None:
        value += weights.nll * tl.load(statistics + NLL * T + row)
        bound += weights.nll * tl.max(nll_bound(label_of(statistics, row + one, T)))
    if sums.value is not None:
        value += weights.divergence * tl.sum(tl.load(sums.value + at), 0)
        slope_sum = tl.sum(tl.load(sums.slope + at), 0)
        largest = tl.max(tl.load(sums.largest + at), 0)
        bound += weights.divergence * (largest + tl.abs(slope_sum))
        tl.store(statistics + SLOPE_SUM * T + row, slope_sum)
    factor = tl.full([1], 1.0, tl.float32)
    if SCALED:
        factor = power_of_two(fp16_exponent(bound * tl.abs(slope)))
    tl.store(statistics + FACTOR * T + row + one, factor)
    if keep is not None:
        value = tl.where(tl.load(keep + row) != 0, value, 0.0)
    tl.store(loss + row + one, value)


@triton.jit
def gradient_kernel(
    strip,
    statistics,
    student,
    teacher,
    target,
    keep,
    mixture,
    weights,
    transform,
    T,
    V,
    divergence: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The strip's dz: the gradient by the raw product, times FACTOR."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_strip = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = strip.first + in_strip
    counts = rows < T
    if keep is not None:
        counts = tl.load(keep + rows, mask=counts, other=0) != 0
    z = logits_tile(student, transform, rows, columns, T, V, DEPTH)
    log_q = log_softmax(z, statistics, rows, T, TOP, LOG_SUM)
    g = tl.zeros([ROWS, COLUMNS], tl.float32)
    if target.ids is not None:
        target_id = tl.load(target.ids + rows, mask=rows < T, other=-1)[:, None]
        is_label = columns[None, :] == target_id
        label = label_of(statistics, rows, T)
        g += weights.nll * nll_slope(log_q, is_label, 0.0, label, target, V)
    if teacher.hidden is not None:
        z_p = logits_tile(teacher, transform, rows, columns, T, V, DEPTH)
        log_p = log_softmax(z_p, statistics, rows, T, TOP_P, LOG_SUM_P)
        d_peak = statistic(statistics, rows, T, D_PEAK)
        _, s = divergence(log_p, log_q, d_peak, mixture)
        slope_sum = statistic(statistics, rows, T, SLOPE_SUM)
        g += weights.divergence * (s - tl.exp(log_q) * slope_sum)
    g = chain(g, z, transform.slope * statistic(statistics, rows, T, FACTOR), transform.cap)
    g = tl.where(counts[:, None], g, 0.0)
    dz = strip.dz + (rows.to(tl.int64)[:, None] * strip.width + in_strip[None, :])
    tl.store(dz, g.to(dz.dtype.element_ty), mask=(rows < T)[:, None] & (columns < V)[None, :])


@triton.jit
def masses_kernel(
    strip,
    statistics,
    target,
    z_more,
    keep,
    transform,
    T,
    V,
    K,
    ENTRIES: tl.constexpr,
):
    """Overwrites the strip's dz where an entry has mass: q - t before it is rounded."""
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    _, mass, _ = load_masses(target.masses, row, K, ENTRIES)
    if keep is not None:
        mass = tl.where(tl.load(keep + row) != 0, mass, 0.0)
    counts = mass > 0
    entries = row * K + tl.arange(0, ENTRIES)
    in_strip = tl.load(target.more + entries, mask=counts, other=-1) - strip.first
    z = tl.load(z_more + entries, mask=counts, other=0.0)[None, :]
    log_q = log_softmax(z, statistics, rows, T, TOP, LOG_SUM)
    g = nll_slope(log_q, False, mass[None, :], label_of(statistics, rows, T), target, V)
    g = chain(g, z, transform.slope * statistic(statistics, rows, T, FACTOR), transform.cap)
    present = (in_strip >= 0) & (in_strip < tl.minimum(strip.width, V - strip.first))
    dz = strip.dz + (row * strip.width + in_strip[None, :])
    tl.store(dz, g.to(dz.dtype.element_ty), mask=present[None, :])


@triton.jit
def accumulate_kernel(
    dhidden,
    strip,
    weight,
    statistics,
    last,
    T,
    V,
    D,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dhidden [T, D] += dz @ the head's strip, in sums of SUM terms; / FACTOR if last."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    inside = (rows < T)[:, None] & (columns < D)[None, :]
    dz = strip.dz + (rows.to(tl.int64)[:, None] * strip.width + depth[None, :])
    weight += (strip.first + depth).to(tl.int64)[:, None] * D + columns[None, :]
    end = tl.minimum(strip.width, V - strip.first)
    for begin in range(0, end, SUM):
        part = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(begin, tl.minimum(begin + SUM, V - strip.first), DEPTH):
            present = strip.first + start + depth < V
            g = tl.load(dz, mask=(rows < T)[:, None] & present[None, :], other=0.0)
            w = tl.load(weight, mask=present[:, None] & (columns < D)[None, :], other=0.0)
            part = tl.dot(g, w.to(g.dtype), part, input_precision="ieee")
            dz += DEPTH
            weight += DEPTH * D
        out = dhidden + rows.to(tl.int64)[:, None] * D + columns[None, :]
        if strip.first + begin > 0:
            part += tl.load(out, mask=inside, other=0.0)
        if last & (begin + SUM >= end):
            part /= statistic(statistics, rows, T, FACTOR)
        tl.store(out, part, mask=inside)


# Terms that are summed before they are added to dh; strips are multiples of it.
SUM = 2048
# How the kernels of single rows are compiled.
ROW_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
DEPTH_OF_ROW = 1024
# How many entries of more_targets one program computes the logits of.
ENTRIES_TOGETHER = 8


def tiles(dtype: torch.dtype, divergence: Any = None) -> dict[str, Any]:
    """Sizes of a tile and how it is compiled: what fits the registers of every chip, unspilled.

    Matrix units take 16-bit numbers; the products of fp32 ones are written out.
    """
    rows = columns = depth = 32 if dtype.itemsize == 4 else 64
    if dtype.itemsize == 2 and divergence in (forward_kl, reverse_kl):
        rows = 128
    sizes = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth}
    return {**sizes, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
