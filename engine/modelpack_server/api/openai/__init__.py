"""The OpenAI API: chat completions, completions, responses, embeddings, rerank, transcriptions,
models, files and batches.

`tokenize` has the routes of vLLM that clients of this API call.
"""

from __future__ import annotations

from fastapi import APIRouter

from modelpack_server.api.openai.batch_runner import BatchRunner
from modelpack_server.api.openai.batches import router as batch_routes
from modelpack_server.api.openai.chat import router as chat
from modelpack_server.api.openai.completions import router as completions
from modelpack_server.api.openai.embeddings import ranking_routes
from modelpack_server.api.openai.embeddings import router as embeddings
from modelpack_server.api.openai.files import router as file_routes
from modelpack_server.api.openai.models import router as models
from modelpack_server.api.openai.responses import BackgroundResponses
from modelpack_server.api.openai.responses import router as responses
from modelpack_server.api.openai.tokenize import router as tokenize
from modelpack_server.api.openai.transcriptions import router as transcriptions
from modelpack_server.pool.pool import ModelPool


def router(pool: ModelPool, background: BackgroundResponses, batches: BatchRunner) -> APIRouter:
    """Return the routes of the OpenAI API.

    `background` has its running background responses, `batches` its batches and files.
    """
    routes = APIRouter()
    for part in (chat, completions, embeddings, ranking_routes, transcriptions, models, tokenize):
        routes.routes.extend(part(pool).routes)
    routes.routes.extend(responses(pool, background).routes)
    routes.routes.extend(file_routes(batches.files).routes)
    routes.routes.extend(batch_routes(batches).routes)
    return routes
