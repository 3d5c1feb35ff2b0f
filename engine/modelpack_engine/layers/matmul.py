"""Matmuls with weights, [rows, in] times [out, in], by the kernel that suits the number of rows.

With few rows, most of the time is spent reading the weights, which MLX's matmuls do at half of the
memory bandwidth. Our kernel computes these matmuls, and may leave partial sums for the next kernel
to add. With many rows, quantised weights are dequantised first. MLX computes all other matmuls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.kernels import launch
from modelpack_engine.layers import kernels

#: The most rows for which our kernel is used, with quantised weights and with plain ones: see
#: benchmarks/results/engine-h200.md. With more rows, quantised weights are dequantised first.
FEW_ROWS, FEW_ROWS_PLAIN = 128, 64
#: The outputs of one block of our kernel, the inputs that it reads at a time, and its threads.
OUTPUTS, DEPTH, THREADS = 64, 64, 128
#: The tile sizes that the kernels are compiled for, with their pipeline stages, by the bits of a
#: weight: few, as each takes a second or two to compile.
_TILES = {
    4: {32: 4, FEW_ROWS: 3},
    8: {32: 4, FEW_ROWS: 3},
    16: {32: 4, FEW_ROWS_PLAIN: 4},
}
#: Threadgroups that keep a large GPU busy, and the fewest tiles that each of them should have.
_THREADGROUPS, _FEWEST_TILES, _MOST_PARTS = 192, 4, 8


@dataclass(frozen=True, slots=True)
class Weights:
    """The parameters of a linear layer, or of the experts of one: plain weights [..., out, in].

    With `bits`, weights are quantised: packed in uint32, low bits first, with scales and biases
    [..., out, in / group]. `transposed` is a view of plain weights, made once for all steps.
    """

    weight: mx.array
    scales: mx.array | None
    biases: mx.array | None
    bias: mx.array | None
    bits: int | None
    group_size: int
    mode: str
    transposed: mx.array | None = None

    @classmethod
    def plain(cls, weight: mx.array, bias: mx.array | None = None) -> Weights:
        """Return weights that are not quantised."""
        return cls(weight, None, None, bias, None, 0, "")

    @property
    def num_outputs(self) -> int:
        """The number of outputs."""
        return self.weight.shape[-2]

    @property
    def num_inputs(self) -> int:
        """The number of inputs."""
        return self.weight.shape[-1] * (32 // self.bits if self.bits else 1)

    def ready(self) -> Weights:
        """Return these weights with `transposed` set, which each step would compute otherwise."""
        if self.bits is not None:
            return self
        transposed = self.weight.T
        mx.eval(transposed)
        return replace(self, transposed=transposed)


def weights_of(layer: nn.Module) -> Weights | None:
    """Return the parameters of a linear layer, or of an embedding used as one; None for others.

    Swapped classes count as their originals; layers that are sharded over devices do not.
    """
    if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return quantised_weights(layer)
    if isinstance(layer, nn.Linear | nn.Embedding):
        return Weights.plain(layer["weight"], layer.get("bias"))
    return None


def quantised_weights(layer: Any) -> Weights:
    """Return the parameters of any quantised layer."""
    return Weights(
        layer["weight"], layer["scales"], layer.get("biases"), layer.get("bias"),
        layer.bits, layer.group_size, layer.mode,
    )  # fmt: skip


def multiply(x: mx.array, weights: Weights) -> mx.array:
    """Return x [rows, in] times the weights, plus the bias: [rows, out] in x's type."""
    if _takes(x, weights):
        return _run(x, weights, 1, (x.shape[0], weights.num_outputs))
    product = _by_mlx(x, weights)
    if weights.bias is None or weights.bits is None:
        return product
    return product + weights.bias


@dataclass(frozen=True, slots=True)
class Parts:
    """Partial sums of a matmul: `count` arrays of the same shape, stacked in `array`.

    Several parts are float32 and must be added; a single part is the result in its own type.
    """

    array: mx.array
    count: int


def multiply_in_parts(x: mx.array, weights: Weights) -> Parts:
    """Return the partial sums of rows x [rows, ...] times the weights: parts [rows, out]."""
    if not _takes(x, weights):
        return Parts(multiply(x.reshape(x.shape[0], -1), weights), 1)
    parts = num_parts(weights.num_outputs, weights.num_inputs)
    shape = (x.shape[0], weights.num_outputs)
    return Parts(_run(x, weights, parts, shape if parts == 1 else (parts, *shape)), parts)


def swiglu(x: mx.array, weights: Weights) -> mx.array:
    """Return silu(gate) * up [rows, n] for rows x [rows, ...] and joint weights [2 n, in]."""
    width = weights.num_outputs // 2
    if _takes(x, weights) and weights.num_outputs % 2 == 0:
        return _run(x, weights, 1, (x.shape[0], width), swiglu=True)
    return kernels.swiglu(multiply(x.reshape(x.shape[0], -1), weights))


def _by_mlx(x: mx.array, weights: Weights) -> mx.array:
    """Multiply by MLX's functions; the bias of quantised weights is not added."""
    weight, bits = weights.weight, weights.bits
    if bits is None:
        transposed = weight.T if weights.transposed is None else weights.transposed
        return x @ transposed if weights.bias is None else mx.addmm(weights.bias, x, transposed)
    scales, biases, group_size = weights.scales, weights.biases, weights.group_size
    assert scales is not None
    if biases is not None and x.shape[0] > FEW_ROWS and _is_affine(x, weights):
        return x @ kernels.dequantise(weight, scales, biases, group_size, bits).T
    return mx.quantized_matmul(
        x, weight, scales, biases,
        transpose=True, group_size=group_size, bits=bits, mode=weights.mode,
    )  # fmt: skip


def _is_affine(x: mx.array, weights: Weights) -> bool:
    """Return whether our kernels support these quantised weights."""
    return (
        weights.mode == "affine"
        and weights.bits in (4, 8)
        and weights.group_size % 32 == 0
        and weights.scales is not None
        and weights.scales.dtype == x.dtype
    )


def _takes(x: mx.array, weights: Weights) -> bool:
    """Return whether our kernel multiplies these rows."""
    return (
        x.shape[0] <= (FEW_ROWS if weights.bits else FEW_ROWS_PLAIN)
        and fits(x, weights)
        and verdict(x.dtype, weights.bits or 16) is None
    )


def fits(x: mx.array, weights: Weights) -> bool:
    """Return whether our kernels support rows x and weights of these types and sizes."""
    return (
        x.dtype in (mx.float16, mx.bfloat16)
        and launch.backend() == "cuda"
        and weights.num_inputs % DEPTH == 0
        and (weights.bias is None or weights.bias.dtype == x.dtype)
        and (_is_affine(x, weights) if weights.bits else weights.weight.dtype == x.dtype)
    )


def stage_bytes(bits: int, tile: int) -> int:
    """Return the bytes of shared memory of one pipeline stage, for tiles of `tile` rows."""
    return OUTPUTS * DEPTH * bits // 8 + tile * DEPTH * 2


def num_parts(num_outputs: int, num_inputs: int) -> int:
    """Return the number of parts to split the inputs into, a power of two."""
    tiles, groups = num_inputs // DEPTH, -(-num_outputs // OUTPUTS)
    parts = 1
    while (
        parts < _MOST_PARTS
        and groups * parts < _THREADGROUPS
        and tiles % (2 * parts) == 0
        and tiles // (2 * parts) >= _FEWEST_TILES
    ):
        parts *= 2
    return parts


def _run(
    x: mx.array, weights: Weights, parts: int, shape: tuple[int, ...], *, swiglu: bool = False
) -> mx.array:
    """Return the output of our kernel in this shape: outputs in parts, or SwiGLU of them."""
    rows, outputs = x.shape[0], weights.num_outputs
    bits = weights.bits or 16
    tile, stages = next(item for item in _TILES[bits].items() if item[0] >= rows)
    out_dtype = x.dtype if parts == 1 else mx.float32
    scales = x if weights.scales is None else weights.scales
    biases = x if weights.biases is None else weights.biases
    (out,) = launch.kernel("product", "cuda", stages * stage_bytes(bits, tile))(
        inputs=[x, weights.weight, scales, biases, x if weights.bias is None else weights.bias],
        template=[
            ("T", x.dtype), ("O", out_dtype), ("BITS", bits), ("GROUP", weights.group_size or 64),
            ("BIAS", weights.bias is not None), ("MT", tile), ("STAGES", stages),
            ("SWIGLU", swiglu),
        ],
        grid=(-(-outputs // OUTPUTS) * THREADS, 1, parts),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[shape],
        output_dtypes=[out_dtype],
    )  # fmt: skip
    return out


def random_weights(
    dtype: mx.Dtype,
    bits: int,
    shape: tuple[int, ...],
    scale: float,
    key: mx.array,
    of_bias: mx.array,
) -> tuple[Weights, mx.array, mx.array]:
    """Return random weights for a test, and the same weights and their bias in float32."""
    full = (mx.random.normal(shape, key=key) * scale).astype(dtype)
    bias = mx.random.normal(shape[:-1], key=of_bias).astype(dtype)
    weights = Weights.plain(full, bias)
    if bits < 16:
        packed = mx.quantize(full, 32, bits)
        full = mx.dequantize(*packed, 32, bits)
        weights = Weights(*packed, bias, bits, 32, "affine")
    return weights, full.astype(mx.float32), bias.astype(mx.float32)


def _compare(dtype: mx.Dtype, bits: int) -> str | None:
    keys = mx.random.split(mx.random.key(9), 3)
    outputs, inputs = 208, 1024
    weights, full, bias = random_weights(dtype, bits, (outputs, inputs), 1 / 32, *keys[:2])
    for rows in (13, max(_TILES[bits])):
        x = mx.random.normal((rows, inputs), key=keys[2]).astype(dtype)
        expected = x.astype(mx.float32) @ full.T + bias
        parts = _run(x, weights, 4, (4, rows, outputs)).sum(axis=0)
        gate, up = mx.split(expected, 2, axis=1)
        found = _run(x, weights, 1, (rows, outputs // 2), swiglu=True)
        problem = launch.difference({f"the sum of {rows} rows": (parts, expected)}, 5e-2)
        problem = problem or launch.difference(
            {f"SwiGLU of {rows} rows": (found, gate * mx.sigmoid(gate) * up)}, 2e-1
        )
        if problem is not None:
            return problem
    return None


#: None if our kernel multiplies as MLX does for a type and the bits of a weight, otherwise the
#: problem.
verdict = launch.verdict(_compare)


_PARAMETERS = ("weight", "scales", "biases", "bias")


def can_join(layers: Sequence[nn.Module]) -> bool:
    """Return whether layers are linears of one kind, with inputs and types that are equal."""
    kinds = {type(layer) for layer in layers}
    if kinds not in ({nn.Linear}, {nn.QuantizedLinear}):
        return False
    names = {tuple(sorted(layer)) for layer in layers}
    widths = {layer["weight"].shape[1] for layer in layers}
    dtypes = {tuple(layer[name].dtype for name in sorted(layer)) for layer in layers}
    how = {
        tuple(getattr(layer, name, None) for name in ("group_size", "bits", "mode"))
        for layer in layers
    }
    return all(len(values) == 1 for values in (names, widths, dtypes, how))


def join(layers: Sequence[nn.Module]) -> Weights:
    """Return the joint weights of layers for which `can_join` is true: their outputs concatenated.

    The layers' parameters become views of the joint ones, so no memory is used twice.
    """
    joint: dict[str, mx.array] = {}
    for name in _PARAMETERS:
        if name not in layers[0]:
            continue
        joint[name] = mx.concatenate([layer[name] for layer in layers])
        mx.eval(joint[name])
        start = 0
        for layer in layers:
            size = layer[name].shape[0]
            layer[name] = joint[name][start : start + size]
            start += size
        mx.eval([layer[name] for layer in layers])
    first = weights_of(layers[0])
    assert first is not None, "plain layers have weights"
    return Weights(
        joint["weight"], joint.get("scales"), joint.get("biases"), joint.get("bias"),
        first.bits, first.group_size, first.mode,
    ).ready()  # fmt: skip
