"""The BLAS under MLX's CPU backend: the shim's products, and which BLAS is chosen."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack_engine.platform import blas
from tests.engine.processor import processor_flags

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")

ROW_MAJOR, NO_TRANS, TRANS = 101, 111, 112
#: Vectors of 4 floats (the compiler's default), of 8, and of this machine's width.
TARGETS = {"sse": ["-O3"], "avx2": ["-O3", "-mavx2", "-mfma"], "native": ["-O3", *blas.NATIVE]}


def _has_avx2() -> bool:
    return "avx2" in processor_flags()


@pytest.fixture(scope="module", params=sorted(TARGETS))
def shim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The shim, compiled for each width of vectors."""
    import scipy_openblas32

    if request.param == "avx2":
        assert _has_avx2(), "the machines that run these tests have AVX2"
    library = Path(scipy_openblas32.get_lib_dir(), "libscipy_openblas.so")
    target = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(
        ["cc", *TARGETS[request.param], "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
         str(Path(blas.__file__).with_name("blas_shim.c")), "-o", str(target), str(library),
         f"-Wl,-rpath,{library.parent}"],
        check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(target), mode=ctypes.RTLD_LOCAL)
    loaded.cblas_sgemm.restype = None
    return loaded


def multiply(
    shim: ctypes.CDLL,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    *,
    trans: tuple[bool, bool],
    alpha: float,
    beta: float,
) -> None:
    """Compute c = alpha * op(a) @ op(b) + beta * c in place; rows may be padded."""
    rows, inner = a.shape[::-1] if trans[0] else a.shape
    pointer = ctypes.POINTER(ctypes.c_float)
    strides = [x.strides[0] // 4 for x in (a, b, c)]
    a_, b_, c_ = (x.ctypes.data_as(pointer) for x in (a, b, c))
    flags = [TRANS if flag else NO_TRANS for flag in trans]
    shim.cblas_sgemm(
        ROW_MAJOR, *flags, rows, c.shape[1], inner, ctypes.c_float(alpha), a_, strides[0],
        b_, strides[1], ctypes.c_float(beta), c_, strides[2],
    )  # fmt: skip


def padded(generator: np.random.Generator, rows: int, cols: int, padding: int) -> np.ndarray:
    """Return a random matrix inside a wider one."""
    return generator.standard_normal((rows, cols + padding), np.float32)[:, :cols]


@pytest.mark.sample(1)
@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    inner=st.sampled_from([1, 3, 4, 7, 8, 15, 16, 17, 31, 64, 100]),
    paddings=st.tuples(*[st.integers(0, 3)] * 3),
    trans=st.tuples(st.booleans(), st.booleans()),
    factors=st.sampled_from([(1.0, 0.0), (0.5, 0.0), (1.0, 1.0), (-2.0, 0.25)]),
)
def test_products(
    shim: ctypes.CDLL,
    rows: int,
    cols: int,
    inner: int,
    paddings: tuple[int, int, int],
    trans: tuple[bool, bool],
    factors: tuple[float, float],
) -> None:
    generator = np.random.default_rng(1)
    a = padded(generator, *((inner, rows) if trans[0] else (rows, inner)), paddings[0])
    b = padded(generator, *((cols, inner) if trans[1] else (inner, cols)), paddings[1])
    whole = generator.standard_normal((rows, cols + paddings[2]), np.float32)
    if factors[1] == 0:
        whole[:, :cols] = np.nan  # with beta 0, the previous values are ignored
    before = whole.copy()
    c = whole[:, :cols]
    expected = factors[0] * (a.T if trans[0] else a).astype(float) @ (b.T if trans[1] else b)
    if factors[1]:
        expected += factors[1] * before[:, :cols]
    multiply(shim, a, b, c, trans=trans, alpha=factors[0], beta=factors[1])
    np.testing.assert_allclose(c, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(whole[:, cols:], before[:, cols:])


def test_a_row_is_the_same_alone_and_among_others(shim: ctypes.CDLL) -> None:
    """Otherwise the output of a request would depend on concurrent requests."""
    generator = np.random.default_rng(2)
    x, weight = padded(generator, 16, 576, 0), padded(generator, 50, 576, 0)
    results = []
    for rows in range(1, 17):
        c = np.zeros((rows, 50), np.float32)
        multiply(shim, x[:rows], weight, c, trans=(False, True), alpha=1, beta=0)
        results.append(c[0])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def run(code: str, **environment: str) -> str:
    """Run Python code in a new process; return its output."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    return done.stdout.strip()


CHOSEN = (
    "from modelpack_engine.platform import blas; found = blas.prepare();"
    " print(found.kind.name, found.note)"
)


def test_the_shim_is_built_once(tmp_path: Path) -> None:
    assert run(CHOSEN, XDG_CACHE_HOME=str(tmp_path)) == "SHIM"
    (built,) = tmp_path.rglob("shim-*.so")
    before = built.stat().st_mtime_ns
    assert run(CHOSEN, XDG_CACHE_HOME=str(tmp_path)) == "SHIM"
    assert built.stat().st_mtime_ns == before


def test_without_a_compiler(tmp_path: Path) -> None:
    code = "from modelpack_engine.platform import blas; blas._SYSTEM_NAMES = ()\n" + CHOSEN
    said = run(code, XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))
    assert said.startswith("BUNDLED no OpenBLAS")
    assert "C compiler" in said


def test_another_processor_gets_a_shim_of_its_own(tmp_path: Path) -> None:
    assert run(CHOSEN, XDG_CACHE_HOME=str(tmp_path)) == "SHIM"
    code = (
        "from modelpack_engine.platform import blas; blas._processor = lambda: 'another'\n" + CHOSEN
    )
    assert run(code, XDG_CACHE_HOME=str(tmp_path)) == "SHIM"
    assert len(list(tmp_path.rglob("shim-*.so"))) == 2


def test_too_late(tmp_path: Path) -> None:
    said = run("import mlx.core\n" + CHOSEN, XDG_CACHE_HOME=str(tmp_path))
    assert "imported before the engine" in said
