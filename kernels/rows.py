"""Row kernels: the logits of a chunk in, loss and gradient by the raw product out.

One program takes one row and goes over it in blocks: once for the softmax, once more for the sums
that reverse KL and Jensen-Shannon need, once for the gradient. Every lane of a block keeps running
sums of its own, which meet once a sweep: no barrier inside, and the same order in every run.

The gradient may be written over the logits it comes from, 16-bit numbers into the first half of
their row: a block's gradient lies over blocks that have been read, or over its own, which has been
read by all threads when the barrier is passed.

Legend: C rows, V vocabulary, K more targets, z finished logit, q student, p teacher.
"""

import triton
import triton.language as tl

from .formulas import (
    MINUS_INFINITY,
    add_entry,
    chain,
    divergence_of,
    entry_numbers,
    entry_slope,
    even_share,
    finish,
    fp16_exponent,
    known,
    load_masses,
    log_likelihood,
    merge,
    mixture_numbers,
    nll_bound,
    nll_slope,
    power_of_two,
    smooth,
    spread,
    transform_numbers,
)

# Entries in a block: 8 a thread and stream keep the running sums in registers.
BLOCK = 4096
WARPS = 16
# Equal arithmetic must give equal numbers wherever it stands: nothing is fused behind our back.
COMPILED = {"num_warps": WARPS, "enable_fp_fusion": False}


@triton.jit
def load_block(row, columns, V, bias, scale, cap):
    """z of a block, -inf outside the vocabulary."""
    inside = columns < V
    raw = tl.load(row + columns, mask=inside, other=0.0)
    if bias is not None:
        bias = tl.load(bias + columns, mask=inside, other=0.0)
    return tl.where(inside, finish(raw, bias, scale, cap), MINUS_INFINITY)


@triton.jit
def load_entry(row, column, V, bias, scale, cap):
    """z of single entries, NaN outside the vocabulary."""
    inside = (column >= 0) & (column < V)
    raw = tl.load(row + column, mask=inside, other=0.0)
    if bias is not None:
        bias = tl.load(bias + column, mask=inside, other=0.0)
    return tl.where(inside, finish(raw, bias, scale, cap), float("nan"))


@triton.jit
def sparse_target_rows_kernel(
    logits,
    dz,
    loss,
    unscale,
    targets,
    more_targets,
    masses,
    keep,
    bias,
    V,
    K,
    stride,
    dz_stride,
    label_smoothing,
    scale,
    cap,
    slope,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """logits [C, V], targets [C] -> loss [C], dz [C, V] (None: loss only), unscale [C].

    more_targets [C, K], masses [C, 1 + K], or both None.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lanes = tl.arange(0, BLOCK)
    stop = V
    if keep is not None:
        stop = tl.where(tl.load(keep + row) != 0, V, 0)

    target = tl.load(targets + row)
    z_target = load_entry(logits, target, stop, bias, scale, cap)
    top = tl.full([BLOCK], MINUS_INFINITY, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    others = tl.zeros([BLOCK], tl.float32)
    sum_z = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, stop, BLOCK, loop_unroll_factor=2):
        columns = start + lanes
        z = load_block(logits, columns, stop, bias, scale, cap)
        if label_smoothing is not None:
            sum_z += tl.where(columns < stop, z, 0.0)
        is_other = tl.where(columns == target, 0.0, 1.0)
        top, total, others = add_entry(top, total, others, z, is_other)
    top, total, others = merge(top, total, others)
    if masses is not None:
        tail, mass, mass_sum = load_masses(masses, row, K, ENTRIES)
        entries = row * K + tl.arange(0, ENTRIES)
        ids = tl.load(more_targets + entries, mask=mass > 0, other=-1)
        z_more = load_entry(logits, ids, stop, bias, scale, cap)
        z_target = known(z_target, mass, z_more)
    log_sum, nll, missing = log_likelihood(top, total, others, z_target)
    elsewhere = label_smoothing
    uniform = even_share(label_smoothing, V)
    if label_smoothing is not None:
        nll = smooth(nll, top + log_sum, tl.sum(sum_z, 0), V, label_smoothing)
    if masses is not None:
        nll = spread(nll, z_target, tail, mass, z_more)
        elsewhere = mass_sum
        if label_smoothing is not None:
            elsewhere += label_smoothing
    one = tl.arange(0, 1)
    tl.store(loss + row + one, tl.where(stop == 0, 0.0, nll))

    if dz is not None:
        dz += row * dz_stride
        if unscale is not None:
            exponent = fp16_exponent(nll_bound(missing, elsewhere) * tl.abs(slope))
            slope *= power_of_two(exponent)
            tl.store(unscale + row + one, power_of_two(-exponent))
        if masses is not None:
            g_more = entry_slope((z_more - top) - log_sum, mass, uniform)
            g_more = chain(g_more, z_more, slope, cap)
        for start in range(0, V, BLOCK):
            columns = start + lanes
            z = load_block(logits, columns, stop, bias, scale, cap)
            tl.debug_barrier()
            g = nll_slope((z - top) - log_sum, columns == target, missing, elsewhere, uniform)
            g = tl.where(columns < stop, chain(g, z, slope, cap), 0.0)
            tl.store(dz + columns, g.to(dz.dtype.element_ty), mask=columns < V)
        if masses is not None:
            # q - t, which is what is rounded
            tl.debug_barrier()
            tl.store(dz + ids, g_more.to(dz.dtype.element_ty), mask=(ids >= 0) & (ids < stop))


@triton.jit
def divergence_rows_kernel(
    logits,
    teacher_logits,
    dz,
    loss,
    unscale,
    targets,
    keep,
    bias,
    teacher_bias,
    V,
    stride,
    teacher_stride,
    dz_stride,
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
    MEASURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logits, teacher_logits [C, V] -> loss [C], dz [C, V] (None: loss only), unscale [C].

    With targets [C] the loss is alpha * divergence + nll_weight * nll. MEASURE: the sums of values
    and slopes have a sweep of their own. Without it, the slopes must sum to zero.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    teacher_logits += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    one = tl.arange(0, 1)
    stop = V
    if keep is not None:
        stop = tl.where(tl.load(keep + row) != 0, V, 0)
    target = -1
    if targets is not None:
        target = tl.load(targets + row)
        z_target = load_entry(logits, target, stop, bias, scale, cap)

    # softmax of both, and the student's most probable entry
    top = tl.full([BLOCK], MINUS_INFINITY, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    others = tl.zeros([BLOCK], tl.float32)
    peak = tl.zeros([BLOCK], tl.int32)
    sum_z = tl.zeros([BLOCK], tl.float32)
    top_p = tl.full([BLOCK], MINUS_INFINITY, tl.float32)
    total_p = tl.zeros([BLOCK], tl.float32)
    for start in range(0, stop, BLOCK):
        columns = start + lanes
        z = load_block(logits, columns, stop, bias, scale, cap)
        peak = tl.where(z > top, columns, peak)
        if label_smoothing is not None:
            sum_z += tl.where(columns < stop, z, 0.0)
        is_other = tl.where(columns == target, 0.0, 1.0)
        top, total, others = add_entry(top, total, others, z, is_other)
        z_p = load_block(teacher_logits, columns, stop, teacher_bias, scale, cap)
        top_p, total_p, _ = add_entry(top_p, total_p, total_p, z_p, 1.0)
    peak = tl.min(tl.where(top == tl.max(top, 0), peak, V), 0)
    top, total, others = merge(top, total, others)
    top_p, total_p, _ = merge(top_p, total_p, total_p)
    log_sum, log_sum_p = tl.log(total), tl.log(total_p)
    nll = tl.zeros([1], tl.float32)
    missing = tl.zeros([1], tl.float32)
    uniform = even_share(label_smoothing, V)
    if targets is not None:
        log_sum, nll, missing = log_likelihood(top, total, others, z_target)
        if label_smoothing is not None:
            nll = smooth(nll, top + log_sum, tl.sum(sum_z, 0), V, label_smoothing)
    z_peak = load_entry(logits, peak, stop, bias, scale, cap)
    z_peak_p = load_entry(teacher_logits, peak, stop, teacher_bias, scale, cap)
    log_q_peak = (z_peak - top) - log_sum
    log_p_peak = (z_peak_p - top_p) - log_sum_p
    d_peak = log_q_peak - log_p_peak

    values = tl.zeros([BLOCK], tl.float32)
    slopes = tl.zeros([BLOCK], tl.float32)
    slope_sum = tl.zeros([1], tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    if MEASURE:
        for start in range(0, stop, BLOCK):
            columns = start + lanes
            log_q = (load_block(logits, columns, stop, bias, scale, cap) - top) - log_sum
            z_p = load_block(teacher_logits, columns, stop, teacher_bias, scale, cap)
            log_p = (z_p - top_p) - log_sum_p
            value, s = divergence(log_p, log_q, d_peak, beta, rest, log_rest)
            values += tl.where(columns < stop, value, 0.0)
            slopes += tl.where(columns < stop, s, 0.0)
            largest = tl.maximum(largest, tl.where(columns < stop, tl.abs(s), 0.0))
        slope_sum += tl.sum(slopes, 0)

    if dz is not None:
        dz += row * dz_stride
        if unscale is not None:
            # forward KL's slopes are at most 1
            bound = tl.max(largest, 0) + tl.abs(slope_sum) if MEASURE else slope_sum + 1
            bound = alpha * bound + nll_weight * nll_bound(missing, label_smoothing)
            exponent = fp16_exponent(bound * tl.abs(slope))
            slope *= power_of_two(exponent)
            tl.store(unscale + row + one, power_of_two(-exponent))
        for start in range(0, V, BLOCK):
            columns = start + lanes
            z = load_block(logits, columns, stop, bias, scale, cap)
            z_p = load_block(teacher_logits, columns, stop, teacher_bias, scale, cap)
            tl.debug_barrier()
            log_q, log_p = (z - top) - log_sum, (z_p - top_p) - log_sum_p
            value, s = divergence(log_p, log_q, d_peak, beta, rest, log_rest)
            if not MEASURE:
                values += tl.where(columns < stop, value, 0.0)
                slopes += tl.where(columns < stop, s, 0.0)
            g = alpha * (s - tl.exp(log_q) * slope_sum)
            if targets is not None:
                g += nll_weight * nll_slope(
                    log_q, columns == target, missing, label_smoothing, uniform
                )
            g = tl.where(columns < stop, chain(g, z, slope, cap), 0.0)
            tl.store(dz + columns, g.to(dz.dtype.element_ty), mask=columns < V)
        if not MEASURE:
            # what rounding left of the slopes' sum, at the entry that is most of it
            slope_sum += tl.sum(slopes, 0)
            _, s = divergence(log_p_peak, log_q_peak, d_peak, beta, rest, log_rest)
            g = alpha * (s - tl.exp(log_q_peak) * slope_sum)
            if targets is not None:
                g += nll_weight * nll_slope(
                    log_q_peak, peak == target, missing, label_smoothing, uniform
                )
            g = chain(g, z_peak, slope, cap)
            tl.debug_barrier()
            tl.store(dz + peak + one, g.to(dz.dtype.element_ty), mask=peak + one < stop)

    value = alpha * tl.sum(values, 0) + nll_weight * nll
    tl.store(loss + row + one, tl.where(stop == 0, 0.0, value))


def sparse_target_rows_(
    logits,
    targets,
    loss,
    dz,
    *,
    more_targets=None,
    masses=None,
    keep=None,
    bias=None,
    label_smoothing=0.0,
    softcap=None,
    logit_scale=1.0,
    temperature=1.0,
    unscale=None,
) -> None:
    """Cross-entropy of softmax rows with few targets each, and its gradient.

    logits [C, V] fp32, raw products of the head    targets [C] int64    bias [V] or None
    more_targets [C, K] int64 and masses [C, 1 + K] fp32 as in ``Problem``, or both None
    keep [C] bool or None: rows where it is False get loss 0 and gradient 0, whatever they hold
    loss [C] fp32, written    dz [C, V], written in its own dtype, or None; it may start where
    logits starts    unscale [C] fp32, written: row r of dz holds its gradient / unscale[r], a
    power of two that keeps fp16 in range. A target outside the vocabulary makes its row NaN.
    """
    C, V = logits.shape
    K, entries = entry_numbers(more_targets)
    scale, cap, slope = transform_numbers(softcap, logit_scale, temperature)
    if C:
        sparse_target_rows_kernel[(C,)](
            logits,
            dz,
            loss,
            unscale,
            targets,
            more_targets,
            masses,
            keep,
            bias,
            V,
            K,
            logits.stride(0),
            0 if dz is None else dz.stride(0),
            label_smoothing or None,
            scale,
            cap,
            slope,
            BLOCK=BLOCK,
            ENTRIES=entries,
            **COMPILED,
        )


def divergence_rows_(
    logits,
    teacher_logits,
    loss,
    dz,
    *,
    targets=None,
    keep=None,
    bias=None,
    teacher_bias=None,
    label_smoothing=0.0,
    beta=0.0,
    alpha=1.0,
    softcap=None,
    logit_scale=1.0,
    temperature=1.0,
    unscale=None,
) -> None:
    """Divergence of teacher and student rows, and its gradient by the student's raw product.

    Shapes as in ``sparse_target_rows_``; teacher_logits [C, V] and teacher_bias [V] belong to the
    teacher. With targets: alpha * divergence + (1 - alpha) * cross-entropy.
    """
    C, V = logits.shape
    scale, cap, slope = transform_numbers(softcap, logit_scale, temperature)
    if C:
        divergence_rows_kernel[(C,)](
            logits,
            teacher_logits,
            dz,
            loss,
            unscale,
            targets,
            keep,
            bias,
            teacher_bias,
            V,
            logits.stride(0),
            teacher_logits.stride(0),
            0 if dz is None else dz.stride(0),
            label_smoothing or None,
            *mixture_numbers(beta),
            alpha,
            1 - alpha,
            scale,
            cap,
            slope,
            divergence=divergence_of(beta),
            MEASURE=beta != 0.0 or dz is None,
            BLOCK=BLOCK,
            **COMPILED,
        )
