"""Who may use a served model, and how much of it.

`protect` puts API keys, limits, CORS, host checks, request ids and traces before an ASGI
application; `modelpack gateway` is that and a proxy for several servers.
"""

from modelpack_server.gateway.keys import KeyFile, add_key
from modelpack_server.gateway.protection import Protection, protect
from modelpack_server.gateway.traces import Trace, trace_of

__all__ = ["KeyFile", "Protection", "Trace", "add_key", "protect", "trace_of"]
