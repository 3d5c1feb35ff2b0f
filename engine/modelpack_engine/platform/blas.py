"""A fast BLAS for MLX's CPU backend on Linux.

The MLX wheel contains the reference BLAS, which is several times slower than OpenBLAS. MLX binds
`cblas_sgemm` when its library is loaded, and looks in the global scope first: a BLAS that is loaded
there before `mlx.core` is imported replaces it. The order of preference is scipy-openblas32 through
a small shim (built once, with a C compiler), the system's OpenBLAS, and MLX's own.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
_SHIM_SOURCE = Path(__file__).with_name("blas_shim.c")
_SYSTEM_NAMES = ("libopenblas.so.0", "libopenblas.so")


class BlasKind(StrEnum):
    """The BLAS that multiplies matrices on the CPU."""

    SHIM = "scipy-openblas32"
    SYSTEM = "system OpenBLAS"
    BUNDLED = "MLX's own"


@dataclass(frozen=True, slots=True)
class Blas:
    """The BLAS that `prepare` chose; `note` says how to get a faster one, if possible."""

    kind: BlasKind
    path: str | None = None
    note: str = ""


_prepared: Blas | None = None


def load_export(package: str, exports: Mapping[str, str], name: str) -> Any:
    """Import `name` from its module in `exports`, and set it in `package`.

    It serves the `__getattr__` of packages whose modules import MLX: it chooses a BLAS before the
    import. Raises `AttributeError` for other names.
    """
    if name not in exports:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    prepare()
    value = getattr(importlib.import_module(exports[name]), name)
    setattr(sys.modules[package], name, value)
    return value


def prepare() -> Blas:
    """Load the best BLAS once; call this before the first import of `mlx.core`.

    OpenBLAS gets one thread unless OPENBLAS_NUM_THREADS is set: on a busy machine its threads wait
    for each other, and a token takes many times as long.
    """
    global _prepared
    if _prepared is None:
        _prepared = _choose()
        if _prepared.note:
            _log.warning("%s", _prepared.note)
    return _prepared


def leave_bundled() -> None:
    """Make `prepare` load nothing, to measure MLX's own BLAS."""
    global _prepared
    _prepared = Blas(BlasKind.BUNDLED)


def _choose() -> Blas:
    if not sys.platform.startswith("linux"):
        return Blas(BlasKind.BUNDLED)  # macOS: MLX uses Accelerate
    if "mlx.core" in sys.modules:
        return Blas(
            BlasKind.BUNDLED,
            note="mlx.core was imported before the engine's modules and uses its slow BLAS: "
            "run `from modelpack_engine import Engine` first",
        )
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    problem = "install the extra 'engine' (scipy-openblas32) and a C compiler"
    shim = None
    try:
        shim = _shim()
    except (OSError, subprocess.SubprocessError) as error:
        problem = f"the BLAS shim could not be built: {error}"
    for kind, names in ((BlasKind.SHIM, (shim,)), (BlasKind.SYSTEM, _SYSTEM_NAMES)):
        for name in names:
            if name is not None and _load(name):
                return Blas(kind, name)
    return Blas(
        BlasKind.BUNDLED,
        note=f"no OpenBLAS, so the CPU computes several times slower: {problem}, "
        "or install the system's libopenblas",
    )


def _load(name: str) -> bool:
    try:
        library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return all(hasattr(library, f"cblas_{kind}gemm") for kind in "sdc")


def _shim() -> str | None:
    """Return the path of the shim, built if needed; None without OpenBLAS or a compiler."""
    found = importlib.util.find_spec("scipy_openblas32")
    if found is None or found.origin is None:
        return None
    library = Path(found.origin).parent / "lib" / "libscipy_openblas.so"
    if not library.exists():
        return None
    from platformdirs import user_cache_path

    source = _SHIM_SOURCE.read_bytes()
    key = hashlib.sha256(source + f"{library} {_processor()} {NATIVE}".encode()).hexdigest()[:16]
    target = user_cache_path("modelpack") / "blas" / f"shim-{key}.so"
    if target.exists():
        return str(target)
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch, "shim.so")
        _compile(compiler, library, built)
        built.replace(target)
    return str(target)


#: Options for this processor. GCC's tuning for some of AMD's avoids fused multiply-adds in some
#: loops only, so that a row's result would depend on how many rows there are.
NATIVE = ["-march=native", "-mtune=generic"]


def _compile(compiler: str, library: Path, target: Path) -> None:
    """Compile the shim for this processor, or for its architecture if the compiler cannot."""
    parts = [str(_SHIM_SOURCE), "-o", str(target), str(library), f"-Wl,-rpath,{library.parent}"]
    for options in (NATIVE, []):
        command = [compiler, "-O3", "-shared", "-fPIC", *options, *parts]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            return
        except subprocess.CalledProcessError:
            if not options:
                raise


def _processor() -> str:
    """Return the processor's model and features: machines may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    wanted = ("model name", "flags", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
