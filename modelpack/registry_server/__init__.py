"""The embedded registry: distribution-spec 1.1 over a store on disk."""

from modelpack.registry_server.app import create_app
from modelpack.registry_server.recorder import RequestRecord
from modelpack.registry_server.server import RegistryServer

__all__ = ["RegistryServer", "RequestRecord", "create_app"]
