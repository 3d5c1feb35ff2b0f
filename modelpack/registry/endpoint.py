"""Endpoint: the URLs, scopes and labels of one repository, as distribution-spec defines them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from oras.container import Container

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import check_repository, check_tag
from modelpack.errors import InvalidReferenceError
from modelpack.progress import Stop
from modelpack.registry.auth import Scopes, repository_scopes
from modelpack.registry.http_client import Call, HttpClient


@dataclass(frozen=True, slots=True)
class BlobLocation:
    """The URL of one blob; `label` names it in errors, `scopes` are needed to read it."""

    client: HttpClient
    url: str
    label: str
    scopes: Scopes

    def read_call(self, headers: Mapping[str, str], stop: Stop | None = None) -> Call:
        """Return a request for the blob, whose body the caller reads."""
        return Call(
            self.label, "GET", self.url, headers, scopes=self.scopes, stream=True, stop=stop
        )


class Endpoint:
    """The URLs of one repository, and the scopes that requests for it need."""

    def __init__(self, client: HttpClient, host: str, name: str) -> None:
        self.name = check_repository(name, name)
        self.label = f"{host}/{name}"
        self.client = client
        #: Whether the registry accepts content in a PATCH only, as an upload has shown.
        self.patch_only = False
        self._container = _container(client.origin.netloc, name)
        self.pull = repository_scopes(name, "pull")
        self.push = repository_scopes(name, "pull", "push")
        self.delete = repository_scopes(name, "pull", "delete")

    def manifest_url(self, name: str) -> str:
        """Return the URL of the manifest `name`, a tag or a digest."""
        return self._url(self._container.manifest_url(name))

    def blob_url(self, digest: Digest) -> str:
        """Return the URL of a blob."""
        return self._url(self._container.get_blob_url(str(digest)))

    def uploads_url(self) -> str:
        """Return the URL at which uploads start."""
        return self._url(self._container.upload_blob_url())

    def tags_url(self) -> str:
        """Return the URL of the first page of tags."""
        return self._url(self._container.tags_url())

    def referrers_url(self, subject: Digest, artifact_type: str | None) -> str:
        """Return the URL of the referrers of `subject`, of one type if given."""
        query = f"?{urlencode({'artifactType': artifact_type})}" if artifact_type else ""
        base = self.manifest_url(str(subject)).rsplit("/manifests/", 1)[0]
        return f"{base}/referrers/{subject}{query}"

    def blob(self, descriptor: Descriptor) -> BlobLocation:
        """Return the location of a blob, to read it."""
        url = self.blob_url(descriptor.digest)
        return BlobLocation(self.client, url, self.blob_label(descriptor), self.pull)

    def blob_label(self, descriptor: Descriptor) -> str:
        """Return the name of a blob in errors."""
        return f"blob {descriptor.digest} of {self.label}"

    def manifest_label(self, name: str) -> str:
        """Return the name of the manifest `name`, a tag or a digest, in errors."""
        return f"{self.label}{'@' if ':' in name else ':'}{name}"

    def _url(self, address: str) -> str:
        return f"{self.client.origin.scheme}://{address}"


def _container(host: str, repository: str) -> Container:
    """Return oras's container, which builds URLs; its parser would take `my.models/` for a host."""
    container = Container("x", registry=host)
    container.namespace, _, container.repository = repository.rpartition("/")
    return container


def checked_name(name: str) -> str:
    """Return `name` if it is a tag or a digest; nothing else gets into a URL.

    Raises `InvalidReferenceError` or `InvalidDigestError`.
    """
    if ":" in name:
        return str(Digest.parse(name))
    if not name:
        raise InvalidReferenceError("expected a tag or a digest, got nothing", reference=name)
    return check_tag(name, name)
