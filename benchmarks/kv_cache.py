"""Measure the accuracy and the capacity of a quantised KV cache, with SmolLM2-135M.

    python benchmarks/kv_cache.py

Prints a table. The model reads the texts of `passages.py` token by token (teacher-forced) with each
type of cache. The table shows how often its most likely next token is the same as with an
unquantised cache, and the Kullback-Leibler divergence of the distributions in nats. As during
generation, the keys and values of each token are read from the cache, including its own.
"""

from __future__ import annotations

# ruff: noqa: E402
import platform
from importlib.metadata import version
from typing import Any

from modelpack_engine.platform import blas

blas.prepare()  # before MLX is loaded

import mlx.core as mx
from passages import PASSAGES

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.config import BLOCK_SIZE, EngineConfig, KVCacheDtype
from modelpack_engine.core.batch import Chunk, StepBatch
from modelpack_engine.models import LoadedModel, ModelFiles, load
from modelpack_engine.runner.kv_cache_size import choose_sizes
from modelpack_engine.runner.model_layout import find_layout, with_cache_type
from modelpack_engine.runner.model_runner import make_runner

KINDS: tuple[KVCacheDtype, ...] = ("auto", "bf16", "fp16", "q8", "q4")
CACHE_BYTES = 256 * 2**20


def reading(token_ids: list[int]) -> StepBatch:
    """Return a step that reads a text and samples after each of its tokens."""
    count = len(token_ids)
    table = tuple(range(1, 1 + -(-count // BLOCK_SIZE)))
    return StepBatch(
        token_ids=token_ids,
        positions=list(range(count)),
        slots=[BLOCK_SIZE + position for position in range(count)],
        from_previous=(),
        num_decode=0,
        decode_tables=[],
        decode_lengths=[],
        decode_seq_ids=(),
        chunks=(Chunk(0, count, count, count, table, 1),),
        sample_rows=tuple(range(count)),
        sample_seqs=(),
    )


def read(loaded: LoadedModel, kind: KVCacheDtype, texts: list[list[int]]) -> list[mx.array]:
    """Return log-probabilities [tokens, vocabulary] of each text's next tokens."""
    runner = make_runner(loaded.model, num_blocks=64, kv_cache_dtype=kind)
    found = []
    for text in texts:
        logits = runner.forward(reading(text), mx.array(text, mx.int32)).astype(mx.float32)
        found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(found[-1], runner.pools())
    runner.undo()
    return found


def tokens_held(loaded: LoadedModel, kind: KVCacheDtype) -> int:
    """Return the number of tokens that fit into a cache of `CACHE_BYTES`."""
    config = EngineConfig(kv_cache_bytes=CACHE_BYTES, max_num_seqs=4096)
    layout = with_cache_type(find_layout(loaded.model), kind)
    return (choose_sizes(layout, loaded.context_length, config).num_blocks - 1) * BLOCK_SIZE


def figures(wanted: list[mx.array], found: list[mx.array], texts: list[list[int]]) -> list[str]:
    """Return agreement, mean and maximum divergence, and perplexity, as text."""
    same: list[float] = []
    divergence: list[float] = []
    loss: list[float] = []
    for plain, other, text in zip(wanted, found, texts, strict=True):
        same += _floats(mx.argmax(plain, axis=-1) == mx.argmax(other, axis=-1))
        divergence += _floats(mx.sum(mx.exp(plain) * (plain - other), axis=-1))
        following = mx.array(text[1:])[:, None]
        loss += _floats(-mx.take_along_axis(other[:-1], following, axis=-1)[:, 0])
    perplexity = mx.exp(mx.mean(mx.array(loss))).item()
    mean = sum(divergence) / len(divergence)
    agreement = sum(same) / len(same)
    return [f"{agreement:.1%}", f"{mean:.2g}", f"{max(divergence):.2g}", f"{perplexity:.2f}"]


def _floats(array: mx.array) -> Any:
    return array.astype(mx.float32).tolist()


def main() -> None:
    """Measure all types and print the table."""
    mx.set_default_device(mx.cpu)
    loaded = load(ModelFiles.from_directory(smollm2_gguf()), device="cpu")
    texts = [loaded.tokenizer.encode(text) for text in PASSAGES.values()]
    counts = {name: len(text) for name, text in zip(PASSAGES, texts, strict=True)}
    print(f"{platform.platform()}, Python {platform.python_version()}, MLX {version('mlx')};")
    print(f"tokens read: {counts}\n")
    columns = [
        "cache", "same top token", "mean KL", "highest KL", "perplexity",
        f"tokens in {CACHE_BYTES >> 20} MiB", "of bf16's",
    ]  # fmt: skip
    print("|", " | ".join(columns), "|\n|", "---|" * len(columns))
    wanted = read(loaded, "auto", texts)
    usual = tokens_held(loaded, "bf16")
    for kind in KINDS:
        row = [kind, *figures(wanted, read(loaded, kind, texts), texts)]
        held = tokens_held(loaded, kind)
        print("|", " | ".join([*row, str(held), f"{held / usual:.2f}"]), "|")


if __name__ == "__main__":
    main()
