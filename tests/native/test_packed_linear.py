"""Packed linear layers against float64, at every level and with a model of AMX's tiles."""

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rtp_llm.kernels import packed_linear
from rtp_llm.kernels.packed_linear import Packed
from rtp_llm.native import library
from rtp_llm.native.build import FLAGS, LINK_FLAGS, PACKAGE, find_compiler
from rtp_llm.native.levels import X86_LEVELS
from rtp_llm.native.library import DTYPE_CODES, Library, built_levels, library_path
from tests.kernel_levels import LEVELS

EMULATED_AMX = "amx, emulated"
SOURCES = ("linear.cpp", "team.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of one rounding
TINY = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}  # of one rounding near zero


@pytest.fixture(scope="session")
def emulated_amx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a library whose AMX instructions are functions in C++."""
    if "avx512_bf16" not in built_levels():
        pytest.skip("the emulation of AMX takes AVX-512 BF16")
    flags = next(level.compiler_flags for level in X86_LEVELS if level.name == "avx512_bf16")
    path = tmp_path_factory.mktemp("amx") / "linear.so"
    command = [*find_compiler(), *FLAGS, *flags, "-DRTP_EMULATE_AMX", *LINK_FLAGS]
    subprocess.run([*command, *(str(PACKAGE / "src" / name) for name in SOURCES), "-o", str(path)], check=True)
    return path


@pytest.fixture(params=[*LEVELS, pytest.param(EMULATED_AMX, marks=pytest.mark.slow)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """Selects the kernels of one level, and one thread."""
    if request.param == EMULATED_AMX:
        linear = {name: types for name, types in library.SIGNATURES.items() if name.startswith("rtp_linear")}
        monkeypatch.setattr(library, "SIGNATURES", linear)
        selected = Library("amx", request.getfixturevalue("emulated_amx"))
        assert selected.has_amx
    else:
        selected = Library(request.param, library_path(request.param))
        assert selected.has_amx == (request.param == "amx")
    assert selected.is_right
    monkeypatch.setattr(packed_linear, "library", lambda: selected)
    torch.set_num_threads(1)
    yield selected
    torch.set_num_threads(1)


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _expected(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the product in float64, and how much sums of float32 that are rounded to `dtype` may differ from it."""
    exact = x.double() @ weight.double().T
    sizes = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, sizes = exact + bias.double(), sizes + bias.double().abs()
    error = sizes * (x.shape[1] + 4) * 2.0**-24
    if gated:
        (gate, up), (gate_error, up_error) = exact.chunk(2, -1), error.chunk(2, -1)
        silu = gate / (1 + torch.exp(-gate))
        silu_error = 1.1 * gate_error + 1e-6 * silu.abs()
        exact, error = silu * up, silu_error * (up.abs() + up_error) + silu.abs() * up_error
    return exact, error + EPSILON[dtype] * (exact.abs() + error) + TINY[dtype]


def _linear(weight: Tensor, gated: bool, output_dtype: torch.dtype) -> tuple[Packed, dict[str, Tensor]]:
    method = Packed(weight.shape[0], weight.shape[1], weight.dtype, gated, output_dtype)
    return method, dict(method.transform({"weight": weight}))


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.one_of(st.integers(0, 40), st.integers(90, 100)),
    num_columns=st.integers(1, 150),
    in_size=st.one_of(st.integers(1, 140), st.sampled_from([512, 1030, 2100])),
    dtype=st.sampled_from(DTYPES),
    has_float32_output=st.booleans(),
    has_bias=st.booleans(),
    gated=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def _check_against_float64(
    num_rows: int,
    num_columns: int,
    in_size: int,
    dtype: torch.dtype,
    has_float32_output: bool,
    has_bias: bool,
    gated: bool,
    threads: int,
) -> None:
    out_size = num_columns * 2 if gated else num_columns
    weight = _random(out_size, in_size, dtype=dtype, seed=1)
    bias = _random(out_size, dtype=dtype, seed=2) if has_bias else None
    x = _random(num_rows, in_size, dtype=dtype)
    output_dtype = torch.float32 if has_float32_output else dtype
    torch.set_num_threads(threads)
    method, weights = _linear(weight, gated, output_dtype)
    y = method.forward(x, weights, bias)
    assert y.dtype == output_dtype
    assert y.shape == (num_rows, num_columns)
    exact, error = _expected(x, weight, bias, gated, output_dtype)
    assert torch.all((y.double() - exact).abs() <= error)


def test_products_equal_float64(kernels: Library) -> None:
    _check_against_float64()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_nothing_outside_is_read_or_written(kernels: Library, dtype: torch.dtype, gated: bool) -> None:
    """NaN behind the last columns and rows of x, W, bias and y stays where it is, and gets nowhere else."""
    num_rows, num_columns, in_size, padding = 35, 67, 75, 9
    out_size = 2 * num_columns if gated else num_columns

    def poisoned(*shape: int) -> Tensor:
        outer = torch.full([size + padding for size in shape], torch.nan, dtype=dtype)
        inner = outer[tuple(slice(size) for size in shape)]
        inner.copy_(_random(*shape, dtype=dtype))
        return inner

    x, weight, bias = poisoned(num_rows, in_size), _random(out_size, in_size, dtype=dtype, seed=1), poisoned(out_size)
    _, weights = _linear(weight, gated, dtype)
    y = torch.full((num_rows + padding, num_columns + padding), torch.nan, dtype=dtype)
    code = DTYPE_CODES[str(dtype)]
    pointers = (weights["weight"].data_ptr(), bias.data_ptr(), y.data_ptr())
    sizes = (y.stride(0), num_rows, out_size, in_size)
    kernels.rtp_linear(code, code, gated, x.data_ptr(), x.stride(0), *pointers, *sizes, 1)
    exact, error = _expected(x, weight, bias, gated, dtype)
    assert torch.all((y[:num_rows, :num_columns].double() - exact).abs() <= error)
    assert y[num_rows:].isnan().all()
    assert y[:, num_columns:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("in_size", [75, 2080])
def test_bits_of_a_row_do_not_depend_on_the_others(
    kernels: Library, dtype: torch.dtype, gated: bool, in_size: int
) -> None:
    weight, bias = _random(134, in_size, dtype=dtype, seed=1), _random(134, dtype=dtype, seed=2)
    method, weights = _linear(weight, gated, torch.float32)
    x = _random(512, in_size, dtype=dtype)
    expected = method.forward(x, weights, bias)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for num_rows in (*range(1, 36), 63, 64, 65, 95, 96, 97, 200, 512):
            for first in {0, 5, 512 - num_rows} & set(range(513 - num_rows)):
                rows = slice(first, first + num_rows)
                assert torch.equal(method.forward(x[rows], weights, bias), expected[rows]), (threads, rows)


def test_inputs_with_other_strides(kernels: Library) -> None:
    weight, x = _random(40, 30, dtype=torch.bfloat16), _random(30, 7, dtype=torch.bfloat16).T
    method, weights = _linear(weight, False, torch.float32)
    assert torch.equal(method.forward(x, weights), method.forward(x.contiguous(), weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_and_infinity_stay(kernels: Library, dtype: torch.dtype) -> None:
    weight = torch.eye(8, dtype=dtype)
    method, weights = _linear(weight, False, dtype)
    x = torch.zeros(3, 8, dtype=dtype)
    x[0, 0], x[1, 1] = torch.nan, torch.inf
    y = method.forward(x, weights)
    assert y[0].isnan().all()
    assert y[1, 1] == torch.inf
    assert not y[2].any()


def test_kernels_that_give_wrong_products_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong:
        is_right = False

        def __init__(self, *_: Any) -> None: ...

    monkeypatch.setattr(library, "Library", Wrong)
    library._load.cache_clear()
    try:
        assert library._load(built_levels()[-1]) is None
    finally:
        library._load.cache_clear()
    assert "wrong results" in caplog.text


@pytest.mark.slow
def test_the_check_at_load_notices_wrong_products(tmp_path: Path) -> None:
    """A copy of the source whose sums lack the last step."""
    for path in (PACKAGE / "src").iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    header = tmp_path / "linear_tile.h"
    header.write_text(header.read_text().replace("step < steps;", "step < steps - 1;"))
    command = [*find_compiler(), *FLAGS, "-O1", *LINK_FLAGS, *SOURCES, "-o", "l.so"]
    subprocess.run(command, check=True, cwd=tmp_path)
    amx = ctypes.c_int()
    assert not ctypes.CDLL(str(tmp_path / "l.so")).rtp_linear_start(ctypes.byref(amx))
