"""The ASGI server of the embedded registry and of the engine's server; start with listener.py."""

from __future__ import annotations

from typing import Final

#: Name of our ASGI extension, whose `give_back` takes pieces of a body that the application no
#: longer uses. It is defined here, since the gateway's checks must not load uvicorn.
REUSE: Final = "modelpack.reuse"
