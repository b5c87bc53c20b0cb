"""Laws of the GPU's backends. Without a GPU they are rehearsed, small, in Triton's interpreter.

Legend: T tokens, C rows of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType

import pytest
import torch
from contract import DEVICE, Case, check, each_loss, make_case, run
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.backends.problem import Head, HiddenTeacher, Problem, SparseTarget

ON_GPU = torch.cuda.is_available()
MIB = 2**20
REASONS = spf.backends.available()


def backends(*names: str) -> pytest.MarkDecorator:
    """Those of the names that cannot run are skipped with the reason why."""
    skip = pytest.mark.skipif
    return pytest.mark.parametrize(
        "backend",
        [
            pytest.param(n, marks=skip(REASONS[n] is not None, reason=f"{n}: {REASONS[n]}"))
            for n in names
        ],
    )


# Of the engines of whole rows, in a small case on a GPU: several chunks, long enough not to stream.
SEVERAL_CHUNKS = 5

each_gpu_backend = backends("triton", "cuda", "streaming")
each_row_kernel = backends("triton", "cuda")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def step(case: Case, backend: str, **options) -> tuple[Tensor, Tensor]:
    """(loss, gradient by hidden), where the case is."""
    hidden = case.hidden.detach().requires_grad_()
    options = {**case.options, "backend": backend, **options}
    loss = getattr(spf, case.loss)(hidden, *case.tensors, **options)
    (gradient,) = torch.autograd.grad(loss, hidden, torch.ones_like(loss))
    return loss.detach(), gradient


def small_case(loss: str, **options) -> Case:
    T, D, V = (200, 256, 8191) if ON_GPU else (10, 24, 515)
    sizes = {"shape": (T,), "width": D, "vocabulary": V}
    options = {"dtype": torch.bfloat16, "reduction": "none", **sizes, **options}
    return make_case(loss, **options).on(DEVICE)


@pytest.fixture(autouse=True)
def _give_memory_back():
    """Other processes test on the same GPU."""
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


def assert_bitwise(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@each_gpu_backend
@pytest.mark.parametrize("loss", ["linear_nll", "linear_kl"])
@pytest.mark.parametrize("one_chunk", [False, True], ids=["chunks", "one chunk"])
def test_more_than_2_to_the_31_logits(backend, loss, one_chunk):
    """Rows on either side of the 2^31st logit, also where one buffer holds them all."""
    T, D, V = (8800, 64, 248320) if ON_GPU else (12, 8, 515)
    if one_chunk and ON_GPU and torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("the GPU has less than 30 GiB of free memory")
    case = make_case(
        loss, shape=(T,), width=D, vocabulary=V, dtype=torch.bfloat16, reduction="none"
    )
    workspace_mib = 24_000 if one_chunk else 256
    token_loss, gradient = step(case.on(DEVICE), backend, workspace_mib=workspace_mib)
    assert token_loss.isfinite().all()
    assert gradient.isfinite().all()
    boundary = min(2**31 // V, T - 2)
    rows = torch.tensor([0, 1, boundary - 1, boundary, boundary + 1, T - 1])
    sample = case.rows(rows)
    sample.upstream = None
    check(sample, token_loss.cpu()[rows], gradient.cpu()[rows])


@contextlib.contextmanager
def load():
    """Yields a function that gives another stream products and copies to do."""
    if not ON_GPU:
        yield lambda: None
        return
    stream = torch.cuda.Stream()
    a, b, c = (torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    source = torch.randn(2**25, device=DEVICE)
    target = torch.empty_like(source)
    stream.wait_stream(torch.cuda.current_stream())

    def more() -> None:
        with torch.cuda.stream(stream):
            torch.mm(a, b, out=c)
            target.copy_(source)

    yield more
    torch.cuda.synchronize()


@backends("torch", "triton", "cuda", "streaming")
@each_loss
def test_repeats_are_bitwise_equal_under_a_load(backend, loss):
    """1,000 times on a GPU. What differs is counted there: no wait between the repeats."""
    case = small_case(loss, ignored=0.1)
    expected = step(case, backend, workspace_mib=SEVERAL_CHUNKS)
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    with load() as more:
        for _ in range(1000 if ON_GPU else 2):
            more()
            results = step(case, backend, workspace_mib=SEVERAL_CHUNKS)
            for one, other in zip(results, expected, strict=True):
                different += (one != other).any()
    assert different == 0


@pytest.mark.long_interpreted
@each_row_kernel
@each_loss
def test_several_chunks(backend, loss):
    """Of 128 rows, or 72 with a teacher; the last one is padded."""
    case = make_case(
        loss, shape=(203,), width=72, vocabulary=1003, dtype=torch.float16, ignored=0.2
    )
    check(case, *run(case, backend=backend, workspace_mib=0.6))


@pytest.mark.long_interpreted
@backends("streaming")
@each_loss
def test_rows_are_the_same_in_every_batch(backend, loss):
    """With cuBLAS this is measured, not promised: see benchmarks/gpu/smoke.py."""
    case = small_case(loss)
    token_loss, gradient = step(case, backend)
    for rows in (slice(0, 1), slice(3, 5), slice(2, 9)):
        assert_bitwise(step(case.rows(rows), backend), (token_loss[rows], gradient[rows]))


@needs_gpu
@each_gpu_backend
@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_step_in_a_cuda_graph(backend, loss, reduction):
    """Replays on new inputs equal the eager steps."""
    case, other = (small_case(loss, reduction=reduction, seed=seed) for seed in (0, 1))
    expected = [step(case, backend), step(other, backend)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(case, backend)
    graph.replay()
    assert_bitwise(results, expected[0])
    for value, new in zip(
        (case.hidden, *case.tensors), (other.hidden, *other.tensors), strict=True
    ):
        value.copy_(new)
    graph.replay()
    assert_bitwise(results, expected[1])


@needs_gpu
@each_gpu_backend
@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_step_never_waits_for_the_device(backend, loss, reduction):
    case = small_case(loss, ignored=0.3, weighted=True, bias=True, reduction=reduction)
    step(case, backend, workspace_mib=SEVERAL_CHUNKS)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, backend, workspace_mib=SEVERAL_CHUNKS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@each_gpu_backend
@each_loss
def test_a_step_on_another_stream(backend, loss):
    case = small_case(loss)
    expected = step(case, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # a kernel on the default stream would not wait for this
        actual = step(case, backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert_bitwise(actual, expected)


@pytest.mark.long_interpreted
@each_gpu_backend
@each_loss
def test_a_compiled_step_is_the_eager_one(backend, loss):
    case = small_case(loss)

    def call(hidden: Tensor) -> Tensor:
        return getattr(spf, loss)(hidden, *case.tensors, **case.options, backend=backend)

    hidden = case.hidden.detach().requires_grad_()
    value = torch.compile(call, fullgraph=True, backend="aot_eager")(hidden)
    (gradient,) = torch.autograd.grad(value, hidden, torch.ones_like(value))
    assert_bitwise((value.detach(), gradient), step(case, backend))


@needs_gpu
@each_gpu_backend
@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [2000, 2003], ids="T{}".format)
def test_peak_memory_stays_within_the_workspace(backend, loss, dtype, tokens):
    """Of the gradient there are its fp32 form, and in backward the scaled one in either dtype."""
    D, V = 2304, 49152
    streams = 1 if loss == "linear_nll" else 2
    workspace_mib = streams * (4 * V * 128 / MIB + 2)  # a chunk of 128 rows fills it
    case = make_case(loss, shape=(16,), width=D, vocabulary=V, dtype=dtype).on(DEVICE)
    tiled = case.rows(torch.arange(tokens, device=DEVICE) % 16)
    step(tiled, backend, workspace_mib=workspace_mib)  # compiles; cuBLAS takes memory of its own
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(tiled, backend, workspace_mib=workspace_mib)
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    fp32_gradient = 4 * tokens * D / MIB
    backward = 2 * fp32_gradient + tokens * D * dtype.itemsize / MIB
    slack = 2  # what the allocator rounds up to
    assert peak <= max(workspace_mib + fp32_gradient, backward) + slack


@each_gpu_backend
@each_loss
def test_a_poisoned_row_stays_alone(backend, loss):
    """NaN in one token's hidden state: its row is NaN, and no other one changes."""
    case = small_case(loss)
    expected = step(case, backend)
    row, others = 4, torch.arange(len(case.hidden), device=DEVICE) != 4
    case.hidden[row, 3] = torch.nan
    token_loss, gradient = step(case, backend)
    assert token_loss[row].isnan()
    assert gradient[row].isnan().all()
    assert_bitwise((token_loss[others], gradient[others]), tuple(v[others] for v in expected))


@each_gpu_backend
@pytest.mark.parametrize("loss", ["linear_nll", "linear_distill"])
@pytest.mark.parametrize("target", [-1, -(2**40), "V", 2**40], ids="target {}".format)
def test_a_target_outside_the_vocabulary_makes_its_row_nan(backend, loss, target):
    """A GPU's kernels cannot raise, and nothing waits for them. Ignored rows may hold anything."""
    case = small_case(loss)
    V, T = len(case.weight), len(case.hidden)
    bad = torch.arange(T, device=DEVICE) == 4
    ignored = torch.arange(T, device=DEVICE) == 6
    outside = V if target == "V" else target

    def engine(targets: Tensor) -> tuple[Tensor, Tensor]:
        problem = Problem(case.hidden, Head(case.weight), SparseTarget(targets), keep=~ignored)
        if loss != "linear_nll":
            problem = problem._replace(teacher=HiddenTeacher(case.teacher), alpha=0.5)
        return spf.backends.ENGINES[backend](problem)

    expected = engine(case.targets)
    token_loss, gradient = engine(case.targets.masked_fill(bad | ignored, outside))
    assert token_loss[bad].isnan().all()
    assert gradient[bad].isnan().all()
    assert (token_loss[ignored] == 0).all()
    assert (gradient[ignored] == 0).all()
    assert_bitwise((token_loss[~bad], gradient[~bad]), tuple(v[~bad] for v in expected))


def row_kernels(backend: str) -> ModuleType:
    modules = {
        "triton": "softprompt_fast.kernels.rows",
        "cuda": "softprompt_fast.backends.cuda_rows",
    }
    return importlib.import_module(modules[backend])


@each_row_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 131, 4099, 50257], ids="V{}".format)
@pytest.mark.parametrize("beta", [None, 0.0, 0.3, 1.0], ids="beta {}".format)
@pytest.mark.parametrize("where", ["over the logits", "apart"])
def test_row_kernels_write_their_outputs_and_nothing_else(backend, dtype, vocabulary, beta, where):
    """Guards around the outputs, beside the rows and in the inputs keep their values."""
    if not ON_GPU and vocabulary > 5000:
        pytest.skip("too long in the interpreter")
    C, stride = 3, -(-vocabulary // 8) * 8 + 8
    inner, columns = slice(1, 1 + C), slice(0, vocabulary)
    torch.manual_seed(0)

    def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, torch.inf, dtype=dtype, device=DEVICE)

    logits, teacher = guarded(C + 2, stride), guarded(C + 2, stride)
    for z in (logits, teacher):
        z[inner, columns] = torch.randn(C, vocabulary, device=DEVICE)
    loss = guarded(C + 2)
    unscale = guarded(C + 2) if dtype == torch.float16 else None
    dz = logits.view(dtype) if where == "over the logits" else guarded(C + 2, stride, dtype=dtype)
    dz_before, logits_before, teacher_before = dz.clone(), logits.clone(), teacher.clone()
    targets = torch.randint(vocabulary, (C,), device=DEVICE)
    options = {"unscale": None if unscale is None else unscale[inner]}
    views = logits[inner, columns], loss[inner], dz[inner, columns]
    kernels = row_kernels(backend)
    if beta is None:
        kernels.sparse_target_rows_(views[0], SparseTarget(targets), *views[1:], **options)
    else:
        of_teacher = teacher[inner, columns]
        kernels.divergence_rows_(views[0], of_teacher, *views[1:], beta=beta, **options)

    written = torch.zeros_like(dz, dtype=torch.bool)
    written[inner, columns] = True
    assert dz[written].isfinite().all()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(dz.view(bits)[~written], dz_before.view(bits)[~written])
    assert torch.equal(teacher, teacher_before)
    if where == "apart":
        assert torch.equal(logits, logits_before)
    for vector in (loss, unscale):
        if vector is not None:
            assert vector[inner].isfinite().all()
            assert vector[[0, -1]].isposinf().all()


@each_row_kernel
def test_slopes_that_cancel_fit_fp16(backend):
    """Reverse KL: the sum of the slopes says nothing about the largest one."""
    z, z_p = torch.empty(2, 1, 8, device=DEVICE)
    dz = torch.empty(1, 8, device=DEVICE, dtype=torch.float16)
    log_q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    log_p = (log_q + torch.tensor([0.0, 1.0, -1.0001])).log_softmax(0)
    z[0, :3], z_p[0, :3] = log_q.float(), log_p.float()
    loss, unscale = torch.empty(2, 1, device=DEVICE)
    row_kernels(backend).divergence_rows_(
        z[:, :3], z_p[:, :3], loss, dz[:, :3], beta=1.0, unscale=unscale
    )
    slopes = log_q.exp() * (log_q - log_p)
    exact = slopes - log_q.exp() * slopes.sum()
    torch.testing.assert_close((dz[0, :3] * unscale).cpu().double(), exact, rtol=1e-3, atol=1e-7)
