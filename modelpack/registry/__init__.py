"""Models in a registry, over HTTP (OCI distribution-spec 1.1).

    with Registry("registry.example") as registry:
        descriptor = registry.repository("team/model").resolve("v1")

`HttpClient` (http_client.py) makes the requests of this package and of `modelpack.hub`.
"""

from __future__ import annotations

from modelpack.registry.credentials import Credential as Credential
from modelpack.registry.credentials import CredentialChain as CredentialChain
from modelpack.registry.credentials import CredentialSource as CredentialSource
from modelpack.registry.credentials import DockerConfig as DockerConfig
from modelpack.registry.credentials import EnvironmentCredentials as EnvironmentCredentials
from modelpack.registry.credentials import StaticCredentials as StaticCredentials
from modelpack.registry.credentials import default_credentials as default_credentials
from modelpack.registry.limits import BlobOptions as BlobOptions
from modelpack.registry.limits import RateLimit as RateLimit
from modelpack.registry.limits import RetryPolicy as RetryPolicy
from modelpack.registry.limits import Timeouts as Timeouts
from modelpack.registry.repository import Registry as Registry
from modelpack.registry.repository import Repository as Repository
from modelpack.registry.tls import TlsOptions as TlsOptions
from modelpack.registry.urls import uses_plain_http as uses_plain_http

__all__ = [
    "BlobOptions",
    "Credential",
    "CredentialChain",
    "CredentialSource",
    "DockerConfig",
    "EnvironmentCredentials",
    "RateLimit",
    "Registry",
    "Repository",
    "RetryPolicy",
    "StaticCredentials",
    "Timeouts",
    "TlsOptions",
    "default_credentials",
    "uses_plain_http",
]
