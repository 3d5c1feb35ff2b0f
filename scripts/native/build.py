"""Compile engine/modelpack_engine/cpu/native to a library; `make native` and the build hook do.

The environment variable MODELPACK_NATIVE=0 skips it, and MODELPACK_NATIVE=1 makes a failure an
error. Without the library the engine computes by MLX alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "libmodelpack_cpu.so"
PACKAGE = Path("engine", "modelpack_engine", "cpu")

FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-pthread",
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
# Only what `usable_kernels` in program.cpp looks for: some processors with VNNI lack VBMI.
_AVX512 = (
    *_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni",
    "-mprefer-vector-width=512",
)  # fmt: skip
#: The flags of each instruction set that kernels.cpp is compiled for, by machine.
KERNELS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "x86_64": {
        "amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        "avx512_bf16": (*_AVX512, "-mavx512bf16"),
        "avx512": _AVX512,
        "avx2": _AVX2,
        "portable": (),
    },
    "aarch64": {
        "neon_bf16": ("-march=armv8.2-a+dotprod+i8mm+bf16",),
        "neon_dot": ("-march=armv8.2-a+dotprod",),
        "portable": (),
    },
}
_BASELINE = {"x86_64": ("-march=x86-64",), "aarch64": ("-march=armv8-a",)}
_LINK = ("-shared", "-s", "-pthread", "-Wl,--version-script=exports.map", "-Wl,--build-id=none")
# Then only glibc is needed, by whatever compiler it was made.
_STATIC = ("-static-libstdc++", "-static-libgcc")


class NativeError(Exception):
    """The library cannot be built; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Library:
    """A compiled library, and the platform of a wheel that contains it."""

    path: Path
    platform: str


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler, with the machine that it compiles for."""

    command: tuple[str, ...]
    version: str
    machine: str

    def objects(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Return the name, source and flags of each object, the slowest first."""
        common = (*FLAGS, *_BASELINE[self.machine])
        return [
            *(
                (f"kernels_{isa}", "kernels.cpp", (*common, *flags, f"-DMODELPACK_ISA={isa}"))
                for isa, flags in KERNELS[self.machine].items()
            ),
            ("program", "program.cpp", common),
            ("packing", "packing.cpp", common),
        ]

    def run(self, arguments: Iterable[str], cwd: Path) -> None:
        """Run the compiler; raise NativeError with its first error."""
        command = [*self.command, *arguments]
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, errors="replace",
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            error = next((line for line in lines if "error" in line), lines[-1])
            raise NativeError(f"{self.command[0]} failed: {error.strip()[:300]}")


def find_compiler(environ: Mapping[str, str]) -> Compiler:
    """Return $CXX, g++ or clang++; raise NativeError if there is none for Linux."""
    chosen = shlex.split(environ.get("CXX", ""))
    search = environ.get("PATH", os.defpath)
    for command in [chosen] if chosen else [["g++"], ["clang++"]]:
        found = shutil.which(command[0], path=search)
        if found is None:
            continue
        command = [found, *command[1:]]
        try:
            target = _output([*command, "-dumpmachine"], environ)
            version = _output([*command, "--version"], environ)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NativeError(f"{found} does not run: {error}") from None
        machine = target.split("-")[0]
        if "linux" not in target or machine not in KERNELS:
            raise NativeError(f"there are no kernels for {target}")
        return Compiler(tuple(command), version, machine)
    name = f"{chosen[0]} ($CXX)" if chosen else "g++ or clang++"
    raise NativeError(f"no C++ compiler found: install {name}")


def _output(command: list[str], environ: Mapping[str, str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(environ))
    return done.stdout.strip()


def build(root: Path, environ: Mapping[str, str] = os.environ) -> Library | None:
    """Compile the library into build/native; return None after a note if that is not possible.

    Raise NativeError instead if MODELPACK_NATIVE is 1.
    """
    wanted = environ.get("MODELPACK_NATIVE", "")
    if wanted == "0" or (wanted != "1" and sys.platform != "linux"):
        return None
    try:
        compiler = find_compiler(environ)
        return _build(compiler, root / PACKAGE / "native", root / "build" / "native")
    except (NativeError, OSError) as error:
        if wanted == "1":
            raise NativeError(f"cannot build {LIBRARY}: {error}") from None
        print(f"note: {LIBRARY} is not built, CPUs use MLX alone: {error}", file=sys.stderr)
        return None


def install(root: Path, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Compile the library into the package of this source tree, for an editable install."""
    target = root / PACKAGE / LIBRARY
    built = build(root, environ)
    if built is None:
        target.unlink(missing_ok=True)  # of other sources: its functions may differ
        return None
    content = built.path.read_bytes()
    if not target.exists() or target.read_bytes() != content:
        _replace(target, content)  # a process may have the old one mapped
    return target


def _build(compiler: Compiler, sources: Path, out: Path) -> Library:
    """Compile and link what has changed; a digest beside each result says what it is of."""
    out = out / compiler.machine
    out.mkdir(parents=True, exist_ok=True)
    headers = [path.read_bytes() for path in sorted(sources.glob("*.hpp"))]
    started = time.monotonic()

    def compile_object(name: str, source: str, flags: tuple[str, ...]) -> tuple[Path, str]:
        digest = _digest(compiler.version, flags, (sources / source).read_bytes(), *headers)
        made = out / f"{name}.o"
        if not _is_current(made, digest):
            _make(compiler, (*flags, "-c", source), made, digest, sources)
        return made, digest

    with ThreadPoolExecutor(_processors()) as pool:
        objects = list(pool.map(lambda item: compile_object(*item), compiler.objects()))

    made = out / LIBRARY
    exports = (sources / "exports.map").read_bytes()
    digest = _digest(compiler.version, _LINK, exports, *(part.encode() for _, part in objects))
    static = digest + " static"
    if not (_is_current(made, digest) or _is_current(made, static)):
        arguments = (*_LINK, *(str(path) for path, _ in objects))
        try:
            _make(compiler, (*arguments, *_STATIC), made, static, sources)
        except NativeError:  # some systems have the static libraries in a package of their own
            _make(compiler, arguments, made, digest, sources)
        print(f"compiled {LIBRARY} for {compiler.machine} in {time.monotonic() - started:.0f} s")
    return Library(made, _platform(made.read_bytes(), compiler.machine, _is_current(made, static)))


def _make(
    compiler: Compiler, arguments: tuple[str, ...], made: Path, digest: str, cwd: Path
) -> None:
    """Make a file by the compiler, beside others who do the same, and note its digest."""
    with tempfile.TemporaryDirectory(dir=made.parent) as work:
        output = Path(work, made.name)
        compiler.run((*arguments, "-o", str(output)), cwd)
        content = output.read_bytes()
    _note(made).unlink(missing_ok=True)
    _replace(made, content)
    _replace(_note(made), f"{digest}\n{_digest(content)}\n".encode())


def _note(made: Path) -> Path:
    return made.with_name(made.name + ".digest")


def _is_current(made: Path, digest: str) -> bool:
    """Whether the file is there, whole, and made of what has this digest."""
    try:
        return _note(made).read_text() == f"{digest}\n{_digest(made.read_bytes())}\n"
    except OSError:
        return False


def _replace(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).chmod(0o755 if path.name == LIBRARY else 0o644)
    Path(file.name).replace(path)


def _digest(*parts: str | bytes | tuple[str, ...]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(repr(part).encode() + b"\n")
    return whole.hexdigest()


def _platform(library: bytes, machine: str, static: bool) -> str:
    """Return a wheel's platform: manylinux of the newest symbol of glibc that is used (PEP 600).

    A library stripped of its symbol table names versions of glibc only where it requires them.
    """
    minors = [int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)(?=[.\0])", library)]
    if not static or not minors or b"\0GLIBC_ABI_" in library:
        return f"linux_{machine}"
    return f"manylinux_2_{max(17, *minors)}_{machine}"


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


if __name__ == "__main__":
    try:
        install(Path(__file__).parents[2])
    except NativeError as error:
        sys.exit(f"error: {error}")
