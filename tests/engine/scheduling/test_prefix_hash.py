"""Hashes of blocks depend on their whole content."""

from __future__ import annotations

import pytest

from modelpack_engine.core.block_manager import HASH_SIZE, block_hashes, cache_salt, root_hash


def block_hash(parent: bytes, token_ids: list[int]) -> bytes:
    (hash_,) = block_hashes(parent, token_ids, len(token_ids))
    return hash_


def test_every_part_counts() -> None:
    hashes = [
        root_hash(),
        root_hash(b""),
        root_hash(b"", b""),
        root_hash(b"a"),
        root_hash(b"a", b"b"),
        root_hash(b"ab"),
        root_hash(b"b", b"a"),
        block_hash(root_hash(), [1, 2]),
        block_hash(root_hash(b"a"), [1, 2]),
        block_hash(root_hash(), [2, 1]),
        block_hash(root_hash(), [1, 3]),
        block_hash(root_hash(), [12]),
        block_hash(root_hash(), [1, 2, 0]),
        block_hash(block_hash(root_hash(), [1]), [2]),
    ]
    assert len(set(hashes)) == len(hashes)
    assert {len(hash_) for hash_ in hashes} == {HASH_SIZE} == {16}


def test_hashes_are_the_same_in_every_process() -> None:
    root = root_hash(b"model", b"salt")
    assert root.hex() == "941db29bb17689ffa45ec2cad68ca5f5"
    assert block_hash(root, list(range(16))).hex() == "d8bfaa1d2e9d201d55a9e7c65a4d7d9b"


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 7, 8, 12])
def test_blocks_follow_one_another(count: int) -> None:
    parent = root_hash()
    one_by_one = []
    for start in range(0, count - 3, 4):
        parent = block_hash(parent, list(range(start, start + 4)))
        one_by_one.append(parent)
    assert block_hashes(root_hash(), range(count), 4) == one_by_one


def test_salts() -> None:
    salts = [
        cache_salt(),
        cache_salt("a"),
        cache_salt(owner=""),
        cache_salt(owner="a"),
        cache_salt("a", owner="a"),
    ]
    assert salts[0] == b"" == cache_salt("")
    assert len(set(salts)) == len(salts)


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_ids_that_are_none(token_id: int) -> None:
    with pytest.raises(OverflowError):
        block_hash(root_hash(), [token_id])
