"""The ASGI server of the embedded registry and of the engine's server; start with listener.py."""
