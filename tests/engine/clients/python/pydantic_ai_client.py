"""pydantic-ai: agents of its models for OpenAI's chat and Responses APIs, and its embedder."""

from __future__ import annotations

import asyncio

from pydantic import BaseModel, Field
from pydantic_ai import Agent, Embedder, NativeOutput, ToolOutput
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from results import QUESTION, TEXTS, Results, parameters

results = Results()
url, chat_model, embedding_model = parameters()
provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
MODEL = OpenAIChatModel(chat_model, provider=provider)
SHORT = {"temperature": 0, "max_tokens": 12}
LONGER = {"temperature": 0, "max_tokens": 40}


class City(BaseModel):
    city: str = Field(max_length=12)


async def whole(model: object) -> dict[str, object]:
    run = await Agent(model, model_settings=SHORT).run(QUESTION)
    return {"text": run.output, "tokens": [run.usage.input_tokens, run.usage.output_tokens]}


async def streamed(model: object) -> dict[str, object]:
    async with Agent(model, model_settings=SHORT).run_stream(QUESTION) as run:
        pieces = [piece async for piece in run.stream_text(delta=True, debounce_by=None)]
        usage = run.usage
        return {
            "text": "".join(pieces),
            "tokens": [usage.input_tokens, usage.output_tokens],
            "pieces": len(pieces),
        }


async def output(kind: object) -> dict[str, object]:
    run = await Agent(MODEL, model_settings=LONGER, output_type=kind, retries=0).run(QUESTION)
    return {"object": run.output.model_dump()}


async def embeddings() -> dict[str, object]:
    embedder = Embedder(OpenAIEmbeddingModel(embedding_model, provider=provider))
    found = await embedder.embed_documents(TEXTS)
    return {"vectors": [list(vector) for vector in found.embeddings]}


with asyncio.Runner() as loop:  # one loop: the provider keeps its connections
    responses = OpenAIResponsesModel(chat_model, provider=provider)
    for name, feature in {
        "chat": whole(MODEL),
        "stream": streamed(MODEL),
        "chat responses": whole(responses),
        "stream responses": streamed(responses),
        "tools": output(ToolOutput(City, name="weather")),
        "schema": output(NativeOutput(City)),
        "embeddings": embeddings(),
    }.items():
        results.add(name, loop.run, coro=feature)
results.print()
