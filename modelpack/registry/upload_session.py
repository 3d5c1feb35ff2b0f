"""UploadSession: the requests of one upload session (distribution-spec "Pushing blobs").

Each is one try: what another try may help against is a `FailedTry`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Final

import requests

from modelpack.descriptor import Descriptor
from modelpack.errors import ModelpackError
from modelpack.progress import Stop
from modelpack.registry.endpoint import Endpoint
from modelpack.registry.retry import FailedTry
from modelpack.registry.transport import Body, Call, stated_number
from modelpack.registry.urls import with_query

_OCTETS: Final = "application/octet-stream"
_RANGE: Final = re.compile(r"(?:bytes[= ])?0-([0-9]{1,18})\Z")


class UploadSession:
    """A place that a registry has opened for one blob; `location` is its newest URL."""

    def __init__(self, endpoint: Endpoint, descriptor: Descriptor, what: str, stop: Stop) -> None:
        self._endpoint = endpoint
        self._transport = endpoint.transport
        self._descriptor = descriptor
        self._what = what
        self._stop = stop
        self.location = ""
        #: The bytes that every chunk but the last has to have, where the registry names them.
        self.minimum_chunk = 0

    def start(self) -> None:
        """Have the registry open a session."""
        url = self._endpoint.uploads_url()
        algorithm = self._descriptor.digest.algorithm
        if algorithm != "sha256":
            url = with_query(url, **{"digest-algorithm": algorithm})
        response = self._transport.attempt(self._call("POST", url))
        self.location = self._transport.location(response, self._what)
        self.minimum_chunk = stated_number(response, "OCI-Chunk-Min-Length") or 0

    def status(self) -> int | None:
        """Return how many bytes the registry has; None if it does not say."""
        return self._received(self._transport.attempt(self._call("GET", self.location)))

    def append(self, body: Body, start: int) -> int | None:
        """Send a chunk that begins at byte `start`; return what `status` does after it."""
        headers = {"Content-Range": _content_range(start, len(body))}
        return self._received(self._send("PATCH", self.location, body, headers))

    def finish(self, body: Body, start: int) -> requests.Response:
        """Send the bytes from `start` on, and say that these are all; return the answer."""
        url = with_query(self.location, digest=str(self._descriptor.digest))
        partial = start > 0 and len(body) > 0
        headers = {"Content-Range": _content_range(start, len(body))} if partial else {}
        return self._send("PUT", url, body, headers)

    def cancel(self) -> None:
        """Tell the registry to forget the session; it would do so by itself some day.

        A requested stop does not stop this, but it takes a second or two at most.
        """
        location, self.location = self.location, ""
        if location:
            call = replace(self._call("DELETE", location), stop=Stop(), answer_time=1.0)
            with suppress(FailedTry, ModelpackError):
                self._transport.attempt(call)

    def _send(
        self, method: str, url: str, body: Body, headers: Mapping[str, str]
    ) -> requests.Response:
        call = replace(
            self._call(method, url),
            headers={"Content-Type": _OCTETS, **headers},
            body=body,
            answer_time=self._transport.timeouts.commit,
        )
        return self._transport.attempt(call)

    def _received(self, response: requests.Response) -> int | None:
        if response.headers.get("Location"):  # it may carry the state: an older one is refused
            self.location = self._transport.location(response, self._what)
        match = _RANGE.match(response.headers.get("Range", "").strip())
        if match is None:
            return None
        # The specification has no way to say "nothing" but this, which says one byte as well.
        return int(match[1]) + 1 if match[1] != "0" else 0

    def _call(self, method: str, url: str) -> Call:
        return Call(self._what, method, url, {}, scopes=self._endpoint.push, stop=self._stop)


def _content_range(start: int, length: int) -> str:
    return f"{start}-{start + length - 1}"
