"""Reading blobs: small ones whole, and bytes that are checked while they pass."""

from __future__ import annotations

from modelpack.descriptor import Descriptor
from modelpack.errors import SizeMismatchError
from modelpack.gojson import MAX_DOCUMENT_BYTES
from modelpack.storage import Source


def read_blob(source: Source, descriptor: Descriptor, *, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """Return a small blob's bytes, checked against size and digest.

    Raises `SizeMismatchError` if it is larger than `limit` bytes or not as long as its descriptor
    says, `DigestMismatchError` if it holds other bytes.
    """
    what = f"blob {descriptor.digest}"
    if descriptor.size > limit:
        raise SizeMismatchError(
            f"{what}: {descriptor.size} bytes are more than the {limit} that fit here",
            expected=f"at most {limit}",
            got=str(descriptor.size),
        )
    content = bytearray(descriptor.size + 1)  # one more, to notice what is too long
    filled = 0
    with source.blob(descriptor).open() as stream:
        view = memoryview(content)
        while filled < len(content) and (count := stream.readinto(view[filled:])):
            filled += count
    if filled != descriptor.size:
        got = f"{filled}" if filled < descriptor.size else f"more than {descriptor.size}"
        raise SizeMismatchError(
            f"{what}: expected {descriptor.size} bytes, got {got}",
            expected=str(descriptor.size),
            got=got,
        )
    result = bytes(content[:filled])
    descriptor.digest.check(result, what)
    return result
