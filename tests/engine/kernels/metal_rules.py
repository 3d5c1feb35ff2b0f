"""Checks of Metal's rules for a kernel, by clang with C++ for OpenCL.

Metal's address spaces are OpenCL's: device is __global, constant is __constant, and threadgroup is
__local. Both languages forbid conversions of pointers between address spaces, and shared memory
that is not declared in the outermost scope of a kernel; array sizes must be constant. So clang,
which is installed from a wheel, finds the errors that a Mac would find. It also measures shared
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from modelpack_engine.kernels.sources import kernel_source
from tests.engine.kernels.emulator import STUBS
from tests.engine.kernels.signatures import Instance, argument_list

_ATTRIBUTES = {
    "thread_index_in_simdgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "thread_position_in_grid": "uint3",
}
_WARNING = 2


@dataclass(frozen=True)
class Verdict:
    """The errors in a kernel, and the bytes of threadgroup memory that it declares."""

    problems: tuple[str, ...]
    shared_bytes: int


def judge(
    instance: Instance,
    constant: Sequence[str] = (),
    *,
    edit: tuple[str, str] | None = None,
) -> Verdict:
    """Compile an instance whose inputs in `constant` have fewer than 8 elements.

    `edit` replaces a text, which must be in the body, by another.
    """
    body, split = instance.body, bool(dict(instance.constants).get("SPLIT"))
    source = kernel_source(body, "metal", split=split)
    text = source.source
    if edit is not None:
        assert edit[0] in text, f"{edit[0]!r} is no longer in the body"
        text = text.replace(*edit)
    spaces = dict.fromkeys(source.inputs, "device") | dict.fromkeys(constant, "constant")
    arguments = argument_list(body, spaces, shape_type="const constant int*", output_space="device")
    if body in ("decode", "rotate_decode") and not split:
        arguments = arguments.replace(", device float* stats", "")
    attributes = [f"{kind} {name}" for name, kind in _ATTRIBUTES.items() if name in text]
    lines = [(STUBS / "opencl.h").read_text(), source.header]
    lines += [f"typedef {c_type} {name};" for name, c_type in instance.types]
    for name, value in instance.constants:
        kind = "bool" if isinstance(value, bool) else "int"
        lines.append(f"constexpr {kind} {name} = {int(value)};")
    lines.append(f"kernel void checked({', '.join([arguments, *attributes])}) {{\n{text}\n}}")
    return _compiled("\n".join(lines))


@cache
def _compiled(program: str) -> Verdict:
    from clang import cindex

    unit = cindex.Index.create().parse(
        "kernel.clcpp",
        args=["-x", "clcpp", "-cl-std=clc++", "-cl-no-stdinc", "-target", "spir64", "-Wall",
              "-Wno-unused", "-Wno-unknown-pragmas"],
        unsaved_files=[("kernel.clcpp", program)],
    )  # fmt: skip
    problems = tuple(
        f"{found.location.line}: {found.spelling}"
        for found in unit.diagnostics
        if found.severity >= _WARNING
    )
    return Verdict(problems, sum(_shared(unit.cursor)))


def _shared(cursor: Any) -> list[int]:
    """Return the sizes of variables in threadgroup memory, below a node of the syntax tree."""
    found = []
    for child in cursor.get_children():
        if child.kind.name == "VAR_DECL" and "__local" in child.type.spelling.split("[")[0]:
            found.append(child.type.get_size())
        found += _shared(child)
    return found
