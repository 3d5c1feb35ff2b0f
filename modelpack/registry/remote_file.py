"""RemoteFile: a blob in a registry as a file that is read here and there, by range requests.

For headers: a few hundred kilobytes of a blob that may have a hundred gigabytes. What is read so is
not verified, since a digest is of all of it: it shows what the registry says, no more.
RFC 9110 section 14; distribution-spec "Pulling blobs".
"""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from typing import Any, Final

import requests

from modelpack.artifacts.descriptor import Descriptor
from modelpack.errors import (
    RegistryError,
    RemoteUnavailableError,
    SizeMismatchError,
    UnsupportedError,
)
from modelpack.registry.endpoint import BlobLocation
from modelpack.registry.http_client import Call, stated_number
from modelpack.registry.retry import FailedTry
from modelpack.registry.urls import origin_of

#: Bytes asked for at a time, at first: the header of most safetensors files fits.
BLOCK: Final = 128 * 1024
#: Bytes fetched at most for one file; the longest vocabularies make headers of 30 MB.
LIMIT: Final = 64 * 1024 * 1024
# Reading on and on, as through a vocabulary, asks for more each time.
_MAX_AHEAD: Final = 32
_MAX_KEPT: Final = 128
_CONTENT_RANGE = re.compile(r"bytes\s+([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)\Z")


class RemoteFile(io.RawIOBase):
    """The blob `descriptor` as a seekable binary file; close it, or use it as a context.

    `bytes_fetched` and `requests` say what reading cost so far. A registry that ignores ranges is
    read from the start on, over one connection that is dropped at the end. More than `limit` bytes
    are refused (`UnsupportedError`). Raises `SizeMismatchError` if the blob has another size.
    """

    def __init__(
        self, location: BlobLocation, descriptor: Descriptor, *, limit: int = LIMIT
    ) -> None:
        super().__init__()
        self.bytes_fetched = 0
        self.requests = 0
        self._scopes = location.scopes
        self._client = location.client
        self._size = descriptor.size
        self._url = location.url
        self._what = location.label
        self._limit = limit
        self._at = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._ahead = 1
        self._next = 0  # the block after the last one fetched
        self._whole: requests.Response | None = None  # where ranges do not work
        self._start = bytearray()  # what came of it

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to `offset` from the start, from here or from the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"offset {base + offset} is before the start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from its start with what follows, as far as one block has it."""
        view = memoryview(buffer).cast("B")
        length = min(len(view), self._size - self._at)
        if length <= 0:
            return 0
        number, inside = divmod(self._at, BLOCK)
        content = self._block(number)[inside : inside + length]
        view[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        """Let go of the connection, if one is held."""
        if self._whole is not None:
            self._whole.close()
            self._whole = None
        super().close()

    def _block(self, number: int) -> bytes:
        found = self._blocks.get(number)
        if found is None:
            if self._whole is None:
                self._ahead = min(self._ahead * 2, _MAX_AHEAD) if number == self._next else 1
                self._fetch(number * BLOCK, min((number + self._ahead) * BLOCK, self._size))
            if self._whole is not None:
                self._read_up_to(min((number + 1) * BLOCK, self._size))
            found = self._blocks[number]
        self._blocks.move_to_end(number)
        return found

    def _keep(self, start: int, content: bytes) -> None:
        """Keep blocks; the content is whole blocks from `start` on, or ends with the blob."""
        for offset in range(0, len(content), BLOCK):
            self._blocks[(start + offset) // BLOCK] = content[offset : offset + BLOCK]
        self._next = (start + len(content)) // BLOCK
        while len(self._blocks) > _MAX_KEPT:
            self._blocks.popitem(last=False)

    def _fetch(self, start: int, end: int) -> None:
        """Have the blocks from `start` to `end`, or find that ranges do not work."""
        self._check_limit(end - start)
        content = self._client.retried(lambda: self._ask(start, end))
        if content is not None:
            self._keep(start, content)

    def _ask(self, start: int, end: int) -> bytes | None:
        """Return the bytes of one request; None, with `_whole` open, where ranges do not work."""
        self.requests += 1
        headers = {"Range": f"bytes={start}-{end - 1}"}
        call = Call(self._what, "GET", self._url, headers, scopes=self._scopes, stream=True)
        try:
            response = self._client.attempt(call)
        except RegistryError as error:
            if error.status_code == 416:
                raise self._wrong_size(f"at most {start}") from None
            raise
        try:
            if response.status_code != 206:
                length = stated_number(response)
                if length not in (None, self._size):
                    raise self._wrong_size(str(length))
                self._whole = response
                return None
            self._check_range(response, start, end)
            content = self._receive(response, end - start)
        except BaseException:
            response.close()
            raise
        if len(content) < end - start:
            raise self._cut_off(response, start + len(content))
        response.close()
        return content

    def _check_range(self, response: requests.Response, start: int, end: int) -> None:
        shown = response.headers.get("Content-Range", "nothing")[:60]
        match = _CONTENT_RANGE.match(shown)
        if match is not None and match[3] not in ("*", str(self._size)):
            raise self._wrong_size(match[3])
        if match is None or (int(match[1]), int(match[2])) != (start, end - 1):
            raise RegistryError(
                f"{self._what}: asked for the bytes {start} to {end - 1}, got the range {shown!r}",
                host=origin_of(response.url).netloc,
                status_code=206,
            )

    def _read_up_to(self, end: int) -> None:
        """Have the blob from its start to `end`, of the one answer that is the whole blob."""
        assert self._whole is not None
        missing = end - len(self._start)
        if missing > 0:
            self._check_limit(missing)
            try:
                content = self._receive(self._whole, missing)
            except FailedTry as failed:
                raise failed.error from None
            self._start += content
            if len(content) < missing:
                raise self._cut_off(self._whole, len(self._start)).error
        first = (end - 1) // BLOCK * BLOCK
        self._keep(first, bytes(self._start[first:end]))

    def _receive(self, response: requests.Response, length: int) -> bytes:
        """Return `length` bytes of an answer, fewer if it ends."""
        content = bytearray()
        inflow = self._client.inflow(length)
        with self._client.guarded(self._what, response.url, inflow=inflow):
            while len(content) < length:
                self._client.stop.check()
                part = response.raw.read1(min(length - len(content), 512 * 1024))
                if not part:
                    break
                content += part
                self.bytes_fetched += len(part)
        return bytes(content)

    def _check_limit(self, more: int) -> None:
        if self.bytes_fetched + more > self._limit:
            raise UnsupportedError(
                f"reading its header takes more than {self._limit} bytes",
                path=self._what,
                hint="pull the file, and look at it here",
            )

    def _cut_off(self, response: requests.Response, position: int) -> FailedTry:
        host = origin_of(response.url).netloc
        return FailedTry(
            RemoteUnavailableError(
                f"{self._what}: the connection ended at byte {position} of {self._size}", host=host
            )
        )

    def _wrong_size(self, got: str) -> SizeMismatchError:
        expected = str(self._size)
        return SizeMismatchError(
            f"{self._what}: size mismatch: expected {expected} bytes, got {got}",
            expected=expected,
            got=got,
        )
