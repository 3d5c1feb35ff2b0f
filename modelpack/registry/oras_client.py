"""What of oras-py is used, and what is switched off.

oras-py 0.2.43 brings a session that takes no cookies, the choice of URL scheme, default headers and
the URLs of distribution-spec (`Container`); `Transport` builds on those and replaces the request
method. Its other methods read whole blobs into memory, write them unverified under their final
name, prompt for passwords or hold one token for every host, so nothing may reach them: each is
overridden by one that names what to use. `tests/registry/test_oras.py` holds these lists against
the installed version, so that a release with other methods is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import oras.provider
from oras.container import Container

#: Used as they are.
KEPT: Final = ("version", "set_header", "get_container")
#: Replaced by working ones in `Transport`.
REPLACED: Final = ("__init__", "do_request", "_get_location")
#: Switched off, with what does the same soundly.
SWITCHED_OFF: Final = {
    "push": "modelpack.push",
    "pull": "modelpack.pull",
    "upload_blob": "Repository.write_blob",
    "put_upload": "Repository.write_blob",
    "chunked_upload": "Repository.write_blob",
    "blob_exists": "Repository.has_blob",
    "get_blob": "Repository.blob",
    "download_blob": "Repository.blob",
    "get_manifest": "Repository.fetch_manifest",
    "upload_manifest": "Repository.write_manifest",
    "get_tags": "Repository.tags",
    "delete_tag": "Repository.delete_manifest",
    "delete_tags": "Repository.delete_manifest",
    "login": "a CredentialSource",
    "logout": "a CredentialSource",
    "_upload_blob": "Repository.write_blob",
    "_put_upload": "Repository.write_blob",
    "_chunked_upload": "Repository.write_blob",
    "_download_blob": "Repository.blob",
    "_upload_manifest": "Repository.write_manifest",
    "_check_200_response": "modelpack.registry.http_errors",
    "_do_paginated_request": "Repository.tags",
    "_parse_manifest_ref": "modelpack.Reference",
    "_parse_response_errors": "modelpack.registry.http_errors",
    "_validate_path": "modelpack.artifacts.paths",
}


def container(host: str, repository: str) -> Container:
    """Return the container of `repository` at `host[:port]`, to build URLs with.

    Container's own parser takes `localhost/x` and `my.models/x` for what they are not, so the parts
    are set rather than parsed.
    """
    made = Container("x", registry=host)
    made.namespace, _, made.repository = repository.rpartition("/")
    return made


class OrasClient(oras.provider.Registry):  # type: ignore[misc]  # oras has no annotations
    """The client of oras, reduced to its sound parts."""


def _switched_off(name: str, instead: str) -> Callable[..., Any]:
    def refuse(self: OrasClient, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"oras's {name} is not sound for models; use {instead}")

    refuse.__name__ = name
    refuse.__doc__ = f"Refuse: use {instead}."
    return refuse


for _name, _instead in SWITCHED_OFF.items():
    setattr(OrasClient, _name, _switched_off(_name, _instead))
