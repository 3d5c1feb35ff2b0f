"""The Responses API: answers that are remembered, made of items."""

from modelpack_server.api.openai.responses.routes import router

__all__ = ["router"]
