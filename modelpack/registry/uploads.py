"""Uploads: a blob streamed into a registry, verified on its way.

distribution-spec "Pushing blobs", in the one form that every registry takes: POST for a session,
then one PUT with the whole content. The last bytes are only sent once all of them are known to be
right, so a blob that differs from its digest is never completed; its session is deleted.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Final

from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import ModelpackError, RegistryError, SizeMismatchError
from modelpack.progress import Action, Progress, Stop
from modelpack.registry.endpoint import Endpoint
from modelpack.registry.retry import FailedTry
from modelpack.registry.stops import either
from modelpack.registry.transport import Call
from modelpack.registry.urls import with_query
from modelpack.storage import BlobReader, BlobSource, Outcome, Watch

#: Bytes read, hashed and sent at a time.
_CHUNK: Final = 1024 * 1024
_OCTETS: Final = "application/octet-stream"
#: What a registry says when it has lost a session; another one may be kept.
_LOST_SESSION: Final = ("BLOB_UPLOAD_UNKNOWN", "BLOB_UPLOAD_INVALID")


class Upload:
    """One blob on its way into a repository."""

    def __init__(self, endpoint: Endpoint, descriptor: Descriptor, watch: Watch) -> None:
        self._endpoint = endpoint
        self._transport = endpoint.transport
        self._descriptor = descriptor
        self._what = f"upload of {endpoint.blob_label(descriptor)}"
        self._stop = either(watch.stop, endpoint.transport.stop)
        self._watch = watch
        self._session = ""

    def send(self, source: BlobSource, session: str = "") -> Outcome:
        """Have the blob in the repository; `session` is one that a failed mount has opened.

        A connection that breaks costs a new session from the first byte on, because registries may
        drop what they got. Raises what `Target.write_blob` raises.
        """
        self._session = session
        return self._transport.retried(lambda: self._try(source), self._stop)

    def exists(self) -> bool:
        """Return whether the repository has the blob, in one try."""
        call = self._call("HEAD", self._endpoint.blob_url(self._descriptor.digest))
        try:
            response = self._transport.attempt(call)
        except RegistryError as error:
            if error.status_code == 404:
                return False
            raise
        length = response.headers.get("Content-Length", "")
        return not length.isdigit() or int(length) == self._descriptor.size

    def mount(self, other: Endpoint) -> str | None:
        """Ask the registry to link the blob from `other`.

        Returns None if it did, else the session for an upload that it opened instead.
        """
        url = with_query(
            self._endpoint.uploads_url(), mount=str(self._descriptor.digest), **{"from": other.name}
        )
        scopes = self._endpoint.push | other.pull
        call = replace(self._call("POST", url), scopes=scopes)
        response = self._transport.retried(lambda: self._transport.attempt(call), self._stop)
        if response.status_code == 201:
            return None
        return self._transport.location(response, self._what)

    def _try(self, source: BlobSource) -> Outcome:
        try:
            if self.exists():
                self._cancel()
                return Outcome.EXISTED
            self._session = self._session or self._start()
            self._put(source)
        except BaseException:
            self._cancel()
            raise
        return Outcome.WRITTEN

    def _cancel(self) -> None:
        """Tell the registry to forget the session; it would do so by itself some day.

        A requested stop does not stop this, but it takes a second or two at most.
        """
        session, self._session = self._session, ""
        if session:
            call = self._call("DELETE", session)
            with suppress(FailedTry, ModelpackError):
                self._transport.attempt(replace(call, stop=Stop(), answer_time=1.0))

    def _start(self) -> str:
        url = self._endpoint.uploads_url()
        algorithm = self._descriptor.digest.algorithm
        if algorithm != "sha256":
            url = with_query(url, **{"digest-algorithm": algorithm})
        response = self._transport.attempt(self._call("POST", url))
        return self._transport.location(response, self._what)

    def _put(self, source: BlobSource) -> None:
        digest = self._descriptor.digest
        body = _CheckedBody(source, self._descriptor, self._what, self._stop, self._watch)
        call = replace(
            self._call("PUT", with_query(self._session, digest=str(digest))),
            headers={"Content-Type": _OCTETS},
            body=body,
            answer_time=self._transport.timeouts.commit,
        )
        try:
            response = self._transport.attempt(call)
        except (FailedTry, RegistryError) as error:
            if body.failure not in (None, error):
                raise body.failure from None  # not the network, though from there it looked so
            if isinstance(error, RegistryError) and body.failure is None and _lost_session(error):
                raise FailedTry(error) from error
            raise
        finally:
            body.close()
        if response.status_code != 201 and not self.exists():
            raise RegistryError(
                f"{self._what}: answered {response.status_code}, but the blob is not there",
                host=self._transport.origin.netloc,
                status_code=response.status_code,
            )

    def _call(self, method: str, url: str) -> Call:
        return Call(self._what, method, url, {}, scopes=self._endpoint.push, stop=self._stop)


class _CheckedBody:
    """A blob's content for a request, hashed and counted while it is sent."""

    def __init__(
        self, source: BlobSource, descriptor: Descriptor, what: str, stop: Stop, watch: Watch
    ) -> None:
        self._source = source
        self._descriptor = descriptor
        self._what = what
        self._stop = stop
        self._report = watch.report
        self._name = descriptor.filepath or descriptor.digest.short
        self._reading: Generator[memoryview, None, None] | None = None
        #: Why the content could not be had, as opposed to sent.
        self.failure: Exception | None = None

    def __len__(self) -> int:
        return self._descriptor.size

    def __iter__(self) -> Iterator[memoryview]:
        self.close()
        self._reading = self._read()
        # Read now, before the head of the request is sent: an empty blob would be done with that.
        return chain([next(self._reading)], self._reading)

    def close(self) -> None:
        """Close the source, which a request that failed half-way leaves open."""
        if self._reading is not None:
            self._reading.close()

    def _read(self) -> Generator[memoryview, None, None]:
        try:
            with self._source.open() as reader:
                yield from self._checked(reader)
        except Exception as error:
            self.failure = error
            raise

    def _checked(self, reader: BlobReader) -> Generator[memoryview, None, None]:
        size, sent = self._descriptor.size, 0
        hasher = self._descriptor.digest.hasher()
        buffer = memoryview(bytearray(min(_CHUNK, size)))
        while True:
            self._stop.check()
            chunk = buffer[: min(_CHUNK, size - sent)]
            count = _fill(reader, chunk)
            hasher.update(chunk[:count])
            sent += count
            if count < len(chunk):
                raise self._wrong_size(str(sent))
            if sent == size:
                if reader.readinto(memoryview(bytearray(1))):
                    raise self._wrong_size(f"more than {size}")
                self._descriptor.digest.check_equal(Digest.of_hasher(hasher), self._what)
            yield chunk
            self._report(Progress(Action.PUSH, self._name, self._descriptor.digest, sent, size))
            if sent == size:
                return

    def _wrong_size(self, got: str) -> SizeMismatchError:
        expected = str(self._descriptor.size)
        return SizeMismatchError(
            f"{self._what}: the source has {got} bytes, expected {expected}",
            expected=expected,
            got=got,
        )


def _lost_session(error: RegistryError) -> bool:
    return error.code in _LOST_SESSION or error.status_code == 416


def _fill(reader: BlobReader, buffer: memoryview) -> int:
    """Read until `buffer` is full or the source ends; return the number of bytes."""
    filled = 0
    while filled < len(buffer) and (count := reader.readinto(buffer[filled:])):
        filled += count
    return filled
