"""A token's loss and gradient are bitwise its own, whatever the batch, the memory, the threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from contract import (
    CPU_BACKENDS,
    DEVICE,
    INTERPRETED,
    Case,
    backends_and_dtypes,
    each_backend,
    each_backend_and_dtype,
    each_loss,
    make_case,
    run,
)

HEADS = [
    (1, torch.float32),
    (64, torch.float32),
    (131, torch.float32),
    (131, torch.bfloat16),
    (131, torch.float16),
    (50257, torch.float32),
    (50257, torch.bfloat16),
]


def heads_of(backends: Iterable[str]) -> pytest.MarkDecorator:
    """Every backend with every head; the interpreter is too slow for more than one."""
    return pytest.mark.parametrize(
        ("backend", "vocabulary", "dtype"),
        [
            pytest.param(backend, V, dtype, id=f"{backend}-V{V}-{str(dtype)[6:]}")
            for backend in backends
            for V, dtype in HEADS
            if (V, dtype) == (131, torch.float32) or backend not in INTERPRETED
        ],
    )


# On a GPU the vendor's library chooses how to sum by the shape of the product.
OWN_PRODUCTS = CPU_BACKENDS if DEVICE.type == "cpu" else ("cpp", "streaming")


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def assert_bitwise(actual, expected):
    """NaN equals NaN."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def rows_case(
    backend: str, loss: str, vocabulary: int, dtype: torch.dtype, tokens: int = 45
) -> Case:
    """As wide as several of the backend's blocks, where the vocabulary is short."""
    width = 48 if vocabulary >= 1000 else 160 if backend in INTERPRETED else 576
    tokens = min(tokens, 600_000 // vocabulary)
    options = {} if loss == "linear_nll" else {"beta": 0.3, "distance": 0.1}
    return make_case(
        loss,
        shape=(tokens,),
        width=width,
        vocabulary=vocabulary,
        dtype=dtype,
        bias=True,
        reduction="none",
        **options,
    )


@pytest.mark.long_interpreted
@heads_of(OWN_PRODUCTS)
@each_loss
def test_rows_do_not_depend_on_their_batch(backend, vocabulary, dtype, loss):
    case = rows_case(backend, loss, vocabulary, dtype)
    together = run(case, backend=backend)
    assert_bitwise(run(case, backend=backend), together)
    tokens = case.hidden.shape[0]
    for rows in (slice(0, 1), slice(8, 9), slice(-1, None), slice(2, 11)):
        alone = run(case.rows(rows), backend=backend)
        assert_bitwise(alone, (value[rows] for value in together))
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    assert_bitwise(run(case.rows(order), backend=backend), (value[order] for value in together))


# The row kernels' chunks go through the vendor's library: test_gpu.py holds them to the contract.
@pytest.mark.long_interpreted
@backends_and_dtypes(name for name in OWN_PRODUCTS if name != "triton")
@each_loss
def test_rows_do_not_depend_on_the_workspace(backend, loss, dtype):
    """As long as a low-precision head is widened in one piece: 0.2 MiB here, an eighth of 2."""
    case = rows_case(backend, loss, 1031, dtype, tokens=90)
    expected = run(case, backend=backend)
    # the streaming backend takes all rows at once in 1 MiB
    for workspace_mib in (0.5,) if backend == "streaming" else (2, 3.5, 7, 1024):
        assert_bitwise(run(case, backend=backend, workspace_mib=workspace_mib), expected)


@heads_of(["torch", "cpp"])
@each_loss
def test_rows_do_not_depend_on_the_number_of_threads(backend, loss, vocabulary, dtype):
    case = rows_case(backend, loss, vocabulary, dtype)
    torch.set_num_threads(1)
    expected = run(case, backend=backend)
    torch.set_num_threads(2)
    assert_bitwise(run(case, backend=backend), expected)


def test_a_workspace_too_small_for_all_threads_uses_fewer():
    """Each has scratch of its own: on a machine of 64 cores that is more than the default."""
    case = make_case("linear_kl", shape=(40,), width=256, vocabulary=1031, dtype=torch.bfloat16)
    torch.set_num_threads(1)
    expected = run(case, backend="cpp")
    torch.set_num_threads(64)
    assert_bitwise(run(case, backend="cpp", workspace_mib=8), expected)


def test_half_precision_numbers_near_zero_survive_flush_denormal():
    case = make_case("linear_nll", dtype=torch.float16, spread=1e-5, logit_scale=1e5)
    assert (case.weight.abs() < torch.finfo(torch.float16).tiny).all()
    expected = run(case, backend="cpp")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals to zero")
    try:
        loss, _ = run(case, backend="cpp")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(loss, expected[0])


@pytest.mark.long_interpreted
@each_backend
@each_loss
def test_rows_do_not_depend_on_the_ignored(backend, loss):
    case = rows_case(backend, loss, 131, torch.float32)
    expected = run(case, backend=backend)
    ignored = torch.arange(45) % 3 == 1
    if loss == "linear_kl":
        case = case.with_options(labels=torch.where(ignored, -100, 0))
    else:
        case.targets[ignored] = -100
    values = run(case, backend=backend)
    assert_bitwise((value[~ignored] for value in values), (value[~ignored] for value in expected))
    assert all((value[ignored] == 0).all() for value in values)


@each_backend_and_dtype
@each_loss
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_poisoned_row_is_nan_and_alone(backend, loss, dtype, poison):
    streams = ["hidden"] if loss == "linear_nll" else ["hidden", "teacher"]
    places = [slice(5, 6), slice(None)]
    if backend in INTERPRETED:  # tests/backends/test_gpu.py has the student's
        streams, places = streams[-1:], places[:1]
    for stream, entries in itertools.product(streams, places):
        case = rows_case(backend, loss, 131, dtype, tokens=20)
        expected = run(case, backend=backend)
        getattr(case, stream)[11, entries] = poison
        token_loss, gradient = run(case, backend=backend)
        assert token_loss[11].isnan(), stream
        assert gradient[11].isnan().all(), stream
        others = torch.arange(20) != 11
        unchanged = (value[others] for value in expected)
        assert_bitwise((token_loss[others], gradient[others]), unchanged)


def transposed(value: torch.Tensor) -> torch.Tensor:
    """The same numbers, the first dimension moving fastest in memory."""
    return value.T.contiguous().T if value.dim() == 2 else value


def offset(value: torch.Tensor) -> torch.Tensor:
    """The same numbers, one element into their storage: no longer aligned."""
    return torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)


def strided(value: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second one of the last dimension."""
    return value.repeat_interleave(2, -1)[..., ::2]


@each_backend_and_dtype
@each_loss
@pytest.mark.parametrize("view", [transposed, offset, strided], ids=lambda view: view.__name__)
def test_views_equal_contiguous_tensors(backend, loss, dtype, view):
    case = make_case(
        loss,
        shape=(20,),
        width=40,
        dtype=dtype,
        bias=True,
        weighted=True,
        teacher_width=None if loss == "linear_nll" else 33,
        reduction="none",
    )

    def viewed(value):
        return view(value) if isinstance(value, torch.Tensor) else value

    other = Case(
        loss=loss,
        hidden=viewed(case.hidden),
        tensors=tuple(map(viewed, case.tensors)),
        options={name: viewed(value) for name, value in case.options.items()},
        upstream=viewed(case.upstream),
    )
    assert_bitwise(run(other, backend=backend), run(case, backend=backend))


@each_backend
@each_loss
def test_expanded_tensors_equal_contiguous_ones(backend, loss):
    """One token repeated with stride 0, and the same of every tensor beside it."""
    case = make_case(loss, shape=(1,), bias=True, weighted=True, reduction="none")
    case.upstream = torch.ones(6)

    def repeat(value, expand):
        if not isinstance(value, torch.Tensor) or value.shape[0] != 1:
            return value
        many = value.expand(6, *value.shape[1:])
        return many if expand else many.contiguous()

    results = []
    for expand in (True, False):
        results.append(
            run(
                Case(
                    loss=loss,
                    hidden=repeat(case.hidden, expand),
                    tensors=(case.weight, *(repeat(t, expand) for t in case.tensors[1:])),
                    options={name: repeat(t, expand) for name, t in case.options.items()},
                    upstream=case.upstream,
                ),
                backend=backend,
            )
        )
    assert_bitwise(*results)
