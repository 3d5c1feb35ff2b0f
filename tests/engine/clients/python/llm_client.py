"""llm: models of extra-openai-models.yaml, as its users name a server, and its embedding model."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from results import QUESTION, TEXTS, Results, parameters

results = Results()
url, chat_model, embedding_model = parameters()
directory = tempfile.TemporaryDirectory()
os.environ["LLM_USER_PATH"] = directory.name
# Its embedding models know no other address than the client's own.
os.environ |= {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none"}

import llm  # noqa: E402
from llm.default_plugins.openai_models import Chat, OpenAIEmbeddingModel  # noqa: E402

SHARED = {
    "model_name": chat_model,
    "api_base": f"{url}/v1",
    "supports_schema": True,
    "supports_tools": True,
}
# JSON is YAML.
Path(directory.name, "extra-openai-models.yaml").write_text(
    json.dumps([SHARED | {"model_id": "chat"}, SHARED | {"model_id": "new", "responses": True}])
)
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


def reply(model: str, stream: bool) -> dict[str, object]:
    options = {"temperature": 0, "max_tokens": 12}
    response = llm.get_model(model).prompt(QUESTION, stream=stream, **options)
    pieces = list(response)
    usage = response.usage()
    return {"text": "".join(pieces), "tokens": [usage.input, usage.output], "pieces": len(pieces)}


results.add("chat", reply, model="chat", stream=False)
results.add("stream", reply, model="chat", stream=True)
results.add("chat responses", reply, model="new", stream=False)
results.add("stream responses", reply, model="new", stream=True)


class Caller(Chat):
    """Has its first reply call a tool; llm leaves that to the model, and this one is too small."""

    def build_kwargs(self, prompt: llm.Prompt, stream: bool) -> dict[str, object]:
        choice = "none" if prompt.tool_results else "required"
        return super().build_kwargs(prompt, stream) | {"tool_choice": choice}


@results.run
def tools() -> dict[str, object]:
    called = []

    def weather(city: str) -> str:
        """Return the weather of a city."""
        called.append(city)
        return "sunny"

    model = Caller("caller", **SHARED)
    chain = model.chain(
        "What is the weather in Paris?", tools=[weather], key="none",
        options={"temperature": 0, "max_tokens": 40},
    )  # fmt: skip
    return {"called": called, "text": chain.text()}


@results.run
def schema() -> dict[str, object]:
    response = llm.get_model("chat").prompt(
        QUESTION, schema=CITY, stream=False, temperature=0, max_tokens=40
    )
    return {"object": json.loads(response.text())}


@results.run
def embeddings() -> dict[str, object]:
    return {"vectors": list(OpenAIEmbeddingModel("here", embedding_model).embed_multi(TEXTS))}


results.print()
