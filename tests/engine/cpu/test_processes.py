"""The library in a process: its threads, its memory, and arguments that it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from modelpack_engine.cpu import library as native
from modelpack_engine.cpu.library import (
    CacheType,
    Code,
    Matrix,
    Operation,
    Rope,
    Source,
    library,
)
from modelpack_engine.platform import device
from scripts.native.build import KERNELS
from tests.engine.cpu.programs import (
    INSTRUCTION_SETS,
    LOGITS,
    Program,
    Steps,
    identity,
    operation,
    random_rows,
    usable,
)
from tests.engine.cpu.tiny_model import TinyModel
from tests.peers import require

pytestmark = pytest.mark.usefixtures("built")
ROOT = Path(__file__).parents[3]
NATIVE = Path(native.__file__).parent / "native"


def python(*arguments: str, **environment: str) -> str:
    """Run Python in the repository's root; return its output."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.long
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """They are equal bit for bit: threads share tiles and rows, and no sum has parts."""
    outputs = {}
    for threads in (1, 2, 5):
        number, *outputs[threads] = python(
            "-m", "tests.engine.cpu.tiny_model", str(native.PATH), str(threads), *usable()
        ).splitlines()
        assert int(number) == threads
    assert outputs[1] == outputs[2] == outputs[5]
    assert len(outputs[1]) == len(usable())


def test_two_threads_of_python() -> None:
    """Programs run one after the other, whether threads share one or each has its own."""
    models = [TinyModel(), TinyModel()]
    expected = models[0].run()
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(models[i % 2].run) for i in range(12)]
        for run in runs:
            np.testing.assert_array_equal(run.result(), expected)


AT_EXIT = """
import os, sys, threading
from tests.engine.cpu.tiny_model import TinyModel
from tests.peers import require

model = TinyModel()
model.run(steps=1)
started = threading.Event()

def forever():
    while True:
        model.run(steps=1)
        started.set()

if sys.argv[1] == "fork":
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    threading.Thread(target=forever, daemon=True).start()
    started.wait()
"""


IN_A_CHILD = """
import os, sys
from tests.engine.cpu.tiny_model import TinyModel

model = TinyModel()
expected = model.run(steps=1)
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert (model.run(steps=1) == expected).all()
assert (TinyModel().run(steps=1) == expected).all()
"""


def test_a_child_of_a_fork_runs_programs() -> None:
    """The parent's threads are not in it: it starts its own."""
    python("-W", "ignore", "-c", IN_A_CHILD)


@pytest.mark.parametrize("how", ["fork", "daemon"])
def test_a_process_ends(how: str) -> None:
    """Also the child of a fork that computes nothing, and while a thread runs a program."""
    python("-W", "ignore", "-c", AT_EXIT, how)


@pytest.mark.parametrize(
    ("usable_processors", "cores"), [({0, 1, 2, 3}, 2), ({0, 2, 3}, 2), ({1}, 1), ({0, 9}, 2)]
)
def test_processors_of_one_core_count_once(
    monkeypatch: pytest.MonkeyPatch, usable_processors: set[int], cores: int
) -> None:
    """Of two cores with two processors each; Linux says nothing about processor 9."""

    def read_text(path: Path) -> str:
        number = int(path.parts[-3].removeprefix("cpu"))
        if number > 3:
            raise FileNotFoundError(path)
        return f"{number // 2 * 2}-{number // 2 * 2 + 1}\n"

    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: usable_processors)
    monkeypatch.setattr(device.Path, "read_text", read_text)
    assert device.usable_cores() == cores


#: The flags of each instruction set, in the order of `INSTRUCTION_SETS`.
FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-march=x86-64-v4 -mavx512vnni -mprefer-vector-width=512",
    "avx512_bf16": "-march=x86-64-v4 -mavx512vnni -mavx512bf16 -mprefer-vector-width=512",
    "amx": "-march=x86-64-v4 -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16"
    " -mprefer-vector-width=512",
    **{name: " ".join(flags) for name, flags in KERNELS["aarch64"].items() if flags},
}


def build(directory: Path, sanitizers: str, instruction_sets: list[str]) -> Path:
    """Compile the library with sanitizers; the other instruction sets use portable code."""
    other = [name for name in INSTRUCTION_SETS if name not in instruction_sets]
    stubs = "".join(
        f"const Kernels* kernels_{n}() {{ return kernels_portable(); }} " for n in other
    )
    source = directory / "stubs.cpp"
    source.write_text(f'#include "kernels.hpp"\nnamespace modelpack {{ {stubs}}}\n')
    compiler = [
        require("g++"), "-std=c++17", "-O1", "-g1", "-fPIC", "-w", f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all", "-fno-trapping-math", "-fno-math-errno", "-I", NATIVE,
    ]  # fmt: skip
    objects = []
    for name in instruction_sets:
        objects.append(directory / f"{name}.o")
        subprocess.run(
            [*compiler, *FLAGS[name].split(), f"-DMODELPACK_ISA={name}", "-c",
             NATIVE / "kernels.cpp", "-o", objects[-1]],
            check=True, timeout=300,
        )  # fmt: skip
    library = directory / "library.so"
    subprocess.run(
        [*compiler, "-shared", NATIVE / "program.cpp", NATIVE / "packing.cpp", source, *objects,
         "-o", library, "-pthread"],
        check=True, timeout=300,
    )  # fmt: skip
    return library


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="preloads a sanitizer")
def test_a_model_under_sanitizers(tmp_path: Path) -> None:
    """No access out of bounds and nothing undefined, in portable code and the processor's best."""
    names = list(dict.fromkeys(["portable", usable()[-1]]))
    path = build(tmp_path, "address,undefined", names)
    preload = subprocess.run(
        [require("g++"), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    output = python(
        "-m", "tests.engine.cpu.tiny_model", str(path), "2", *names,
        LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0", PYTHONMALLOC="malloc",
    )  # fmt: skip
    assert len(output.splitlines()) == 1 + len(names)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_freed() -> None:
    """Of programs and matrices that were used: 40 MB each time."""
    data = random_rows(Source.F32, 1024, 1024, 0)

    def use() -> None:
        matrix = Matrix(Source.F32, 1024, 1024, data)
        made = [
            operation(Code.EMBED, output=0, matrix=[matrix]),
            operation(Code.MULTIPLY, input=0, output=1, matrix=[matrix]),
        ]
        program = Program(made, [1024, 1024], rows=1024, columns=1024)
        assert program.run(np.arange(2), np.empty((2, 1024), np.float32)) == 0

    for _ in range(3):
        use()
    before = resident()
    for _ in range(20):
        use()
    assert resident() - before < 20 << 20


@pytest.mark.parametrize(
    ("source", "rows", "columns"),
    [(99, 16, 32), (-1, 16, 32), (Source.F32, 16, 33), (Source.F32, 0, 32), (Source.F32, -1, 32),
     (Source.F32, 16, 0), (Source.F32, 16, -32), (Source.F16, 16, 16), (Source.Q8_0, 16, 48),
     (Source.Q4_K, 16, 32), (Source.Q6_K, 16, 128), (Source.Q4_K, 16, 257)],
)  # fmt: skip
def test_a_matrix_that_has_no_layout(source: int, rows: int, columns: int) -> None:
    data = np.zeros(1 << 16, np.uint8)
    for element in (1, 2, 4):
        size = max(0, rows * columns * element)
        assert not library().mp_matrix_new(source, rows, columns, data.ctypes.data, size)


@pytest.mark.parametrize("size", [0, 32 * 4 * 7, 32 * 4 * 8 - 1, 32 * 4 * 8 + 1])
def test_a_matrix_of_another_size_than_its_data(size: int) -> None:
    data = np.zeros(1 << 16, np.uint8)
    assert not library().mp_matrix_new(Source.F32, 8, 32, data.ctypes.data, size)


def test_a_matrix_that_does_not_fit_in_memory() -> None:
    data = np.zeros(1, np.uint8)
    rows, columns = 2**31 - 1, 2**31 - 32
    size = (rows * columns * 4) % 2**64
    assert not library().mp_matrix_new(Source.F32, rows, columns, data.ctypes.data, size)


def test_a_program_that_does_not_fit_in_memory() -> None:
    assert not Program([], [2**31 - 1], rows=2**31 - 1, columns=32).pointer


@pytest.mark.parametrize(
    "field", [{"rows": 0}, {"rows": -1}, {"columns": 0}, {"columns": -5}], ids=str
)
def test_programs_of_no_size(field: dict[str, int]) -> None:
    assert not Program([], [32], **{"rows": 4, "columns": 32} | field).pointer


@pytest.mark.parametrize("code", [Code.ROTATE, Code.ATTEND])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 0, 64), (4, 3, 64), (4, 2, 40), (4, 2, 0), (4, 2, 272)]
)
def test_heads_that_the_kernels_do_not_have(
    code: Code, heads: int, kv_heads: int, dim: int
) -> None:
    made = operation(code, heads=heads, kv_heads=kv_heads, dim=dim, cache=CacheType.F32)
    assert not Program([made], [4096], rows=4, columns=32).pointer


@pytest.mark.parametrize(("rope", "dims"), [(1, 64), (0, 66), (0, 512), (0, 25), (0, -2)])
def test_rotations_that_a_head_has_no_room_for(rope: int, dims: int) -> None:
    frequencies = np.ones(256, np.float32)
    made = operation(Code.ROTATE, heads=2, kv_heads=1, dim=64, rope=rope, cache=CacheType.F32)
    ropes = [Rope(dims, 0, 1.0, 0, frequencies.ctypes.data)]
    assert not Program([made], [256], rows=4, columns=32, ropes=ropes).pointer


def small_program() -> Program:
    made: list[Operation] = [
        operation(Code.EMBED, output=0, matrix=[identity(32)]),
        operation(Code.MULTIPLY, input=0, output=LOGITS, matrix=[identity(32)]),
    ]
    return Program(made, [32], rows=4, columns=32)


@pytest.mark.parametrize("rows", [0, 5, 1000])
def test_steps_of_a_wrong_size(rows: int) -> None:
    logits = np.full((max(rows, 1), 32), 7, np.float32)
    assert small_program().run(np.zeros(rows, np.int32), logits) != 0
    assert (logits == 7).all()


def test_more_samples_than_rows_of_the_program() -> None:
    logits = np.full((5, 32), 7, np.float32)
    steps = Steps(sampled=np.zeros(5, np.int32))
    assert small_program().run(np.zeros(2, np.int32), logits, steps) != 0


def test_unknown_kernels() -> None:
    before = library().mp_kernels()
    for name in ("", "avx", "neon" if before.startswith(b"avx") else "avx2"):
        assert library().mp_use_kernels(name.encode()) != 0
    assert library().mp_kernels() == before
