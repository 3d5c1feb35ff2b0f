"""The application: routes of the OpenAI API, health and metrics, for one model."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from modelpack.errors import NotFoundError
from modelpack_engine.async_engine import EngineState
from modelpack_engine.server import chat, completions, metrics, problems
from modelpack_engine.server.requests import ChatRequest, CompletionRequest
from modelpack_engine.server.serving import ServedModel
from modelpack_engine.server.sse import EventStream


def create_app(served: ServedModel) -> FastAPI:
    """Return the application that serves one model."""
    app = FastAPI(title="Modelpack", docs_url="/docs", openapi_url="/openapi.json")
    problems.install(app)

    def model_for(name: str) -> ServedModel:
        if name not in served.names:
            raise NotFoundError(
                f"the model {name!r} is not served here", hint=f"there is {served.names[0]!r}"
            )
        return served

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": served.created, "owned_by": "modelpack"}

    def not_ready() -> Response | None:
        state = served.engine.state
        if state is EngineState.READY:
            return None
        text = "the model is being loaded"
        if state is EngineState.FAILED:
            text = f"the model could not be loaded: {served.engine.failure}"
        return problems.problem(503, text, code=str(state), headers={"Retry-After": "1"})

    @app.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatRequest) -> Response:
        model = model_for(body.model)
        if refusal := not_ready():
            return refusal
        stream = await chat.start(body, model)
        if body.stream:
            return EventStream(chat.chunks(body, model, stream))
        return JSONResponse(await chat.whole(body, model, stream))

    @app.post("/v1/completions", response_model=None)
    async def create_completion(body: CompletionRequest) -> Response:
        model = model_for(body.model)
        if refusal := not_ready():
            return refusal
        prompts = await completions.start(body, model)
        if body.stream:
            return EventStream(completions.chunks(body, model, prompts))
        return JSONResponse(await completions.whole(body, model, prompts))

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card(served.names[0])]}

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        model_for(name)
        return card(name)

    @app.get("/health", response_model=None)
    async def health() -> Response:
        return not_ready() or JSONResponse({"status": "ok"})

    @app.get("/metrics", response_model=None)
    async def read_metrics() -> Response:
        text = metrics.render(served.names[0], served.engine.stats())
        return Response(text, media_type=metrics.CONTENT_TYPE)

    return app
