"""NVIDIA's run-time compiler (NVRTC), which MLX's build for CUDA brings along."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from modelpack_engine.errors import EngineError

_SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
_HEADER = "cuda_fp16.h"


class CompileError(EngineError):
    """NVRTC is not there, or does not take a text."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel's machine code, and the symbol by which it is found there."""

    code: bytes
    symbol: str


class Nvrtc:
    """The compiler, with CUDA's own headers."""

    def __init__(self, library: ctypes.CDLL, include: Path) -> None:
        self._library = library
        self._include = include

    def compile(self, text: str, name: str, architecture: str) -> Compiled:
        """Compile `text` for an `architecture` such as sm_90a; `name` is the kernel's, qualified.

        Raises `CompileError` with the compiler's log.
        """
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None
        )
        try:
            self._call("nvrtcAddNameExpression", program, name.encode())
            options = [
                b"--device-as-default-execution-space",  # as MLX has it
                f"--gpu-architecture={architecture}".encode(),
                f"--include-path={self._include}".encode(),
            ]
            array = (ctypes.c_char_p * len(options))(*options)
            try:
                self._call("nvrtcCompileProgram", program, len(options), array)
            except CompileError as error:
                log = self._read("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program)
                raise CompileError(log.rstrip(b"\0").decode(errors="replace")) from error
            symbol = ctypes.c_char_p()
            self._call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(symbol))
            assert symbol.value is not None
            code = self._read("nvrtcGetCUBINSize", "nvrtcGetCUBIN", program)
            return Compiled(code, symbol.value.decode())
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _read(self, size_of: str, get: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(size_of, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(get, program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise CompileError(f"{function} ends with {status}")


@cache
def find() -> Nvrtc:
    """Return this machine's compiler; raises `CompileError` if it or its headers are not there."""
    folders = list(_folders())
    include = next((f / "include" for f in folders if (f / "include" / _HEADER).is_file()), None)
    if include is None:
        raise CompileError(f"{_HEADER} is in none of {', '.join(map(str, folders)) or 'no folder'}")
    # The name alone finds the one that MLX has loaded.
    for place in ("", *(f"{folder / 'lib'}/" for folder in folders)):
        for name in _SONAMES:
            try:
                return Nvrtc(ctypes.CDLL(place + name), include)
            except OSError:
                continue
    raise CompileError(f"there is no {' or '.join(_SONAMES)}")


def _folders() -> Iterator[Path]:
    """Yield where CUDA may be: in Python packages, then where its variables point."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec and spec.submodule_search_locations) or ():
        yield from sorted(path for path in Path(root).iterdir() if path.is_dir())
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if place := os.environ.get(variable):
            yield Path(place)
    yield Path("/usr/local/cuda")
