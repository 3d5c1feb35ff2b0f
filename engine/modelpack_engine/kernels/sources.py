"""The kernels' sources: a C-like body for each kernel, and a preamble for each backend.

A body uses only `PA_*` macros, which the preamble defines, and the common subset of Metal, CUDA and
C++. The preamble is inside the function, before the body, since MLX passes those Metal thread
attributes whose names it finds in the function's source. Tests run the bodies by an emulator on the
host, a third backend. `prefill`, `grouped`, `product`, `packed`, `packed_row`, `packed_strips`,
`packed_wide`, `arrange`, `add_norm_arranged`, `block_tiles`, `block_strips`, `digit_strips`,
`experts`, `experts_wide`, `shrink_wide`, `expand_wide`, `delta_tiles`, `delta_wide`,
`state_space_wide`, `usable`, `deliver`, `fetch` and `address` are for CUDA only.
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
    "decode", "rotate_decode", "merge", "write", "quantise", "prefill", "rotate", "add_norm",
    "swiglu", "rows",
    "dequantise", "product", "state_space", "delta_rule", "experts", "route", "dispatch", "combine",
    "draw", "packed", "grouped", "greedy", "usable", "angles", "experts_wide", "packed_strips",
    "packed_wide", "arrange", "add_norm_arranged", "dots", "deliver", "packed_row", "block_dots",
    "block_tiles", "block_strips", "digit_strips", "block_values", "adapters", "adapters_norm",
    "shrink_wide", "expand_wide", "convolve", "gated_norm", "linear_attention",
    "delta_tiles", "delta_wide", "state_space_wide", "norm_beside", "accepted", "pick", "address",
    "beside", "gate", "windows", "fetch",
]  # fmt: skip

INPUTS: dict[Body, tuple[str, ...]] = {
    "decode": (
        "q", "q_more", "k_pool", "v_pool", "block_tables", "context_lens", "sinks", "params",
        "written",
    ),
    "rotate_decode": (
        "joint", "values", "positions", "slots", "inverse", "q_weight", "k_weight", "k_pool",
        "v_pool", "block_tables", "context_lens", "sinks", "params", "previous",
    ),
    "merge": ("partial", "stats", "sinks"),
    "write": ("k", "v", "k_pool", "v_pool", "slots", "previous"),
    "quantise": ("k", "v", "k_pool", "v_pool", "slots", "previous"),
    "prefill": ("q", "k_pool", "v_pool", "tables", "spans", "sinks", "params", "written"),
    "rotate": (
        "joint", "values", "positions", "slots", "inverse", "q_weight", "k_weight", "k_pool",
        "v_pool", "previous",
    ),
    "add_norm": ("a", "b", "weight"),
    "add_norm_arranged": ("a", "b", "weight"),
    "norm_beside": ("table", "ids", "hidden", "table_weight", "hidden_weight"),
    "beside": ("a", "b", "c"),
    "accepted": ("ids", "numbers"),
    "pick": ("logits", "before", "tokens"),
    "swiglu": ("joint",),
    "gate": ("x", "gate", "given"),
    "dequantise": ("weight", "scales", "biases"),
    "product": ("x", "weight", "scales", "biases", "bias"),
    "packed": ("x", "weight", "scales", "biases", "bias"),
    "arrange": ("x",),
    "packed_wide": ("x", "weight", "scales", "biases", "bias"),
    "packed_row": ("x", "weight", "scales", "biases", "bias", "more", "norm"),
    "packed_strips": ("x", "weight", "scales", "biases", "bias", "more", "norm"),
    "state_space": ("x", "dt", "a", "b", "c", "d", "biases", "state", "pool", "segments", "owners"),
    "state_space_wide": (
        "x", "dt", "a", "b", "c", "d", "biases", "state", "pool", "segments", "owners",
    ),
    "delta_rule": (
        "q", "k", "v", "g", "beta", "rates", "biases", "state", "pool", "segments", "owners",
    ),
    "delta_tiles": ("q", "k", "g", "rates", "biases", "segments", "owners"),
    "delta_wide": (
        "q", "k", "v", "g", "beta", "rates", "biases", "state", "pool", "segments", "owners",
        "mixes", "factors",
    ),
    "convolve": ("x", "columns", "weight", "bias", "state", "pool", "segments", "owners"),
    "gated_norm": ("x", "gate", "columns", "weight"),
    "linear_attention": (
        "q", "k", "v", "decay", "a", "b", "state", "pool", "segments", "owners",
    ),
    "rows": ("table", "index"),
    "experts": (
        "x", "weight", "scales", "biases", "bias", "weight_up", "scales_up", "biases_up", "bias_up",
        "source", "spans",
    ),
    "experts_wide": ("x", "weight", "bias", "weight_up", "bias_up", "source", "spans"),
    "dots": (
        "x", "weight", "scales", "biases", "bias", "weight_up", "scales_up", "biases_up", "bias_up",
        "chosen", "scores", "more", "norm",
    ),
    "route": ("logits", "bias"),
    "dispatch": ("experts",),
    "combine": ("given", "place", "scores"),
    "draw": ("logits", "settings"),
    "greedy": ("logits",),
    "grouped": (
        "q", "k_pool", "v_pool", "block_tables", "context_lens", "sinks", "params", "written",
    ),
    "usable": ("token_ids", "maxima"),
    "angles": ("first", "second", "third", "axis_of", "inverse"),
    "windows": ("joint", "angles", "index"),
    "deliver": ("numbers", "address"),
    "fetch": ("source",),
    "address": tuple("abcdefgh"),
    "block_dots": ("x", "weight", "bias", "chosen"),
    "block_tiles": ("x", "weight", "bias", "source", "spans"),
    "block_strips": ("x", "weight", "bias", "more", "norm"),
    "digit_strips": ("x", "weight", "bias", "more", "norm"),
    "block_values": ("weight",),
    "adapters": ("given", "x", "down", "up", "slots"),
    "shrink_wide": ("x", "down", "slots", "singles"),
    "expand_wide": ("given", "inner", "up", "slots", "singles"),
    "adapters_norm": ("a", "b", "weight", "x", "down", "up", "slots"),
}  # fmt: skip
OUTPUTS: dict[Body, tuple[str, ...]] = dict.fromkeys(INPUTS, ("out",)) | {
    "decode": ("out", "stats"),
    "rotate_decode": ("out", "token", "stats"),
    "write": ("token",),
    "quantise": ("token",),
    "prefill": ("out", "stats"),
    "rotate": ("q", "token"),
    "add_norm": ("total", "out"),
    "add_norm_arranged": ("total", "out"),
    "accepted": ("found", "places"),
    "pick": ("found",),
    "adapters_norm": ("total", "out"),
    "state_space": ("y",),
    "state_space_wide": ("y",),
    "delta_rule": ("y",),
    "delta_tiles": ("mixes", "factors"),
    "delta_wide": ("y",),
    "convolve": ("y",),
    "linear_attention": ("y",),
    "route": ("chosen", "scores"),
    "dots": ("out", "total"),
    "packed_row": ("out", "total"),
    "packed_strips": ("out", "total"),
    "block_strips": ("out", "total"),
    "digit_strips": ("out", "total"),
    "dispatch": ("source", "place", "sorted", "spans"),
    "greedy": ("token", "next"),
    "draw": ("token", "next"),
    "usable": ("usable", "next"),
    "deliver": ("done",),
    "fetch": ("out", "done"),
}

#: What stands for arrays that a kernel is made without (CUDA).
ABSENT: dict[str, str] = {
    "chosen": "const unsigned int* const chosen = nullptr;\n",
    "scores": "const S* const scores = nullptr;\n",
    "weight_up": "const auto* const weight_up = weight;\n",
    "more": "const B* const more = nullptr;\n",
    "norm": "const V* const norm = nullptr;\n",
    "total": "T* const total = nullptr;\n",
    "source": "const int* const source = nullptr;\n",
    "spans": "const int* const spans = nullptr;\n",
}
for _name in ("scales", "biases", "bias"):
    ABSENT[_name] = f"const T* const {_name} = nullptr;\n"
    ABSENT[f"{_name}_up"] = f"const T* const {_name}_up = {_name};\n"

#: The texts of bodies that have several.
PARTS: dict[Body, tuple[str, ...]] = {
    "greedy": ("most_likely", "greedy"),
    "pick": ("most_likely", "pick"),
    "experts": ("experts", "product"),
    "adapters": ("chunks", "shrink", "expand", "adapters"),
    "add_norm": ("add_norm", "normed", "in_rows"),
    "add_norm_arranged": ("add_norm", "normed", "in_order"),
    "norm_beside": ("norm_beside", "normed", "in_rows"),
    "adapters_norm": ("shrink", "expand", "add_norm", "normed", "in_rows"),
    "expand_wide": ("chunks", "expand_wide"),
    "delta_wide": ("delta_rule", "delta_wide"),
    "packed_strips": ("units", "packed_strips", "float_rows", "strips"),
    "rotate_decode": ("rotate_decode", "decode"),
    "block_dots": ("stored", "block_dots"),
    "block_values": ("stored", "block_values"),
    "block_tiles": ("stored", "block_chunk", "block_tiles"),
    "block_strips": (
        "units",
        "stored",
        "block_chunk",
        "block_stage",
        "block_strips",
        "float_rows",
        "strips",
    ),
    "digit_strips": ("units", "stored", "block_stage", "digit_strips", "digit_rows", "strips"),
}

#: MLX binds inputs with fewer elements in Metal's constant address space.
CONSTANT_BELOW = 8


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A kernel for MLX; its name has a hash of its source, as MLX caches binaries by name."""

    name: str
    header: str
    source: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@cache
def text(name: str) -> str:
    """Return the contents of a source file in this package."""
    return (files(__package__) / f"{name}.h").read_text(encoding="utf-8")


def body_text(body: Body) -> str:
    """Return all texts of a body."""
    return "".join(map(text, PARTS.get(body, (body,))))


@cache
def kernel_source(
    body: Body,
    backend: Backend,
    *,
    split: bool = False,
    by_path: bool = False,
    absent: tuple[str, ...] = (),
) -> KernelSource:
    """Return the source of `body` for `backend`; only `split` attention returns statistics.

    The kernel has no arrays `absent`, which are names in ABSENT.

    `by_path` includes the files by path (CUDA): MLX hashes a kernel's source at every call, and a
    short source takes less time.
    """
    headers = ["common"]
    if body in (
        "prefill", "product", "experts", "experts_wide", "packed", "packed_row", "packed_strips",
        "packed_wide", "grouped", "block_tiles", "block_strips", "digit_strips", "shrink_wide",
        "expand_wide", "delta_tiles", "delta_wide", "state_space_wide",
    ):  # fmt: skip
        headers.append("tensor_cores")
    if body in ("packed", "packed_row", "packed_strips"):
        headers.append("codes")
    if body in ("packed_strips", "packed_wide", "block_strips", "digit_strips"):
        headers.append("barriers")
    if body in ("packed_wide", "experts_wide", "block_tiles", "block_strips"):
        headers.append("codes")
    if body in ("packed_wide", "experts_wide"):
        headers.append("warpgroups")
    if body in ("packed_wide", "block_tiles", "block_strips"):
        headers.append("affine")
    if body in ("packed_wide", "arrange", "add_norm_arranged"):
        headers.append("order")
    if body.startswith("block_") or body == "digit_strips":
        headers.append("blocks")
    if body == "digit_strips":
        headers.append("planes")
    if body in ("packed_strips", "block_strips", "digit_strips"):
        headers.append("bounds")
    outputs = tuple(name for name in OUTPUTS[body] if name not in absent)
    before = "".join(ABSENT[name] for name in absent)
    if body in ("decode", "prefill", "rotate_decode") and not split:
        outputs = tuple(name for name in outputs if name != "stats")
        before = "PA_DEVICE float* stats = nullptr;\n"
    header = "".join(map(text, headers))
    source = text(backend) + before + body_text(body)
    inputs = tuple(name for name in INPUTS[body] if name not in absent)
    digest = blake2b((header + source).encode(), digest_size=6).hexdigest()
    if by_path:
        # MLX passes the shapes whose names it finds in the source.
        shapes = [f"{name}_shape" for name in inputs if f"{name}_shape" in source]
        header = "".join(map(_include, headers))
        source = f"// {' '.join(shapes)}\n{_include(backend)}{before}"
        source += "".join(map(_include, PARTS.get(body, (body,))))
    else:
        header, source = _bare(header), _bare(source)
    return KernelSource(f"paged_{body}_{digest}", header, source, inputs, outputs)


def can_include() -> bool:
    """Return whether the sources are files that a compiler can open."""
    return isinstance(files(__package__), Path)


def _include(name: str) -> str:
    return f'#include "{files(__package__)}/{name}.h"\n'


def _bare(source: str) -> str:
    """Return a source without comments and indentation."""
    lines = (line.partition("//")[0].strip() for line in source.splitlines())
    return "\n".join(line for line in lines if line) + "\n"
