"""The Responses API: stored responses made of items. Read `routes` first."""

from modelpack_server.api.openai.responses.routes import router

__all__ = ["router"]
