"""The kernels' texts: one C-like body each, and a preamble per backend that explains its words.

A body uses only `PA_*` macros, C, and what all three of Metal, CUDA and C++ have. The preamble goes
in front of it inside of the function, since MLX passes the thread attributes of Metal that it finds
named in the function's text. The third backend is an emulator on the host, which tests run.
`prefill`, `product` and `experts` are for CUDA only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import Literal

Backend = Literal["metal", "cuda", "none"]
Body = Literal[
    "decode",
    "merge",
    "write",
    "quantise",
    "prefill",
    "rotate",
    "add_norm",
    "swiglu",
    "dequantise",
    "product",
    "state_space",
    "delta_rule",
    "rows",
    "experts",
    "route",
    "dispatch",
    "combine",
    "draw",
]

INPUTS: dict[Body, tuple[str, ...]] = {
    "decode": (
        "q", "q_more", "k_pool", "v_pool", "block_tables", "context_lens", "sinks", "params",
        "written",
    ),
    "merge": ("partial", "stats", "sinks"),
    "write": ("k", "v", "k_pool", "v_pool", "slots", "previous"),
    "quantise": ("k", "v", "k_pool", "v_pool", "slots", "previous"),
    "prefill": ("q", "k_pool", "v_pool", "tables", "spans", "sinks", "params", "written"),
    "rotate": (
        "joint", "positions", "slots", "inverse", "q_weight", "k_weight", "k_pool", "v_pool",
        "previous",
    ),
    "add_norm": ("a", "b", "weight"),
    "swiglu": ("joint",),
    "dequantise": ("weight", "scales", "biases"),
    "product": ("x", "weight", "scales", "biases", "bias"),
    "state_space": ("x", "dt", "a", "b", "c", "d", "state"),
    "delta_rule": ("q", "k", "v", "g", "beta", "state"),
    "rows": ("table", "index"),
    "experts": (
        "x", "weight", "scales", "biases", "bias", "weight_up", "scales_up", "biases_up", "bias_up",
        "source", "spans",
    ),
    "route": ("logits", "bias"),
    "dispatch": ("experts",),
    "combine": ("given", "place", "scores"),
    "draw": ("logits", "settings"),
}  # fmt: skip
OUTPUTS: dict[Body, tuple[str, ...]] = {
    "decode": ("out", "stats"),
    "merge": ("out",),
    "write": ("token",),
    "quantise": ("token",),
    "prefill": ("out", "stats"),
    "rotate": ("q", "token"),
    "add_norm": ("total", "out"),
    "swiglu": ("out",),
    "dequantise": ("out",),
    "product": ("out",),
    "state_space": ("y", "new_state"),
    "delta_rule": ("y", "new_state"),
    "rows": ("out",),
    "experts": ("out",),
    "route": ("chosen", "scores"),
    "dispatch": ("source", "place", "sorted", "spans"),
    "combine": ("out",),
    "draw": ("token",),
}

#: MLX binds inputs with fewer elements in Metal's constant address space.
CONSTANT_BELOW = 8


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A kernel as MLX takes it; its name has a hash of the text, as MLX caches binaries by name."""

    name: str
    header: str
    source: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@cache
def text(name: str) -> str:
    """Return one of the files beside this module."""
    return (files(__package__) / f"{name}.h").read_text(encoding="utf-8")


@cache
def kernel_source(
    body: Body, backend: Backend, *, split: bool = False, by_path: bool = False
) -> KernelSource:
    """Return `body` for `backend`; attention that is not `split` has no statistics to give out.

    `by_path` names the files for the compiler to include (CUDA): MLX hashes a kernel's text at
    every call, and short ones take less time.
    """
    headers, parts = ["common"], [backend, body]
    if body in ("prefill", "product", "experts"):
        headers.append("tensor_cores")
    if body == "experts":
        parts.append("product")
    outputs = OUTPUTS[body]
    before = ""
    if body in ("decode", "prefill") and not split:
        outputs = outputs[:1]
        before = "PA_DEVICE float* stats = nullptr;\n"
    header, source = "".join(map(text, headers)), before.join(map(text, parts))
    digest = blake2b((header + source).encode(), digest_size=6).hexdigest()
    if by_path:
        # MLX passes the shapes that it finds named in the text.
        shapes = [f"{name}_shape" for name in INPUTS[body] if f"{name}_shape" in source]
        header = "".join(map(_include, headers))
        source = f"// {' '.join(shapes)}\n" + before.join(map(_include, parts))
    else:
        header, source = _bare(header), _bare(source)
    return KernelSource(f"paged_{body}_{digest}", header, source, INPUTS[body], outputs)


def can_include() -> bool:
    """Return whether the texts are files, which a compiler can open."""
    return isinstance(files(__package__), Path)


def _include(name: str) -> str:
    return f'#include "{files(__package__)}/{name}.h"\n'


def _bare(source: str) -> str:
    """Return a text without comments and indentation."""
    lines = (line.partition("//")[0].strip() for line in source.splitlines())
    return "\n".join(line for line in lines if line) + "\n"
