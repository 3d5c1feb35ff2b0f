"""The host emulator: kernel bodies compiled by g++, whose lanes run in turns or as threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelpack_engine.kernels.sources import INPUTS, OUTPUTS, PARTS, Body, text
from tests.engine.kernels.signatures import ELEMENTS, Instance, argument_list, names_in_use
from tests.engine.processor import processor_flags
from tests.peers import require

STUBS = Path(__file__).parent / "stubs"
#: Bodies on tensor cores that stubs stand for.
ON_TENSOR_CORES: tuple[Body, ...] = (
    "packed", "packed_row", "packed_strips", "packed_wide", "arrange", "add_norm_arranged",
    "experts_wide", "block_tiles", "block_strips", "digit_strips", "shrink_wide", "expand_wide",
    "delta_tiles", "delta_wide", "state_space_wide",
)  # fmt: skip
#: Those of rows in order, whose texts are also "codes", "affine" and "order".
ARRANGED: tuple[Body, ...] = ("packed_wide", "arrange", "add_norm_arranged")
Array = npt.NDArray[Any]
#: An edit of a text, by its name.
Edit = Callable[[str, str], str]


def unchanged(name: str, source: str) -> str:
    """Return a text unchanged."""
    return source


@dataclass(frozen=True)
class Emulator:
    """A compiled program with some instances of the kernels."""

    program: Path
    instances: tuple[Instance, ...]

    def run(
        self,
        instance: Instance,
        arrays: Mapping[str, Array],
        grid: tuple[int, int, int],
        threads: int,
        directory: Path,
    ) -> subprocess.CompletedProcess[str]:
        """Run one grid (in threadgroups) on `arrays`, which the kernel modifies as on a GPU."""
        directory.mkdir(parents=True, exist_ok=True)
        before = {name: array.tobytes() for name, array in arrays.items()}
        for name, array in arrays.items():
            array.tofile(directory / f"{name}.data")
            np.array(array.shape, np.int32).tofile(directory / f"{name}.shape")
        index = self.instances.index(instance)
        done = subprocess.run(
            [self.program, directory, *map(str, (index, *grid, threads))],
            capture_output=True, text=True, timeout=300, check=False,
            env={"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"},
        )  # fmt: skip
        if done.returncode == 0:
            for name in _changed(instance.body):
                found = np.fromfile(directory / f"{name}.data", arrays[name].dtype)
                if found.tobytes() != before[name]:  # a pool may be given twice
                    arrays[name][...] = found.reshape(arrays[name].shape)
        return done


def build(instances: Sequence[Instance], sanitizers: str = "", edit: Edit = unchanged) -> Emulator:
    """Return a program of `instances` (bodies passed through `edit`) with these sanitizers, if any.

    It is compiled once for each text: programs stay in `.cache/emulators`.
    """
    unique = tuple(dict.fromkeys(instances))
    headers = _header(sanitizers).parent
    program = _compiled(sanitizers, _program(unique, edit), "-x", "c++", "-I", headers)
    return Emulator(program, unique)


def run_here(
    instance: Instance,
    arrays: Mapping[str, Array],
    grid: tuple[int, int, int],
    threads: int,
) -> None:
    """Run one grid within this process, which takes a hundredth of the time of a program."""
    # Kernels read vectors of 16 bytes, but MLX's memory is aligned to 8.
    given = {name: arrays[name].copy() for name in _names(instance.body)}
    shapes = [np.array(array.shape, np.int32) for array in given.values()]
    pointers = ctypes.c_void_p * len(given)
    _loaded(instance)(
        pointers(*(array.ctypes.data for array in given.values())),
        pointers(*(shape.ctypes.data for shape in shapes)),
        (ctypes.c_int * 4)(*grid, threads),
    )
    before = {name: arrays[name].copy() for name in _changed(instance.body)}
    for name, array in before.items():
        if not np.array_equal(given[name], array):  # a pool may be given twice
            arrays[name][...] = given[name]


@lru_cache(maxsize=1024)
def _loaded(instance: Instance) -> Callable[..., None]:
    """Return the function of a library with an instance."""
    sizes = ", ".join(f"sizes[{i}]" for i in range(4))
    source = [
        *_definitions([instance], unchanged),
        'extern "C" __attribute__((visibility("default")))',
        "void run_grid(char** data, int** shapes, const int* sizes) {",
        f"  const Grid grid{{{sizes}}};",
        f"  {_call(instance, 'Given {name}_{{data[{number}], shapes[{number}]}};')}",
        "}",
        "",
    ]
    shared = "-fPIC", "-shared", "-fvisibility=hidden"
    headers = _header("", *shared[:1]).parent
    library = _compiled("", "\n".join(source), "-x", "c++", *shared, "-I", headers)
    found: Callable[..., None] = ctypes.CDLL(str(library)).run_grid
    return found


@cache
def _header(sanitizers: str, *options: str) -> Path:
    """Return emulator.h precompiled, which halves the compile time."""
    text = (STUBS / "emulator.h").read_text()
    return _compiled(sanitizers, text, "-x", "c++-header", *options, name="emulator.h.gch")


@cache
def _faster() -> tuple[str, ...]:
    """Return options for instructions that convert float16, and for a linker of half the time."""
    options = []
    if "f16c" in processor_flags():
        options.append("-mf16c")
    if shutil.which("ld.gold"):
        options.append("-fuse-ld=gold")
    return tuple(options)


def _compiled(sanitizers: str, source: str, *options: str | Path, name: str = "emulator") -> Path:
    """Return what `source` compiles to, from the cache where it has been compiled before."""
    command = [
        require("g++"), "-std=c++17", "-O0" if sanitizers else "-O1", "-Wall", "-pthread",
        "-Wno-unknown-pragmas",
        *(["-g1", f"-fsanitize={sanitizers}", "-DPA_THREADS"] if sanitizers else []),
        "-fno-sanitize-recover=all", *_faster(), *options, "-I", STUBS,
    ]  # fmt: skip
    key = hashlib.sha256("\0".join([*map(str, command), source]).encode()).hexdigest()
    found = Path(os.environ["MODELPACK_CACHE"], "emulators", key[:32], name)
    if not found.is_file():
        found.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=found.parent) as scratch:
            made, written = Path(scratch, name), Path(scratch, "source")
            written.write_text(source)
            done = subprocess.run(
                [*command, written, "-o", made], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[:4000]
            made.replace(found)
    return found


#: Bodies that write states, and snapshots of them, in place.
RECURRENT: tuple[Body, ...] = (
    "state_space", "state_space_wide", "delta_rule", "delta_wide", "convolve", "linear_attention",
)  # fmt: skip


def _changed(body: Body) -> tuple[str, ...]:
    return (
        *OUTPUTS[body],
        *(("k_pool", "v_pool") if body in ("write", "quantise", "rotate", "rotate_decode") else ()),
        *(("state", "pool") if body in RECURRENT else ()),
    )


def _names(body: Body) -> tuple[str, ...]:
    return (*INPUTS[body], *OUTPUTS[body])


def _definitions(instances: Sequence[Instance], edit: Edit) -> list[str]:
    """Return the lines that define the bodies of instances."""
    lines = [
        '#include "emulator.h"',
        text("common"),
        text("blocks"),
        (STUBS / "host.h").read_text(),
    ]
    for body in INPUTS:
        first = next((i for i in instances if i.body == body), None)
        if first is not None:
            arguments = argument_list(body, {}, shape_type="const int*")
            if body in ON_TENSOR_CORES and "struct Dim" not in "".join(lines):
                lines.append((STUBS / "tensor.h").read_text())
                arranged = any(one.body in ARRANGED for one in instances)
                shared = edit if arranged else unchanged
                lines += [
                    shared(part, text(part)) for part in ("codes", "affine", "order", "planes")
                ]
            lines += [
                f"template <{first.parameters()}>",
                f"void {body}(Emu& emu, {arguments}) {{",
                "pa_emu = &emu;" if body in ON_TENSOR_CORES else "",
                *(edit(part, text(part)) for part in PARTS.get(body, (body,))),
                "}",
                *(f"#undef {name}" for name in ("PA_CHUNKS", "PA_EXPANDED", "PA_ROTATES")),
            ]
    return lines


def _program(instances: Sequence[Instance], edit: Edit) -> str:
    lines = _definitions(instances, edit)
    lines += ["int main(int, char** argv) {", "  const char* at = argv[1];"]
    lines += ["  const int index = std::atoi(argv[2]);"]
    lines += ["  const Grid grid{" + ", ".join(f"std::atoi(argv[{i}])" for i in range(3, 7)) + "};"]
    for index, instance in enumerate(instances):
        call = _call(instance, 'Array {name}_(at, "{name}", {changed});')
        lines.append(f"  if (index == {index}) {{ {call} return 0; }}")
    return "\n".join([*lines, "  return 2;", "}", ""])


def _call(instance: Instance, load: str) -> str:
    """Return the launch of an instance, each of whose arrays is defined by `load`."""
    body = instance.body
    types = dict(instance.types)
    loads, passed = [], []
    for number, name in enumerate(_names(body)):
        element = ELEMENTS[body][name]
        changed = str(name in _changed(body)).lower()
        loads.append(load.format(name=name, number=number, changed=changed))
        passed.append(f"{name}_.as<{types.get(element, element)}>()")
        if name in names_in_use(body):
            passed.append(f"{name}_.shape")
    call = f"{body}<{instance.arguments()}>(emu, {', '.join(passed)});"
    return " ".join(loads) + f" launch(grid, [&](Emu& emu) {{ {call} }});"
