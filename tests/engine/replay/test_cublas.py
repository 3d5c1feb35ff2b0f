"""cuBLAS, in place of which a library counts the calls."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from modelpack_engine.platform import cublas
from modelpack_engine.platform.cublas import WORKSPACE_BYTES, Cublas, Shape
from modelpack_engine.platform.driver import DriverError

MAKERS = {
    "cublasLtCreate", "cublasLtMatmulPreferenceCreate", "cublasLtMatmulDescCreate",
    "cublasLtMatrixLayoutCreate",
}  # fmt: skip


class Library:
    """Records calls, with what pointers point to; `codes` are the results of functions."""

    def __init__(self, found: int = 1, state: int = 0, **codes: int) -> None:
        self.found, self.state, self.codes, self.missing = found, state, codes, ""
        self.calls = list[tuple[Any, ...]]()
        self._handles = iter(range(100, 200))

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cublas") or name == self.missing:
            raise AttributeError(name)

        def function(*arguments: Any) -> int:
            given = list(arguments)
            if name in MAKERS:
                given.pop(0)._obj.value = next(self._handles)
            if name == "cublasLtMatmulAlgoGetHeuristic":
                given.pop()._obj.value = self.found
                choice = given.pop()._obj
                choice.algorithm[0], choice.workspace_bytes = 77, 4096
                choice.state = self.state
            values = [getattr(each, "_obj", each) for each in given]
            self.calls.append(
                (name, *(getattr(each, "value", getattr(each, "algorithm", each))
                         for each in values))
            )  # fmt: skip
            return self.codes.get(name, 0)

        self.__dict__[name] = function
        return function


SHAPE = Shape(rows=96, outputs=512, inputs=256, type="bfloat16")


def made(library: Library) -> Cublas:
    return Cublas(library)  # type: ignore[arg-type]


def test_a_matmul() -> None:
    """MLX's description: rows of arrays are columns of cuBLAS, and the weights are transposed."""
    library = Library()
    found = made(library)
    assert library.calls == [
        ("cublasLtCreate",),
        ("cublasLtMatmulPreferenceCreate",),
        ("cublasLtMatmulPreferenceSetAttribute", 101, 1, WORKSPACE_BYTES, 8),
    ]
    library.calls.clear()
    found.prepare(SHAPE)
    found.prepare(SHAPE)
    assert library.calls == [
        ("cublasLtMatmulDescCreate", 68, 0),
        ("cublasLtMatmulDescSetAttribute", 102, 3, 1, 4),
        ("cublasLtMatrixLayoutCreate", 14, 256, 512, 256),
        ("cublasLtMatrixLayoutCreate", 14, 256, 96, 256),
        ("cublasLtMatrixLayoutCreate", 14, 512, 96, 512),
        ("cublasLtMatmulAlgoGetHeuristic", 100, 102, 103, 104, 105, 105, 101, 1),
    ]
    library.calls.clear()
    found.multiply(SHAPE, 7, 8, None, 9, 10, 11)
    [(name, *arguments, algorithm, workspace, size, stream)] = library.calls
    assert name == "cublasLtMatmul"
    assert arguments == [100, 102, 1.0, 8, 103, 7, 104, 0.0, 9, 105, 9, 105]
    assert (algorithm[0], workspace, size, stream) == (77, 10, 4096, 11)


def test_a_matmul_and_a_bias() -> None:
    """The descriptions are shared: the address of the bias is set before each call."""
    library, shape = Library(), replace(SHAPE, bias=True)
    found = made(library)
    library.calls.clear()
    found.prepare(shape)
    found.prepare(SHAPE)
    descriptions = [each for each in library.calls if each[0].startswith("cublasLtMatmulDesc")]
    assert descriptions == [
        ("cublasLtMatmulDescCreate", 68, 0),
        ("cublasLtMatmulDescSetAttribute", 102, 3, 1, 4),
        ("cublasLtMatmulDescSetAttribute", 102, 7, 4, 4),
        ("cublasLtMatmulDescSetAttribute", 102, 8, 256, 8),
        ("cublasLtMatmulDescCreate", 68, 0),
        ("cublasLtMatmulDescSetAttribute", 106, 3, 1, 4),
    ]
    library.calls.clear()
    found.multiply(shape, 7, 8, 12, 9, 10, 11)
    found.multiply(SHAPE, 7, 8, None, 9, 10, 11)
    assert [each[:5] for each in library.calls] == [
        ("cublasLtMatmulDescSetAttribute", 102, 8, 12, 8),
        ("cublasLtMatmul", 100, 102, 1.0, 8),
        ("cublasLtMatmul", 100, 106, 1.0, 8),
    ]


def test_the_structure_of_a_choice() -> None:
    """That of cublasLt.h: 64 bytes of the algorithm, its workspace, a state, waves, and a rest."""
    assert ctypes.sizeof(cublas._Choice) == 96
    assert cublas._Choice.workspace_bytes.offset == 64
    assert cublas._Choice.state.offset == 72


@pytest.mark.parametrize(
    ("library", "problem"),
    [
        (Library(found=0), "cuBLAS cannot multiply Shape"),
        (Library(state=15), "cuBLAS cannot multiply Shape"),
        (Library(cublasLtMatmulAlgoGetHeuristic=15), "cuBLAS status 15"),
        (Library(cublasLtMatrixLayoutCreate=7), "cublasLtMatrixLayoutCreate failed"),
    ],
)
def test_a_shape_that_cannot_be_multiplied(library: Library, problem: str) -> None:
    found = made(library)
    with pytest.raises(DriverError, match=problem):
        found.prepare(SHAPE)


def test_an_old_library() -> None:
    library = Library()
    library.missing = "cublasLtMatmul"
    with pytest.raises(DriverError, match="cuBLAS has no cublasLtMatmul"):
        made(library)


def test_the_library_that_is_loaded_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own, not another version in the loader's path."""
    asked = list[tuple[str, bool]]()

    def load(name: str, mode: int) -> Library:
        asked.append((name, mode == os.RTLD_NOLOAD))
        if asked[-1] != ("libcublasLt.so.12", True):
            raise OSError(f"{name}: cannot open shared object file")
        return Library()

    monkeypatch.setattr(ctypes, "CDLL", load)
    cublas.find_cublas.cache_clear()
    cublas.find_cublas()
    cublas.find_cublas.cache_clear()
    assert asked == [("libcublasLt.so.13", True), ("libcublasLt.so.12", True)]


def test_a_machine_without_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, mode: int) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    cublas.find_cublas.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(DriverError, match="cuBLAS is not found: libcublasLt"):
        cublas.find_cublas()
