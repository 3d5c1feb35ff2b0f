"""Access control for served models, and the gateway.

`protect` wraps an ASGI application in API keys, limits, CORS, host checks, request ids and traces.
`modelpack gateway` adds a proxy for several servers.
"""

from modelpack_server.gateway.keys import KeyFile, add_key
from modelpack_server.gateway.protection import Protection, protect
from modelpack_server.gateway.traces import Trace, trace_of

__all__ = ["KeyFile", "Protection", "Trace", "add_key", "protect", "trace_of"]
