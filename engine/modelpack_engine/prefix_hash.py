"""Identity of KV blocks: equal hashes mean equal keys and values.

A block's KV depends on its tokens, on every token before them, and on what else went into the
model. So hashes are chained: each covers its parent's, and the first parent is a root over model,
adapter and media. BLAKE2b with 128 bits: nobody is going to find two contents of one hash, not even
on purpose, so a hit needs no comparison of tokens.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

HASH_SIZE = 16  # bytes


def root_hash(*parts: bytes) -> bytes:
    """Return the parent of first blocks for one combination of `parts`, such as model and salt."""
    root = hashlib.blake2b(digest_size=HASH_SIZE, person=b"kv root")
    for part in parts:
        root.update(struct.pack("<Q", len(part)) + part)
    return root.digest()


def block_hash(parent: bytes, token_ids: Iterable[int]) -> bytes:
    """Return the hash of the full block of `token_ids` after `parent`; ids are below 2**32."""
    ids = tuple(token_ids)
    packed = struct.pack(f"<{len(ids)}I", *ids)
    return hashlib.blake2b(parent + packed, digest_size=HASH_SIZE, person=b"kv block").digest()


def cache_salt(adapter: str = "", media: Iterable[bytes] = ()) -> bytes:
    """Return the salt of a sequence: its adapter's name and its media's digests, in order."""
    if not adapter and not (media := tuple(media)):
        return b""
    return root_hash(adapter.encode(), *media)
