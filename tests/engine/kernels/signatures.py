"""The types of each kernel's arguments, and the parameters that MLX generates for a body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelpack_engine.kernels.plan import (
    MERGE_SIMDGROUPS,
    AttentionShape,
    DecodePlan,
    plan_write,
    vector_width,
)
from modelpack_engine.kernels.quantised import Quantisation
from modelpack_engine.kernels.sources import INPUTS, OUTPUTS, Body, body_text

#: Element types: a template type, or C's.
ELEMENTS: dict[Body, dict[str, str]] = {
    "decode": {
        "q": "T", "q_more": "T", "k_pool": "P", "v_pool": "P", "block_tables": "int",
        "context_lens": "int", "sinks": "S", "params": "float", "written": "int", "out": "O",
        "stats": "float",
    },
    "merge": {"partial": "float", "stats": "float", "sinks": "S", "out": "T"},
    "write": {
        "k": "R", "v": "R", "k_pool": "P", "v_pool": "P", "slots": "int", "previous": "int",
        "token": "int",
    },
    "rotate": {
        "joint": "J", "values": "A", "positions": "int", "slots": "int", "inverse": "float",
        "q_weight": "W", "k_weight": "W", "k_pool": "P", "v_pool": "P", "previous": "int",
        "q": "T", "token": "int",
    },
    "rotate_decode": {
        "joint": "J", "values": "A", "positions": "int", "slots": "int", "inverse": "float",
        "q_weight": "W", "k_weight": "W", "k_pool": "P", "v_pool": "P", "block_tables": "int",
        "context_lens": "int", "sinks": "S", "params": "float", "previous": "int", "out": "O",
        "token": "int", "stats": "float",
    },
    "add_norm": {"a": "T", "b": "B", "weight": "W", "total": "T", "out": "T"},
    "add_norm_arranged": {"a": "T", "b": "B", "weight": "W", "total": "T", "out": "T"},
    "norm_beside": {
        "table": "T", "ids": "int", "hidden": "T", "table_weight": "W", "hidden_weight": "W",
        "out": "T",
    },
    "beside": {"a": "T", "b": "T", "c": "T", "out": "T"},
    "accepted": {"ids": "int", "numbers": "int", "found": "int", "places": "int"},
    "pick": {"logits": "T", "before": "int", "tokens": "int", "found": "int"},
    "swiglu": {"joint": "T", "out": "T"},
    "gate": {"x": "B", "gate": "T", "given": "T", "out": "T"},
    "dequantise": {"weight": "uint32_t", "scales": "T", "biases": "T", "out": "T"},
    "state_space": {
        "x": "T", "dt": "S", "a": "float", "b": "T", "c": "T", "d": "E", "biases": "float",
        "state": "float", "pool": "float",
        "segments": "int", "owners": "int", "y": "T",
    },
    "delta_rule": {
        "q": "T", "k": "T", "v": "T", "g": "G", "beta": "G", "rates": "float",
        "biases": "float", "state": "float", "pool": "float",
        "segments": "int", "owners": "int", "y": "T",
    },
    "delta_tiles": {
        "q": "T", "k": "T", "g": "G", "rates": "float", "biases": "float", "segments": "int",
        "owners": "int", "mixes": "T", "factors": "float",
    },
    "convolve": {
        "x": "T", "columns": "int", "weight": "E", "bias": "E", "state": "T", "pool": "T",
        "segments": "int", "owners": "int", "y": "T",
    },
    "linear_attention": {
        "q": "T", "k": "T", "v": "T", "decay": "D", "a": "T", "b": "T", "state": "S", "pool": "S",
        "segments": "int", "owners": "int", "y": "T",
    },
    "gated_norm": {"x": "T", "gate": "T", "columns": "int", "weight": "W", "out": "T"},
    "rows": {"table": "T", "index": "int", "out": "T"},
    "route": {"logits": "L", "bias": "B", "chosen": "uint32_t", "scores": "S"},
    "dispatch": {
        "experts": "uint32_t", "source": "int", "place": "int", "sorted": "uint32_t",
        "spans": "int",
    },
    "combine": {"given": "T", "place": "int", "scores": "S", "out": "O"},
    "packed": {
        "x": "T", "weight": "uint32_t", "scales": "T", "biases": "T", "bias": "T", "out": "O",
    },
    "arrange": {"x": "T", "out": "T"},
    "packed_wide": {
        "x": "T", "weight": "uint32_t", "scales": "T", "biases": "T", "bias": "T", "out": "O",
    },
    "packed_row": {
        "x": "T", "weight": "uint32_t", "scales": "T", "biases": "T", "bias": "T", "more": "B",
        "norm": "V", "out": "O", "total": "T",
    },
    "packed_strips": {
        "x": "T", "weight": "uint32_t", "scales": "T", "biases": "T", "bias": "T", "more": "B",
        "norm": "V", "out": "O", "total": "T",
    },
    "experts_wide": {
        "x": "T", "weight": "T", "bias": "T", "weight_up": "T", "bias_up": "T", "source": "int",
        "spans": "int", "out": "T",
    },
    "dots": {
        "x": "T", "weight": "W", "scales": "T", "biases": "T", "bias": "T", "weight_up": "W",
        "scales_up": "T", "biases_up": "T", "bias_up": "T", "chosen": "uint32_t", "scores": "S",
        "more": "B", "norm": "V", "out": "O", "total": "T",
    },
    "draw": {"logits": "T", "settings": "int", "token": "int", "next": "int"},
    "greedy": {"logits": "T", "token": "int", "next": "int"},
    "angles": {
        "first": "int", "second": "int", "third": "int", "axis_of": "int", "inverse": "float",
        "out": "float",
    },
    "windows": {"joint": "T", "angles": "float", "index": "int", "out": "T"},
    "usable": {"token_ids": "int", "maxima": "T", "usable": "int", "next": "int"},
    "block_dots": {
        "x": "T", "weight": "uint32_t", "bias": "T", "chosen": "uint32_t", "out": "O",
    },
    "block_tiles": {
        "x": "T", "weight": "uint32_t", "bias": "T", "source": "int", "spans": "int", "out": "O",
    },
    "block_strips": {
        "x": "T", "weight": "uint32_t", "bias": "T", "more": "B", "norm": "V", "out": "O",
        "total": "T",
    },
    "digit_strips": {
        "x": "T", "weight": "uint32_t", "bias": "T", "more": "B", "norm": "V", "out": "O",
        "total": "T",
    },
    "block_values": {"weight": "uint32_t", "out": "T"},
    "adapters": {"given": "J", "x": "T", "down": "A", "up": "A", "slots": "int", "out": "T"},
    "shrink_wide": {"x": "T", "down": "T", "slots": "int", "singles": "int", "out": "T"},
    "expand_wide": {
        "given": "J", "inner": "T", "up": "T", "slots": "int", "singles": "int", "out": "T",
    },
    "adapters_norm": {
        "a": "T", "b": "B", "weight": "W", "x": "T", "down": "A", "up": "A", "slots": "int",
        "total": "T", "out": "T",
    },
}  # fmt: skip
ELEMENTS["quantise"] = ELEMENTS["write"]
ELEMENTS["delta_wide"] = ELEMENTS["delta_rule"] | {"mixes": "T", "factors": "float"}
ELEMENTS["state_space_wide"] = ELEMENTS["state_space"]


@dataclass(frozen=True)
class Instance:
    """A body with its template arguments, in the order of `launch`."""

    body: Body
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | bool], ...]

    def arguments(self) -> str:
        """Return the arguments as C++ template arguments."""
        return ", ".join([t for _, t in self.types] + [str(int(v)) for _, v in self.constants])

    def parameters(self) -> str:
        """Return the matching template parameters."""
        types = [f"typename {name}" for name, _ in self.types]
        constants = [
            f"{'bool' if isinstance(value, bool) else 'int'} {name}"
            for name, value in self.constants
        ]
        return ", ".join(types + constants)


def decode_instance(plan: DecodePlan, *, q: str, pool: str, sinks: str = "float") -> Instance:
    """Return the decode kernel of `plan`; `q`, `pool` and `sinks` are C types."""
    out = "float" if plan.parts > 1 else q
    return Instance("decode", (("T", q), ("P", pool), ("S", sinks), ("O", out)), plan.constants)


def merge_instance(shape: AttentionShape, *, q: str, sinks: str = "float") -> Instance:
    """Return the kernel that merges the parts of a split decode."""
    constants: tuple[tuple[str, int | bool], ...] = (
        ("HQ", shape.num_heads), ("DV", shape.value_dim), ("SINKS", shape.sinks),
        ("NSG", MERGE_SIMDGROUPS),
    )  # fmt: skip
    return Instance("merge", (("T", q), ("S", sinks)), constants)


def write_instance(key_width: int, value_width: int, *, rows: str, pool: str) -> Instance:
    """Return the kernel that writes rows of these widths."""
    size = {"float": 4, "float16_t": 2, "bfloat16_t": 2}
    vector, _ = plan_write(max(size[rows], size[pool]), key_width, value_width)
    constants = (("KW", key_width), ("VW", value_width), ("VEC", vector))
    return Instance("write", (("R", rows), ("P", pool)), constants)


def quantise_instance(
    key_width: int, value_width: int, quantised: Quantisation, *, rows: str
) -> Instance:
    """Return the kernel that quantises rows of these widths."""
    constants = (
        ("KW", key_width), ("VW", value_width), ("BITS", quantised.bits),
        ("GROUP", quantised.group),
    )  # fmt: skip
    return Instance("quantise", (("R", rows), ("P", "uint32_t")), constants)


def draw_instance(vocab_size: int) -> Instance:
    """Return the kernel that draws tokens by logits in bfloat16."""
    constants = (
        ("V", vocab_size), ("VEC", vector_width(2, vocab_size)), ("SHIFT", 16), ("NSG", 16),
    )  # fmt: skip
    return Instance("draw", (("T", "bfloat16_t"),), constants)


def greedy_instance(vocab_size: int) -> Instance:
    """Return the kernel that chooses the most likely tokens by logits in bfloat16."""
    constants = (("V", vocab_size), ("VEC", vector_width(2, vocab_size)), ("NSG", 16))
    return Instance("greedy", (("T", "bfloat16_t"),), constants)


def names_in_use(body: Body) -> Sequence[str]:
    """Return the inputs whose shape the body reads."""
    return [name for name in INPUTS[body] if f"{name}_shape" in body_text(body)]


def argument_list(
    body: Body, spaces: Mapping[str, str], *, shape_type: str, output_space: str = ""
) -> str:
    """Return a kernel's parameters in MLX's order; `spaces` gives inputs' address spaces."""
    found = []
    for name in INPUTS[body]:
        found.append(f"const {spaces.get(name, '')} {ELEMENTS[body][name]}* {name}")
        if name in names_in_use(body):
            found.append(f"{shape_type} {name}_shape")
    for name in OUTPUTS[body]:
        found.append(f"{output_space} {ELEMENTS[body][name]}* {name}")
    return ", ".join(found)
