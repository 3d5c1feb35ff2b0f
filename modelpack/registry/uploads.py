"""Uploads: a blob streamed into a registry, verified on its way.

distribution-spec "Pushing blobs". A blob goes in one PUT, the one form that every registry takes;
in chunks where the caller or the registry wants them. A connection that breaks is taken up where
the registry says that it stopped, and started again from the first byte where it does not say so.
The last bytes are only sent once all of them are known to be right, so a blob that differs from its
digest is never completed; its session is deleted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import requests

from modelpack.descriptor import Descriptor
from modelpack.errors import AuthError, RegistryError
from modelpack.registry.endpoint import Endpoint
from modelpack.registry.retry import FailedTry, Retries
from modelpack.registry.stops import either
from modelpack.registry.transport import Call, stated_number
from modelpack.registry.upload_content import ContentPart, UploadContent
from modelpack.registry.upload_session import UploadSession
from modelpack.registry.urls import with_query
from modelpack.storage import BlobSource, Outcome, Watch

#: The size of chunks where the registry wants chunks and the caller says nothing.
_CHUNK: Final = 64 * 1024 * 1024
#: What a registry says when it has lost a session; another one may be kept.
_LOST_SESSION: Final = ("BLOB_UPLOAD_UNKNOWN", "BLOB_UPLOAD_INVALID")
#: How often in a row a registry may refuse what it had asked for.
_MAX_REFUSALS: Final = 2


class Upload:
    """One blob on its way into a repository."""

    def __init__(self, endpoint: Endpoint, descriptor: Descriptor, watch: Watch) -> None:
        self._endpoint = endpoint
        self._transport = endpoint.transport
        self._descriptor = descriptor
        self._what = f"upload of {endpoint.blob_label(descriptor)}"
        self._stop = either(watch.stop, endpoint.transport.stop)
        self._watch = watch
        self._session = UploadSession(endpoint, descriptor, self._what, self._stop)
        self._begun = False  # the session may hold bytes
        self._received = 0  # what the registry has, for all we know
        self._farthest = 0  # the most that it ever had
        self._refusals = 0
        self._in_chunks = True  # where anybody wants chunks

    def send(self, source: BlobSource, session: str = "") -> Outcome:
        """Have the blob in the repository; `session` is one that a failed mount has opened.

        Raises what `Target.write_blob` raises.
        """
        self._session.location = session
        rate = self._transport.blobs.rate
        content = UploadContent(source, self._descriptor, self._what, self._stop, self._watch, rate)
        retries = self._transport.retries(self._stop)
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
            response = self._transport.attempt(call)
        except RegistryError as error:
            if error.status_code == 404:
                return False
            raise
        return stated_number(response) in (None, self._descriptor.size)

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
            response = self._put(content.part(start, size), start)
        except (FailedTry, RegistryError) as error:
            if content.failure not in (None, error):
                raise content.failure from None  # not the network, though from there it looked so
            if isinstance(error, RegistryError) and content.failure is None:
                self._after_refusal(error)
            raise
        if response.status_code != 201 and not self.exists():
            raise RegistryError(
                f"{self._what}: answered {response.status_code}, but the blob is not there",
                host=self._transport.origin.netloc,
                status_code=response.status_code,
            )
        return Outcome.WRITTEN

    def _take_up(self, content: UploadContent, retries: Retries) -> None:
        """Find out where to go on after a failure; start again where the registry does not say."""
        try:
            received = self._session.status() if self._session.location else None
        except RegistryError:
            received = None
        if not received or received > content.sent:  # nothing to go on from, or nothing sensible
            self._start_again()
            return
        self._reached(received, retries)

    def _start_again(self) -> None:
        self._session.cancel()
        self._begun = False
        self._received = 0

    def _after_refusal(self, error: RegistryError) -> None:
        """Raise `FailedTry` if a registry's refusal may be only of how the bytes were sent."""
        if isinstance(error, AuthError) or self._refusals >= _MAX_REFUSALS:
            return
        lost = error.code in _LOST_SESSION or error.status_code == 416
        special = self._received > 0 or self._chunk_size() is not None
        if lost or special:
            self._refusals += 1
            if not lost or self._refusals == _MAX_REFUSALS:
                self._in_chunks = False
                self._start_again()
            raise FailedTry(error) from error

    def _chunk_size(self) -> int | None:
        """Return the size of chunks to send, None to send everything at once."""
        asked, minimum = self._transport.blobs.chunk_size, self._session.minimum_chunk
        if not self._in_chunks or not (asked or minimum):
            return None
        return max(asked or _CHUNK, minimum)

    def _send_chunks(self, content: UploadContent, retries: Retries) -> None:
        """Send all but the last chunk, if it is to be chunks."""
        size = self._chunk_size()
        while size is not None and self._descriptor.size - self._received > size:
            start, end = self._received, self._received + size
            received = self._append(content.part(start, end), start)
            if received not in (None, end):
                # A registry that keeps nothing of a chunk will not keep the next one either.
                self._in_chunks = False
                self._start_again()
                raise FailedTry(
                    RegistryError(
                        f"{self._what}: got a chunk that ends at byte {end}, "
                        f"and says that it has {received} bytes",
                        host=self._transport.origin.netloc,
                    )
                )
            self._reached(end, retries)

    def _reached(self, received: int, retries: Retries) -> None:
        """Go on from byte `received`; what came as far before, in a session since lost, is none."""
        self._received = received
        if received > self._farthest:
            self._farthest = received
            self._refusals = 0
            retries.made_progress()

    def _append(self, part: ContentPart, start: int) -> int | None:
        try:
            return self._session.append(part, start)
        finally:
            part.close()

    def _put(self, part: ContentPart, start: int) -> requests.Response:
        try:
            return self._session.finish(part, start)
        finally:
            part.close()

    def _call(self, method: str, url: str) -> Call:
        return Call(self._what, method, url, {}, scopes=self._endpoint.push, stop=self._stop)
