"""CUDA binaries of our kernels, compiled without a GPU: their names and contents."""

from __future__ import annotations

import itertools
import math
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.kernels import cuda as binaries
from modelpack_engine.kernels import cuda as nvrtc
from modelpack_engine.kernels import grouped, launch, operations, prefill
from modelpack_engine.kernels.cuda import (
    GeneratedKernel,
    binaries_folder,
    compile_kernel,
    std_hash,
)
from modelpack_engine.kernels.plan import AttentionShape
from modelpack_engine.kernels.quantised import Quantisation
from modelpack_engine.kernels.sources import KernelSource, kernel_source
from modelpack_engine.layers import (
    adapters,
    blocks,
    convolution,
    delta_rule,
    dots,
    drafts,
    expert_kernels,
    gated_norm,
    kernels,
    linear_attention,
    matmul,
    packed,
    packed_wide,
    rotated_attention,
    state_space,
    strips,
)
from modelpack_engine.runner import replay
from modelpack_engine.sampling import delivery, sampler
from modelpack_engine.vision import transfers, windows
from tests.peers import require

pytestmark = pytest.mark.long

SOURCE = KernelSource("paged_x_12ab", "// ours\n", "  out[0] = a_shape[0];", ("a", "n"), ("out",))
INPUTS = [mx.zeros((2, 3), mx.bfloat16), mx.array(1.0)]
TEMPLATE = [("T", mx.bfloat16), ("S", mx.float32), ("SPLIT", True), ("WIDTH", 8)]
#: The source that MLX 0.32.4 generates for this kernel, without its own headers.
TEXT = """\
// ours
namespace mlx::core::cu {

namespace cg = cooperative_groups;

__global__ void custom_kernel_paged_x_12ab_bfloat16_t_float_t_8(
    const __nv_bfloat16* a,
    const __grid_constant__ Shape a_shape,
    const float* n,
    uint32_t* out) {
  using T = __nv_bfloat16;
  using S = float;
  constexpr bool SPLIT = true;
  constexpr int WIDTH = 8;

  out[0] = a_shape[0];
}

} // namespace mlx::core::cu
"""


HASH = """
#include <iostream>
#include <string>
int main() {
  for (std::string line; std::getline(std::cin, line);)
    std::cout << std::hash<std::string>{}(line) << std::endl;
}
"""


@dataclass
class Compiler:
    """Replaces NVRTC: the binary is the source."""

    texts: list[str] = field(default_factory=list)
    error: str = ""

    def compile(self, text: str, name: str, architecture: str) -> nvrtc.Compiled:
        self.texts.append(text)
        if self.error:
            raise nvrtc.CompileError(self.error)
        return nvrtc.Compiled(f"{architecture} {name} {text}".encode(), "_Z1x")


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    """A compiler on a machine where it is unknown whether MLX uses the binaries."""
    found = Compiler()
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "ptx"))
    monkeypatch.setattr(nvrtc, "find", lambda: found)
    monkeypatch.setattr(binaries, "_architecture", lambda: "sm_90a")
    return found


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, unasked: Compiler) -> Compiler:
    """A compiler on a machine where MLX uses its binaries."""
    monkeypatch.setattr(binaries, "found_by_mlx", lambda: True)
    return unasked


def kernel() -> GeneratedKernel:
    return GeneratedKernel(SOURCE, INPUTS, TEMPLATE, [mx.uint32])


def prepare() -> None:
    binaries.prepare(SOURCE, INPUTS, TEMPLATE, [mx.uint32])


def test_the_machine_code_of_a_kernel(compiler: Compiler) -> None:
    """It is the stored one, if MLX uses these binaries; otherwise it is compiled."""
    first = binaries.compiled_kernel(kernel())
    assert len(compiler.texts) == 1
    prepare()
    assert len(compiler.texts) == 2
    assert binaries.compiled_kernel(kernel()) == first
    assert len(compiler.texts) == 2


def test_the_text_is_mlx_s() -> None:
    assert kernel().text == TEXT
    assert kernel().function == "custom_kernel_paged_x_12ab_bfloat16_t_float_t_8"


def test_the_hash_is_the_standard_library_s(tmp_path: Path) -> None:
    program = tmp_path / "hash.cpp"
    program.write_text(HASH)
    subprocess.run([require("g++"), program, "-o", tmp_path / "hash"], check=True)
    lines = ["", *(TEXT.replace("\n", " ")[:n] for n in (*range(1, 20), 64, 200)), "ä€𝄞" * 9]
    done = subprocess.run(
        [tmp_path / "hash"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert [std_hash(line.encode()) for line in lines] == list(map(int, done.stdout.split()))


def test_a_binary_is_made_once(compiler: Compiler, tmp_path: Path) -> None:
    prepare()
    prepare()
    (text,) = compiler.texts
    assert text == binaries.PRELUDE + TEXT
    code = tmp_path / "ptx" / f"{kernel().path}.ptx"
    assert code.read_bytes().startswith(b"sm_90a mlx::core::cu::custom_kernel_paged_x_12ab_")
    symbol, digest = code.with_suffix(".txt").read_text().splitlines()
    assert symbol == f"mlx::core::cu::{kernel().function}\t_Z1x"
    assert "\t" not in digest
    assert sorted(path.suffix for path in (tmp_path / "ptx").iterdir()) == [".ptx", ".txt"]


@pytest.mark.parametrize("suffix", [".ptx", ".txt"])
@pytest.mark.parametrize("damage", [b"", b"half of", b"\xff\n\xfe", None])
def test_a_damaged_binary_is_made_again(
    compiler: Compiler, tmp_path: Path, suffix: str, damage: bytes | None
) -> None:
    prepare()
    files = sorted((tmp_path / "ptx").iterdir())
    before = [file.read_bytes() for file in files]
    (damaged,) = (file for file in files if file.suffix == suffix)
    if damage is None:
        damaged.unlink()
    else:
        damaged.write_bytes(damage)
    prepare()
    assert len(compiler.texts) == 2
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("what", ["_architecture", "PRELUDE"])
def test_a_binary_for_something_else_is_replaced(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    prepare()
    other: Any = (lambda: "sm_80") if what == "_architecture" else "// other headers"
    monkeypatch.setattr(binaries, what, other)
    prepare()
    prepare()
    assert len(compiler.texts) == 2


def test_long_names_are_folders_as_in_mlx(compiler: Compiler, tmp_path: Path) -> None:
    long = [*TEMPLATE, *((f"N{i}", 10**9 + i) for i in range(25))]
    binaries.prepare(SOURCE, INPUTS, long, [mx.uint32])
    path = GeneratedKernel(SOURCE, INPUTS, long, [mx.uint32]).path
    assert [len(part) > 200 for part in path.parts] == [True, False]
    assert (tmp_path / "ptx" / f"{path}.ptx").is_file()
    binaries.prepare(SOURCE, INPUTS, long, [mx.uint32])
    assert len(compiler.texts) == 1


def test_what_cannot_be_made_is_left_to_mlx(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.error = "identifier x is undefined"
    prepare()
    compiler.error = ""
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "file"))
    prepare()
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "ptx"))
    binaries.prepare(SOURCE, [mx.zeros((1,), mx.complex64), INPUTS[1]], TEMPLATE, [mx.uint32])
    monkeypatch.setattr(binaries, "found_by_mlx", lambda: False)
    prepare()
    assert len(compiler.texts) == 1
    assert not (tmp_path / "ptx").exists()


def test_kernels_are_prepared_before_their_first_call(compiler: Compiler, tmp_path: Path) -> None:
    there: list[int] = []

    def run(**_: Any) -> list[mx.array]:
        there.append(len(list((tmp_path / "ptx").glob("*.ptx"))))
        return []

    call = binaries.prepared(run, SOURCE)
    for width in (8, 8, 9):
        call(inputs=INPUTS, template=[("WIDTH", width)], output_dtypes=[mx.uint32], grid=(1, 1, 1))
    call(inputs=[INPUTS[1]] * 2, template=[("WIDTH", 9)], output_dtypes=[mx.uint32])
    assert there == [1, 1, 2, 3]


def fake_mlx(folder: Path, looks: bool, error: str = "") -> Callable[..., Any]:
    """Return a fake of `mx.fast.cuda_kernel` that uses stored binaries, or does not."""

    def make(**_: Any) -> Any:
        def run(**_: Any) -> list[mx.array]:
            if error:
                raise RuntimeError(error)
            (code,) = folder.glob("*.ptx")
            return [mx.array([1 if looks and b"out[0] = 1" in code.read_bytes() else 0])]

        return run

    return make


@pytest.mark.parametrize(
    ("looks", "error", "found"), [(True, "", True), (False, "", False), (True, "no image", False)]
)
def test_whether_mlx_looks_is_asked(
    monkeypatch: pytest.MonkeyPatch,
    unasked: Compiler,
    tmp_path: Path,
    looks: bool,
    error: str,
    found: bool,
) -> None:
    monkeypatch.setattr(mx.fast, "cuda_kernel", fake_mlx(tmp_path / "ptx", looks, error))
    binaries.found_by_mlx.cache_clear()
    try:
        assert binaries.found_by_mlx() is found
        unasked.error = "there is no compiler"
        binaries.found_by_mlx.cache_clear()
        assert not binaries.found_by_mlx()
    finally:
        binaries.found_by_mlx.cache_clear()
    assert not list((tmp_path / "ptx").iterdir()), "a binary that is not the text's stays nowhere"


def test_where_mlx_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "/some/where")
    assert binaries_folder() == Path("/some/where")
    monkeypatch.delenv("MLX_PTX_CACHE_DIR")
    monkeypatch.setenv("TMPDIR", "/else/where")
    assert binaries_folder() == Path("/else/where/mlx", version("mlx"), "ptx")


# With NVIDIA's own compiler.


def registers_of_a_quarter(code: bytes, threads: int) -> int:
    """Return the registers that a block takes of a multiprocessor's quarter, which has 16,384.

    Each quarter runs one of four warps, which gets registers for its lanes by eights. `code` has
    one kernel; records of `.nv.info` have its number of registers, and those of its functions.
    """
    record = b"\x04\x2f\x08\x00"  # EIATTR_REGCOUNT: the index of a symbol, then its registers
    found = [int.from_bytes(each[4:8], "little") for each in code.split(record)[1:]]
    registers = max(number for number in found if number < 256)  # the rest are instructions
    warps = -(-threads // 32)
    return -(-warps // 4) * -(-registers // 8) * 8 * 32


class Compiling:
    """Replaces `launch._kernel`: kernels are compiled, and return zeros."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.compiler = nvrtc.find()
        self.done: set[Path] = set()
        self.beside = 1  # blocks on a multiprocessor

    def kernel(self, body: Any, on: Any, shared_bytes: int = 0, **more: Any) -> Any:
        source = kernel_source(body, "cuda", by_path=body in ("rows", "swiglu"), **more)

        def run(
            *,
            inputs: Sequence[mx.array],
            template: Any,
            output_shapes: Sequence[tuple[int, ...]],
            output_dtypes: Sequence[mx.Dtype],
            threadgroup: tuple[int, int, int],
            **_: Any,
        ) -> list[mx.array]:
            found = GeneratedKernel(source, inputs, template, output_dtypes)
            if found.path not in self.done:
                made = compile_kernel(found, self.architecture, self.compiler)
                assert found.function in made.symbol
                assert made.code.startswith(b"\x7fELF")
                beside = self.beside if body == "packed_wide" else 1
                registers = registers_of_a_quarter(made.code, math.prod(threadgroup))
                assert registers * beside <= 1 << 14, template
                self.done.add(found.path)
            return [mx.zeros(*of) for of in zip(output_shapes, output_dtypes, strict=True)]

        return run


BF16, F16, F32 = mx.bfloat16, mx.float16, mx.float32
LLAMA = AttentionShape(8, 2, 64, 64)
SINKS = AttentionShape(8, 2, 64, 64, window=128, softcap=True, sinks=True)
LATENT = AttentionShape(16, 1, 512, 512, 64, latent=True)
Q8 = AttentionShape(8, 2, 64, 64, bits=8, group=64)
BLOCKS = {**blocks.BLOCK_TYPES, "halves of Q4_K": blocks.BLOCK_TYPES["Q4_K"].halved}
FEW_BLOCKS = ["Q2_K", "Q6_K", "Q5_1", "IQ4_XS", "halves of Q4_K"]
PLACE = delivery.Place(np.zeros(0, np.int32), mx.zeros((4,), mx.int32))
CALLS: dict[str, Callable[[], object]] = {
    "decode": lambda: operations.probe_decode(LLAMA, "cuda", BF16, BF16),
    "rotate_decode": lambda: rotated_attention._compare(
        LLAMA, rotated_attention.Kind(BF16, BF16, 1, BF16, LLAMA.key_dim, interleaved=False)
    ),
    "rotate_decode, norms": lambda: rotated_attention._compare(
        LLAMA,
        rotated_attention.Kind(
            F16, F32, 2, F16, LLAMA.key_dim, interleaved=True, norms=F16, values=F16
        ),
    ),
    "decode, half": lambda: operations.probe_decode(LLAMA, "cuda", F16, F16),
    "decode, sinks": lambda: operations.probe_decode(SINKS, "cuda", F32, BF16),
    "decode, latent": lambda: operations.probe_decode(LATENT, "cuda", BF16, BF16),
    "decode, q8": lambda: operations.probe_decode(Q8, "cuda", BF16, mx.uint32),
    "write": lambda: operations.probe_write("cuda", BF16, BF16),
    "quantise": lambda: operations.probe_quantise("cuda", BF16, Quantisation(4, 64)),
    "prefill": lambda: prefill.probe(LLAMA, BF16),
    "prefill, sinks": lambda: prefill.probe(SINKS, F16),
    "grouped": lambda: grouped.probe(AttentionShape(8, 2, 128, 128), BF16),
    "grouped, sinks": lambda: grouped.probe(
        AttentionShape(16, 1, 64, 64, window=128, softcap=True, sinks=True), F16
    ),
    "fused layers": lambda: kernels._compare(BF16),
    "fused layers, float32": lambda: kernels._compare(F32),
    "values of another matmul": lambda: kernels._compare_own_values(BF16),
    "routes": lambda: expert_kernels._compare_routing(BF16),
    "products": lambda: matmul._compare(BF16, 16, False),
    "products, 4 bits": lambda: matmul._compare(F16, 4, True),
    "packed weights": lambda: packed._compare(BF16, 4, 64, packed.TILE),
    "packed weights, 8 bits": lambda: packed._compare(F16, 8, 32, packed.TILE),
    "packed weights, one row": lambda: packed._compare_row(BF16, 64),
    "packed weights, one row, groups of 32": lambda: packed._compare_row(F16, 32),
    **{
        f"blocks, {name}": lambda name=name: (  # type: ignore[misc]
            blocks._compare(BF16, BLOCKS[name], 1),
            blocks._compare_values(F16, BLOCKS[name]),
        )
        for name in ("Q2_K", "Q5_K", "Q6_K", "Q5_1", "IQ4_XS", "halves of Q4_K")
    },
    "experts": lambda: expert_kernels._compare_matmul(BF16, 16, 32, swiglu=True),
    "dots": lambda: dots._compare(BF16, 16, 64),
    "dots, 4 bits": lambda: dots._compare(F16, 4, 64),
    "dots of norms": lambda: dots._compare_normed(BF16, 16, 64),
    "dots of experts": lambda: dots._compare_experts(BF16, 16, 64),
    "dots of experts, 8 bits": lambda: dots._compare_experts(F16, 8, 32),
    "experts, 8 bits": lambda: expert_kernels._compare_matmul(F16, 8, 64, swiglu=False),
    "rows of a draft": lambda: drafts._compare_places(),
    "tokens of a draft": lambda: drafts._compare_picked(BF16, 1000),
    "states beside each other": lambda: drafts._compare_beside(BF16),
    "norms of a draft": lambda: drafts._compare_norms(F16),
    "greedy": lambda: sampler._compare_greedy(BF16, 1000),
    "draws": lambda: sampler._compare(BF16, 1000),
    "tokens without a choice": lambda: sampler._mark(
        mx.zeros((3,), mx.int32), mx.zeros((3,), BF16)
    ),
    "delivered tokens": lambda: delivery.deliver(mx.zeros((300,), mx.int32), PLACE.address),
    "addresses": lambda: replay.addresses([mx.zeros((4,), F16), mx.zeros((4,), mx.uint8)]),
    "taken numbers": lambda: kernels.take_rows(mx.zeros((5, 1), mx.int32), mx.array([3, 0])),
    "delta rule": lambda: delta_rule._compare(BF16),
    "delta rule on tensor cores": lambda: delta_rule._compare_wide(BF16, 128, 128),
    "delta rule of wide keys on tensor cores": lambda: delta_rule._compare_wide(BF16, 256, 64),
    "state space": lambda: state_space._compare(BF16),
    "state space on tensor cores": lambda: state_space._compare_wide(BF16, 64, 128),
    "state space on tensor cores, 256 states": lambda: state_space._compare_wide(F16, 128, 256),
    "convolution": lambda: convolution._compare(BF16),
    "gated norm": lambda: gated_norm._compare(BF16),
    "linear attention": lambda: linear_attention._compare(BF16),
    "windows of patches": lambda: windows._compare(BF16, 16, 80),
    "fetched numbers": lambda: transfers._fetch(0, 100),
    "adapters": lambda: adapters._compare(BF16),
    "adapters on tensor cores": lambda: adapters._products(BF16, wide=True),
}


#: A text for Hopper, and for one of two other generations by turns.
TEXTS = [
    (name, architecture)
    for index, name in enumerate(CALLS)
    for architecture in ("sm_90a", ("sm_80", "sm_100a")[index % 2])
]


@pytest.mark.parametrize(("name", "architecture"), TEXTS)
def test_nvidia_s_compiler_takes_the_texts(
    monkeypatch: pytest.MonkeyPatch, name: str, architecture: str
) -> None:
    compiling = Compiling(architecture)
    monkeypatch.setattr(launch, "kernel", compiling.kernel)
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    CALLS[name]()  # returns an error: the fake kernels return zeros
    assert compiling.done


@pytest.mark.parametrize("tile", [*packed_wide.TILES, packed_wide.GATED])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_nvidia_s_compiler_takes_warpgroups(
    monkeypatch: pytest.MonkeyPatch,
    tile: packed_wide.WideTile,
    dtype: mx.Dtype,
    bits: int,
    group_size: int,
) -> None:
    """So many blocks as should run beside each other have enough registers."""
    compiling = Compiling("sm_90a")
    monkeypatch.setattr(launch, "kernel", compiling.kernel)
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    compiling.beside = tile.beside
    for biased in (False, True):
        packed_wide._compare(dtype, bits, group_size, tile, biased)
    assert compiling.done


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize(
    "form",
    [strips.Format(bits, size) for bits, size in itertools.product((4, 8), (32, 64, 128))]
    + [strips.Format(0, 0, BLOCKS[name]) for name in FEW_BLOCKS],
    ids=lambda form: form.blocks.name if form.blocks else f"{form.bits} bits of {form.group_size}",
)
@pytest.mark.parametrize("inputs", [4096, strips.MOST_NORMED])
def test_strips_have_enough_registers(
    monkeypatch: pytest.MonkeyPatch, inputs: int, form: strips.Format, dtype: mx.Dtype
) -> None:
    """Otherwise MLX cannot launch them: SwiGLU of one row in groups of 32 could not be."""
    compiling = Compiling("sm_90a")
    monkeypatch.setattr(launch, "kernel", compiling.kernel)
    for rows, biased in itertools.product((1, 2, 4, 8), (False, True)):
        weights, *_ = strips.random_weights_of(dtype, form, (64, inputs), biased=biased)
        few = strips.plan(rows, inputs, form, parted=True)
        if few is None:  # the rows have no room
            assert rows == 8
            continue
        x = mx.zeros((rows, inputs), dtype)
        for swiglu in (False, True) if few.parts == 1 else (False,):
            strips.multiply(x, weights, few, swiglu=swiglu)
            for count, of_norm in ((1, dtype), (8, F32)) if rows == 1 else ():
                parts = mx.zeros((count, *x.shape), dtype if count == 1 else F32)
                row = dots.Normed(x, parts, count, mx.zeros((inputs,), of_norm), 1e-5)
                strips.multiply_normed(row, weights, few, swiglu=swiglu)
    assert compiling.done


@pytest.mark.parametrize("name", FEW_BLOCKS)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_nvidia_s_compiler_takes_tiles_of_blocks(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: mx.Dtype
) -> None:
    compiling = Compiling("sm_90a")
    monkeypatch.setattr(launch, "kernel", compiling.kernel)
    for tile in (blocks.TILE_OF_MANY, *(blocks.TILES if dtype == BF16 else blocks.TILES[:1])):
        blocks._compare_tiles(dtype, BLOCKS[name], tile)
    assert compiling.done


@pytest.mark.parametrize("swiglu", [False, True])
def test_nvidia_s_compiler_takes_experts_by_warpgroups(
    monkeypatch: pytest.MonkeyPatch, swiglu: bool
) -> None:
    compiling = Compiling("sm_90a")
    monkeypatch.setattr(launch, "kernel", compiling.kernel)
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    expert_kernels._compare_wide(BF16, swiglu)
    assert compiling.done


def test_a_text_that_is_wrong_is_refused() -> None:
    wrong = KernelSource("wrong", "", "  out[0] = a_shap[0];", ("a",), ("out",))
    with pytest.raises(nvrtc.CompileError, match='identifier "a_shap" is undefined'):
        compile_kernel(
            GeneratedKernel(wrong, INPUTS[:1], [("T", F32)], [F32]), "sm_90a", nvrtc.find()
        )
