"""The Responses and Conversations APIs: stored lists of items. Read `routes` first."""

from modelpack_server.api.openai.responses.background import BackgroundResponses
from modelpack_server.api.openai.responses.routes import router

__all__ = ["BackgroundResponses", "router"]
