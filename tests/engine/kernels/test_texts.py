"""The Metal and CUDA sources: parsed by g++ with stub headers, and checked for Metal's rules."""

from __future__ import annotations

import re
import subprocess

import pytest

from modelpack_engine.kernels.quantised import Quantisation
from modelpack_engine.kernels.sources import (
    INPUTS,
    Backend,
    Body,
    body_text,
    kernel_source,
    text,
)
from tests.engine.kernels.cases import CASES
from tests.engine.kernels.emulator import STUBS
from tests.engine.kernels.signatures import (
    Instance,
    argument_list,
    draw_instance,
    names_in_use,
    quantise_instance,
    write_instance,
)
from tests.peers import require

#: Thread attributes that MLX passes to a Metal kernel that names them.
ATTRIBUTES = {
    "thread_index_in_simdgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "thread_position_in_grid": "uint3",
}
BODIES: tuple[Body, ...] = ("decode", "merge", "write", "quantise", "draw")


def instances(body: Body) -> list[Instance]:
    found = {i: None for case in CASES for i in case.instances if i.body == body}
    if body == "write":
        found = {write_instance(64, 32, rows="float", pool="bfloat16_t"): None}
    if body == "quantise":
        kinds = [Quantisation(8, 64), Quantisation(4, 32)]
        found = {quantise_instance(128, 64, kind, rows="bfloat16_t"): None for kind in kinds}
    if body == "draw":
        found = {draw_instance(vocab_size): None for vocab_size in (128256, 50257)}
    return list(found)


def metal_program(body: Body) -> str:
    """Return the source that MLX generates for Metal: a template and its instances."""
    lines = ['#include "metal.h"', text("common")]
    spaces = dict.fromkeys(INPUTS[body], "device")
    spaces |= {"sinks": "constant", "written": "constant", "context_lens": "constant"}
    for split in (False, True) if body == "decode" else (False,):
        source = kernel_source(body, "metal", split=split)
        wanted = [
            i for i in instances(body) if body != "decode" or dict(i.constants)["SPLIT"] == split
        ]
        name = f"{body}_{split}"
        arguments = argument_list(
            body, spaces, shape_type="const constant int*", output_space="device"
        )
        if "stats" not in source.outputs:
            arguments = (
                arguments.replace(", device float* stats", "") if body == "decode" else arguments
            )
        attributes = ", ".join(f"{t} {n}" for n, t in ATTRIBUTES.items() if n in source.source)
        lines.append(f"template <{wanted[0].parameters()}>")
        lines.append(f"void {name}({arguments}, {attributes}) {{\n{source.source}\n}}")
        for instance in wanted:
            lines.append(
                f"template decltype({name}<{instance.arguments()}>) {name}<{instance.arguments()}>;"
            )
    return "\n".join(lines)


def cuda_program(body: Body) -> str:
    """Return the source that MLX generates for CUDA: a function for each instance."""
    lines = ['#include "cuda.h"', text("common"), "namespace mlx::core::cu {"]
    for index, instance in enumerate(instances(body)):
        split = bool(dict(instance.constants).get("SPLIT"))
        source = kernel_source(body, "cuda", split=split)
        arguments = argument_list(body, {}, shape_type="const __grid_constant__ Shape")
        if body == "decode" and not split:
            arguments = arguments.replace(",  float* stats", "")
        types = dict(instance.types)
        for name, c_type in types.items():
            arguments = re.sub(rf"\b{name}\*", f"{c_type}*", arguments)
        lines.append(f"__global__ void {body}_{index}({arguments}) {{")
        for name, value in instance.constants:
            kind = "bool" if isinstance(value, bool) else "int"
            lines.append(f"  constexpr {kind} {name} = {int(value)};")
        lines += [f"  using {name} = {c_type};" for name, c_type in types.items()]
        lines += [source.source, "}"]
    return "\n".join([*lines, "}"])


def parse(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            require("g++"), "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-Wno-unused",
            "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-I", STUBS, "-x", "c++", "-",
        ],
        input=program, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("backend", ["metal", "cuda"])
def test_text_parses(backend: str, body: Body) -> None:
    done = parse((metal_program if backend == "metal" else cuda_program)(body))
    assert done.returncode == 0, done.stderr[:4000]


def test_an_unknown_word_does_not_parse() -> None:
    for program in (cuda_program("merge"), metal_program("merge")):
        assert "#define PA_SIMD " in program
        assert parse(program.replace("#define PA_SIMD ", "#define PA_SIM ")).returncode != 0


#: Language features that Metal lacks or defines differently, each with a source that uses it.
RULES = {
    "a pointer needs an address space": (
        r"(?<!PA_DEVICE )\b(?!return\b)\w+\*", "const Vec* line = 0;",
    ),
    "a reference needs an address space": (r"\w& ?\w", "const Vec& line = x;"),
    "there is no double": (r"\bdouble\b", "double x;"),
    "literals without f are double": (r"\b\d+\.\d*(e-?\d+)?(?![\df.e-])", "x = 1.0;"),
    "there is no static": (r"\bstatic\b", "static int x;"),
    "there is no standard library": (r"\bstd::|#include", "std::exp(x);"),
    "there are no lambdas": (r"\[[&=]?\]\s*\(", "[&](int x) {}"),
    "there is no goto": (r"\bgoto\b", "goto end;"),
    "backends' names stay in preambles": (
        r"\b(simd_\w+|metal::|threadgroup|threadIdx|blockIdx|__\w+|device|thread_\w+)\b",
        "threadgroup float x[3];",
    ),
}  # fmt: skip


def code(source: str) -> str:
    """Return a text without its comments."""
    return re.sub(r"//[^\n]*", "", source)


@pytest.mark.parametrize("rule", RULES)
def test_bodies_keep_the_rules_of_metal(rule: str) -> None:
    pattern, wrong = RULES[rule]
    assert re.search(pattern, wrong), "the rule does not see what it forbids"
    for body in BODIES:
        found = re.search(pattern, code(body_text(body)))
        assert found is None, f"{body}: {found and found.group()}"


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("backend", ["metal", "cuda"])
def test_mlx_passes_the_attributes_and_shapes_in_use_and_no_others(
    backend: Backend, body: Body
) -> None:
    # MLX looks for names anywhere in the text, in comments, too.
    source = kernel_source(body, backend).source
    for name in INPUTS[body]:
        assert (f"{name}_shape" in source) == (name in names_in_use(body))
        assert f"{name}_strides" not in source
        assert f"{name}_ndim" not in source
    known = {"grid_origin", "grid_size", "quadgroup", "thread_execution_width", "threads_per_",
             "dispatch_", "thread_index_in_threadgroup", "thread_position_in_threadgroup",
             "simdgroups_per_threadgroup"}  # fmt: skip
    assert not {name for name in known if name in source}


def test_names_change_with_the_text() -> None:
    # MLX caches compiled kernels by name, on disk, too.
    names = [
        kernel_source(body, backend, split=split).name
        for body in BODIES
        for backend in ("metal", "cuda")
        for split in ((False, True) if body == "decode" else (False,))
    ]
    assert len(set(names)) == len(names) == 12
    assert all(re.fullmatch(r"paged_\w+_[0-9a-f]{12}", name) for name in names)
