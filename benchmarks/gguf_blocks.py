"""Measure GGUF's block types on a GPU: kernels, and engines with random weights of an 8B model.

    python benchmarks/gguf_blocks.py models [--mixes q4_k_m q6_k] [--keep all]
    python benchmarks/gguf_blocks.py peer
    python benchmarks/gguf_blocks.py kernels [--sweep]

`models` writes GGUF files of random blocks and loads them as `serve` does, or with no type or with
all types kept as they are stored. `peer` is the same shape in MLX's own 4 bits: mlx-lm's
`generate_step` in a process with MLX's default limits, then the engine. `kernels` compares each
kernel with float32 and measures it, with MLX's 4 bits for comparison; `--sweep` tries other sizes
of the kernels. Prints one JSON object for each measurement.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gpu_engine import (
    COMMON,
    CONTEXT,
    LIMITS,
    SHAPES,
    VOCABULARY,
    make_engine,
    make_model,
    one_stream,
    prompt,
    show,
)
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from modelpack_engine.engine import Engine
from modelpack_engine.layers import blocks, matmul
from modelpack_engine.layers.weights import Weights
from modelpack_engine.models import planes
from modelpack_engine.models.gguf import GGUFLoader
from modelpack_engine.models.gguf_file import GGUFFile
from modelpack_engine.models.precision import Precision, evaluate
from modelpack_engine.request import EngineRequest, SamplingParams

SHAPE = "llama-8b"
#: The bytes of a block's float16 factors; MXFP4 has an exponent of 8 bits.
FACTORS = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip


def mix_q4_k_m(name: str, layer: int, layers: int) -> str:
    """Return the type that llama.cpp gives a tensor of a Q4_K_M file."""
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    careful = name == "output" or (more and name in ("attn_v", "ffn_down"))
    return "Q6_K" if careful else "Q4_K"


#: The type of a tensor by its name, its layer and the number of layers.
MIXES: dict[str, Callable[[str, int, int], str]] = {"q4_k_m": mix_q4_k_m} | {
    kind.lower(): lambda *_, kind=kind: kind for kind in FACTORS
}


def random_tensor(kind: str, rows: int, columns: int) -> np.ndarray:
    """Return random blocks, uint8 [rows, bytes of a row], with small factors."""
    import gguf

    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(rows + columns)
    found = random.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
    for at in FACTORS[kind]:
        small = random.uniform(-1e-4, 1e-4, (len(found), 1)).astype(np.float16)
        found[:, at : at + 2] = small.view(np.uint8)
    if kind == "MXFP4":
        found[:, 0] = 114  # 2 ** -13, or half of it
    return found.reshape(rows, -1)


def write_gguf(path: Path, mix: Callable[[str, int, int], str]) -> None:
    """Write a model of SHAPE; all layers have the same random blocks of a type."""
    import gguf

    shape: dict[str, Any] = COMMON | SHAPES[SHAPE][1]
    hidden, inner, layers = (
        shape[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_vocab_size(VOCABULARY)
    made: dict[tuple[str, int, int], np.ndarray] = {}

    def add(name: str, layer: int, rows: int, columns: int) -> None:
        kind = mix(name.rpartition(".")[2], layer, layers)
        if (kind, rows, columns) not in made:
            made[kind, rows, columns] = random_tensor(kind, rows, columns)
        raw = made[kind, rows, columns]
        dtype = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", raw, raw_shape=raw.shape, raw_dtype=dtype)

    ones = np.ones(hidden, np.float32)
    add("token_embd", 0, VOCABULARY, hidden)
    for layer in range(layers):
        at = f"blk.{layer}."
        writer.add_tensor(f"{at}attn_norm.weight", ones)
        add(f"{at}attn_q", layer, hidden, hidden)
        add(f"{at}attn_k", layer, keys, hidden)
        add(f"{at}attn_v", layer, keys, hidden)
        add(f"{at}attn_output", layer, hidden, hidden)
        writer.add_tensor(f"{at}ffn_norm.weight", ones)
        add(f"{at}ffn_gate", layer, inner, hidden)
        add(f"{at}ffn_up", layer, inner, hidden)
        add(f"{at}ffn_down", layer, hidden, inner)
    writer.add_tensor("output_norm.weight", ones)
    add("output", 0, VOCABULARY, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def streams(engine: Engine, count: int, tokens: int = 128) -> float:
    """Return tokens per second of `count` streams together, after the last one's first token."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    for number in range(count):
        request = EngineRequest(prompt(64, 100 + number), params)
        engine.add_request(f"{number}-{time.time()}", request)
    begun: set[str] = set()
    start, counted = 0.0, 0
    while engine.has_work:
        for event in engine.step():
            begun.add(event.request_id)
            counted += len(event.token_ids) if start else 0
        if not start and len(begun) == count:
            start = time.perf_counter()
    return counted / (time.perf_counter() - start)


def measure_engine(
    kind: str, model: Any, about: dict[str, Any], tokens: int, *, loads: bool
) -> None:
    """Measure an engine: one stream, with `loads` several, and memory without the KV cache."""
    mx.reset_peak_memory()
    kv_bytes, begun = 4 << 30, time.perf_counter()
    engine = make_engine(model, 64 if loads else 1, "shortest-first", kv_bytes, 4096)
    start_s = round(time.perf_counter() - begun, 1)
    one = [one_stream(engine, tokens) for _ in range(4)][1:]
    held = mx.get_active_memory() - engine.memory_bytes
    show(kind, about | {
        "one_stream_tok_s": round(statistics.median(one), 1),
        "runs": [round(rate, 1) for rate in one], "start_s": start_s,
        "active": mx.get_active_memory(), "planned": engine.memory_bytes,
        "active_besides_plan": held, "peak": mx.get_peak_memory(),
    })  # fmt: skip
    if not loads:
        return
    many: dict[int, list[float]] = {}
    for count in (8, 32, 64):
        many[count] = [round(streams(engine, count)) for _ in range(2)]
    prompts = []
    for seed in (2, 3):
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        begun = time.perf_counter()
        engine.add_request(f"long-{seed}", EngineRequest(prompt(2048, seed), params))
        while engine.has_work:
            engine.step()
        prompts.append(round(time.perf_counter() - begun, 4))
    show(f"{kind}, loads", about | {
        "streams_tok_s": many, "prompt_of_2048_s": prompts,
        "peak_besides_kv": mx.get_peak_memory() - kv_bytes,
    })  # fmt: skip


KEEP = {"none": (), "some": planes.KEPT_ON_CUDA, "all": tuple(blocks.BLOCK_TYPES)}


def load_gguf(path: Path, keep: str) -> Any:
    """Return the model of a file, whose types `keep` stay as they are stored."""
    loader = GGUFLoader(GGUFFile.open((path,)))
    return loader.load(Precision(mx.bfloat16, dense=False, blocks=KEEP[keep]))


def measure_models(mixes: Sequence[str], keep: str, tokens: int, *, loads: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for name in mixes:
            path = Path(directory, f"{name}.gguf")
            begun = time.perf_counter()
            write_gguf(path, MIXES[name])
            written = time.perf_counter()
            model = load_gguf(path, keep)
            weights = evaluate(model)
            mx.clear_cache()
            size = path.stat().st_size
            about = {
                "mix": name, "keep": keep, "file": size, "weights": weights,
                "weights_of_file": round(weights / size, 4),
                "write_s": round(written - begun, 1),
                "load_s": round(time.perf_counter() - written, 1),
            }  # fmt: skip
            show("loaded", about)
            measure_engine("model", model, about, tokens, loads=loads)
            del model
            path.unlink()
            mx.clear_cache()


def measure_peer(tokens: int, *, layers: int, loads: bool) -> None:
    command = [sys.executable, __file__, "mlx-lm", "--tokens", str(tokens)]
    command += ["--layers", str(layers)]
    subprocess.run(command, env={**os.environ, **LIMITS}, check=True)
    model = make_model(SHAPE, 4)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    measure_engine("engine, MLX's 4 bits", model, {"weights": weights}, tokens, loads=loads)


def stream_of_peer(model: Any, tokens: int) -> float:
    """Return tokens per second of mlx-lm's single-request path after a prompt of two tokens.

    MLX compiles its kernel for the rows of longer prompts for half a minute.
    """
    first = 0.0
    for token, _ in generate_step(mx.array(prompt(2, 1)), model, max_tokens=tokens):
        int(token)
        first = first or time.perf_counter()
    return (tokens - 1) / (time.perf_counter() - first)


def measure_mlx_lm(tokens: int) -> None:
    model = make_model(SHAPE, 4)
    rates = [round(stream_of_peer(model, tokens), 1) for _ in range(4)][1:]
    show("mlx-lm, MLX's 4 bits", {
        "one_stream_tok_s": statistics.median(rates), "runs": rates,
        "peak": mx.get_peak_memory(),
    })  # fmt: skip


def microseconds(call: Callable[[int], mx.array], calls: int = 40, rounds: int = 5) -> float:
    """Return the least time of a call, of many that are launched together."""
    mx.eval([call(i) for i in range(4)])
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        mx.eval([call(i) for i in range(calls)])
        found.append((time.perf_counter() - start) / calls)
    return round(min(found) * 1e6, 2)


def error_of(found: mx.array, expected: mx.array) -> float:
    """Return the norm of the difference, of that of what is expected."""
    difference = found.astype(mx.float32) - expected
    return float(mx.linalg.norm(difference) / mx.linalg.norm(expected))


BF16 = mx.bfloat16
#: Outputs and inputs of gates and ups, of downs, and of queries, keys and values.
SIZES = ((28672, 4096), (4096, 14336), (6144, 4096))


def measure_kernels(kinds: Sequence[str], deadline: float, *, with_mlx: bool) -> None:
    for outputs, inputs in SIZES:
        for group in (64, 32) if with_mlx else ():
            measure_affine(outputs, inputs, group)
        for name in kinds:
            measure_type(name, outputs, inputs, deadline)
            mx.clear_cache()


def measure_affine(outputs: int, inputs: int, group: int) -> None:
    """Measure MLX's 4 bits, by MLX and by our kernels."""
    full = (mx.random.normal((outputs, inputs)) / 64).astype(BF16)
    packed: list[Any] = [mx.quantize(full * (1 + i / 64), group, 4) for i in range(4)]
    mx.eval(packed)
    ours = [Weights(*each, bias=None, bits=4, group_size=group, mode="affine") for each in packed]

    def by_rows(x: mx.array) -> dict[str, float]:
        return {
            "mlx_us": microseconds(
                lambda i: mx.quantized_matmul(x, *packed[i % 4], group_size=group, bits=4)
            ),
            "us": microseconds(lambda i: matmul.multiply(x, ours[i % 4])),
        }

    for rows in (1, 8, 32, 128):
        x = mx.random.normal((rows, inputs)).astype(BF16)
        about = {"type": f"MLX's 4 bits, groups of {group}", "outputs": outputs, "inputs": inputs}
        show("kernel", about | {"rows": rows, **by_rows(x)})


def measure_type(name: str, outputs: int, inputs: int, deadline: float) -> None:
    """Measure the kernels for a block type, and their errors."""
    kind = blocks.BLOCK_TYPES[name]
    weight = [mx.array(blocks.random_words(kind, outputs, inputs, i)) for i in range(3)]
    mx.eval(weight)
    exact = blocks.computed_values(weight[0], kind, mx.float32)
    about = {"type": name, "outputs": outputs, "inputs": inputs, "bytes": weight[0].nbytes}
    us = microseconds(lambda i: blocks.run_values(weight[i % 3], kind, BF16), 8)
    show("values", about | {"us": us, "problem": blocks.values_verdict(BF16, kind)})

    def measured(x: mx.array) -> dict[str, Any]:
        def dense(i: int) -> mx.array:
            return x @ blocks.run_values(weight[i % 3], kind, BF16).T

        def dots(i: int) -> mx.array:
            return blocks.run_dots(x, weight[i % 3], kind)

        def tiles(i: int) -> mx.array:
            return blocks.run_tiles(x, weight[i % 3], kind, blocks.tile_for(x.shape[0], outputs))

        ways = {"dense": dense, "tiles": tiles} | ({"dots": dots} if x.shape[0] <= 8 else {})
        expected = x.astype(mx.float32) @ exact.T
        return {
            how: timed(call, expected, 8 if call is dense else 30) for how, call in ways.items()
        }

    for rows in (1, 8, 32, 64, 128, 256):
        if time.monotonic() > deadline:
            return
        x = mx.random.normal((rows, inputs)).astype(BF16)
        show("kernel", about | {"rows": rows, **measured(x)})


def timed(call: Callable[[int], mx.array], expected: mx.array | None, calls: int) -> dict[str, Any]:
    """Return the time of a call and its error, or why it fails."""
    try:
        found = {"us": microseconds(call, calls)}
        return found if expected is None else found | {"error": error_of(call(0), expected)}
    except (RuntimeError, ValueError) as error:
        return {"problem": str(error)[:500]}


#: Lines, loads and simdgroups of the kernel for one row, and rows and tiles of the other.
DOTS = (
    (1, 1, 4),
    (1, 2, 4),
    (1, 4, 4),
    (2, 1, 4),
    (2, 2, 4),
    (2, 2, 8),
    (4, 1, 4),
    (4, 2, 4),
    (4, 1, 8),
    (8, 1, 4),
)
TRIES = (
    *((1, blocks.Tile(8, warps, ahead)) for warps in (4, 8) for ahead in (1, 2, 4)),
    *((32, blocks.Tile(32, warps, ahead)) for warps in (4, 8) for ahead in (1, 2)),
    *((64, blocks.Tile(64, warps, 1)) for warps in (2, 4, 8)),
    *((128, tile) for tile in (blocks.Tile(64, 4, 1), blocks.Tile(128, 2, 1))),
)


def sweep_kernels(kinds: Sequence[str], deadline: float) -> None:
    """Try other sizes of the kernels."""
    for outputs, inputs in SIZES[:2]:
        for name in kinds:
            sweep_type(name, outputs, inputs, deadline)
            mx.clear_cache()


def sweep_type(name: str, outputs: int, inputs: int, deadline: float) -> None:
    kind = blocks.BLOCK_TYPES[name]
    weight = [mx.array(blocks.random_words(kind, outputs, inputs, i)) for i in range(3)]
    x = mx.random.normal((128, inputs)).astype(BF16)
    mx.eval(weight, x)

    def dots(how: tuple[int, int, int], i: int) -> mx.array:
        lines, ahead, simdgroups = how
        return blocks.run_dots(
            x[:1], weight[i % 3], kind, lines=lines, ahead=ahead, simdgroups=simdgroups
        )

    def tiles(how: tuple[int, blocks.Tile], i: int) -> mx.array:
        return blocks.run_tiles(x[: how[0]], weight[i % 3], kind, how[1])

    about = {"type": name, "outputs": outputs, "inputs": inputs}
    for how, call in (
        *((str(how), partial(dots, how)) for how in DOTS),
        *((str(how), partial(tiles, how)) for how in TRIES),
    ):
        if time.monotonic() > deadline:
            return
        show("sweep", about | {"how": how, **timed(call, None, 30)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("models", "peer", "mlx-lm", "kernels"))
    parser.add_argument("--mixes", nargs="*", default=["q4_k_m", "q6_k", "q8_0"], choices=MIXES)
    parser.add_argument("--keep", default="some", choices=KEEP, help="types as they are stored")
    parser.add_argument("--types", nargs="*", default=["Q4_K", "Q6_K"], choices=blocks.BLOCK_TYPES)
    parser.add_argument("--sweep", action="store_true", help="other sizes of the kernels")
    parser.add_argument("--tokens", type=int, default=256, help="of one stream")
    parser.add_argument("--seconds", type=float, default=600, help="no kernel is begun after these")
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    parser.add_argument("--no-loads", action="store_true", help="one stream only")
    parser.add_argument("--no-mlx", action="store_true", help="kernels without MLX's 4 bits")
    args = parser.parse_args()
    SHAPES[SHAPE][1]["num_hidden_layers"] = args.layers
    deadline = time.monotonic() + args.seconds
    about = {key: value for key, value in mx.device_info().items() if isinstance(value, str | int)}
    show("machine", {"mlx": version("mlx"), **vars(args), **about})
    if args.what == "models":
        measure_models(args.mixes, args.keep, args.tokens, loads=not args.no_loads)
    elif args.what == "peer":
        measure_peer(args.tokens, layers=args.layers, loads=not args.no_loads)
    elif args.what == "mlx-lm":
        measure_mlx_lm(args.tokens)
    elif args.sweep:
        sweep_kernels(args.types, deadline)
    else:
        measure_kernels(args.types, deadline, with_mlx=not args.no_mlx)


if __name__ == "__main__":
    main()
