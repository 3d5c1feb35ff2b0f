"""Identity of KV blocks: equal hashes mean equal keys and values.

A block's KV depends on its tokens, on every token before them, and on what else went into the
model. So hashes are chained: each covers its parent's, and the first parent is a root over model,
adapter and media. BLAKE2b with 128 bits: nobody is going to find two contents of one hash, not even
on purpose, so a hit needs no comparison of tokens.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache

HASH_SIZE = 16  # bytes

#: Blocks whose hashes are remembered together, as prompts often begin alike.
_REMEMBERED = 16

_BLOCK = hashlib.blake2b(digest_size=HASH_SIZE, person=b"kv block")


def root_hash(*parts: bytes) -> bytes:
    """Return the parent of first blocks for one combination of `parts`, such as model and salt."""
    root = hashlib.blake2b(digest_size=HASH_SIZE, person=b"kv root")
    for part in parts:
        root.update(struct.pack("<Q", len(part)) + part)
    return root.digest()


def block_hashes(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Return the hashes of the full blocks of `token_ids` after `parent`; ids are below 2**32."""
    packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
    size = struct.calcsize(f"<{block_size}I")
    hashes: list[bytes] = []
    for start in range(0, len(packed), _REMEMBERED * size):
        run = packed[start : start + _REMEMBERED * size]
        hashes += _hashes(hashes[-1] if hashes else parent, run, size)
    return hashes


@lru_cache(maxsize=4096)
def _hashes(parent: bytes, packed: bytes, size: int) -> tuple[bytes, ...]:
    """Return the hashes of the full blocks, of `size` bytes each, of `packed` tokens."""
    hashes = []
    for end in range(size, len(packed) + 1, size):
        block = _BLOCK.copy()  # takes half as long as a new one
        block.update(parent + packed[end - size : end])
        hashes.append(parent := block.digest())
    return tuple(hashes)


def cache_salt(
    adapter: str = "", media: Iterable[bytes] = (), *, owner: str | None = None
) -> bytes:
    """Return the salt of a sequence: sequences share prefixes only if their salts are equal.

    It covers the adapter's name, the digests of the media in order, and the owner of the request,
    whose prompts others must not find in the cache. Without any of them it is empty.
    """
    media = tuple(media)
    content = root_hash(adapter.encode(), *media) if adapter or media else b""
    if owner is None:
        return content
    return b"owner" + root_hash(owner.encode(), content)
