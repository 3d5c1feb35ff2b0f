"""The kernels' texts: one C-like body each, and a preamble per backend that explains its words.

A body uses only `PA_*` macros, C, and what all three of Metal, CUDA and C++ have. The preamble goes
in front of it inside of the function, since MLX passes the thread attributes of Metal that it finds
named in the function's text. The third backend is an emulator on the host, which tests run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from typing import Literal

Backend = Literal["metal", "cuda", "none"]
Body = Literal["decode", "merge", "write"]

INPUTS: dict[Body, tuple[str, ...]] = {
    "decode": (
        "q", "q_more", "k_pool", "v_pool", "block_tables", "context_lens", "sinks", "params",
        "written",
    ),
    "merge": ("partial", "stats", "sinks"),
    "write": ("k", "v", "k_pool", "v_pool", "slots", "previous"),
}  # fmt: skip
OUTPUTS: dict[Body, tuple[str, ...]] = {
    "decode": ("out", "stats"),
    "merge": ("out",),
    "write": ("token",),
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
def kernel_source(body: Body, backend: Backend, *, split: bool = False) -> KernelSource:
    """Return `body` for `backend`; a decode that is not `split` has no statistics to give out."""
    outputs = OUTPUTS[body]
    source = text(backend) + text(body)
    if body == "decode" and not split:
        outputs = outputs[:1]
        source = text(backend) + "PA_DEVICE float* stats = nullptr;\n" + text(body)
    header = text("common")
    digest = blake2b((header + source).encode(), digest_size=6).hexdigest()
    return KernelSource(f"paged_{body}_{digest}", header, source, INPUTS[body], outputs)
