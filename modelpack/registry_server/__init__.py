"""The embedded registry: distribution-spec 1.1 over a store on disk."""

from modelpack.registry_server.metrics import RequestRecord
from modelpack.registry_server.server import RegistryServer, create_app

__all__ = ["RegistryServer", "RequestRecord", "create_app"]
