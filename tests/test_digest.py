"""Digests: the grammar, and hashing."""

from __future__ import annotations

import hashlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.artifacts.digest import Digest, digest_of_chunks
from modelpack.errors import DigestMismatchError, IntegrityError, InvalidDigestError

HEX64 = "0123456789abcdef" * 4


@pytest.mark.parametrize("text", [f"sha256:{HEX64}", f"sha512:{HEX64}{HEX64}", f"blake3:{HEX64}"])
def test_valid(text: str) -> None:
    assert str(Digest.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256",
        "sha256:",
        HEX64,
        f"md5:{HEX64[:32]}",
        f"SHA256:{HEX64}",
        f"sha256:{HEX64.upper()}",
        f"sha256:{HEX64[:-1]}",
        f"sha256:{HEX64}0",
        f"sha512:{HEX64}",
        f"blake3:{HEX64}{HEX64}",
        f"sha256:{HEX64}\n",
        f"sha256: {HEX64[1:]}",
        "sha256:../../etc",
        f"sha256:{HEX64[:-2]}/x",
        f"sha256:{'٠' * 64}",
    ],
)
@pytest.mark.scenario(27)
def test_invalid_digests_are_refused(text: str) -> None:
    with pytest.raises(InvalidDigestError) as caught:
        Digest.parse(text)
    assert isinstance(caught.value, IntegrityError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 5


def test_a_huge_text_is_not_repeated_in_the_error() -> None:
    with pytest.raises(InvalidDigestError) as caught:
        Digest.parse("x" * 10_000)
    assert len(str(caught.value)) < 400


@given(st.lists(st.binary(max_size=100)), st.sampled_from(["sha256", "sha512"]))
def test_digest_of_chunks_is_that_of_the_whole(chunks: list[bytes], algorithm: str) -> None:
    whole = b"".join(chunks)
    digest, size = digest_of_chunks(chunks, algorithm)
    assert digest == Digest.of(whole, algorithm)
    assert digest.encoded == hashlib.new(algorithm, whole).hexdigest()
    assert size == len(whole)
    assert Digest.parse(str(digest)) == digest


def test_check_names_expected_and_got() -> None:
    digest = Digest.of(b"right")
    digest.check(b"right", "blob")
    with pytest.raises(DigestMismatchError, match="the blob") as caught:
        digest.check(b"wrong", "the blob")
    assert caught.value.expected == str(digest)
    assert caught.value.got == str(Digest.of(b"wrong"))


def test_blake3() -> None:
    """The first vector of the BLAKE3 repository: no bytes."""
    empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert Digest.of(b"", "blake3") == Digest("blake3", empty)


def test_blake3_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest is read, and content is refused."""
    monkeypatch.setitem(sys.modules, "blake3", None)
    digest = Digest.parse(f"blake3:{HEX64}")
    with pytest.raises(InvalidDigestError, match="package blake3 is not installed") as caught:
        digest.check(b"", "it")
    assert caught.value.hint == "run pip install blake3"
