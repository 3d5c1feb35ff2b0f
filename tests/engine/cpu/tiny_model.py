"""TinyModel: two layers of random weights in all formats. Run as a script, it prints its results.

python -m tests.engine.cpu.tiny_model LIBRARY THREADS [INSTRUCTION_SET...]
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from modelpack_engine.cpu import library as native
from modelpack_engine.cpu.library import CacheType, Code, Ending, Rope, Source
from tests.engine.cpu.programs import (
    LOGITS,
    Array,
    Program,
    Sequence_,
    Steps,
    operation,
    packed,
)

HEADS, KV_HEADS, DIM, WIDTH, INNER, VOCABULARY = 4, 2, 64, 256, 512, 300
#: The sources of queries, keys, values, outputs, gates, ups and downs.
LAYERS = (
    (Source.Q4_K, Source.Q4_K, Source.Q6_K, Source.BF16, Source.Q4_0, Source.Q4_1, Source.Q5_0),
    (Source.F16, Source.BF16, Source.Q8_0, Source.F32, Source.F32_AS_INT8, Source.Q6_K, Source.F16),
)
STREAM, QKV, ATTENDED, GATED, SAMPLED = range(5)


class TinyModel:
    """A program with a cache of its own for each run."""

    def __init__(self, rows: int = 64) -> None:
        norm = np.linspace(0.5, 1.5, WIDTH, dtype=np.float32)
        embedding, _ = packed(Source.Q6_K, VOCABULARY, WIDTH)
        made = [operation(Code.EMBED, output=STREAM, matrix=[embedding])]
        for layer, sources in enumerate(LAYERS):
            kv = KV_HEADS * DIM, WIDTH
            sizes = ((HEADS * DIM, WIDTH), kv, kv, (WIDTH, HEADS * DIM), (INNER, WIDTH),
                     (INNER, WIDTH), (WIDTH, INNER))  # fmt: skip
            q, k, v, o, gate, up, down = (
                packed(source, *size, seed)[0]
                for seed, (source, size) in enumerate(zip(sources, sizes, strict=True))
            )
            shared = {"pool": layer, "cache": tuple(CacheType)[layer + 1], "heads": HEADS,
                      "kv_heads": KV_HEADS, "dim": DIM}  # fmt: skip
            made += [
                operation(Code.MULTIPLY, input=STREAM, output=QKV, matrix=[q, k, v], norm=norm),
                operation(Code.ROTATE, input=QKV, rope=0, **shared),
                operation(Code.ATTEND, input=QKV, output=ATTENDED, scale=0.125, **shared),
                operation(
                    Code.MULTIPLY, input=ATTENDED, output=STREAM, matrix=[o], ending=Ending.ADD
                ),
                operation(
                    Code.MULTIPLY, input=STREAM, output=GATED, matrix=[gate, up], norm=norm,
                    ending=Ending.GATED, activation=layer,
                ),
                operation(
                    Code.MULTIPLY, input=GATED, output=STREAM, matrix=[down], ending=Ending.ADD
                ),
            ]  # fmt: skip
        made += [
            operation(Code.SELECT, input=STREAM, output=SAMPLED),
            operation(Code.MULTIPLY, input=SAMPLED, output=LOGITS, matrix=[embedding], norm=norm),
            operation(Code.SOFTCAP, softcap=30.0, dim=VOCABULARY),
        ]
        self._frequencies = (0.1 ** np.arange(DIM // 2)).astype(np.float32)
        widths = [WIDTH, (HEADS + 2 * KV_HEADS) * DIM, HEADS * DIM, INNER, WIDTH]
        rope = Rope(DIM, 0, 1.0, 0, self._frequencies.ctypes.data)
        self.program = Program(made, widths, rows=rows, columns=INNER, ropes=[rope])

    def run(self, steps: int = 4) -> Array:
        """Return the logits of a prompt of 20 tokens, one of 5, and then of one token each."""
        pools = [np.zeros((9, 2, KV_HEADS, 16 * DIM), np.uint16) for _ in LAYERS]
        tables = [np.array([3, 1, 5], np.int32), np.array([2, 8, 6], np.int32)]
        lengths, found = [0, 0], []
        tokens = np.arange(25) * 7 % VOCABULARY
        for counts in [(20, 5), *((1, 1) for _ in range(steps))]:
            positions = np.concatenate(
                [np.arange(n, n + count) for n, count in zip(lengths, counts, strict=True)]
            )
            slots = np.concatenate(
                [
                    table[np.arange(n, n + count) // 16] * 16 + np.arange(n, n + count) % 16
                    for table, n, count in zip(tables, lengths, counts, strict=True)
                ]
            )
            logits = np.empty((2, VOCABULARY), np.float32)
            step = Steps(
                positions=positions, slots=slots, pools=pools,
                sequences=[Sequence_(n, count, table)
                           for n, count, table in zip(lengths, counts, tables, strict=True)],
                sampled=np.cumsum(counts) - 1,
            )  # fmt: skip
            assert self.program.run(tokens, logits, step) == 0
            found.append(logits)
            tokens = logits.argmax(axis=1)
            lengths = [n + count for n, count in zip(lengths, counts, strict=True)]
        return np.stack(found)


def main(path: str, threads: str, *instruction_sets: str) -> None:
    """Print the number of threads, and a digest of the logits of each instruction set."""
    native.PATH = Path(path)
    native.usable_cores = lambda: int(threads)
    library = native.library()
    print(library.mp_start(1))
    for name in instruction_sets:
        assert library.mp_use_kernels(name.encode()) == 0
        logits = TinyModel().run()
        assert np.isfinite(logits).all()
        print(name, hashlib.sha256(logits.tobytes()).hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
