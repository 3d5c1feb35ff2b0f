"""litellm: its provider for OpenAI's API, and a chat through each other one that we serve."""

from __future__ import annotations

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it fetches one

import litellm
from pydantic import BaseModel, Field
from results import QUESTION, TEXTS, Results, parameters

litellm.suppress_debug_info = True
results = Results()
url, chat_model, embedding_model = parameters()
HERE = {"api_base": f"{url}/v1", "api_key": "none"}
ASKED = {
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 12,
    "num_retries": 0,
}
OPENAI = ASKED | HERE | {"model": f"openai/{chat_model}"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class City(BaseModel):
    city: str = Field(max_length=12)


def whole(**asked: object) -> dict[str, object]:
    reply = litellm.completion(**asked)
    return {
        "text": reply.choices[0].message.content,
        "tokens": [reply.usage.prompt_tokens, reply.usage.completion_tokens],
    }


def streamed(**asked: object) -> dict[str, object]:
    options = {"include_usage": True}
    chunks = list(litellm.completion(**asked, stream=True, stream_options=options))
    reply = litellm.stream_chunk_builder(chunks)
    return {
        "text": reply.choices[0].message.content,
        "tokens": [reply.usage.prompt_tokens, reply.usage.completion_tokens],
        "pieces": len(chunks),
    }


OTHERS = {
    "vllm": OPENAI | {"model": f"hosted_vllm/{chat_model}"},
    "anthropic": ASKED
    | HERE
    | {"model": f"anthropic/{chat_model}", "api_base": f"{url}/anthropic"},
    "ollama": ASKED | {"model": f"ollama_chat/{chat_model}", "api_base": url},
}
results.add("chat", whole, **OPENAI)
results.add("stream", streamed, **OPENAI)
for provider, asked in OTHERS.items():
    results.add(f"chat {provider}", whole, **asked)
    results.add(f"stream {provider}", streamed, **asked)


@results.run
def tools() -> dict[str, object]:
    choice = {"type": "function", "function": {"name": "weather"}}
    asked = OPENAI | {"max_tokens": 40, "tools": [WEATHER]}
    chunks = list(litellm.completion(**asked, tool_choice=choice, stream=True))
    message = litellm.stream_chunk_builder(chunks).choices[0].message
    [call] = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [*ASKED["messages"], message.model_dump(), result]
    answer = litellm.completion(**(asked | {"messages": messages}), tool_choice="none")
    return {
        "called": [json.loads(call.function.arguments)["city"]],
        "text": answer.choices[0].message.content,
    }


@results.run
def schema() -> dict[str, object]:
    reply = litellm.completion(**(OPENAI | {"max_tokens": 40}), response_format=City)
    return {"object": json.loads(reply.choices[0].message.content)}


@results.run
def embeddings() -> dict[str, object]:
    reply = litellm.embedding(model=f"openai/{embedding_model}", input=TEXTS, **HERE)
    return {"vectors": [item["embedding"] for item in reply.data]}


@results.run
def refusal() -> dict[str, object]:
    try:
        litellm.completion(**(OPENAI | {"model": "openai/nope"}))
    except litellm.NotFoundError as error:
        return {"status": error.status_code}
    return {}


results.print()
