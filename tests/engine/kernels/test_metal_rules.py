"""Address spaces and threadgroup memory of the Metal kernels, by clang: no Mac is needed."""

from __future__ import annotations

import itertools

import pytest

from modelpack_engine.kernels.plan import MAX_SHARED_BYTES, AttentionShape, plan_decode
from modelpack_engine.kernels.quantised import Quantisation
from modelpack_engine.kernels.sources import Body
from modelpack_engine.layers.blocks import BLOCK_TYPES
from tests.engine.kernels.cases import CASES, Case
from tests.engine.kernels.metal_rules import judge
from tests.engine.kernels.signatures import (
    Instance,
    draw_instance,
    greedy_instance,
    quantise_instance,
    write_instance,
)

BF16 = (("T", "bfloat16_t"),)
ROTATE = (("HQ", 8), ("HK", 2), ("D", 64), ("NSG", 4))
#: The kernels of fused layers, by the constants that `fusion.kernels` gives them.
FUSED = [
    Instance(
        "add_norm",
        (*BF16, ("B", "bfloat16_t"), ("W", "float")),
        (("D", 576), ("VEC", 4), ("NSG", 5), ("PARTS", 1), ("EPSILON", 0x3727C5AC)),
    ),
    Instance(
        "add_norm",
        (*BF16, ("B", "float"), ("W", "bfloat16_t")),
        (("D", 4096), ("VEC", 4), ("NSG", 32), ("PARTS", 4), ("EPSILON", 0)),
    ),
    Instance(
        "norm_beside",
        (*BF16, ("W", "bfloat16_t")),
        (
            ("D", 576),
            ("VEC", 8),
            ("NSG", 3),
            ("COLUMNS", 5),
            ("COLUMN", 2),
            ("EPSILON", 0x3727C5AC),
        ),
    ),
    Instance("beside", BF16, (("D", 576), ("VEC", 8))),
    Instance("accepted", (), (("ROWS", 5), ("TOKENS", 4))),
    Instance("pick", BF16, (("V", 16384), ("VEC", 8), ("NSG", 16), ("COLUMNS", 5))),
    Instance("swiglu", BF16, (("N", 1536), ("VEC", 8))),
    Instance("windows", BF16, (("H", 16), ("D", 80), ("VEC", 8))),
    Instance(
        "gate",
        (*BF16, ("B", "float")),
        (
            ("N", 1536),
            ("VEC", 4),
            ("PARTS", 2),
            ("WIDTH", 3072),
            ("AT", 64),
            ("D", 64),
            ("STRIDE", 128),
            ("EACH", 1),
            ("SQUARED", False),
            ("GATED", True),
            ("ADDS", True),
        ),
    ),
    Instance("rows", BF16, (("D", 1536), ("VEC", 8))),
    *(Instance("dequantise", BF16, (("K", 576), ("BITS", bits), ("GROUP", 64))) for bits in (4, 8)),
    *(
        Instance(
            "rotate",
            (*BF16, ("J", joint), ("A", joint), ("P", pool), ("W", "bfloat16_t")),
            (
                *ROTATE,
                ("VEC", 8 if norm else 1),
                ("LPH", 4 if norm else 32),
                ("PARTS", 1 if joint == "bfloat16_t" else 4),
                ("DIMS", dims),
                ("INTERLEAVED", interleaved),
                ("QKNORM", norm),
                ("TABLE", norm),
                ("GATED", norm),
                ("OWN_VALUES", norm),
                ("EPSILON", 0x3727C5AC),
                ("FACTOR", 0x3F800000),
            ),
        )
        for joint, pool, dims, interleaved, norm in (
            ("bfloat16_t", "bfloat16_t", 64, False, True),
            ("float", "float16_t", 32, True, False),
        )
    ),
]
MIXTURES = [
    *(
        Instance(
            "route",
            (("L", "float"), *BF16, ("B", "float"), ("S", "float")),
            (
                ("PARTS", 2), ("EXPERTS", 48), ("K", 4), ("SIGMOID", sigmoid), ("GROUPS", groups),
                ("KEEP", 2), ("NORMED", True), ("FACTOR", 0x3F800000), ("NSG", 4),
            ),
        )
        for sigmoid, groups in ((False, 1), (True, 8))
    ),
    Instance("dispatch", (), (("EXPERTS", 48), ("EACH", 4), ("TILE", 32), ("NSG", 4))),
    Instance(
        "combine",
        (*BF16, ("S", "float"), ("R", "float"), ("O", "bfloat16_t")),
        (("D", 576), ("K", 4), ("VEC", 8)),
    ),
]  # fmt: skip
ADAPTERS = [
    *(
        Instance(
            "adapters",
            (*BF16, ("A", "bfloat16_t"), ("J", "float")),
            (
                ("IN", 576), ("OUT", 960), ("N", 24), ("RANK", 8), ("RANKS", 16 if gated else 8),
                ("PARTS", 2), ("END0", 480 if gated else 576), ("END1", 960 if gated else 768),
                ("END2", 960),
                ("GATED", gated), ("CHUNK", 512), ("FROM", 8), ("TO", 4), ("NSG", 2),
            ),
        )
        for gated in (False, True)
    ),
    Instance(
        "adapters_norm",
        (*BF16, ("A", "bfloat16_t"), ("B", "float"), ("W", "bfloat16_t")),
        (
            ("IN", 576), ("N", 8), ("RANKS", 8), ("FROM", 8), ("D", 576), ("VEC", 4), ("NSG", 2),
            ("PARTS", 2), ("EPSILON", 0x3727C5AC),
        ),
    ),
]  # fmt: skip
RECURRENT = [
    *(
        Instance(
            "state_space",
            (*BF16, ("E", "float"), ("S", "bfloat16_t" if raw else "float")),
            (
                ("H", 8), ("P", 64), ("G", 2), ("N", 128), ("R", 2), ("NSG", 4), ("INPUTS", 1024),
                ("GROUPS", 1024), ("X_AT", 0), ("B_AT", 512), ("C_AT", 768), ("RAW", raw),
                ("STEPS", 1032), ("DT_AT", 1024), ("LOW", 0), ("HIGH", 1 << 30),
            ),
        )
        for raw in (False, True)
    ),
    *(
        Instance(
            "delta_rule",
            (*BF16, ("G", "bfloat16_t" if raw else "float")),
            (
                ("HK", 2), ("HV", 4), ("DK", 64), ("DV", 64), ("R", 2), ("EVERY", every),
                ("NSG", 4), ("KEYS", 512), ("VALUES", 512), ("Q_AT", 0), ("K_AT", 128),
                ("V_AT", 256), ("NORM", raw), ("EPSILON", 0), ("RAW", raw), ("SCALARS", 520),
                ("G_AT", 516), ("BETA_AT", 512), ("PER", 2), ("WIDE", False),
                ("LONG", 32),
            ),
        )
        for every, raw in ((False, False), (True, False), (False, True))
    ),
    Instance(
        "convolve",
        (*BF16, ("E", "bfloat16_t")),
        (
            ("C", 512), ("K", 4), ("V", 4), ("WIDTH", 512), ("SKIP", 3), ("BIAS", True),
            ("ACTIVATE", True),
        ),
    ),
    *(
        Instance(
            "linear_attention",
            (*BF16, *((name, "bfloat16_t" if own else "float") for name in "DS")),
            (
                ("H", 4), ("DK", 64), ("DV", 64), ("R", 2), ("NSG", 4), ("EVERY", own),
                ("CORRECTED", own), ("TURNED", not own),
            ),
        )
        for own in (False, True)
    ),
    *(
        Instance(
            "gated_norm",
            (*BF16, ("W", "bfloat16_t")),
            (
                ("C", 512), ("D", size), ("WIDTH", 1024), ("BEFORE", before), ("SAME", not before),
                ("VEC", vector), ("NSG", 4), ("EPSILON", 0),
            ),
        )
        for size, vector, before in ((128, 4, False), (32, 1, True))
    ),
]  # fmt: skip
#: Kernels of GGUF's block types: of 6 bits, of 2 with minimums, by a table, and with halves.
BLOCKS = [
    Instance(
        body,
        (*BF16, *(() if body == "block_values" else (("O", "bfloat16_t"),)), ("H", "float16_t")),
        (
            *kind.constants,
            *(
                (("NSG", 4),)
                if body == "block_values"
                else (
                    ("BIAS", True), ("ROWS", 1 if each else 2), ("LINES", 2), ("NSG", 4),
                    ("AHEAD", 2), ("EACH", each),
                )
            ),
        ),
    )
    for body, each in (("block_dots", 0), ("block_dots", 8), ("block_values", 0))
    for kind in (
        *(BLOCK_TYPES[name] for name in ("Q6_K", "Q2_K", "IQ4_XS", "Q5_1")),
        BLOCK_TYPES["Q4_K"].halved,
    )
]  # fmt: skip
#: Inputs that can have fewer than 8 elements: MLX puts them into `constant`, one by one.
SMALL: dict[Body, tuple[str, ...]] = {
    "decode": ("block_tables", "context_lens", "sinks"),
    "rotate_decode": ("positions", "slots", "inverse", "block_tables", "context_lens"),
    "merge": ("stats", "sinks"),
    "write": ("slots",),
    "quantise": ("slots",),
    "rotate": ("positions", "slots", "inverse"),
    "add_norm": (),
    "norm_beside": ("ids",),
    "beside": (),
    "accepted": ("ids",),
    "pick": ("before",),
    "swiglu": (),
    "gate": ("gate",),
    "dequantise": ("scales", "biases"),
    "state_space": ("a", "d", "biases", "segments", "owners"),
    "delta_rule": ("rates", "biases", "segments", "owners"),
    "convolve": ("segments", "owners"),
    "gated_norm": ("columns",),
    "linear_attention": ("decay", "segments", "owners"),
    "rows": ("index",),
    "windows": ("index",),
    "route": ("logits", "bias"),
    "dispatch": (),
    "combine": (),
    "draw": ("settings",),
    "greedy": (),
    "block_dots": ("bias", "chosen"),
    "block_values": (),
    "adapters": ("slots",),
    "adapters_norm": ("slots",),
}
#: Inputs that always have fewer than 8 elements.
TINY: dict[Body, tuple[str, ...]] = {
    "decode": ("params", "written"),
    "write": ("previous",),
    "quantise": ("previous",),
    "rotate": ("previous",),
    "rotate_decode": ("params", "sinks", "previous"),
}
#: Rows of Llama's shape, and rows with norms, parts of sums, and values of another matmul.
ROTATED = [
    Instance(
        "rotate_decode",
        (
            *BF16, ("J", joint), ("A", "bfloat16_t"), ("P", "bfloat16_t"), ("W", "float"),
            ("S", "float"), ("O", out),
        ),
        (
            *plan_decode(AttentionShape(16, 4, 128, 128), 2, 4, 4096, parts).constants,
            ("DIMS", dims), ("INTERLEAVED", interleaved), ("QKNORM", norm), ("PARTS", count),
            ("OWN_VALUES", own_values), ("EPSILON", 0x3727C5AC), ("FACTOR", 0x3F800000),
        ),
    )
    for joint, out, parts, dims, interleaved, norm, count, own_values in (
        ("bfloat16_t", "bfloat16_t", 1, 128, False, False, 1, False),
        ("float", "float", 4, 64, True, True, 4, True),
    )
]  # fmt: skip
INSTANCES = [
    *dict.fromkeys(instance for case in CASES for instance in case.instances),
    write_instance(64, 32, rows="float", pool="bfloat16_t"),
    write_instance(20, 12, rows="float16_t", pool="float16_t"),
    quantise_instance(128, 64, Quantisation(8, 32), rows="bfloat16_t"),
    quantise_instance(64, 64, Quantisation(4, 64), rows="float"),
    draw_instance(128256),
    draw_instance(50257),
    greedy_instance(128256),
    greedy_instance(50257),
    *ROTATED,
    *FUSED,
    *MIXTURES,
    *ADAPTERS,
    *RECURRENT,
    *BLOCKS,
]


@pytest.mark.long
@pytest.mark.parametrize(
    "instance", INSTANCES, ids=[f"{i.body}-{index}" for index, i in enumerate(INSTANCES)]
)
def test_address_spaces(instance: Instance) -> None:
    """With all inputs that may be small in `device` memory, and with all of them in `constant`."""
    for small in ((), SMALL[instance.body]):
        verdict = judge(instance, (*TINY.get(instance.body, ()), *small))
        assert verdict.problems == ()


@pytest.mark.parametrize("body", SMALL)
def test_address_spaces_of_each_input(body: Body) -> None:
    """Every combination of address spaces, for one instance of each kernel."""
    instance = next(found for found in INSTANCES if found.body == body)
    for count in range(1, len(SMALL[body])):
        for small in itertools.combinations(SMALL[body], count):
            assert judge(instance, (*TINY.get(body, ()), *small)).problems == ()


@pytest.mark.sample(9)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shared_memory_is_what_the_plan_says(case: Case) -> None:
    decode, *merge = (judge(instance) for instance in case.instances)
    assert decode.shared_bytes == case.plan.shared_bytes <= MAX_SHARED_BYTES
    assert all(0 < found.shared_bytes <= MAX_SHARED_BYTES for found in merge)


@pytest.mark.parametrize("instance", BLOCKS, ids=lambda i: i.body)
def test_rules_and_shared_memory_of_blocks(instance: Instance) -> None:
    verdict = judge(instance)
    assert verdict.problems == ()
    assert verdict.shared_bytes == (64 if instance.body == "block_dots" else 0)


@pytest.mark.parametrize("instance", [*FUSED, *ADAPTERS], ids=lambda i: i.body)
def test_shared_memory_of_fused_layers(instance: Instance) -> None:
    constants = dict(instance.constants)
    expected = 0
    if instance.body in ("add_norm", "adapters_norm", "norm_beside"):  # a sum of each simdgroup
        expected += 4 * constants["NSG"]
    if instance.body == "pick":  # a value, a place and a fault of each simdgroup
        expected += 12 * constants["NSG"]
    if instance.body in ("adapters", "adapters_norm"):  # 8 sums of each, and the sums of all
        expected += 4 * (8 * constants["NSG"] + constants["RANKS"])
    assert judge(instance).shared_bytes == expected


DECODE = CASES[0].instances[0]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (("float most[HEADS]", "PA_DEVICE float* p = queries; float most[HEADS]"), "cannot init"),
        (("float bias[STEPS];", "PA_SHARED(float, bias, STEPS);"), "outermost scope"),
        (("float bias[STEPS];", "float bias[parts];"), "not a constant"),
        (("float bias[STEPS];", "float bias[STEPS]; const float* w = params;"), "cannot init"),
        (("PA_SYNC();", "PA_SYNCS();"), "undeclared"),
    ],
)
def test_what_breaks_the_rules_is_noticed(edit: tuple[str, str], says: str) -> None:
    problems = judge(DECODE, TINY["decode"], edit=edit).problems
    assert any(says in problem for problem in problems), problems


def test_rows_of_fewer_than_8_elements_would_not_compile() -> None:
    """So `write_kv` leaves small inputs to MLX: see `test_operations`."""
    instance = write_instance(4, 2, rows="float", pool="float")
    assert judge(instance, TINY["write"]).problems == ()
    assert judge(instance, (*TINY["write"], "k")).problems
