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
p teacher.
"""

import triton
import triton.language as tl

from .formulas import (
    MINUS_INFINITY,
    chain,
    entry_slope,
    even_share,
    finish,
    finite_top,
    forward_kl,
    fp16_exponent,
    known,
    load_masses,
    log_likelihood,
    merge,
    nll_bound,
    nll_slope,
    power_of_two,
    reverse_kl,
    smooth,
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
def logits_tile(hidden, weight, bias, rows, columns, T, V, D, scale, cap, DEPTH: tl.constexpr):
    """z [ROWS, COLUMNS]; 0 for rows outside T, -inf for columns outside V."""
    depth = tl.arange(0, DEPTH)
    row_inside, column_inside = rows < T, columns < V
    hidden += rows.to(tl.int64)[:, None] * D + depth[None, :]
    weight += columns.to(tl.int64)[None, :] * D + depth[:, None]
    raw = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in range(0, D, DEPTH):
        inside = start + depth < D
        h = tl.load(hidden + start, mask=row_inside[:, None] & inside[None, :], other=0.0)
        w = tl.load(weight + start, mask=inside[:, None] & column_inside[None, :], other=0.0)
        raw = tl.dot(h, w, raw, input_precision="ieee")
    if bias is not None:
        bias = tl.load(bias + columns, mask=column_inside, other=0.0)[None, :]
    return tl.where(column_inside[None, :], finish(raw, bias, scale, cap), MINUS_INFINITY)


@triton.jit
def statistics_kernel(
    hidden,
    weight,
    bias,
    targets,
    tops,
    totals,
    others,
    sums_z,
    peaks,
    z_targets,
    T,
    V,
    D,
    part_length,
    scale,
    cap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One stream of logits -> tops, totals, others, sums_z, peaks [PARTS, T], z_targets [T].

    others: the totals without the target. What is None is not asked for.
    """
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
        z = logits_tile(hidden, weight, bias, rows, columns, T, end, D, scale, cap, DEPTH)
        largest = tl.max(z, 1)
        if peaks is not None:
            at = tl.min(tl.where(z == largest[:, None], columns[None, :], V), 1)
            peak = tl.where(largest > top, at, peak)
        if sums_z is not None:
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
    tl.store(tops + at, top, mask=inside)
    tl.store(totals + at, total, mask=inside)
    if sums_z is not None:
        tl.store(sums_z + at, sum_z, mask=inside)
    if peaks is not None:
        tl.store(peaks + at, peak, mask=inside)
    if targets is not None:
        tl.store(others + at, other, mask=inside)
        tl.store(z_targets + rows, z_target, mask=inside & (target >= begin) & (target < end))


@triton.jit
def logits_of(hidden, weight, bias, row, columns, V, D, scale, cap, DEPTH: tl.constexpr):
    """z of a few entries of one row, NaN outside the vocabulary.    columns [N] -> [N]"""
    depth = tl.arange(0, DEPTH)
    present = (columns >= 0) & (columns < V)
    hidden += row.to(tl.int64) * D + depth
    weight += columns.to(tl.int64)[:, None] * D + depth[None, :]
    raw = tl.zeros([columns.shape[0], DEPTH], tl.float32)
    for start in range(0, D, DEPTH):
        inside = start + depth < D
        h = tl.load(hidden + start, mask=inside, other=0.0)
        w = tl.load(weight + start, mask=present[:, None] & inside[None, :], other=0.0)
        raw += h.to(tl.float32)[None, :] * w.to(tl.float32)
    if bias is not None:
        bias = tl.load(bias + columns, mask=present, other=0.0)
    return tl.where(present, finish(tl.sum(raw, 1), bias, scale, cap), float("nan"))


@triton.jit
def entries_kernel(
    hidden,
    weight,
    bias,
    more_targets,
    masses,
    z_more,
    V,
    D,
    K,
    scale,
    cap,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """more_targets [T, K], masses [T, 1 + K] -> z_more [T, K]; NaN where nothing is looked at."""
    row = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entries < K
    mass = tl.load(masses + row * (1 + K) + 1 + entries, mask=inside, other=0.0)
    ids = tl.load(more_targets + row * K + entries, mask=mass > 0, other=-1)
    z = logits_of(hidden, weight, bias, row, ids, V, D, scale, cap, DEPTH)
    tl.store(z_more + row * K + entries, z, mask=inside)


@triton.jit
def finish_kernel(
    statistics,
    tops,
    totals,
    others,
    sums_z,
    peaks,
    z_targets,
    targets,
    masses,
    z_more,
    tops_p,
    totals_p,
    teacher,
    teacher_weight,
    teacher_bias,
    T,
    V,
    D_teacher,
    K,
    label_smoothing,
    scale,
    cap,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The parts [PARTS, T] of every row -> statistics [STATISTICS, T].

    masses [T, 1 + K] and z_more [T, K], or both None.
    """
    row = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    parts = tl.arange(0, PARTS).to(tl.int64) * T + row
    tops = tl.load(tops + parts)
    totals = tl.load(totals + parts)
    without_target = totals
    if targets is not None:
        without_target = tl.load(others + parts)
    top, total, other = merge(tops, totals, without_target)
    log_sum = tl.log(total)
    if targets is not None:
        target = tl.load(targets + row)
        inside = (target >= 0) & (target < V)
        z_target = tl.load(z_targets + row, mask=inside, other=float("nan"))
        if masses is not None:
            tail, mass, mass_sum = load_masses(masses, row, K, ENTRIES)
            entries = row * K + tl.arange(0, ENTRIES)
            z_more = tl.load(z_more + entries, mask=mass > 0, other=0.0)
            z_target = known(z_target, mass, z_more)
        log_sum, nll, missing = log_likelihood(top, total, other, z_target)
        elsewhere = tl.zeros([1], tl.float32)
        if label_smoothing is not None:
            sum_z = tl.sum(tl.load(sums_z + parts), 0)
            nll = smooth(nll, top + log_sum, sum_z, V, label_smoothing)
            elsewhere += label_smoothing
        if masses is not None:
            nll = spread(nll, z_target, tail, mass, z_more)
            elsewhere += mass_sum
        tl.store(statistics + NLL * T + row + one, nll)
        tl.store(statistics + MISSING * T + row + one, missing)
        tl.store(statistics + ELSEWHERE * T + row + one, elsewhere)
    tl.store(statistics + TOP * T + row + one, top)
    tl.store(statistics + LOG_SUM * T + row + one, log_sum)
    if teacher is not None:
        totals_p = tl.load(totals_p + parts)
        top_p, total_p, _ = merge(tl.load(tops_p + parts), totals_p, totals_p)
        log_sum_p = tl.log(total_p)
        tl.store(statistics + TOP_P * T + row + one, top_p)
        tl.store(statistics + LOG_SUM_P * T + row + one, log_sum_p)
        is_top = tops == tl.max(tops, 0)
        peak = tl.min(tl.where(is_top, tl.load(peaks + parts), V - 1), 0, keep_dims=True)
        z_peak_p = logits_of(
            teacher, teacher_weight, teacher_bias, row, peak, V, D_teacher, scale, cap, DEPTH
        )
        d_peak = -log_sum - ((z_peak_p - top_p) - log_sum_p)
        tl.store(statistics + D_PEAK * T + row + one, d_peak)


@triton.jit
def statistic(statistics, rows, T, INDEX: tl.constexpr):
    """One statistic of the rows of a tile.    [ROWS, 1]"""
    return tl.load(statistics + INDEX * T + rows, mask=rows < T, other=0.0)[:, None]


@triton.jit
def log_softmax(z, statistics, rows, T, TOP: tl.constexpr, LOG_SUM: tl.constexpr):
    """Of a tile whose rows' statistics are known."""
    top = statistic(statistics, rows, T, TOP)
    return (z - top) - statistic(statistics, rows, T, LOG_SUM)


@triton.jit
def measure_kernel(
    hidden,
    weight,
    bias,
    teacher,
    teacher_weight,
    teacher_bias,
    statistics,
    values,
    slopes,
    largests,
    T,
    V,
    D,
    D_teacher,
    part_length,
    beta,
    rest,
    log_rest,
    scale,
    cap,
    divergence: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Sums of value and slope, and the largest slope, in every part -> [PARTS, T] each."""
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
        z = logits_tile(hidden, weight, bias, rows, columns, T, end, D, scale, cap, DEPTH)
        log_q = log_softmax(z, statistics, rows, T, TOP, LOG_SUM)
        z_p = logits_tile(
            teacher,
            teacher_weight,
            teacher_bias,
            rows,
            columns,
            T,
            end,
            D_teacher,
            scale,
            cap,
            DEPTH,
        )
        log_p = log_softmax(z_p, statistics, rows, T, TOP_P, LOG_SUM_P)
        value, s = divergence(log_p, log_q, d_peak, beta, rest, log_rest)
        present = columns[None, :] < end
        value_sum += tl.sum(tl.where(present, value, 0.0), 1)
        s = tl.where(present, s, 0.0)
        slope_sum += tl.sum(s, 1)
        largest = tl.maximum(largest, tl.max(tl.abs(s), 1))
    at = part.to(tl.int64) * T + rows
    tl.store(values + at, value_sum, mask=inside)
    tl.store(slopes + at, slope_sum, mask=inside)
    tl.store(largests + at, largest, mask=inside)


@triton.jit
def finish_sums_kernel(
    statistics,
    values,
    slopes,
    largests,
    targets,
    keep,
    loss,
    T,
    alpha,
    nll_weight,
    slope,
    SCALED: tl.constexpr,
):
    """loss [T], and the statistics SLOPE_SUM and FACTOR. SCALED: dz has to fit fp16."""
    row = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    parts = tl.arange(0, PARTS).to(tl.int64) * T + row
    value = tl.zeros([1], tl.float32)
    bound = tl.zeros([1], tl.float32)
    if targets is not None:
        value += nll_weight * tl.load(statistics + NLL * T + row)
        missing = tl.load(statistics + MISSING * T + row)
        elsewhere = tl.load(statistics + ELSEWHERE * T + row)
        bound += nll_weight * nll_bound(missing, elsewhere)
    if values is not None:
        value += alpha * tl.sum(tl.load(values + parts), 0)
        slope_sum = tl.sum(tl.load(slopes + parts), 0)
        bound += alpha * (tl.max(tl.load(largests + parts), 0) + tl.abs(slope_sum))
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
    hidden,
    weight,
    bias,
    teacher,
    teacher_weight,
    teacher_bias,
    statistics,
    targets,
    keep,
    dz,
    first,
    strip,
    T,
    V,
    D,
    D_teacher,
    label_smoothing,
    beta,
    rest,
    log_rest,
    alpha,
    nll_weight,
    scale,
    cap,
    slope,
    divergence: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dz [T, strip]: the gradient by the raw product, times FACTOR, of columns from first on."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_strip = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = first + in_strip
    counts = rows < T
    if keep is not None:
        counts = tl.load(keep + rows, mask=counts, other=0) != 0
    z = logits_tile(hidden, weight, bias, rows, columns, T, V, D, scale, cap, DEPTH)
    log_q = log_softmax(z, statistics, rows, T, TOP, LOG_SUM)
    g = tl.zeros([ROWS, COLUMNS], tl.float32)
    if targets is not None:
        target = tl.load(targets + rows, mask=rows < T, other=-1)[:, None]
        missing = statistic(statistics, rows, T, MISSING)
        elsewhere = statistic(statistics, rows, T, ELSEWHERE)
        is_target = columns[None, :] == target
        uniform = even_share(label_smoothing, V)
        g += nll_weight * nll_slope(log_q, is_target, missing, elsewhere, uniform)
    if teacher is not None:
        z_p = logits_tile(
            teacher, teacher_weight, teacher_bias, rows, columns, T, V, D_teacher, scale, cap, DEPTH
        )
        log_p = log_softmax(z_p, statistics, rows, T, TOP_P, LOG_SUM_P)
        d_peak = statistic(statistics, rows, T, D_PEAK)
        _, s = divergence(log_p, log_q, d_peak, beta, rest, log_rest)
        g += alpha * (s - tl.exp(log_q) * statistic(statistics, rows, T, SLOPE_SUM))
    g = chain(g, z, slope * statistic(statistics, rows, T, FACTOR), cap)
    g = tl.where(counts[:, None], g, 0.0)
    dz += rows.to(tl.int64)[:, None] * strip + in_strip[None, :]
    tl.store(dz, g.to(dz.dtype.element_ty), mask=(rows < T)[:, None] & (columns < V)[None, :])


@triton.jit
def masses_kernel(
    statistics,
    more_targets,
    masses,
    z_more,
    keep,
    dz,
    first,
    strip,
    T,
    V,
    K,
    label_smoothing,
    cap,
    slope,
    ENTRIES: tl.constexpr,
):
    """Overwrites dz [T, strip] where an entry has mass: q - t before it is rounded."""
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    _, mass, _ = load_masses(masses, row, K, ENTRIES)
    if keep is not None:
        mass = tl.where(tl.load(keep + row) != 0, mass, 0.0)
    counts = mass > 0
    entries = row * K + tl.arange(0, ENTRIES)
    in_strip = tl.load(more_targets + entries, mask=counts, other=-1) - first
    z = tl.load(z_more + entries, mask=counts, other=0.0)[None, :]
    log_q = log_softmax(z, statistics, rows, T, TOP, LOG_SUM)
    g = entry_slope(log_q, mass[None, :], even_share(label_smoothing, V))
    g = chain(g, z, slope * statistic(statistics, rows, T, FACTOR), cap)
    present = (in_strip >= 0) & (in_strip < tl.minimum(strip, V - first))
    dz += row * strip + in_strip[None, :]
    tl.store(dz, g.to(dz.dtype.element_ty), mask=present[None, :])


@triton.jit
def accumulate_kernel(
    dz,
    weight,
    statistics,
    dhidden,
    first,
    strip,
    last,
    T,
    V,
    D,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dhidden [T, D] += dz [T, strip] @ weight[first:], in sums of SUM terms; / FACTOR if last."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    inside = (rows < T)[:, None] & (columns < D)[None, :]
    dz += rows.to(tl.int64)[:, None] * strip + depth[None, :]
    weight += (first + depth).to(tl.int64)[:, None] * D + columns[None, :]
    end = tl.minimum(strip, V - first)
    for begin in range(0, end, SUM):
        part = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(begin, tl.minimum(begin + SUM, V - first), DEPTH):
            present = first + start + depth < V
            g = tl.load(dz, mask=(rows < T)[:, None] & present[None, :], other=0.0)
            w = tl.load(weight, mask=present[:, None] & (columns < D)[None, :], other=0.0)
            part = tl.dot(g, w.to(g.dtype), part, input_precision="ieee")
            dz += DEPTH
            weight += DEPTH * D
        out = dhidden + rows.to(tl.int64)[:, None] * D + columns[None, :]
        if first + begin > 0:
            part += tl.load(out, mask=inside, other=0.0)
        if last & (begin + SUM >= end):
            part /= statistic(statistics, rows, T, FACTOR)
        tl.store(out, part, mask=inside)


# How the kernels of single rows are compiled.
ROW_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
DEPTH_OF_ROW = 1024
# How many entries of more_targets one program computes the logits of.
ENTRIES_TOGETHER = 8


def tiles(dtype, divergence=None):
    """Sizes of a tile and how it is compiled: what fits the registers of every chip, unspilled.

    Matrix units take 16-bit numbers; the products of fp32 ones are written out.
    """
    rows = columns = depth = 32 if dtype.itemsize == 4 else 64
    if dtype.itemsize == 2 and divergence in (forward_kl, reverse_kl):
        rows = 128
    sizes = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth}
    return {**sizes, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
