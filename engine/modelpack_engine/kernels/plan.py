"""Plans of kernels (variants, groups, splits), and the order of reads after in-place writes.

An in-place write has a token (int32 [1], 0) as its output. The pools that `write_kv` returns are
recorded here with their token as long as they exist, so that readers can be ordered after the
write.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from weakref import ref

import mlx.core as mx

_tokens: dict[int, tuple[ref[mx.array], mx.array]] = {}


def written(pool: mx.array, token: mx.array) -> mx.array:
    """Record `token` as that of the last write to `pool`; return `pool`."""
    key = id(pool)

    def forget(gone: ref[mx.array]) -> None:
        if key in _tokens and _tokens[key][0] is gone:
            del _tokens[key]

    _tokens[key] = ref(pool, forget), token
    return pool


def token_of(pool: mx.array | None) -> mx.array | None:
    """Return the token of the last write to `pool`; None if no kernel has written it."""
    found = _tokens.get(id(pool))
    return found[1] if found is not None and found[0]() is pool else None


def after(indices: mx.array, *pools: mx.array | None) -> mx.array:
    """Return `indices` (int32), ordered after the writes to `pools`.

    Gathering from a pool with MLX's functions requires such indices: see the package's docstring.
    """
    tokens = {id(token): token for pool in pools if (token := token_of(pool)) is not None}
    for token in tokens.values():
        indices = indices + token
    return indices


#: Simdgroups of a threadgroup: few enough that short contexts keep all of them busy. On CUDA, more
#: for few threadgroups, and fewer for many threadgroups with short contexts (measured).
SIMDGROUPS, _MOST_SIMDGROUPS, _FEWEST_SIMDGROUPS = 4, 8, 2
_MANY_THREADGROUPS, _FEW_TOKENS = 1024, 640
#: Simdgroups that merge the parts of a head.
MERGE_SIMDGROUPS = 8
#: Threadgroups that keep a large GPU busy; with fewer, contexts are split.
TARGET_THREADGROUPS = 256
#: Shorter contexts are never split. A part has at least a quarter of this many tokens, or all of it
#: with the most simdgroups.
SPLIT_CONTEXT = 512
MAX_PARTS = 64
#: Bytes of one load.
LOAD_BYTES = 16
#: Quantised elements of one load, and those that one thread writes.
MAX_QUANTISED = 16
QUANTISED_PART = 8
#: The most float accumulators of a lane.
MAX_ACCUMULATORS = 64
# The same on Metal, where a thread has 128 registers: these, 32 for pending loads and 16 for scores
# leave some for addresses; 64 accumulators would spill. Estimated, not measured.
_METAL_ACCUMULATORS = 32
#: The most bytes of pending loads of a lane.
MAX_FLIGHT_BYTES = 128
#: The shared memory that Metal guarantees to a threadgroup.
MAX_SHARED_BYTES = 32 * 1024


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The properties of a layer's attention that are compiled into a kernel.

    `key_dim` and `value_dim` are the widths of the two pools' rows. With `latent`, the values are
    the first `value_dim` elements of the keys, and the second pool has `extra_dim` further elements
    of the keys. With `bits` above 0, the pools are quantised in groups of `group` elements.
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    extra_dim: int = 0
    latent: bool = False
    block_size: int = 16
    window: int | None = None
    softcap: bool = False
    sinks: bool = False
    bits: int = 0
    group: int = 0


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The decode kernel's template constants and grid; `parts` is 1 if contexts are not split."""

    constants: tuple[tuple[str, int | bool], ...]
    groups: int
    threads: int
    parts: int
    shared_bytes: int


def refusal(shape: AttentionShape, itemsize: int) -> str | None:
    """Return why there is no kernel for `shape` with pool elements of `itemsize` bytes, or None."""
    if shape.num_heads % shape.num_kv_heads:
        return f"{shape.num_heads} heads do not share {shape.num_kv_heads} KV heads evenly"
    if shape.block_size not in (8, 16, 32):
        return f"block size {shape.block_size}, expected 8, 16 or 32"
    if not shape.latent and shape.extra_dim:
        return "extra_dim requires latent attention"
    if shape.latent and shape.value_dim > shape.key_dim:
        return "latent values are longer than the keys"
    if shape.bits and (
        shape.latent or shape.key_dim % shape.group or shape.value_dim % shape.group
    ):
        return "quantised pools need whole groups per head, and no latents"
    if min(shape.key_dim, shape.value_dim) < 8:
        return f"heads of {shape.key_dim}/{shape.value_dim} elements are too small"
    merging = 4 * MERGE_SIMDGROUPS * -(-shape.value_dim // 32) * 32
    if max(merging, plan_decode(shape, itemsize, 1, 1).shared_bytes) > MAX_SHARED_BYTES:
        return f"heads of {shape.key_dim + shape.extra_dim} elements need too much shared memory"
    return None


def accumulators(backend: str) -> int:
    """Return the most accumulators of a lane on a backend."""
    return _METAL_ACCUMULATORS if backend == "metal" else MAX_ACCUMULATORS


def simdgroups(backend: str) -> int | None:
    """Return the simdgroups of a threadgroup on a backend; None: chosen for each shape."""
    return None if backend == "cuda" else SIMDGROUPS


def norm_simdgroups(dim: int, vector: int) -> int:
    """Return the simdgroups that norm a row of `dim` elements, `vector` of them at a time."""
    return min(32, max(1, -(-dim // (vector * 32))))


def logit_simdgroups(vocab_size: int) -> int:
    """Return the simdgroups that choose a token by a row of logits."""
    return min(16, max(1, vocab_size // 512))


def vector_width(itemsize: int, *widths: int) -> int:
    """Return how many elements of `itemsize` bytes one load reads from rows of these widths."""
    vector = LOAD_BYTES // itemsize
    while any(width % vector for width in widths):
        vector //= 2
    return vector


def quantised_width(shape: AttentionShape) -> int:
    """Return how many quantised elements one load reads, which must divide rows and heads."""
    vector = MAX_QUANTISED
    pieces = [shape.group * shape.bits]  # in bits
    for dim in (shape.key_dim, shape.value_dim):
        groups = shape.num_kv_heads * dim // shape.group
        pieces += [dim * shape.bits, shape.num_kv_heads * dim * shape.bits + groups * 32]
    while any(piece % (vector * shape.bits) for piece in pieces):
        vector //= 2
    return vector


@lru_cache(maxsize=1024)
def plan_decode(
    shape: AttentionShape,
    itemsize: int,
    num_rows: int,
    max_context: int,
    split: int | None = None,
    simdgroups: int | None = SIMDGROUPS,
    max_steps: int = 4,
    max_accumulators: int = MAX_ACCUMULATORS,
) -> DecodePlan:
    """Return the plan for `num_rows` rows whose contexts have up to `max_context` tokens.

    `itemsize` is the size of the pools' elements, unless they are quantised. `split` fixes the
    number of parts, and `max_accumulators` limits those of a lane. `simdgroups` None chooses a
    number for CUDA.
    """
    context = min(max_context, shape.window or max_context)
    dim = shape.key_dim + shape.extra_dim
    group = shape.num_heads // shape.num_kv_heads
    if shape.bits:
        vector, width = quantised_width(shape), shape.bits
    else:
        vector = vector_width(itemsize, shape.key_dim, shape.value_dim, shape.extra_dim)
        width = itemsize * 8
    # Lanes that share a token: enough that each holds one vector of a key or value, up to 32.
    lanes = max(1, 32 // shape.block_size)
    while lanes < 32 and lanes * vector < max(dim, shape.value_dim):
        lanes *= 2
    key_vectors = -(-dim // (vector * lanes))
    value_vectors = -(-shape.value_dim // (vector * lanes))
    abreast = 32 // lanes
    flight = (key_vectors + (0 if shape.latent else value_vectors)) * vector * width // 8
    steps = max_steps
    while steps > 1 and (steps * abreast > shape.block_size or steps * flight > MAX_FLIGHT_BYTES):
        steps //= 2
    most = max(1, min(8, max_accumulators // (value_vectors * vector)))
    groups = -(-group // most)
    heads = -(-group // groups)
    groups = -(-group // heads)
    threadgroups = num_rows * shape.num_kv_heads * groups
    row = (value_vectors * vector + 1) * lanes * abreast  # of one simdgroup, padded

    def shared_bytes(simdgroups: int) -> int:
        return 4 * (heads * key_vectors * vector * lanes + 2 * simdgroups * (row + 2))

    if simdgroups is None:
        simdgroups = _choose_simdgroups(threadgroups, context)
        if shared_bytes(simdgroups) > MAX_SHARED_BYTES:
            simdgroups = SIMDGROUPS
    if split is None:
        fewest = SPLIT_CONTEXT if simdgroups == _MOST_SIMDGROUPS else SPLIT_CONTEXT // 4
        split = num_parts(threadgroups, max_context, shape.window, fewest=fewest)
    constants: tuple[tuple[str, int | bool], ...] = (
        ("DK", shape.key_dim), ("DX", shape.extra_dim), ("DV", shape.value_dim),
        ("HK", shape.num_kv_heads), ("G", group), ("HEADS", heads), ("BLOCK", shape.block_size),
        ("WINDOW", shape.window or 0), ("SOFTCAP", shape.softcap), ("SINKS", shape.sinks),
        ("SPLIT", split > 1), ("LATENT", shape.latent),
        ("BITS", shape.bits), ("GROUP", max(1, shape.group)),
        ("NSG", simdgroups), ("VEC", vector), ("LPT", lanes), ("STEPS", steps),
    )  # fmt: skip
    return DecodePlan(constants, groups, 32 * simdgroups, split, shared_bytes(simdgroups))


def _choose_simdgroups(threadgroups: int, context: int) -> int:
    """Return the simdgroups of each threadgroup, for contexts of up to `context` tokens.

    Measured on an H200: benchmarks/results/kernels-h200.md.
    """
    if threadgroups <= TARGET_THREADGROUPS and context >= SPLIT_CONTEXT:
        return _MOST_SIMDGROUPS
    if threadgroups >= _MANY_THREADGROUPS and context <= _FEW_TOKENS:
        return _FEWEST_SIMDGROUPS
    return SIMDGROUPS


def num_parts(
    threadgroups: int,
    max_context: int,
    window: int | None,
    *,
    enough: int = TARGET_THREADGROUPS,
    fewest: int = SPLIT_CONTEXT // 4,
    most: int = MAX_PARTS,
) -> int:
    """Return the number of parts to split contexts into: a power of two, 1 for short contexts.

    Parts are doubled up to `most`, until there are `enough` threadgroups, as long as each part has
    `fewest` tokens.
    """
    context = max_context if window is None else min(max_context, window)
    if context < SPLIT_CONTEXT:
        return 1
    parts = 1
    while parts < most and threadgroups * parts < enough and context >= fewest * (2 * parts):
        parts *= 2
    return parts


def plan_write(itemsize: int, key_width: int, value_width: int) -> tuple[int, int]:
    """Return (elements per thread, threads per row) to copy rows of these widths; 0 means none.

    `itemsize` is the larger one of the two types.
    """
    vector = vector_width(itemsize, key_width, value_width)
    return vector, max(key_width, value_width) // vector
