"""The embedded registry: distribution-spec 1.1 over a store on disk."""

from modelpack.server.app import create_app
from modelpack.server.recording import RequestRecord
from modelpack.server.serving import RegistryServer

__all__ = ["RegistryServer", "RequestRecord", "create_app"]
