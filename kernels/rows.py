"""Row kernels: the logits of a chunk in, loss and gradient by the raw product out.

One program takes one row and goes over it in blocks: once for the softmax, once more for the sums
that reverse KL and Jensen-Shannon need, once for the gradient. Every lane of a block keeps running
sums of its own, which meet once a sweep: no barrier inside, and the same order in every run.

The gradient may be written over the logits it comes from, 16-bit numbers into the first half of
their row: a block's gradient lies over blocks that have been read, or over its own, which has been
read by all threads when the barrier is passed.

Legend: C rows, V vocabulary, K more targets, z finished logit, q student, p teacher. For the
arguments that are tuples see ``arguments.py``.
"""

import triton
import triton.language as tl
from torch import Tensor

from softprompt_fast.backends.formulas import IDENTITY, LogitTransform
from softprompt_fast.backends.problem import NO_TARGET, SparseTarget

from .arguments import Gradient, Label, Logits, Mixture, Transform, Weights, entry_numbers
from .formulas import (
    MINUS_INFINITY,
    add_entry,
    chain,
    divergence_of,
    finish,
    fp16_exponent,
    known,
    label_loss,
    load_masses,
    merge,
    nll_bound,
    nll_slope,
    power_of_two,
    spread,
)

# Entries in a block: 8 a thread and stream keep the running sums in registers.
BLOCK = 4096
WARPS = 16
# Equal arithmetic must give equal numbers wherever it stands: nothing is fused behind our back.
COMPILED = {"num_warps": WARPS, "enable_fp_fusion": False}


@triton.jit
def load_block(row, columns, stop, bias, transform):
    """z of a block, -inf from ``stop`` on."""
    inside = columns < stop
    raw = tl.load(row + columns, mask=inside, other=0.0)
    if bias is not None:
        bias = tl.load(bias + columns, mask=inside, other=0.0)
    return tl.where(inside, finish(raw, bias, transform), MINUS_INFINITY)


@triton.jit
def load_entry(row, column, stop, bias, transform):
    """z of single entries, NaN outside the vocabulary."""
    inside = (column >= 0) & (column < stop)
    raw = tl.load(row + column, mask=inside, other=0.0)
    if bias is not None:
        bias = tl.load(bias + column, mask=inside, other=0.0)
    return tl.where(inside, finish(raw, bias, transform), float("nan"))


@triton.jit
def stop_of(keep, row, V):
    """Where the row ends: a row that does not count is empty."""
    stop = V
    if keep is not None:
        stop = tl.where(tl.load(keep + row) != 0, V, 0)
    return stop


@triton.jit
def sparse_target_rows_kernel(
    student,
    target,
    keep,
    transform,
    loss,
    gradient,
    V,
    K,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Cross-entropy of rows [C, V] -> loss [C] and, unless dz is None, the gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits = student.raw + row * student.stride
    bias = student.bias
    lanes = tl.arange(0, BLOCK)
    one = tl.arange(0, 1)
    stop = stop_of(keep, row, V)

    # softmax
    target_id = tl.load(target.ids + row)
    z_label = load_entry(logits, target_id, stop, bias, transform)
    top = tl.full([BLOCK], MINUS_INFINITY, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    others = tl.zeros([BLOCK], tl.float32)
    sum_z = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, stop, BLOCK, loop_unroll_factor=2):
        columns = start + lanes
        z = load_block(logits, columns, stop, bias, transform)
        if target.smoothing is not None:
            sum_z += tl.where(columns < stop, z, 0.0)
        is_other = tl.where(columns == target_id, 0.0, 1.0)
        top, total, others = add_entry(top, total, others, z, is_other)
    top, total, others = merge(top, total, others)

    # loss
    if target.masses is not None:
        tail, mass, mass_sum = load_masses(target.masses, row, K, ENTRIES)
        entries = row * K + tl.arange(0, ENTRIES)
        ids = tl.load(target.more + entries, mask=mass > 0, other=-1)
        z_more = load_entry(logits, ids, stop, bias, transform)
        z_label = known(z_label, mass, z_more)
    sum_z = tl.sum(sum_z, 0)
    log_sum, nll, label = label_loss(top, total, others, sum_z, z_label, target, V)
    if target.masses is not None:
        nll = spread(nll, z_label, tail, mass, z_more)
        label = Label(label.lse, label.missing, label.elsewhere + mass_sum)
    tl.store(loss + row + one, tl.where(stop == 0, 0.0, nll))

    # gradient
    if gradient.dz is not None:
        dz = gradient.dz + row * gradient.stride
        slope = transform.slope
        if gradient.unscale is not None:
            slope = fit_fp16(slope, nll_bound(label), gradient.unscale + row)
        if target.masses is not None:
            log_q_more = (z_more - top) - log_sum
            g_more = nll_slope(log_q_more, False, mass, label, target, V)
            g_more = chain(g_more, z_more, slope, transform.cap)
        for start in range(0, V, BLOCK):
            columns = start + lanes
            z = load_block(logits, columns, stop, bias, transform)
            tl.debug_barrier()
            log_q = (z - top) - log_sum
            g = nll_slope(log_q, columns == target_id, 0.0, label, target, V)
            g = tl.where(columns < stop, chain(g, z, slope, transform.cap), 0.0)
            tl.store(dz + columns, g.to(dz.dtype.element_ty), mask=columns < V)
        if target.masses is not None:
            # q - t, which is what is rounded
            tl.debug_barrier()
            tl.store(dz + ids, g_more.to(dz.dtype.element_ty), mask=(ids >= 0) & (ids < stop))


@triton.jit
def fit_fp16(slope, bound, unscale):
    """slope times the power of two that keeps dz in fp16's range; its inverse is stored.    [1]"""
    exponent = fp16_exponent(bound * tl.abs(slope))
    tl.store(unscale + tl.arange(0, 1), power_of_two(-exponent))
    return slope * power_of_two(exponent)


@triton.jit
def divergence_rows_kernel(
    student,
    teacher,
    target,
    keep,
    mixture,
    weights,
    transform,
    loss,
    gradient,
    V,
    divergence: tl.constexpr,
    MEASURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Divergence of rows [C, V] -> loss [C] and, unless dz is None, the gradient.

    MEASURE: the sums of values and slopes have a sweep of their own. Without it, the slopes must
    sum to zero.
    """
    row = tl.program_id(0).to(tl.int64)
    logits = student.raw + row * student.stride
    logits_p = teacher.raw + row * teacher.stride
    lanes = tl.arange(0, BLOCK)
    one = tl.arange(0, 1)
    stop = stop_of(keep, row, V)
    target_id = -1
    if target.ids is not None:
        target_id = tl.load(target.ids + row)
        z_label = load_entry(logits, target_id, stop, student.bias, transform)

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
        z = load_block(logits, columns, stop, student.bias, transform)
        peak = tl.where(z > top, columns, peak)
        if target.smoothing is not None:
            sum_z += tl.where(columns < stop, z, 0.0)
        is_other = tl.where(columns == target_id, 0.0, 1.0)
        top, total, others = add_entry(top, total, others, z, is_other)
        z_p = load_block(logits_p, columns, stop, teacher.bias, transform)
        top_p, total_p, _ = add_entry(top_p, total_p, total_p, z_p, 1.0)
    peak = tl.min(tl.where(top == tl.max(top, 0), peak, V), 0)
    top, total, others = merge(top, total, others)
    top_p, total_p, _ = merge(top_p, total_p, total_p)
    log_sum, log_sum_p = tl.log(total), tl.log(total_p)

    # cross-entropy
    zero = tl.zeros([1], tl.float32)
    nll, label = zero, Label(zero, zero, zero)
    if target.ids is not None:
        sum_z = tl.sum(sum_z, 0)
        log_sum, nll, label = label_loss(top, total, others, sum_z, z_label, target, V)

    # divergence
    z_peak = load_entry(logits, peak, stop, student.bias, transform)
    log_q_peak = (z_peak - top) - log_sum
    log_p_peak = (load_entry(logits_p, peak, stop, teacher.bias, transform) - top_p) - log_sum_p
    d_peak = log_q_peak - log_p_peak
    values = tl.zeros([BLOCK], tl.float32)
    slopes = tl.zeros([BLOCK], tl.float32)
    slope_sum = tl.zeros([1], tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    if MEASURE:
        for start in range(0, stop, BLOCK):
            columns = start + lanes
            inside = columns < stop
            z = load_block(logits, columns, stop, student.bias, transform)
            z_p = load_block(logits_p, columns, stop, teacher.bias, transform)
            log_q, log_p = (z - top) - log_sum, (z_p - top_p) - log_sum_p
            value, s = divergence(log_p, log_q, d_peak, mixture)
            values += tl.where(inside, value, 0.0)
            slopes += tl.where(inside, s, 0.0)
            largest = tl.maximum(largest, tl.where(inside, tl.abs(s), 0.0))
        slope_sum += tl.sum(slopes, 0)

    # gradient
    if gradient.dz is not None:
        dz = gradient.dz + row * gradient.stride
        slope = transform.slope
        if gradient.unscale is not None:
            # forward KL's slopes are at most 1
            bound = tl.max(largest, 0) + tl.abs(slope_sum) if MEASURE else slope_sum + 1
            bound = weights.divergence * bound + weights.nll * nll_bound(label)
            slope = fit_fp16(slope, bound, gradient.unscale + row)
        for start in range(0, V, BLOCK):
            columns = start + lanes
            inside = columns < stop
            z = load_block(logits, columns, stop, student.bias, transform)
            z_p = load_block(logits_p, columns, stop, teacher.bias, transform)
            tl.debug_barrier()
            log_q, log_p = (z - top) - log_sum, (z_p - top_p) - log_sum_p
            value, s = divergence(log_p, log_q, d_peak, mixture)
            if not MEASURE:
                values += tl.where(inside, value, 0.0)
                slopes += tl.where(inside, s, 0.0)
            is_label = columns == target_id
            g = loss_slope(s, slope_sum, log_q, is_label, label, target, weights, V)
            g = tl.where(inside, chain(g, z, slope, transform.cap), 0.0)
            tl.store(dz + columns, g.to(dz.dtype.element_ty), mask=columns < V)
        if not MEASURE:
            # what rounding left of the slopes' sum, at the entry that is most of it
            slope_sum += tl.sum(slopes, 0)
            _, s = divergence(log_p_peak, log_q_peak, d_peak, mixture)
            is_label = peak == target_id
            g = loss_slope(s, slope_sum, log_q_peak, is_label, label, target, weights, V)
            g = chain(g, z_peak, slope, transform.cap)
            tl.debug_barrier()
            tl.store(dz + peak + one, g.to(dz.dtype.element_ty), mask=peak + one < stop)

    value = weights.divergence * tl.sum(values, 0) + weights.nll * nll
    tl.store(loss + row + one, tl.where(stop == 0, 0.0, value))


@triton.jit
def loss_slope(s, slope_sum, log_q, is_label, label, target, weights, V):
    """d loss / dz of an entry where the divergence's slope is s."""
    g = weights.divergence * (s - tl.exp(log_q) * slope_sum)
    if target.ids is not None:
        g += weights.nll * nll_slope(log_q, is_label, 0.0, label, target, V)
    return g


def sparse_target_rows_(
    logits: Tensor,
    target: SparseTarget,
    loss: Tensor,
    dz: Tensor | None,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    keep: Tensor | None = None,
    unscale: Tensor | None = None,
) -> None:
    """Cross-entropy of softmax rows with few targets each, and its gradient.

    logits [C, V] fp32, raw products of the head    target, without a tail, over [C]
    keep [C] bool or None: rows where it is False get loss 0 and gradient 0, whatever they hold
    loss [C] fp32, written    dz [C, V], written in its own dtype, or None; it may start where
    logits starts    unscale [C] fp32, written: row r of dz holds its gradient / unscale[r], a
    power of two that keeps fp16 in range. An id outside the vocabulary makes its row NaN.
    """
    C, V = logits.shape
    K, entries = entry_numbers(target)
    if C:
        sparse_target_rows_kernel[(C,)](
            Logits(logits, logits.stride(0), bias),
            target,
            keep,
            Transform.of(transform),
            loss,
            Gradient.of(dz, unscale),
            V,
            K,
            BLOCK=BLOCK,
            ENTRIES=entries,
            **COMPILED,
        )


def divergence_rows_(
    logits: Tensor,
    teacher_logits: Tensor,
    loss: Tensor,
    dz: Tensor | None,
    *,
    beta: float = 0.0,
    target: SparseTarget = NO_TARGET,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    keep: Tensor | None = None,
    unscale: Tensor | None = None,
) -> None:
    """Divergence of teacher and student rows, and its gradient by the student's raw product.

    As ``sparse_target_rows_``; teacher_logits [C, V] and teacher_bias [V] belong to the teacher.
    With a target, a label: alpha * divergence + (1 - alpha) * cross-entropy.
    """
    C, V = logits.shape
    if C:
        divergence_rows_kernel[(C,)](
            Logits(logits, logits.stride(0), bias),
            Logits(teacher_logits, teacher_logits.stride(0), teacher_bias),
            target,
            keep,
            Mixture.of(beta),
            Weights.of(alpha),
            Transform.of(transform),
            loss,
            Gradient.of(dz, unscale),
            V,
            divergence=divergence_of(beta),
            MEASURE=beta != 0.0 or dz is None,
            BLOCK=BLOCK,
            **COMPILED,
        )
