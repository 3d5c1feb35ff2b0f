"""Blob uploads: the upload session, its retries and chunks, and the verified content that it sends.

distribution-spec "Pushing blobs". `Upload` skips existing blobs, resumes after a failure where the
registry reports how much it has, and sends chunks if the registry or the user requires them.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Final

import requests

from modelpack.artifacts.descriptor import Descriptor, size_mismatch
from modelpack.artifacts.digest import Digest
from modelpack.errors import AuthError, ModelpackError, RegistryError, SizeMismatchError
from modelpack.progress import Action, Progress, Stop
from modelpack.registry.endpoint import Endpoint
from modelpack.registry.http_client import Body, Call, stated_number
from modelpack.registry.limits import FailedTry, RateLimit, Retries, either
from modelpack.registry.urls import with_query
from modelpack.storage import BlobReader, BlobSource, Outcome, Watch, fill

if TYPE_CHECKING:
    from hashlib import _Hash

#: Bytes read, hashed and sent at a time.
_PIECE: Final = 1024 * 1024
#: Bytes between two checkpoints, which are saved states of the hash.
CHECKPOINT: Final = 64 * 1024 * 1024


class UploadContent:
    """The content of a blob, read in parts; a part may begin before the end of an earlier one.

    The last bytes are returned only after the whole content was verified. To go back, the source is
    opened at the last checkpoint before the part, not at its first byte.
    """

    def __init__(
        self,
        source: BlobSource,
        descriptor: Descriptor,
        what: str,
        stop: Stop,
        watch: Watch,
        rate: RateLimit | None = None,
    ) -> None:
        self._source = source
        self._descriptor = descriptor
        self._what = what
        self._stop = stop
        self._report = watch.report
        self._rate = rate
        self._name = descriptor.filepath or descriptor.digest.short
        self._checkpoints: list[tuple[int, _Hash]] = [(0, descriptor.digest.hasher())]
        self._stack = ExitStack()
        self._reader: BlobReader | None = None
        self._hasher = descriptor.digest.hasher()
        self._position = 0
        #: The largest offset that was sent: no registry can have more.
        self.sent = 0
        #: The error of the source, as opposed to one of the network.
        self.failure: Exception | None = None

    def close(self) -> None:
        """Close the source, which a request that failed half-way leaves open."""
        self._reader = None
        self._stack.close()

    def read(self, start: int, end: int) -> Generator[memoryview, None, None]:
        """Yield the bytes from `start` to `end`, hashing them on the way."""
        self.failure = None
        try:
            self._go_to(start)
            yield from self._pieces(end)
        except BaseException as error:
            if isinstance(error, Exception):
                self.failure = error
            self.close()
            raise

    def _go_to(self, start: int) -> None:
        if self._reader is not None and self._position == start:
            return
        self.close()
        self._position, kept = next(c for c in reversed(self._checkpoints) if c[0] <= start)
        self._hasher = kept.copy()
        self._reader = self._stack.enter_context(self._source.open(self._position))
        buffer = memoryview(bytearray(min(_PIECE, start - self._position)))
        while self._position < start:
            self._take(buffer[: start - self._position])

    def _pieces(self, end: int) -> Generator[memoryview, None, None]:
        digest, size = self._descriptor.digest, self._descriptor.size
        step = min(_PIECE, self._rate.step) if self._rate else _PIECE
        buffer = memoryview(bytearray(min(step, end - self._position)))
        while True:
            piece = buffer[: end - self._position]
            self._take(piece)
            if self._position == size:
                self._check_end()
            if self._rate:
                self._rate.wait(len(piece), self._stop)
            self.sent = max(self.sent, self._position)
            yield piece
            self._report(Progress(Action.PUSH, self._name, digest, self._position, size))
            if self._position == end:
                return

    def _take(self, piece: memoryview) -> None:
        """Read and hash as many bytes as `piece` has."""
        assert self._reader is not None
        self._stop.check()
        count = fill(self._reader, piece)
        self._hasher.update(piece[:count])
        self._position += count
        if count < len(piece):
            raise self._wrong_size(str(self._position))
        if self._position >= self._checkpoints[-1][0] + CHECKPOINT:
            self._checkpoints.append((self._position, self._hasher.copy()))

    def _check_end(self) -> None:
        assert self._reader is not None
        if self._reader.readinto(memoryview(bytearray(1))):
            raise self._wrong_size(f"more than {self._descriptor.size}")
        self._descriptor.digest.check_equal(Digest.of_hasher(self._hasher), self._what)

    def _wrong_size(self, got: str) -> SizeMismatchError:
        return size_mismatch(f"source of {self._what}", self._descriptor.size, got)


class ContentPart:
    """The bytes from `start` to `end` of an `UploadContent`; fulfils `Body`."""

    def __init__(self, content: UploadContent, start: int, end: int) -> None:
        self._content = content
        self._start = start
        self._end = end
        self._reading: Generator[memoryview, None, None] | None = None

    def __len__(self) -> int:
        return self._end - self._start

    def __iter__(self) -> Iterator[memoryview]:
        self.close()
        self._reading = self._content.read(self._start, self._end)
        # Read the first piece before the head of the request is sent: if the source fails later,
        # the head alone could be a complete request.
        return chain([next(self._reading)], self._reading)

    def close(self) -> None:
        """Close the source if the part was not read to its end."""
        if self._reading is not None:
            self._reading.close()


_RANGE: Final = re.compile(r"(?:bytes[= ])?0-([0-9]{1,18})\Z")


class UploadSession:
    """An upload session of a registry for one blob; `location` is its current URL."""

    def __init__(self, endpoint: Endpoint, descriptor: Descriptor, what: str, stop: Stop) -> None:
        self._endpoint = endpoint
        self._client = endpoint.client
        self._descriptor = descriptor
        self._what = what
        self._stop = stop
        self.location = ""
        #: The least size of all chunks but the last, 0 if the registry states none.
        self.minimum_chunk = 0

    def start(self) -> None:
        """Open the session in the registry."""
        url = self._endpoint.uploads_url()
        algorithm = self._descriptor.digest.algorithm
        if algorithm != "sha256":
            url = with_query(url, **{"digest-algorithm": algorithm})
        response = self._client.attempt(self._call("POST", url))
        self.location = self._client.location(response, self._what)
        self.minimum_chunk = stated_number(response, "OCI-Chunk-Min-Length") or 0

    def status(self) -> int | None:
        """Return how many bytes the registry has; None if it does not say."""
        return self._received(self._client.attempt(self._call("GET", self.location)))

    def append(self, body: Body, start: int) -> int | None:
        """Send a chunk that begins at byte `start`; return the bytes that the registry has then.

        The whole blob is sent as a stream, without a range, as docker does.
        """
        whole = len(body) == self._descriptor.size
        headers = {} if whole else {"Content-Range": _content_range(start, len(body))}
        return self._received(self._send("PATCH", self.location, body, headers))

    def finish(self, body: Body, start: int) -> requests.Response:
        """Send the bytes from `start` on and complete the upload; return the response."""
        url = with_query(self.location, digest=str(self._descriptor.digest))
        partial = start > 0 and len(body) > 0
        headers = {"Content-Range": _content_range(start, len(body))} if partial else {}
        return self._send("PUT", url, body, headers)

    def cancel(self) -> None:
        """Delete the session, in a second or two even after a stop; ignore failures."""
        location, self.location = self.location, ""
        if location:
            call = replace(self._call("DELETE", location), stop=Stop(), answer_time=1.0)
            with suppress(FailedTry, ModelpackError):
                self._client.attempt(call)

    def _send(
        self, method: str, url: str, body: Body, headers: Mapping[str, str]
    ) -> requests.Response:
        headers = {"Content-Type": "application/octet-stream", **headers}
        wait = self._client.timeouts.commit
        call = replace(self._call(method, url), headers=headers, body=body, answer_time=wait)
        return self._client.attempt(call)

    def _received(self, response: requests.Response) -> int | None:
        if response.headers.get("Location"):  # it may hold the state; older ones are refused
            self.location = self._client.location(response, self._what)
        match = _RANGE.match(response.headers.get("Range", "").strip())
        if match is None:
            return None
        # In the specification `0-0` means both nothing and one byte.
        return int(match[1]) + 1 if match[1] != "0" else 0

    def _call(self, method: str, url: str) -> Call:
        return Call(self._what, method, url, {}, scopes=self._endpoint.push, stop=self._stop)


def _content_range(start: int, length: int) -> str:
    return f"{start}-{start + length - 1}"


#: The size of chunks if the registry requires chunks and the caller gives no size.
_CHUNK: Final = 64 * 1024 * 1024
#: Error codes of a registry that has lost a session; a new session may work.
_LOST_SESSION: Final = ("BLOB_UPLOAD_UNKNOWN", "BLOB_UPLOAD_INVALID")
#: Statuses and error codes of registries that accept no content in a PUT, such as Artifactory.
_NO_CONTENT: Final = (400, 404, 405, 411, 415, 501)
_NO_CONTENT_CODES: Final = (None, "UNSUPPORTED", *_LOST_SESSION)
#: Refusals in a row after which an upload fails.
_MAX_REFUSALS: Final = 2


class Upload:
    """The upload of one blob to a repository."""

    def __init__(self, endpoint: Endpoint, descriptor: Descriptor, watch: Watch) -> None:
        self._endpoint = endpoint
        self._client = endpoint.client
        self._descriptor = descriptor
        self._what = f"upload of {endpoint.blob_label(descriptor)}"
        self._stop = either(watch.stop, endpoint.client.stop)
        self._watch = watch
        self._session = UploadSession(endpoint, descriptor, self._what, self._stop)
        self._begun = False  # the session may hold bytes
        self._received = 0  # bytes that the registry has, as far as known
        self._farthest = 0  # the most bytes that it ever had
        self._refusals = 0
        self._in_chunks = True  # if the registry or the caller wants chunks
        self._by_patch = endpoint.patch_only  # the last request has no content

    def send(self, source: BlobSource, session: str = "") -> Outcome:
        """Upload the blob unless the repository has it; `session` is one opened by a failed mount.

        Raises what `Target.write_blob` raises.
        """
        self._session.location = session
        rate = self._client.blobs.rate
        content = UploadContent(source, self._descriptor, self._what, self._stop, self._watch, rate)
        retries = self._client.retries(self._stop)
        try:
            while True:
                try:
                    return self._try(content, retries)
                except FailedTry as failed:
                    retries.wait_after(failed)
        except BaseException:
            self._session.cancel()
            raise
        finally:
            content.close()

    def exists(self) -> bool:
        """Return whether the repository has the blob, in one try."""
        call = self._call("HEAD", self._endpoint.blob_url(self._descriptor.digest))
        try:
            response = self._client.attempt(call)
        except RegistryError as error:
            if error.status_code == 404:
                return False
            raise
        return stated_number(response) in (None, self._descriptor.size)

    @property
    def session(self) -> str:
        """The URL of the session that a failed mount opened, or ""."""
        return self._session.location

    def mount(self, other: Endpoint) -> bool:
        """Ask the registry, in one try, to link the blob from `other`; return whether it did.

        The registry may open a `session` instead; one that an earlier mount opened is cancelled.
        """
        self._session.cancel()
        url = with_query(
            self._endpoint.uploads_url(), mount=str(self._descriptor.digest), **{"from": other.name}
        )
        scopes = self._endpoint.push | other.pull
        response = self._client.attempt(replace(self._call("POST", url), scopes=scopes))
        if response.status_code == 201:
            return True
        self._session.location = self._client.location(response, self._what)
        return False

    def _try(self, content: UploadContent, retries: Retries) -> Outcome:
        if self.exists():
            self._session.cancel()
            return Outcome.EXISTED
        if self._begun:
            self._take_up(content, retries)
        if not self._session.location:
            self._session.start()
        self._begun = True
        try:
            self._send_chunks(content, retries)
            start, size = self._received, self._descriptor.size
            with closing(ContentPart(content, start, size)) as part:
                response = self._session.finish(part, start)
        except (FailedTry, RegistryError) as error:
            if content.failure not in (None, error):
                raise content.failure from None  # requests reports it as an error of the network
            if isinstance(error, RegistryError) and content.failure is None:
                self._after_refusal(error)
            raise
        if response.status_code != 201 and not self.exists():
            raise RegistryError(
                f"{self._what}: answered {response.status_code}, but the blob is not there",
                host=self._client.origin.netloc,
                status_code=response.status_code,
            )
        self._endpoint.patch_only |= self._by_patch
        return Outcome.WRITTEN

    def _take_up(self, content: UploadContent, retries: Retries) -> None:
        """Find where to resume after a failure; start again if the registry does not report it."""
        try:
            received = self._session.status() if self._session.location else None
        except RegistryError:
            received = None
        if received and received <= content.sent:
            self._reached(received, retries)
        else:  # no bytes, or an impossible number
            self._start_again()

    def _start_again(self) -> None:
        self._session.cancel()
        self._begun = False
        self._received = 0

    def _after_refusal(self, error: RegistryError) -> None:
        """Raise `FailedTry` if a new session, one request or a PATCH may succeed."""
        if isinstance(error, AuthError):
            return
        lost = error.code in _LOST_SESSION or error.status_code == 416
        if self._may_want_a_patch(error) and (not lost or self._refusals >= _MAX_REFUSALS - 1):
            self._by_patch = True
            self._start_again()
            raise FailedTry(error) from error
        if self._refusals >= _MAX_REFUSALS or (self._by_patch and not lost):
            return
        if lost or self._received > 0 or self._chunk_size() is not None:
            self._refusals += 1
            if not lost or self._refusals == _MAX_REFUSALS:
                self._in_chunks = False
                self._start_again()
            raise FailedTry(error) from error

    def _may_want_a_patch(self, error: RegistryError) -> bool:
        """Return whether the registry may have refused content because it came in a PUT."""
        in_a_put = self._received == 0 < self._descriptor.size and self._chunk_size() is None
        refused = error.status_code in _NO_CONTENT and error.code in _NO_CONTENT_CODES
        return in_a_put and refused and not self._by_patch

    def _chunk_size(self) -> int | None:
        """Return the size of chunks to send, None to send everything at once."""
        asked, minimum = self._client.blobs.chunk_size, self._session.minimum_chunk
        in_chunks = self._in_chunks and (asked or minimum)
        return max(asked or _CHUNK, minimum) if in_chunks else None

    def _next_chunk(self) -> int | None:
        """Return the end of the next chunk; None if the rest is sent with the last request."""
        size, left = self._chunk_size(), self._descriptor.size - self._received
        if self._by_patch:
            return self._received + min(size or left, left) if left else None
        return self._received + size if size is not None and left > size else None

    def _send_chunks(self, content: UploadContent, retries: Retries) -> None:
        """Send all content that does not belong into the last request."""
        while (end := self._next_chunk()) is not None:
            start = self._received
            with closing(ContentPart(content, start, end)) as part:
                received = self._session.append(part, start)
            if received not in (None, end):
                # A registry that keeps nothing of a chunk will not keep the next one either.
                self._in_chunks = False
                self._start_again()
                raise FailedTry(
                    RegistryError(
                        f"{self._what}: sent a chunk that ends at byte {end}, "
                        f"but the registry has {received} bytes",
                        host=self._client.origin.netloc,
                    )
                )
            self._reached(end, retries)

    def _reached(self, received: int, retries: Retries) -> None:
        """Continue at byte `received`; bytes that an earlier, lost session had are not progress."""
        self._received = received
        if received > self._farthest:
            self._farthest = received
            self._refusals = 0
            retries.made_progress()

    def _call(self, method: str, url: str) -> Call:
        return Call(self._what, method, url, {}, scopes=self._endpoint.push, stop=self._stop)
